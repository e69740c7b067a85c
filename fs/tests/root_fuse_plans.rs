//! The mount plans show the same tree: that of the view.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use crate::common::layer::{Files, Item, TestLayer};
use crate::common::{mount as written, tree};
use crate::fuse_support::*;
use lazyrun_fs::fuse::{self, Flat, FuseKind, FuseMount, ServeOptions, ServerHandle, ViewFs};
use lazyrun_fs::mount::OverlayOptions;
use lazyrun_fs::mounter::{Device, Request};
use lazyrun_fs::view::View;
use lazyrun_index::EntryKind;

/// Two layers with everything that views know.
fn layers() -> Vec<TestLayer> {
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255,
        255, 255,
    ];
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut bottom = TestLayer::default();
    bottom.dir("d").dir("gone").file("gone/x", b"x").file("d/kept", &pattern(5000));
    bottom.file_item(Item::new("su", EntryKind::File).mode(0o4755).owner(70_000, 4_000_000_000), b"su");
    bottom.hardlink("su2", "su").symlink("link", "d/kept").symlink("long", vec![b't'; 4000]);
    bottom.file_item(Item::new("cap", EntryKind::File).xattr("security.capability", &capability), b"cap");
    bottom.file_item(Item::new("acl", EntryKind::File).xattr("system.posix_acl_access", &acl), b"acl");
    bottom.add(Item::new("dacl", EntryKind::Directory).xattr("system.posix_acl_default", &acl));
    bottom.add(Item::new("fifo", EntryKind::Fifo).time(-1, 999_999_999));
    bottom.add(Item { rdev: (1, 3), ..Item::new("null", EntryKind::CharDevice) });
    bottom.add(Item { rdev: (259, 70_000), ..Item::new("block", EntryKind::BlockDevice) });
    bottom.file("large", &pattern(5 << 20));
    let mut top = TestLayer::default();
    top.file(".wh.gone", b"").file("d/new", &pattern(700)).dir("many");
    for i in 0..500 {
        top.file(format!("many/{i:03} {}", "n".repeat(i % 100)), &pattern(i * 7));
    }
    top.sparse("odd", 300_001, &[(100, pattern(700)), (1000, pattern(3)), (299_000, pattern(1001))]);
    top.sparse("far", 3 << 20, &[(1 << 20, pattern(4096))]);
    vec![bottom, top]
}

fn start<S: fuse::Server>(kind: FuseKind, server: S) -> (OwnedFd, ServerHandle) {
    let FuseMount { tree, dev } = fuse::mount(kind).unwrap();
    let handle = fuse::serve(server, tree.as_fd(), dev, ServeOptions::default()).unwrap();
    (tree, handle)
}

fn compare(what: &str, expected: &tree::Tree, mount: &OwnedFd) {
    let mut found = tree::of_dir(&inside(mount, "."));
    assert!(found.len() > 500, "{what}: only {} entries", found.len());
    let mut expected = expected.clone();
    if what.starts_with("overlay") {
        // The root directory of an overlay is its upper.
        expected.remove(".");
        found.remove(".");
    }
    let differences = tree::compare_strictly(&expected, &found);
    assert!(differences.is_empty(), "{what}: {differences:#?}");
}

fn overlay(dir: &Path, name: &str, lower: &OwnedFd) -> OwnedFd {
    let [upper, work] = ["upper", "work"].map(|d| dir.join(format!("{d}-{name}")));
    for d in [&upper, &work] {
        std::fs::create_dir(d).unwrap();
    }
    let request = Request::Overlay { upper, work, options: OverlayOptions::default() };
    mounter().mount(&request, &[lower.as_fd()]).unwrap()
}

#[test]
fn all_plans_show_the_view() {
    let _isolated = Isolated::enter();
    let layers = layers();
    let view = View::merge(&layers.iter().collect::<Vec<_>>()).unwrap();
    let contents = Files::of(&layers);
    let expected = tree::of_view(&view, &contents);
    let image = written::write(&view, &contents).unwrap();

    let files = Arc::new(MemoryFiles::default());
    let mut devices = Vec::new();
    for (i, bytes) in contents.0.iter().enumerate() {
        files.add(10 + i as u64, &format!("layer{i}"), bytes.clone());
        devices.push(Device::Flat(format!("layer{i}")));
    }
    assert!(image.summary.appendix_size > 0, "the odd file should need one");
    devices.push(Device::Local(image.devices.last().unwrap().clone()));

    let (flat, server) = start(FuseKind::Flat, Flat::new(Arc::clone(&files)));
    let request = Request::Erofs { image: image.image.clone(), devices, directio: false };
    let erofs = mounter().mount(&request, &[flat.as_fd()]).unwrap();
    let root = overlay(image.dir.path(), "erofs", &erofs);
    compare("overlay on EROFS on the flat mount", &expected, &root);
    compare("EROFS on the flat mount", &expected, &erofs);
    let warm = server.stats();
    compare("EROFS on the flat mount, warm", &expected, &erofs);
    compare("overlay on EROFS on the flat mount, warm", &expected, &root);
    assert_eq!(server.stats(), warm, "a warm view asked the FUSE server");

    let (whole, server) = start(FuseKind::View, ViewFs::new(Arc::new(view), files, vec![10, 11]));
    compare("the view server", &expected, &whole);
    let root = overlay(image.dir.path(), "fuse", &whole);
    compare("overlay on the view server", &expected, &root);
    println!("the view of {} entries: cold walk {:?}", expected.len(), server.stats());
}
