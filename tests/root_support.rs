//! The oracle and the yardstick themselves: containerd's unpack of the fixture, the reading and comparing of trees.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::support::containerd::Containerd;
use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, TAG, big, sha256};
use crate::support::need_root;
use crate::support::tree::{differences, escape, from_json_lines, scan};

#[test]
fn containerd_unpacks_the_fixture_as_written() {
    need_root();
    let (fixture, registry) = (Fixture::new(), DockerRegistry::start());
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let mut containerd = Containerd::start();
    containerd.pull(&image);
    let dir = tempfile::tempdir().unwrap();
    containerd.mount(&image, dir.path());
    let tree = scan(dir.path());
    drop(containerd);
    let field = |path: &str, name: &str| tree[path].get(name).cloned().unwrap_or(Value::Null);
    assert!(!tree.contains_key("etc/removed") && !tree.contains_key("var/opaque/below"));
    assert_eq!(field("var/opaque", "mode"), "0711");
    assert_eq!(field("var/becomes-file", "type"), "f");
    assert_eq!(field("var/becomes-dir", "type"), "d");
    assert_eq!(field("data/big.bin", "sha256"), sha256(&big()));
    assert_eq!(field("data/attributes", "mode"), "4755");
    assert_eq!(field("data/attributes", "mtime"), "1700000000.123456789");
    assert_eq!(tree["data/attributes"]["xattrs"]["user.note"], "6b657074");
    assert_eq!(field("data/last-again", "link"), "data/last");
    assert_eq!(field("data/null", "rdev"), "1:3");
    assert_eq!(field("data/dangling", "target"), "/no/such/file");
    assert!(tree.keys().any(|path| path.len() == "data/".len() + 255));
    assert!(tree.len() > 350, "{} entries", tree.len());
}

#[test]
fn every_kind_of_difference_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    for root in [&one, &two] {
        fs::create_dir_all(root.join("sub")).unwrap();
        for name in ["same", "content", "mode", "missing", "sub/link"] {
            fs::write(root.join(name), name).unwrap();
        }
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        for name in ["same", "content", "mode", "missing", "sub/link", "sub"] {
            fs::File::open(root.join(name)).unwrap().set_times(times).unwrap();
        }
    }
    assert_eq!(differences(&scan(&one), &scan(&two)), Vec::<String>::new());
    fs::write(two.join("content"), "CONTENT").unwrap();
    fs::set_permissions(two.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(two.join("missing")).unwrap();
    fs::remove_file(two.join("sub/link")).unwrap();
    fs::hard_link(two.join("same"), two.join("sub/link")).unwrap();
    fs::write(two.join("extra"), "").unwrap();
    let found = differences(&scan(&one), &scan(&two)).join("\n");
    for part in [
        "content: sha256",
        "content: mtime",
        "mode: mode",
        "missing: missing",
        "sub/link: link",
        "extra: extra",
    ] {
        assert!(found.contains(part), "{part} was not seen in:\n{found}");
    }
}

#[test]
fn trees_are_read_from_json_lines() {
    let text = "{\"path\":\".\",\"type\":\"d\"}\n{\"path\":\"a\",\"type\":\"f\",\"size\":3}\n";
    let tree = from_json_lines(text);
    assert_eq!(tree["a"]["size"], 3);
    assert_eq!(escape(b"plain"), "plain");
    assert_eq!(escape("ü".as_bytes()), "ü");
    assert_eq!(escape(b"\xff\\\n"), "\\xff\\x5c\\x0a");
}
