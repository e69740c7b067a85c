//! Which comparisons are answered from an upper directory.

use std::path::{Component, Path, PathBuf};

use super::error::DiffError;
use crate::snapshotter::Snapshots;
use crate::snapshotter::labels;
use crate::snapshotter::proto::types::Mount;
use crate::snapshotter::record::{Kind, Named};

/// What a snapshot changes of those below it.
#[derive(Debug)]
pub(super) struct Change {
    /// The directory that holds it.
    pub(super) directory: PathBuf,
    /// containerd's namespace, as the snapshot's key begins with it.
    pub(super) namespace: Option<String>,
}

/// All that `right` changes of `left`: the topmost directory of `right`, a snapshot of ours, if the others are exactly
/// those of `left`.
///
/// # Errors
/// [`DiffError::NotOurs`] for any other comparison.
pub(super) fn find(snapshots: &Snapshots, left: &[Mount], right: &[Mount]) -> Result<Change, DiffError> {
    let (Some(left), Some(right)) = (layers(left), layers(right)) else {
        return Err(DiffError::not_ours("the mounts are not those of a snapshot of lazyrun's"));
    };
    let Some((top, below)) = right.split_first() else {
        return Err(DiffError::not_ours("there is nothing on the right"));
    };
    if below.is_empty() || below != left {
        return Err(DiffError::not_ours("the right side does not stand on the left one"));
    }
    let id = top.parent().and_then(Path::file_name).and_then(|id| id.to_str()?.parse::<u64>().ok());
    let Some(id) = id.filter(|id| snapshots.dirs.content(*id) == *top) else {
        return Err(DiffError::not_ours("the right side is no snapshot of lazyrun's"));
    };
    // containerd tells a snapshotter no namespace and puts it into the keys: ids are told apart in all of them.
    let known = snapshots.store.all(None)?.into_iter().find(|named| named.record.id == id);
    let ours = known.filter(|Named { record, .. }| {
        record.remote.is_none() && matches!(record.kind, Kind::Active | Kind::Committed)
    });
    let Some(ours) = ours else {
        return Err(DiffError::not_ours("the right side is no snapshot with files of its own"));
    };
    Ok(Change { directory: top.clone(), namespace: labels::namespace_of(&ours.name).map(str::to_owned) })
}

/// The directories that a snapshot's mounts name, topmost first; `None` for mounts that lazyrun does not make.
fn layers(mounts: &[Mount]) -> Option<Vec<PathBuf>> {
    let [mount] = mounts else { return None };
    let dir = |path: &str| {
        let path = PathBuf::from(path);
        // So that two names of one directory are equal, and none leads out of where it seems to be.
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        (path.is_absolute() && plain).then_some(path)
    };
    match mount.r#type.as_str() {
        "bind" => Some(vec![dir(&mount.source)?]),
        "overlay" => {
            let (mut upper, mut lowers) = (None, Vec::new());
            for option in &mount.options {
                match option.split_once('=').unwrap_or((option, "")) {
                    ("upperdir", path) => upper = Some(dir(path)?),
                    ("lowerdir", paths) => lowers = paths.split(':').map(dir).collect::<Option<_>>()?,
                    ("workdir", _) | ("index", "off") | ("ro" | "rw", "") => {}
                    // Others may change what an upper directory means.
                    _ => return None,
                }
            }
            Some(upper.into_iter().chain(lowers).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Vec<Mount> {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        vec![Mount { r#type: kind.into(), source: source.into(), options, target: String::new() }]
    }

    fn names(mounts: &[Mount]) -> Option<Vec<String>> {
        layers(mounts).map(|l| l.iter().map(|path| path.to_string_lossy().into_owned()).collect())
    }

    #[test]
    fn mounts_are_read_as_they_are_made() {
        let of = |kind, source, options: &[&str]| names(&mount(kind, source, options));
        assert_eq!(of("bind", "/a/1/fs", &["ro", "rbind"]), Some(vec!["/a/1/fs".into()]));
        let options = ["index=off", "workdir=/a/9/work", "upperdir=/a/9/fs", "lowerdir=/a/2/fs:/a/1/fs"];
        let all = ["/a/9/fs", "/a/2/fs", "/a/1/fs"].map(str::to_owned).to_vec();
        assert_eq!(of("overlay", "overlay", &options), Some(all));
        for odd in ["userxattr", "metacopy=on", "redirect_dir=on", "upperdir=/a/../b", "lowerdir=x"] {
            assert_eq!(of("overlay", "overlay", &[odd, "workdir=/w"]), None, "{odd}");
        }
        assert_eq!(of("ext4", "/dev/x", &[]), None);
        assert_eq!(names(&[]), None);
    }
}
