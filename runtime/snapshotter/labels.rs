//! The labels by which containerd tells what a snapshot is to be.

use lazyrun_index::Digest;

use super::error::SnapshotError;
use super::record::Labels;

/// The chainID of the layer that is about to be unpacked. The snapshotter may provide it itself.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// The reference the image is pulled by.
const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of the image's manifest.
const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// The digest of the layer's blob.
const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// The ids of the user namespace that a container is to run in, as `CONTAINER:HOST:COUNT`, several separated by commas.
const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";
/// Longest name and value of a label together, in bytes: containerd's own limit.
const MAX_LABEL: usize = 4096;

/// A layer of an image, as the labels of a request name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The chainID of the layer and those below it.
    pub target: Digest,
    /// The reference of the image.
    pub reference: String,
    /// The digest of its manifest.
    pub manifest: Digest,
    /// The digest of the layer's blob, where it was said.
    pub layer: Option<Digest>,
}

/// Checks the lengths of labels.
///
/// # Errors
/// [`SnapshotError::InvalidArgument`] when one is too long.
pub fn check(labels: &Labels) -> Result<(), SnapshotError> {
    match labels.iter().find(|(name, value)| name.len() + value.len() > MAX_LABEL) {
        None => Ok(()),
        Some((name, _)) => {
            let start: String = name.chars().take(40).collect();
            Err(SnapshotError::InvalidArgument(format!(
                "the label {start} is longer than {MAX_LABEL} bytes with its value"
            )))
        }
    }
}

/// The layer that labels name. A client that passes no annotations of the image (plain `ctr`) names none.
pub fn wanted(labels: &Labels) -> Option<Wanted> {
    let digest = |label: &str| labels.get(label)?.parse::<Digest>().ok();
    Some(Wanted {
        target: digest(TARGET)?,
        reference: labels.get(IMAGE_REF)?.clone(),
        manifest: digest(MANIFEST)?,
        layer: digest(LAYER),
    })
}

/// Options by which containerd maps the ids of a mount's directories, as its overlayfs snapshotter has them
/// (a proxy plugin with the capability `remap-ids`).
pub fn idmap(labels: &Labels) -> Vec<String> {
    let option = |label: &str, name: &str| labels.get(label).map(|mapping| format!("{name}={mapping}"));
    [option(UID_MAPPING, "uidmap"), option(GID_MAPPING, "gidmap")].into_iter().flatten().collect()
}

/// Whom the root of a container in its own user namespace belongs to outside, when labels say both mappings.
///
/// # Errors
/// [`SnapshotError::InvalidArgument`] when a mapping is none or has no root.
pub fn mapped_root(labels: &Labels) -> Result<Option<(u32, u32)>, SnapshotError> {
    let (Some(users), Some(groups)) = (labels.get(UID_MAPPING), labels.get(GID_MAPPING)) else {
        return Ok(None);
    };
    let root = |mapping: &String| {
        root_of(mapping).ok_or_else(|| {
            SnapshotError::InvalidArgument(format!("{mapping:?} maps no root of a user namespace"))
        })
    };
    Ok(Some((root(users)?, root(groups)?)))
}

fn root_of(mapping: &str) -> Option<u32> {
    mapping.split(',').find_map(|range| {
        let numbers: Result<Vec<u32>, _> = range.split(':').map(str::parse).collect();
        let [container, host, count] = numbers.ok()?.try_into().ok()?;
        (container == 0 && count > 0).then_some(host)
    })
}

/// The name a layer gets when it is committed within a request for `key`.
///
/// containerd's own metadata store makes keys as `NAMESPACE/NUMBER/KEY`, which nobody else has; its garbage collector
/// later names the layer without saying a namespace. So the layer's name begins like the key.
pub fn name_of_layer(namespace: &str, key: &str, target: &str) -> String {
    match numbered(namespace, key) {
        Some((number, _)) => format!("{namespace}/{number}/{target}"),
        None => target.to_owned(),
    }
}

/// The key of a snapshot as containerd's client knows it. containerd itself does not say the namespace.
pub fn key_of_client(key: &str) -> &str {
    namespace_of(key).and_then(|namespace| numbered(namespace, key)).map_or(key, |(_, own)| own)
}

/// The namespace that a key begins with, if containerd's metadata store made it.
pub fn namespace_of(key: &str) -> Option<&str> {
    let (namespace, _) = key.split_once('/')?;
    (!namespace.is_empty() && numbered(namespace, key).is_some()).then_some(namespace)
}

/// The number that containerd gave a key, and the client's own key behind it.
fn numbered<'a>(namespace: &str, key: &'a str) -> Option<(&'a str, &'a str)> {
    let (number, own) = key.strip_prefix(namespace)?.strip_prefix('/')?.split_once('/')?;
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    is_number.then_some((number, own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_begin_like_the_keys_of_containerd() {
        let of = |namespace: &str, key: &str| name_of_layer(namespace, key, "T");
        assert_eq!(of("default", "default/12/extract-1 T"), "default/12/T");
        for key in ["extract-1 T", "other/12/x", "default/x/y", "default//y", "default/12"] {
            assert_eq!(of("default", key), "T", "{key}");
        }
        assert_eq!(key_of_client("default/12/a/b"), "a/b");
        assert_eq!(key_of_client("default/a"), "default/a");
        assert_eq!(key_of_client("a"), "a");
        assert_eq!(namespace_of("k8s.io/12/a/b"), Some("k8s.io"));
        for key in ["active", "a/b", "a/b/c", "/1/x", "a//x"] {
            assert_eq!(namespace_of(key), None, "{key}");
        }
    }

    #[test]
    fn all_of_an_image_has_to_be_named() {
        let digest = Digest::of(b"x").to_string();
        let mut labels = Labels::from([
            (TARGET.to_owned(), digest.clone()),
            (IMAGE_REF.to_owned(), "r.example/x:1".to_owned()),
            (MANIFEST.to_owned(), digest),
        ]);
        assert!(wanted(&labels).is_some_and(|w| w.layer.is_none()));
        labels.insert(MANIFEST.into(), "sha256:short".into());
        assert_eq!(wanted(&labels), None);
        labels.remove(IMAGE_REF);
        assert_eq!(wanted(&labels), None);
    }

    #[test]
    fn ids_are_mapped_as_by_overlayfs() {
        let labels = |users: &str, groups: &str| {
            Labels::from([
                (UID_MAPPING.to_owned(), users.to_owned()),
                (GID_MAPPING.to_owned(), groups.to_owned()),
            ])
        };
        let both = labels("0:100000:65536", "5:7:1,0:200000:65536");
        assert_eq!(idmap(&both), ["uidmap=0:100000:65536", "gidmap=5:7:1,0:200000:65536"]);
        assert_eq!(mapped_root(&both).unwrap(), Some((100_000, 200_000)));
        assert_eq!(mapped_root(&Labels::new()).unwrap(), None);
        for odd in ["", "0:1", "0:x:1", "0:1:0", "1:1:1", "0:4294967296:1"] {
            assert!(mapped_root(&labels(odd, "0:1:1")).is_err(), "{odd}");
        }
    }

    #[test]
    fn labels_are_bounded() {
        assert!(check(&Labels::from([("a".into(), "b".repeat(4095))])).is_ok());
        assert!(check(&Labels::from([("a".into(), "b".repeat(4096))])).is_err());
    }
}
