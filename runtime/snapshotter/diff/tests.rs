//! Upper directories made by hand, as overlayfs and containers leave them.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, mknod};
use tar::EntryType;

use super::archive::{Archive, Time};
use super::error::DiffError;
use super::upper;

fn layer(dir: &Path, latest: Option<Time>) -> Result<Vec<u8>, DiffError> {
    let mut archive = Archive::new(Vec::new(), latest);
    upper::write(dir, &mut archive)?;
    Ok(archive.finish()?)
}

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).expect("set an xattr");
}

fn entries(tar: &[u8]) -> Vec<(String, EntryType, Vec<String>)> {
    let mut archive = tar::Archive::new(tar);
    let read = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let mut entry = entry.expect("an entry");
        let keys = entry.pax_extensions().expect("records").into_iter().flatten();
        let keys = keys.map(|record| record.expect("a record").key().expect("a key").to_owned());
        let keys = keys.filter(|key| key != "mtime").collect();
        (entry.path().expect("a path").display().to_string(), entry.header().entry_type(), keys)
    };
    archive.entries().expect("a tar").map(read).collect()
}

fn need_root() {
    assert!(nix::unistd::geteuid().is_root(), "whiteouts are devices: run the tests as root");
}

#[test]
fn whiteouts_and_opaque_directories_are_said_as_in_oci() {
    need_root();
    let dir = tempfile::tempdir().expect("dir");
    let at = |path: &str| dir.path().join(path);
    fs::create_dir(at("opaque")).expect("dir");
    set(&at("opaque"), "trusted.overlay.opaque", b"y");
    set(&at("opaque"), "trusted.overlay.origin", b"private");
    set(&at("opaque"), "trusted.overlay.overlay.opaque", b"a container's own");
    fs::write(at("opaque/file"), "x").expect("file");
    mknod(&at("gone"), SFlag::S_IFCHR, Mode::empty(), 0).expect("whiteout");
    let _socket = UnixListener::bind(at("socket")).expect("socket");
    let tar = layer(dir.path(), None).expect("a layer");
    let expected = [
        (".wh.gone", EntryType::Regular, vec![]),
        ("opaque/", EntryType::Directory, vec!["SCHILY.xattr.trusted.overlay.opaque".to_owned()]),
        ("opaque/.wh..wh..opq", EntryType::Regular, vec![]),
        ("opaque/file", EntryType::Regular, vec![]),
    ];
    assert_eq!(entries(&tar), expected.map(|(path, kind, keys)| (path.to_owned(), kind, keys)));
}

#[test]
fn what_an_upper_directory_does_not_hold_is_not_ours() {
    need_root();
    for (name, value) in [("redirect", "/elsewhere"), ("metacopy", ""), ("whiteout", ""), ("opaque", "x")] {
        let dir = tempfile::tempdir().expect("dir");
        fs::create_dir_all(dir.path().join("a/b")).expect("dir");
        set(&dir.path().join("a/b"), &format!("trusted.overlay.{name}"), value.as_bytes());
        assert!(matches!(layer(dir.path(), None), Err(DiffError::NotOurs(_))), "{name}");
    }
}

#[test]
fn files_that_would_be_whiteouts_are_refused() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join(".wh.passwd"), "").expect("file");
    let error = layer(dir.path(), None).expect_err("refused").to_string();
    assert!(error.contains("/.wh.passwd"), "{error}");
}

#[test]
fn the_same_directory_is_the_same_layer_and_times_are_bounded() {
    let dir = tempfile::tempdir().expect("dir");
    for name in ["b", "a", "c"] {
        fs::write(dir.path().join(name), name).expect("file");
    }
    let once = layer(dir.path(), None).expect("a layer");
    assert_eq!(layer(dir.path(), None).expect("a layer"), once);
    let bound = layer(dir.path(), Some(Time { seconds: 1000, nanos: 0 })).expect("a layer");
    let mut archive = tar::Archive::new(bound.as_slice());
    let times =
        archive.entries().expect("a tar").map(|e| e.expect("an entry").header().mtime().expect("a time"));
    assert_eq!(times.collect::<Vec<_>>(), [1000, 1000, 1000]);
}

#[test]
fn a_symlink_in_place_of_the_directory_leads_nowhere() {
    let dir = tempfile::tempdir().expect("dir");
    std::os::unix::fs::symlink("/etc", dir.path().join("upper")).expect("symlink");
    assert!(matches!(layer(&dir.path().join("upper"), None), Err(DiffError::Read { .. })));
}
