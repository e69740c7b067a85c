//! The odd and hostile layers of tests/oddlayers at the root of the repository.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::{index_blob, prove, small_spans};
use lazyrun_index::{EntryKind, EntryRef, IndexError, LayerIndex};
use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/oddlayers")
}

fn json(path: &Path) -> Value {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

fn blob(digest: &str) -> PathBuf {
    root().join("layout/blobs").join(digest.replace(':', "/"))
}

/// The layer blobs of a case, bottom first.
fn layers(case: &Value) -> Vec<Vec<u8>> {
    let manifest = json(&blob(case["digest"].as_str().unwrap()));
    let layers = manifest["layers"].as_array().unwrap().clone();
    layers.iter().map(|l| std::fs::read(blob(l["digest"].as_str().unwrap())).unwrap()).collect()
}

fn diff_ids(case: &Value) -> Vec<String> {
    let manifest = json(&blob(case["digest"].as_str().unwrap()));
    let config = json(&blob(manifest["config"]["digest"].as_str().unwrap()));
    let ids = config["rootfs"]["diff_ids"].as_array().unwrap().clone();
    ids.iter().map(|id| id.as_str().unwrap().to_owned()).collect()
}

/// Why these are refused: the fault lies in one layer and not between layers.
fn must_refuse(tag: &str) -> Option<fn(&IndexError) -> bool> {
    Some(match tag {
        "bad-truncated-tar" | "bad-huge-size" => {
            |e| matches!(e, IndexError::TarTruncated { .. } | IndexError::Entry { .. })
        }
        "bad-gz-truncated" => |e| matches!(e, IndexError::BlobTruncated { .. }),
        "bad-gz-crc" => |e| matches!(e, IndexError::BlobCorrupt { .. }),
        "bad-pax-len" | "names-nul" => |e| matches!(e, IndexError::TarHeader { .. }),
        "long-256" | "long-deep-4k" | "path-dotdot" | "path-empty" => {
            |e| matches!(e, IndexError::Entry { .. })
        }
        _ => return None,
    })
}

#[test]
fn every_case_indexes_or_is_refused() {
    let cases = json(&root().join("cases.json"));
    let mut compared = 0;
    for (tag, case) in cases.as_object().unwrap() {
        let mut last = None;
        let mut fault = None;
        for (i, (layer, diff_id)) in layers(case).iter().zip(diff_ids(case)).enumerate() {
            match index_blob(layer, &small_spans()) {
                Ok(indexed) => {
                    if case["big"] == false {
                        prove(layer, &indexed);
                    }
                    if tag != "bad-diffid" {
                        assert_eq!(indexed.summary.diff_id.to_string(), diff_id, "{tag} layer {i}");
                    }
                    last = Some(indexed);
                }
                Err(e) => fault = Some(e),
            }
        }
        match (must_refuse(tag), fault) {
            (Some(right), Some(e)) => assert!(right(&e), "{tag} is refused for another reason: {e}"),
            (Some(_), None) => panic!("{tag} has to be refused"),
            (None, Some(e)) => panic!("{tag} has to be taken: {e}"),
            (None, None) => {}
        }
        // With one layer and no whiteouts the tree is the layer.
        let tree = root().join("expected").join(format!("{tag}.jsonl"));
        let plain =
            case["expect"] == "ok" && case["layers"] == 1 && !tag.starts_with("wh-") && tag != "aufs-meta";
        if let (Some(indexed), true) = (last, plain && tree.exists()) {
            compare(tag, &indexed.index, &std::fs::read_to_string(tree).unwrap());
            compared += 1;
        }
    }
    assert!(compared > 15, "only {compared} trees were compared");
}

/// Compares the last entry of each path with the tree that containerd and others make of it.
fn compare(tag: &str, index: &LayerIndex, tree: &str) {
    let mut entries: BTreeMap<String, EntryRef<'_>> = BTreeMap::new();
    for entry in index.entries() {
        let path = if entry.path().is_empty() { ".".to_owned() } else { escape(entry.path()) };
        entries.insert(path, entry);
    }
    let mut wanted = BTreeMap::new();
    for line in tree.lines() {
        let want: Value = serde_json::from_str(line).unwrap();
        wanted.insert(want["path"].as_str().unwrap().to_owned(), want);
    }
    for (path, want) in &wanted {
        if want["implicit"] == true || path == "." {
            continue;
        }
        let entry = *entries.get(path).unwrap_or_else(|| panic!("{tag}: {path} is missing"));
        check(tag, path, entry, want, &entries);
    }
    for (path, entry) in &entries {
        // What a later entry of the same layer replaced by a file is gone, so only paths with living parents count.
        if !wanted.contains_key(path) {
            let replaced = path.match_indices('/').any(|(i, _)| {
                entries.get(&path[..i]).is_some_and(|parent| parent.kind() != EntryKind::Directory)
            });
            assert!(replaced, "{tag}: {entry:?} is too much");
        }
    }
}

fn check(tag: &str, path: &str, entry: EntryRef<'_>, want: &Value, all: &BTreeMap<String, EntryRef<'_>>) {
    let place = format!("{tag}: {path}");
    // A hard link has the attributes of what it leads to.
    let mut target = entry;
    while target.kind() == EntryKind::Hardlink {
        target = all[&escape(target.link())];
    }
    let kind = match target.kind() {
        EntryKind::File => "f",
        EntryKind::Directory => "d",
        EntryKind::Symlink => "l",
        EntryKind::CharDevice => "c",
        EntryKind::BlockDevice => "b",
        EntryKind::Fifo => "p",
        EntryKind::Hardlink => unreachable!(),
    };
    assert_eq!(want["type"], kind, "{place}");
    assert_eq!(want["mode"], format!("{:04o}", if kind == "l" { 0o777 } else { target.mode() }), "{place}");
    assert_eq!(
        (want["uid"].as_u64(), want["gid"].as_u64()),
        (Some(target.uid().into()), Some(target.gid().into()))
    );
    let mtime = target.mtime();
    assert_eq!(want["mtime"], format!("{}.{:09}", mtime.secs, mtime.nanos), "{place}");
    match kind {
        "f" => {
            assert_eq!(want["size"], target.size(), "{place}");
            let sha = want["sha256"].as_str().unwrap();
            if let (Some(digest), false) = (target.content(), sha.starts_with("sampled")) {
                assert_eq!(sha, digest.hex(), "{place}");
            }
        }
        "l" => assert_eq!(want["target"], escape(target.link()), "{place}"),
        "c" | "b" => {
            let (major, minor) = target.rdev();
            assert_eq!(want["rdev"], format!("{major}:{minor}"), "{place}");
        }
        _ => {}
    }
    let hex = |value: &[u8]| value.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let xattrs: BTreeMap<String, String> =
        target.xattrs().map(|(name, value)| (escape(name), hex(value))).collect();
    let wanted: BTreeMap<String, String> = want["xattrs"].as_object().map_or_else(BTreeMap::new, |x| {
        x.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect()
    });
    assert_eq!(wanted, xattrs, "{place}");
}

/// As scan.py writes names.
fn escape(name: &[u8]) -> String {
    let plain = |c: char| u32::from(c) >= 32 && c != '\\' && c != '\u{7f}';
    match std::str::from_utf8(name) {
        Ok(text) if text.chars().all(plain) => text.to_owned(),
        _ => name
            .iter()
            .map(|&c| {
                if (32..=126).contains(&c) && c != b'\\' {
                    char::from(c).to_string()
                } else {
                    format!("\\x{c:02x}")
                }
            })
            .collect(),
    }
}
