//! A full disk is a clean error. Needs root, to make a small tmpfs that no directory tree ever sees.

use std::ffi::CStr;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

use crate::common::server::{Server, serve};
use crate::common::{TestImage, TestLayer, amd64, no_progress, quick_client, quick_fetch, tar};
use lazyrun_fetcher::{CacheLimits, FetchError, Fetcher, LayerStore, RegistryClient};

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
    let of_space = matches!(error, FetchError::DiskFull { .. } | FetchError::DiskReserved { .. });
    assert!(of_space, "{error}");
    // Forgetting needs no space, or nothing could ever be freed.
    layer.forget().unwrap();
    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(fetcher.read(&layer, 0, 10).await.unwrap(), image.layers[1].tar[..10]);
}

/// Fills the disk to the brim; the file that does.
fn fill_up(root: &std::path::Path) -> PathBuf {
    let path = root.join("ballast");
    let mut file = std::fs::File::create(&path).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    path
}

/// Everything that fills a layer, on a disk that is full: by what is evicted of another image there is room, and when
/// there is nothing to evict there is an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_evicts_before_it_is_an_error() {
    let mount = small_tmpfs(c"24m");
    let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    let fetcher = Fetcher::new(LayerStore::open(&root).unwrap(), quick_fetch());
    fetcher.store().set_limits(CacheLimits { limit: None, reserve: 0 }).unwrap();
    let client = RegistryClient::new(quick_client()).unwrap();
    let image =
        TestImage::new(vec![TestLayer::gzip(tar(1, 40, 100_000)), TestLayer::gzip(tar(2, 60, 100_000))]);
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let resolved = client.resolve(&server.name("app:v1").parse().unwrap(), &amd64()).await.unwrap();
    let blobs = client.blobs(&resolved.reference);
    let wanted = fetcher.ingest(&resolved.layers[0], blobs.clone(), no_progress()).await.unwrap();
    let idle = fetcher.ingest(&resolved.layers[1], blobs.clone(), no_progress()).await.unwrap();
    let tar = &image.layers[0].tar;

    // Faults, prefetch and hydration each find a full disk and a layer that may go.
    for way in ["fault", "prefetch", "hydrate"] {
        wanted.forget().unwrap();
        fetcher.hydrate(&idle, no_progress()).await.unwrap();
        let ballast = fill_up(&root);
        match way {
            "fault" => assert_eq!(fetcher.read(&wanted, 5000, 10).await.unwrap(), tar[5000..5010]),
            "prefetch" => fetcher.prefetch(&wanted, std::slice::from_ref(&(0..3))).await.unwrap(),
            _ => fetcher.hydrate(&wanted, no_progress()).await.unwrap(),
        }
        assert!(wanted.local_bytes() > 0 && !idle.is_hydrated(), "{way}");
        std::fs::remove_file(ballast).unwrap();
    }

    // What is read directly never goes: then there is no room, in a sentence, and what is here stays right.
    wanted.forget().unwrap();
    fetcher.hydrate(&idle, no_progress()).await.unwrap();
    let pin = idle.pin_direct();
    let ballast = fill_up(&root);
    let speaks_of_space = |error: FetchError| {
        let known = matches!(error, FetchError::DiskFull { .. } | FetchError::DiskReserved { .. });
        assert!(known && error.to_string().contains("disk"), "{error}");
    };
    speaks_of_space(fetcher.read(&wanted, 5000, 10).await.unwrap_err());
    speaks_of_space(fetcher.prefetch(&wanted, std::slice::from_ref(&(0..3))).await.unwrap_err());
    speaks_of_space(fetcher.hydrate(&wanted, no_progress()).await.unwrap_err());
    assert!(idle.is_hydrated());
    assert!(std::fs::read(idle.data_path()).unwrap() == image.layers[1].tar);
    // With room all is well again, without anything being made anew.
    std::fs::remove_file(ballast).unwrap();
    fetcher.hydrate(&wanted, no_progress()).await.unwrap();
    drop(pin);
    for layer in [&wanted, &idle] {
        assert!(layer.check(false).unwrap().bad.is_empty());
    }
    assert_eq!(fetcher.read(&wanted, 0, tar.len()).await.unwrap(), *tar);
}

/// The reserve holds for faults and hydration too, not only for streams.
#[tokio::test(flavor = "multi_thread")]
async fn the_reserve_stays_free() {
    let mount = small_tmpfs(c"24m");
    let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    let fetcher = Fetcher::new(LayerStore::open(&root).unwrap(), quick_fetch());
    let reserve = (24 << 20) / 20;
    let client = RegistryClient::new(quick_client()).unwrap();
    let image = TestImage::new(vec![TestLayer::gzip(tar(1, 40, 100_000))]);
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let resolved = client.resolve(&server.name("app:v1").parse().unwrap(), &amd64()).await.unwrap();
    let blobs = client.blobs(&resolved.reference);
    let layer = fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await.unwrap();
    layer.forget().unwrap();
    let free = || {
        let disk = nix::sys::statvfs::fstatvfs(&mount).unwrap();
        disk.blocks_available() * disk.fragment_size()
    };
    // The store looks now and then only, so it looks when the limits are set.
    std::fs::write(root.join("ballast"), vec![1; (free() - reserve - (1 << 20)) as usize]).unwrap();
    fetcher.store().set_limits(CacheLimits { limit: None, reserve }).unwrap();
    let error = fetcher.hydrate(&layer, no_progress()).await.unwrap_err();
    assert!(matches!(error, FetchError::DiskReserved { .. }), "{error}");
    assert!(error.to_string().contains("stay free"), "{error}");
    assert!(free() >= reserve, "{} bytes are left", free());
    assert!(layer.local_bytes() > 500_000, "what fits is kept: {}", layer.local_bytes());
}
