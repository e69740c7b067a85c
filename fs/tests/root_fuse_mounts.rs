//! Detached mounts, the mount helper, the flat server and its takeover, on the real kernel as root.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fuse_support::*;
use lazyrun_fs::fuse::{self, Flat, FuseKind, FuseMount, ServeOptions, ServerHandle};
use lazyrun_fs::mount::{self, OverlayOptions};
use lazyrun_fs::mounter::{Device, Mounter, Request};
use lazyrun_fs::plan::{self, Plan};

const MIB: usize = 1 << 20;
/// Size of the layer file that [`child_server`] serves.
const CHILD_LAYER: usize = 16 * MIB;

fn serve(files: &Arc<MemoryFiles>) -> (OwnedFd, ServerHandle) {
    let FuseMount { tree, dev } = fuse::mount(FuseKind::Flat).unwrap();
    let server = fuse::serve(Flat::new(Arc::clone(files)), tree.as_fd(), dev, ServeOptions::default());
    (tree, server.unwrap())
}

/// A view whose only file shows the layer file `name` on the flat mount.
fn view(dir: &Path, flat: &OwnedFd, name: &str, size: usize, directio: bool) -> OwnedFd {
    let image = dir.join("image");
    write_tiny_image(&image, u32::try_from(size).unwrap());
    let request = Request::Erofs { image, devices: vec![Device::Flat(name.into())], directio };
    mounter().mount(&request, &[flat.as_fd()]).unwrap()
}

#[test]
fn layer_files_are_read_and_found_when_they_appear() {
    let _isolated = Isolated::enter();
    let bytes = pattern(3 * MIB + 777);
    let files = MemoryFiles::with("one", bytes.clone());
    let (tree, server) = serve(&files);
    assert!(fs::read(inside(&tree, "one")).unwrap() == bytes);
    assert_eq!(fs::metadata(inside(&tree, "one")).unwrap().len(), bytes.len() as u64);

    let missing = fs::read(inside(&tree, "two")).unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(libc::ENOENT));
    files.add(77, "two", pattern(5000));
    assert_eq!(fs::read(inside(&tree, "two")).unwrap(), pattern(5000));
    assert_eq!(fs::metadata(inside(&tree, "two")).unwrap().ino(), 77);

    // Reads came in pieces of the readahead, and the open upcall only until the kernel learnt better.
    let stats = server.stats();
    assert!(stats.read <= (bytes.len() / (128 << 10)) as u64 + 6, "{stats:?}");
    assert_eq!(stats.open, 1, "{stats:?}");
    assert!(server.is_alive());
}

#[test]
fn a_warm_view_asks_nothing() {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    let bytes = pattern(8 * MIB);
    let (tree, server) = serve(&MemoryFiles::with("layer", bytes.clone()));
    for directio in [false, true] {
        let view = view(dir.path(), &tree, "layer", bytes.len(), directio);
        let path = inside(&view, TINY_FILE);
        assert!(fs::read(&path).unwrap() == bytes, "directio {directio}");

        let cold = server.stats();
        for _ in 0..100 {
            assert!(fs::read(&path).unwrap() == bytes);
            assert_eq!(fs::metadata(&path).unwrap().len(), bytes.len() as u64);
            assert_eq!(fs::read_dir(inside(&view, ".")).unwrap().count(), 1);
        }
        assert_eq!(server.stats(), cold, "a warm view asked the FUSE server");
    }
    let stats = server.stats();
    assert_eq!(stats.open, 1, "{stats:?}");
    println!("requests for 8 MiB read cold twice, then 200 times warm: {stats:?}");
}

