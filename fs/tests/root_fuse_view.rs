//! The view server on the real kernel, as root.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use crate::fuse_support::*;
use lazyrun_fs::fuse::{self, FuseKind, FuseMount, ServeOptions, ServerHandle, ViewFs};
use lazyrun_fs::mount::OverlayOptions;
use lazyrun_fs::mounter::Request;
use lazyrun_fs::view::{Entry, LayerEntries, View};
use lazyrun_index::{EntryKind, Extent, Timestamp};

const LAYER_LEN: usize = 4 << 20;

/// An entry of a made-up layer.
#[derive(Clone)]
struct Made {
    path: String,
    kind: EntryKind,
    mode: u32,
    mtime: Timestamp,
    size: u64,
    link: &'static str,
    rdev: (u32, u32),
    xattrs: Vec<(&'static str, &'static [u8])>,
    extents: Vec<Extent>,
}

fn made(path: impl Into<String>, kind: EntryKind, mode: u32) -> Made {
    Made {
        path: path.into(),
        kind,
        mode,
        mtime: Timestamp { secs: 1_000_000_000, nanos: 123_456_789 },
        size: 0,
        link: "",
        rdev: (0, 0),
        xattrs: Vec::new(),
        extents: Vec::new(),
    }
}

fn file(path: impl Into<String>, size: u64, extents: &[(u64, u64, u64)]) -> Made {
    let extent = |&(file_offset, layer_offset, len)| Extent { file_offset, layer_offset, len };
    Made { size, extents: extents.iter().map(extent).collect(), ..made(path, EntryKind::File, 0o644) }
}

struct Layer(Vec<Made>);

impl LayerEntries for Layer {
    fn name(&self) -> String {
        "made up".into()
    }

    fn count(&self) -> usize {
        self.0.len()
    }

    fn get(&self, i: usize) -> Entry<'_> {
        let e = &self.0[i];
        Entry {
            path: e.path.as_bytes(),
            kind: e.kind,
            mode: e.mode,
            uid: 1234,
            gid: 70_000,
            mtime: e.mtime,
            size: e.size,
            link: e.link.as_bytes(),
            rdev: e.rdev,
        }
    }

    fn each_xattr(&self, i: usize, each: &mut dyn FnMut(&[u8], &[u8])) {
        for (name, value) in &self.0[i].xattrs {
            each(name.as_bytes(), value);
        }
    }

    fn each_extent(&self, i: usize, each: &mut dyn FnMut(Extent)) {
        for extent in &self.0[i].extents {
            each(*extent);
        }
    }
}

/// Mounts the view of two layers: the given one on top of a bottom that holds `/bottom`.
fn serve(top: Vec<Made>) -> (OwnedFd, ServerHandle, Vec<u8>) {
    let bytes = pattern(LAYER_LEN);
    let files = MemoryFiles::with("bottom", bytes.clone());
    files.add(3, "top", bytes.iter().rev().copied().collect());
    let bottom = Layer(vec![file("bottom", 5, &[(0, 1000, 5)])]);
    let view = View::merge(&[&bottom, &Layer(top)]).unwrap();
    let FuseMount { tree, dev } = fuse::mount(FuseKind::View).unwrap();
    let server = ViewFs::new(Arc::new(view), files, vec![2, 3]);
    let server = fuse::serve(server, tree.as_fd(), dev, ServeOptions::default()).unwrap();
    (tree, server, bytes)
}

/// What `top` of [`serve`] holds at an offset.
fn top(bytes: &[u8], offset: usize, len: usize) -> Vec<u8> {
    bytes.iter().rev().skip(offset).take(len).copied().collect()
}

