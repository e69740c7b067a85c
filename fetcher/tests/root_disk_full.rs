//! A full disk is a clean error. Needs root, to make a small tmpfs that no directory tree ever sees.

mod common;

use std::ffi::CStr;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

use common::server::{Server, serve};
use common::{TestImage, TestLayer, amd64, no_progress, quick_client, quick_fetch, tar};
use lazyrun_fetcher::{FetchError, Fetcher, LayerStore, RegistryClient};

/// A detached tmpfs: gone when the descriptor is closed, whatever happens to the test.
fn small_tmpfs(size: &CStr) -> OwnedFd {
    let checked = |what: &str, result: libc::c_long| {
        assert!(result >= 0, "{what} failed: {}; this test needs root", std::io::Error::last_os_error());
        i32::try_from(result).unwrap()
    };
    // SAFETY: the arguments are what fsopen(2), fsconfig(2) and fsmount(2) want: NUL-terminated strings that
    // outlive the calls, and descriptors that were just returned and are owned by nobody else.
    unsafe {
        let fs = checked("fsopen", libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1));
        let fs = OwnedFd::from_raw_fd(fs);
        let set = libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), 1, c"size".as_ptr(), size.as_ptr(), 0);
        checked("fsconfig", set);
        checked("fsconfig", libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), 6, 0, 0, 0));
        let mount = checked("fsmount", libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), 1, 0));
        OwnedFd::from_raw_fd(mount)
    }
}

/// A tar of one file that compresses to a thousandth and has no zeros that could be holes.
fn bomb() -> Vec<u8> {
    let len = 64 << 20;
    let mut header = tar::Header::new_ustar();
    header.set_size(len);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, "ones", std::io::repeat(1).take(len)).unwrap();
    archive.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_error_that_leaves_nothing() {
    let mount = small_tmpfs(c"1500k");
    let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    let fetcher = Fetcher::new(LayerStore::open(&root).unwrap(), quick_fetch());
    let client = RegistryClient::new(quick_client()).unwrap();
    let image = TestImage::new(vec![
        TestLayer::gzip(tar(1, 30, 100_000)),
        TestLayer::gzip(tar(2, 5, 100_000)),
        TestLayer::gzip(bomb()),
    ]);
    assert!(image.layers[2].blob.len() < 200_000);
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let resolved = client.resolve(&server.name("app:v1").parse().unwrap(), &amd64()).await.unwrap();
    let blobs = client.blobs(&resolved.reference);

    for i in [0, 2] {
        let error = fetcher.ingest(&resolved.layers[i], blobs.clone(), no_progress()).await.unwrap_err();
        let FetchError::NoRoom { digest, free, reserve, .. } = &error else { panic!("{error}") };
        assert_eq!((*digest, *reserve), (image.layers[i].digest(), (1500 << 10) / 20), "{error}");
        assert!(*free >= *reserve, "{error}");
        assert!(error.to_string().contains(&image.layers[i].digest().to_string()), "{error}");
        assert_eq!(std::fs::read_dir(root.join("layers")).unwrap().count(), 0);
    }

    // What fits still works, also when the disk fills up later.
    let layer = fetcher.ingest(&resolved.layers[1], blobs, no_progress()).await.unwrap();
    layer.forget().unwrap();
    let ballast = root.join("ballast");
    while std::fs::write(
        &ballast,
        vec![1; std::fs::metadata(&ballast).map_or(0, |m| m.len() as usize) + 4096],
    )
    .is_ok()
    {}
    let error = fetcher.read(&layer, 0, 10).await.unwrap_err();
    assert!(matches!(error, FetchError::DiskFull { .. }), "{error}");
    // Forgetting needs no space, or nothing could ever be freed.
    layer.forget().unwrap();
    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(fetcher.read(&layer, 0, 10).await.unwrap(), image.layers[1].tar[..10]);
}