#[test]
fn an_overlay_made_by_the_helper_can_be_attached_in_another_namespace() {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    // Separators of overlayfs's option strings, and more than fsconfig's 255 bytes.
    let odd = dir.path().join(r"a:b,c\d").join("x".repeat(200)).join("y".repeat(100));
    let (upper, work, target) = (odd.join("upper"), odd.join("work"), odd.join("rootfs"));
    for d in [&upper, &work, &target] {
        fs::create_dir_all(d).unwrap();
    }
    let bytes = pattern(MIB);
    let (tree, _server) = serve(&MemoryFiles::with("layer", bytes.clone()));
    let view = view(&odd, &tree, "layer", bytes.len(), false);
    let overlay = |options| Request::Overlay { upper: upper.clone(), work: work.clone(), options };

    let root = mounter().mount(&overlay(OverlayOptions::default()), &[view.as_fd()]).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let _other = Isolated::enter();
            mount::attach(root.as_fd(), &target).unwrap();
            assert!(fs::read(target.join(TINY_FILE)).unwrap() == bytes);
            fs::write(target.join("new"), "written").unwrap();
            fs::remove_file(target.join(TINY_FILE)).unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
            mount::detach(&target).unwrap();
        });
        other.join().unwrap();
    });
    drop(root);
    assert_eq!(fs::read_to_string(upper.join("new")).unwrap(), "written");
    assert_eq!(fs::metadata(upper.join(TINY_FILE)).unwrap().rdev(), 0, "a whiteout");

    // The view itself is still there for the next container, also after a request that failed.
    let missing = Request::Overlay {
        upper: odd.join("nothing"),
        work: work.clone(),
        options: OverlayOptions::default(),
    };
    let error = mounter().mount(&missing, &[view.as_fd()]).unwrap_err().to_string();
    assert!(error.contains("nothing") && error.contains("No such file"), "{error}");
    let volatile = OverlayOptions { volatile: true, xino: Some(false), ..OverlayOptions::default() };
    let root = mounter().mount(&overlay(volatile), &[view.as_fd()]).unwrap();
    assert_eq!(fs::read_to_string(inside(&root, "new")).unwrap(), "written");
    mount::set_readonly(root.as_fd()).unwrap();
    let refused = fs::write(inside(&root, "more"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let copy = mount::clone_tree(view.as_fd()).unwrap();
    assert!(fs::read(inside(&copy, TINY_FILE)).unwrap() == bytes);
}

#[test]
fn a_view_that_cannot_be_mounted_is_named_in_the_error() {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::write(&image, vec![0u8; 8192]).unwrap();
    let broken = Request::Erofs { image: image.clone(), devices: vec![], directio: false };
    let error = mounter().mount(&broken, &[]).unwrap_err().to_string();
    assert!(error.contains(&image.display().to_string()) && error.contains("Invalid argument"), "{error}");

    write_tiny_image(&image, 4096);
    let devices = vec![Device::Local(dir.path().join("missing"))];
    let error = mounter().mount(&Request::Erofs { image, devices, directio: false }, &[]).unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
}

#[test]
fn a_helper_that_hangs_is_killed() {
    let _isolated = Isolated::enter();
    let stuck = Mounter::new("/bin/sleep".into()).with_args(["60"]).with_timeout(Duration::from_millis(200));
    let start = Instant::now();
    let error = stuck.probe(Path::new("/")).unwrap_err().to_string();
    assert!(error.contains("did not answer"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
    let broken = Mounter::new("/bin/false".into());
    let error = broken.probe(Path::new("/")).unwrap_err().to_string();
    assert!(error.starts_with("the mount helper"), "{error}");
    let absent = Mounter::new("/no/such/program".into());
    let error = absent.probe(Path::new("/")).unwrap_err().to_string();
    assert!(error.contains("cannot be started"), "{error}");
}

#[test]
fn what_is_cached_of_a_file_is_forgotten_by_a_helper() {
    let _isolated = Isolated::enter();
    let files = MemoryFiles::with("layer", vec![1; 2 * MIB]);
    let (tree, server) = serve(&files);
    let _abort = AbortAtEnd(dup(tree.as_fd()));
    let dev = server.device_fd().unwrap();
    let file = File::open(inside(&tree, "layer")).unwrap();
    let first = || {
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 0).unwrap();
        page[0]
    };
    assert_eq!(first(), 1);
    files.add(2, "layer", vec![2; 2 * MIB]);
    mounter().invalidate(dev.as_fd(), vec![2, 99]).unwrap();
    assert_eq!(first(), 2);

    // It waits for a read that is under way, but the one who wants it does not.
    *files.hold_from.lock().unwrap() = Some(MIB as u64);
    let held = File::open(inside(&tree, "layer")).unwrap();
    let reader = std::thread::spawn(move || held.read_exact_at(&mut [0u8; 4096], MIB as u64));
    wait_for("the read to arrive", || !files.parked.lock().unwrap().is_empty());
    files.add(2, "layer", vec![3; 2 * MIB]);
    let error = mounter().with_timeout(Duration::from_millis(500)).invalidate(dev.as_fd(), vec![2]);
    assert!(error.unwrap_err().to_string().contains("did not answer"));
    // The kernel asks once more for what readahead did not get.
    *files.hold_from.lock().unwrap() = None;
    files.parked.lock().unwrap().drain(..).for_each(|reply| reply.error(libc::EIO));
    reader.join().unwrap().unwrap();
    wait_for("the contents to be forgotten", || first() == 3);
}

#[test]
fn an_aborted_server_ends_the_connection() {
    let _isolated = Isolated::enter();
    let bytes = pattern(2 * MIB);
    let files = MemoryFiles::with("layer", bytes.clone());
    *files.hold_from.lock().unwrap() = Some(MIB as u64);
    let (tree, server) = serve(&files);
    let _abort = AbortAtEnd(dup(tree.as_fd()));
    let keeper = server.device_fd().unwrap();
    let file = File::open(inside(&tree, "layer")).unwrap();
    let reader = std::thread::spawn(move || file.read_exact_at(&mut [0u8; 4096], MIB as u64));
    wait_for("the read to arrive", || !files.parked.lock().unwrap().is_empty());
    server.abort().unwrap();
    assert!(reader.join().unwrap().is_err(), "a read without a server must fail");
    drop(keeper);
}

#[test]
fn a_server_ends_with_its_mount() {
    let _isolated = Isolated::enter();
    let (tree, server) = serve(&MemoryFiles::with("layer", pattern(MIB)));
    let keeper = server.device_fd().unwrap();
    let file = File::open(inside(&tree, "layer")).unwrap();
    drop(tree);
    file.read_exact_at(&mut [0u8; 4096], 0).unwrap();
    assert!(server.is_alive());
    drop(file);
    server.join();
    drop(keeper);
}

#[test]
fn many_servers_fit_in_little_memory() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(child_args("root_fuse_mounts::child_memory"))
        .env("LAZYRUN_TEST_DIR", "/")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Starts a server in another process that parks reads from `hold_from` on, and says so in `dir`.
fn start_child(
    dir: &Path,
    mount: &FuseMount,
    adopt: bool,
    hold_from: usize,
    resend: bool,
    journal: Option<&File>,
) -> Child {
    let journal = journal.map(|file| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    for mark in ["serving", "parked"] {
        let _ = fs::remove_file(dir.join(mark));
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(child_args("root_fuse_mounts::child_server"))
        .env("LAZYRUN_TEST_DIR", dir)
        .env("LAZYRUN_TEST_HOLD", hold_from.to_string())
        .env("LAZYRUN_TEST_ADOPT", adopt.to_string())
        .env("LAZYRUN_TEST_RESEND", resend.to_string())
        .env("LAZYRUN_TEST_JOURNAL", journal.unwrap_or_default())
        .stdin(dup(mount.dev.as_fd()))
        .stdout(Stdio::null())
        .stderr(dup(mount.tree.as_fd()))
        .spawn()
        .unwrap();
    wait_for("the child to serve", || dir.join("serving").exists());
    child
}

/// A file of a server, by the name under which it can be opened from outside.
fn open_by_name(path: impl AsRef<Path>) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn servers_killed_with_reads_in_flight_are_taken_over() {
    killed_with_reads_in_flight(true);
}

#[test]
fn servers_killed_with_reads_in_flight_are_taken_over_by_their_journal() {
    killed_with_reads_in_flight(false);
}

fn killed_with_reads_in_flight(resend: bool) {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    let bytes = pattern(CHILD_LAYER);
    let mount = fuse::mount(FuseKind::Flat).unwrap();
    let _abort = AbortAtEnd(dup(mount.tree.as_fd()));
    let mut child = start_child(dir.path(), &mount, false, CHILD_LAYER / 2, resend, None);
    let journal = fs::read_to_string(dir.path().join("journal")).ok().map(open_by_name);
    assert_eq!(journal.is_some(), !resend, "a journal is for kernels that cannot resend");
    let view = view(dir.path(), &mount.tree, "layer", bytes.len(), false);
    let path = inside(&view, TINY_FILE);
    let mut first = vec![0u8; 64 * 1024];
    File::open(&path).unwrap().read_exact(&mut first).unwrap();
    assert!(first == bytes[..first.len()]);

    // One reader through the view, one on the layer file itself; each dead server held a request of theirs.
    let readers =
        [path.clone(), inside(&mount.tree, "layer")].map(|path| std::thread::spawn(|| fs::read(path)));
    for round in 0..4 {
        wait_for("a read to be taken by the child", || dir.path().join("parked").exists());
        child.kill().unwrap();
        child.wait().unwrap();
        // Nobody serves: what the kernel knows it still says, what it does not know waits.
        assert_eq!(fs::metadata(&path).unwrap().len(), bytes.len() as u64);
        assert!(!readers[0].is_finished() && !readers[1].is_finished());
        if round < 3 {
            let hold_from = CHILD_LAYER / 8 * (5 + round);
            child = start_child(dir.path(), &mount, true, hold_from, resend, journal.as_ref());
        }
    }
    let journal = journal.map(OwnedFd::from);
    let adopt = ServeOptions { adopt: true, journal, resend, ..ServeOptions::default() };
    let files = MemoryFiles::with("layer", bytes.clone());
    let FuseMount { tree, dev } = mount;
    let server = fuse::serve(Flat::new(files), tree.as_fd(), dup(dev.as_fd()), adopt).unwrap();
    for reader in readers {
        assert!(reader.join().unwrap().unwrap() == bytes, "wrong bytes after the takeover");
    }
    assert!(server.stats().read > 0);
    // Requests of every kind work after it, and open is still not asked.
    assert!(fs::read(inside(&tree, "layer")).unwrap() == bytes);
    assert!(fs::metadata(inside(&tree, "other")).is_err());
    assert_eq!(server.stats().open, 0, "the new server was asked to open");
}

#[test]
fn probing_tells_which_plans_work() {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    let probes = mounter().probe(&dir.path().join("not/yet/made")).unwrap();
    for (name, check) in probes.each() {
        assert_eq!(*check, Ok(()), "{name}");
    }
    assert_eq!(plan::choose(&probes, None), Ok(Plan::Erofs));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a probe left files behind");

    let probes = mounter().probe(Path::new("/proc/sys")).unwrap();
    let error = plan::choose(&probes, None).unwrap_err().to_string();
    assert!(error.contains("/proc/sys cannot be written to"), "{error}");
}

#[test]
fn what_is_missing_is_said_by_the_probes() {
    let _isolated = Isolated::enter();
    let dir = tempfile::tempdir().unwrap();
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("none"), "/dev", Some("tmpfs"), flags, none).unwrap();
    // The standard library sends a child's output there.
    fs::write("/dev/null", "").unwrap();
    let probes = mounter().probe(dir.path());
    mount::detach(Path::new("/dev")).unwrap();
    let probes = probes.unwrap();
    assert_eq!(probes.erofs, Ok(()));
    assert!(probes.fuse.as_ref().is_err_and(|e| e.contains("cannot open /dev/fuse")), "{probes:?}");
    let error = plan::choose(&probes, Some(Plan::Overlay)).unwrap_err().to_string();
    assert!(error.starts_with("mount plan overlay cannot be used: cannot open /dev/fuse"), "{error}");

    // A root directory on an overlay, as in nested containers: no upper can be there.
    let dirs = ["lower", "upper", "work", "root"].map(|name| dir.path().join(name));
    dirs.iter().for_each(|d| fs::create_dir(d).unwrap());
    let lower = File::open(&dirs[0]).unwrap();
    let overlay = mount::overlay(lower.as_fd(), &dirs[1], &dirs[2], &OverlayOptions::default()).unwrap();
    mount::attach(overlay.as_fd(), &dirs[3]).unwrap();
    let probes = mounter().probe(&dirs[3]);
    mount::detach(&dirs[3]).unwrap();
    let probes = probes.unwrap();
    println!("on an overlay: {probes:?}");
    assert!(probes.fuse.is_ok() && probes.overlay_on_fuse.is_err(), "{probes:?}");
    assert_eq!(plan::choose(&probes, None), Ok(Plan::Fuse), "{probes:?}");
}

/// Not a test: a process whose memory nobody else uses.
#[test]
#[ignore = "a helper process of the other tests"]
fn child_memory() {
    if std::env::var_os("LAZYRUN_TEST_DIR").is_none() {
        return;
    }
    let _isolated = Isolated::enter();
    let before = resident_kib();
    let servers: Vec<_> = (0..8)
        .map(|_| {
            let served = serve(&MemoryFiles::with("layer", pattern(1000)));
            assert_eq!(fs::read(inside(&served.0, "layer")).unwrap().len(), 1000);
            served
        })
        .collect();
    let grown = resident_kib() - before;
    println!("{} servers: {grown} KiB", servers.len());
    assert!(grown < 8 * 1024, "{} servers of two threads take {grown} KiB", servers.len());
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Not a test: the server that is killed. Standard input is the FUSE device, standard error the mount.
#[test]
#[ignore = "a helper process of the other tests"]
fn child_server() {
    let Some(dir) = std::env::var_os("LAZYRUN_TEST_DIR") else { return };
    let dir = Path::new(&dir);
    let files = MemoryFiles::with("layer", pattern(CHILD_LAYER));
    let hold = std::env::var("LAZYRUN_TEST_HOLD").unwrap().parse().unwrap();
    *files.hold_from.lock().unwrap() = Some(hold);
    *files.parked_mark.lock().unwrap() = Some(dir.join("parked"));
    let dev = dup(std::io::stdin().as_fd());
    let adopt = std::env::var("LAZYRUN_TEST_ADOPT").unwrap() == "true";
    let resend = std::env::var("LAZYRUN_TEST_RESEND").unwrap() == "true";
    let journal = std::env::var("LAZYRUN_TEST_JOURNAL").unwrap();
    let journal = (!journal.is_empty()).then(|| open_by_name(journal).into());
    let options = ServeOptions { adopt, journal, resend, ..ServeOptions::default() };
    let server = fuse::serve(Flat::new(files), std::io::stderr().as_fd(), dev, options).unwrap();
    let journal = server.journal_fd().unwrap();
    if let Some(journal) = &journal {
        let name = format!("/proc/{}/fd/{}", std::process::id(), journal.as_raw_fd());
        fs::write(dir.join("journal"), name).unwrap();
    }
    File::create(dir.join("serving")).unwrap();
    loop {
        std::thread::park();
    }
}