#[test]
fn every_attribute_of_a_view_is_served() {
    let _isolated = Isolated::enter();
    let setuid = Made { mode: 0o4755, ..file("dir/su", 10, &[(0, 0, 10)]) };
    let hard = Made { link: "dir/su", ..made("hard", EntryKind::Hardlink, 0o4755) };
    let symlink = Made { link: "../else where", ..made("dir/sym", EntryKind::Symlink, 0o777) };
    let device = Made { rdev: (259, 70_000), ..made("dir/dev", EntryKind::CharDevice, 0o600) };
    let old = Timestamp { secs: -5, nanos: 7 };
    let fifo = Made { mtime: old, ..made("dir/fifo", EntryKind::Fifo, 0o1600) };
    let entries = vec![made("dir", EntryKind::Directory, 0o2750), setuid, hard, symlink, device, fifo];
    let (tree, _server, bytes) = serve(entries);
    let stat = |name: &str| fs::symlink_metadata(inside(&tree, name)).unwrap();

    let dir = stat("dir");
    assert_eq!((dir.mode(), dir.nlink(), dir.uid(), dir.gid()), (0o42_750, 2, 1234, 70_000));
    assert_eq!((dir.mtime(), dir.mtime_nsec()), (1_000_000_000, 123_456_789));
    let su = stat("dir/su");
    assert_eq!((su.mode(), su.nlink(), su.size(), su.ino()), (0o104_755, 2, 10, stat("hard").ino()));
    assert_eq!(fs::read(inside(&tree, "hard")).unwrap(), top(&bytes, 0, 10));
    assert_eq!(fs::read_link(inside(&tree, "dir/sym")).unwrap(), Path::new("../else where"));
    let dev = stat("dir/dev");
    assert!(dev.file_type().is_char_device());
    assert_eq!(dev.rdev(), nix::sys::stat::makedev(259, 70_000));
    let fifo = stat("dir/fifo");
    assert!(fifo.file_type().is_fifo());
    assert_eq!((fifo.mtime(), fifo.mtime_nsec()), (-5, 7));
    assert_eq!(stat("dir/..").ino(), stat(".").ino());
    assert_eq!(fs::read(inside(&tree, "bottom")).unwrap(), &bytes[1000..1005]);
    let refused = fs::write(inside(&tree, "new"), b"x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn sparse_files_and_large_reads_are_put_together() {
    let _isolated = Isolated::enter();
    let size = 3 << 20;
    let extents = [(4096, 777, 100), (4196, 50_000, 9000), (1 << 20, 100_000, 1 << 20)];
    let (tree, server, bytes) = serve(vec![
        file("sparse", size, &extents),
        file("hole", 1 << 20, &[]),
        file("liar", 8192, &[(0, LAYER_LEN as u64 - 10, 8192)]),
        file("empty", 0, &[]),
    ]);
    let mut expected = vec![0u8; size as usize];
    for (at, layer_offset, len) in extents.map(|(a, o, l)| (a as usize, o as usize, l as usize)) {
        expected[at..at + len].copy_from_slice(&top(&bytes, layer_offset, len));
    }
    assert!(fs::read(inside(&tree, "sparse")).unwrap() == expected);
    assert!(fs::read(inside(&tree, "hole")).unwrap() == vec![0u8; 1 << 20]);
    assert_eq!(fs::read(inside(&tree, "empty")).unwrap(), b"");
    // By the readahead of 128 KiB, a few more at the ends.
    assert!(server.stats().read <= 40, "reads are small: {:?}", server.stats());
    // A layer file that ends before the extent does must not read as zeros.
    let error = fs::read(inside(&tree, "liar")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_warm_view_without_attributes_asks_nothing() {
    let _isolated = Isolated::enter();
    let mut entries = vec![made("many", EntryKind::Directory, 0o755)];
    for i in 0..3000 {
        entries.push(file(format!("many/file with a longer name {i:04}"), 100, &[(0, i * 512, 100)]));
    }
    entries.push(Made { link: "many", ..made("link", EntryKind::Symlink, 0o777) });
    let (tree, server, bytes) = serve(entries);
    let walk = || {
        let mut count = 0;
        for entry in fs::read_dir(inside(&tree, "link")).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().len(), 100);
            assert_eq!(fs::read(entry.path()).unwrap().len(), 100);
            count += 1;
        }
        assert_eq!(count, 3000);
        let path = inside(&tree, "many/file with a longer name 0042");
        assert_eq!(fs::read(path).unwrap(), top(&bytes, 42 * 512, 100));
        assert!(!inside(&tree, "many/no such name").exists());
        assert_eq!(fs::read_link(inside(&tree, "link")).unwrap(), Path::new("many"));
        assert!(xattrs(&inside(&tree, "many")).is_empty());
    };
    walk();
    let cold = server.stats();
    println!("cold walk of 3000 files: {cold:?}");
    // A machine short of memory takes pages of any file back, so that a walk may have to read a few anew; that
    // it finds none of ten walks whole would be the view's fault.
    let quiet = (0..10).any(|_| {
        let before = server.stats();
        walk();
        server.stats() == before
    });
    let warm = server.stats();
    assert!(quiet, "a warm view asked the FUSE server: {cold:?}, then {warm:?}");
    assert!(cold.open <= 2, "{cold:?}");
}

#[test]
fn attributes_of_overlayfs_do_not_act_and_are_seen_on_top() {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    let opaque: (&str, &[u8]) = ("trusted.overlay.opaque", b"y");
    let marked =
        Made { xattrs: vec![("user.note", b"hello"), opaque], ..made("marked", EntryKind::Directory, 0o755) };
    let (tree, _server, _) = serve(vec![marked, file("marked/file", 3, &[(0, 0, 3)])]);
    let escaped = ("trusted.overlay.overlay.opaque".to_owned(), b"y".to_vec());
    let note = ("user.note".to_owned(), b"hello".to_vec());
    assert_eq!(xattrs(&inside(&tree, "marked")), [escaped, note.clone()]);

    let (upper, work) = (dir.path().join("upper"), dir.path().join("work"));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let request = Request::Overlay { upper: upper.clone(), work, options: OverlayOptions::default() };
    let root = mounter().mount(&request, &[tree.as_fd()]).unwrap();
    let plain = ("trusted.overlay.opaque".to_owned(), b"y".to_vec());
    assert_eq!(xattrs(&inside(&root, "marked")), [plain, note]);
    fs::write(inside(&root, "marked/file"), b"changed").unwrap();
    assert_eq!(fs::read(upper.join("marked/file")).unwrap(), b"changed");
    assert_eq!(fs::read(inside(&tree, "marked/file")).unwrap().len(), 3);
}

/// All extended attributes of a file, sorted, following links.
fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut list = vec![0u8; 4096];
    // SAFETY: path is NUL-terminated, the buffer is as long as said.
    let n = unsafe { libc::listxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    let n = usize::try_from(n).unwrap_or(0);
    let mut found: Vec<_> = list[..n]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let c_name = CString::new(name).unwrap();
            let mut value = vec![0u8; 4096];
            let (buffer, len) = (value.as_mut_ptr().cast(), value.len());
            // SAFETY: both names are NUL-terminated, the buffer is as long as said.
            let n = unsafe { libc::getxattr(path.as_ptr(), c_name.as_ptr(), buffer, len) };
            value.truncate(usize::try_from(n).unwrap());
            (String::from_utf8(name.to_vec()).unwrap(), value)
        })
        .collect();
    found.sort();
    found
}
