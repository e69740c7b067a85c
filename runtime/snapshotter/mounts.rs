//! What containerd is told to mount.

use super::dirs::Dirs;
use super::proto::types::Mount;
use super::record::{Chain, Kind};

/// The mounts of an active snapshot or view.
pub(super) fn of(dirs: &Dirs, chain: &Chain) -> Vec<Mount> {
    let path = |id| dirs.content(id).to_string_lossy().into_owned();
    // The view of an image has all layers below it in it.
    let view = chain.below.iter().position(|below| below.remote.is_some());
    let lowers = &chain.below[..view.map_or(chain.below.len(), |at| at + 1)];
    let lowers: Vec<String> = lowers.iter().map(|below| path(below.id)).collect();
    if chain.remote.is_some() {
        // A layer that is there without being unpacked: the unpacker sees that there is nothing to write.
        return vec![bind(path(chain.id), "ro", &[])];
    }
    match (chain.kind, lowers.as_slice()) {
        (Kind::Active, []) => vec![bind(path(chain.id), "rw", &chain.idmap)],
        (_, []) => vec![bind(path(chain.id), "ro", &chain.idmap)],
        // overlayfs does not mount a single directory.
        (Kind::View, [only]) => vec![bind(only.clone(), "ro", &chain.idmap)],
        (kind, _) => {
            let mut options = chain.idmap.clone();
            if std::path::Path::new("/sys/module/overlay/parameters/index").exists() {
                options.push("index=off".to_owned());
            }
            if kind == Kind::Active {
                options.push(format!("workdir={}", dirs.work(chain.id).display()));
                options.push(format!("upperdir={}", path(chain.id)));
            }
            options.push(format!("lowerdir={}", lowers.join(":")));
            vec![Mount { r#type: "overlay".into(), source: "overlay".into(), options, target: String::new() }]
        }
    }
}

fn bind(source: String, access: &str, idmap: &[String]) -> Mount {
    let options = [idmap, &[access.to_owned(), "rbind".to_owned()]].concat();
    Mount { r#type: "bind".into(), source, options, target: String::new() }
}

#[cfg(test)]
mod tests {
    use lazyrun_index::Digest;

    use super::super::record::{Below, Remote};
    use super::*;

    fn mounts(kind: Kind, below: &[(u64, bool)]) -> Vec<String> {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = Dirs::new(dir.path().to_owned()).expect("dirs");
        let remote = || Remote { image: "i".into(), position: 0, diff_id: Digest::of(b"") };
        let below = below.iter().map(|(id, layer)| Below { id: *id, remote: layer.then(remote) }).collect();
        let chain = Chain { id: 9, kind, remote: None, below, idmap: Vec::new() };
        let root = dir.path().to_string_lossy().into_owned();
        of(&dirs, &chain)
            .into_iter()
            .map(|m| {
                let options: Vec<String> = m.options.into_iter().filter(|o| o != "index=off").collect();
                format!("{} {} {}", m.r#type, m.source, options.join(",")).replace(&root, "R")
            })
            .collect()
    }

    #[test]
    fn as_overlayfs_wants_them() {
        assert_eq!(mounts(Kind::Active, &[]), ["bind R/9/fs rw,rbind"]);
        assert_eq!(mounts(Kind::View, &[]), ["bind R/9/fs ro,rbind"]);
        assert_eq!(mounts(Kind::View, &[(2, false)]), ["bind R/2/fs ro,rbind"]);
        let two = [(2, false), (1, false)];
        assert_eq!(mounts(Kind::View, &two), ["overlay overlay lowerdir=R/2/fs:R/1/fs"]);
        assert_eq!(
            mounts(Kind::Active, &two[1..]),
            ["overlay overlay workdir=R/9/work,upperdir=R/9/fs,lowerdir=R/1/fs"]
        );
    }

    #[test]
    fn a_view_stands_for_all_layers_below_it() {
        let image = [(3, true), (2, true), (1, true)];
        assert_eq!(mounts(Kind::View, &image), ["bind R/3/fs ro,rbind"]);
        let built = [(5, false), (3, true), (2, true), (1, true)];
        assert_eq!(mounts(Kind::View, &built), ["overlay overlay lowerdir=R/5/fs:R/3/fs"]);
    }
}
