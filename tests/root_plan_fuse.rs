//! Plan `fuse`: a container's root without the kernel's overlayfs. Its upper directory is overlayfs's, and it lives on
//! when the daemon is killed.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::fixture::{Fixture, big, noise, sha256};
use crate::support::instance::{EXE, Lazyrun};
use crate::support::tree::{Tree, assert_equal, scan};
use crate::support::wait_for;

/// Changes of every kind, made in a writable mount of the fixture.
fn change(root: &Path) {
    let at = |path: &str| root.join(path);
    let append = |path: &str| {
        let mut file = OpenOptions::new().append(true).open(at(path)).expect("open to append");
        file.write_all(b"more\n").expect("append");
    };
    append("data/last");
    append("data/attributes");
    fs::write(at("data/big.bin"), "short now").expect("truncate a large file");
    fs::remove_file(at("data/first")).expect("remove a lower file");
    fs::remove_dir_all(at("data/small")).expect("remove a lower directory");
    fs::create_dir(at("data/small")).expect("make it again, opaque");
    fs::write(at("data/small/own"), "of the upper").expect("write");
    fs::rename(at("etc/group"), at("etc/group.old")).expect("rename a lower file");
    fs::rename(at("data/empty"), at("data/long-again")).expect("rename a lower file");
    fs::hard_link(at("etc/passwd"), at("etc/passwd.link")).expect("link");
    fs::set_permissions(at("usr/local/bin/hello"), fs::Permissions::from_mode(0o700)).expect("chmod");
    std::os::unix::fs::chown(at("var/becomes-file"), Some(7), Some(8)).expect("chown");
    std::os::unix::fs::symlink("elsewhere", at("var/link")).expect("symlink");
    fs::create_dir_all(at("new/directory/deep")).expect("directories");
    fs::rename(at("new/directory"), at("new/moved")).expect("rename a new directory");
    fs::remove_file(at("data/null")).expect("remove a device");
    fs::write(at("data/null"), "a file now").expect("a file where a whiteout was");
    let device = nix::sys::stat::makedev(1, 5);
    nix::sys::stat::mknod(
        &at("data/zero"),
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::from_bits_truncate(0o666),
        device,
    )
    .expect("a device node");
    set_xattr(&at("data/attributes"), "user.more", b"1");
    set_xattr(&at("data"), "trusted.overlay.own", b"of a container");
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let to_c = |bytes: &[u8]| CString::new(bytes).expect("no NUL in it");
    let (at, name) = (to_c(path.as_os_str().as_bytes()), to_c(name.as_bytes()));
    // SAFETY: the strings end with NUL; the kernel reads `value.len()` bytes from `value`.
    let set = unsafe { libc::lsetxattr(at.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    assert_eq!(set, 0, "set an attribute of {}: {}", path.display(), std::io::Error::last_os_error());
}

/// The only writable mount's upper directory, copied with everything that overlayfs keeps in it.
fn copy_of_upper(lazyrun: &Lazyrun, name: &str) -> PathBuf {
    let mounts = lazyrun.root().join("mounts");
    let uppers = fs::read_dir(mounts).expect("mounts").map(|e| e.expect("a mount").path().join("upper"));
    let used: Vec<PathBuf> =
        uppers.filter(|upper| fs::read_dir(upper).is_ok_and(|mut list| list.next().is_some())).collect();
    let [upper] = &used[..] else { panic!("{} upper directories are in use", used.len()) };
    let copy = lazyrun.scratch(name).join("upper");
    let copied = Command::new("cp").arg("-a").arg(upper).arg(&copy).status().expect("cp");
    assert!(copied.success());
    copy
}

/// Changes a mount by one plan; returns what it shows then and a copy of the upper directory.
fn changed_by(lazyrun: &Lazyrun, plan: &str, image: &str) -> (Tree, PathBuf) {
    let dir = lazyrun.scratch(&format!("changed-by-{plan}"));
    lazyrun.ok(&["mount", "--rw", "--union", plan, image, dir.to_str().unwrap()]);
    change(&dir);
    let seen = scan(&dir);
    let upper = copy_of_upper(lazyrun, &format!("upper-of-{plan}"));
    lazyrun.ok(&["umount", dir.to_str().unwrap()]);
    (seen, upper)
}

/// A child that another test has just forked may hold what was open here until it executes its program.
fn unmount(dir: &Path) {
    wait_for("the directory to be free", Duration::from_secs(10), || match umount2(dir, MntFlags::empty()) {
        Err(Errno::EBUSY) => None,
        result => {
            result.expect("unmount");
            Some(())
        }
    });
}

/// What the kernel's overlayfs and `lazyrun union` show of an upper directory over the image.
fn seen_by_both(lazyrun: &Lazyrun, lower: &Path, upper: &Path) -> [Tree; 2] {
    let work = lazyrun.scratch("work");
    let merged = lazyrun.scratch("merged");
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let kernel = format!("{options},index=off,metacopy=off");
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(kernel.as_str()))
        .expect("the kernel's overlayfs takes the upper directory");
    let first = scan(&merged);
    unmount(&merged);
    let union = Command::new(EXE).args(["union", "-o", &options]).arg(&merged).status().expect("run lazyrun");
    assert!(union.success(), "lazyrun union takes the upper directory");
    let second = scan(&merged);
    unmount(&merged);
    [first, second]
}

#[test]
fn an_upper_directory_moves_between_the_plans() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let lower = lazyrun.scratch("lower");
    lazyrun.ok(&["mount", "--union", "erofs", &image, lower.to_str().unwrap()]);
    let (by_kernel, upper_of_kernel) = changed_by(&lazyrun, "erofs", &image);
    let (by_fuse, upper_of_fuse) = changed_by(&lazyrun, "fuse", &image);
    assert!(!by_fuse.contains_key("data/first") && by_fuse.contains_key("new/moved/deep"));
    let mut plans = vec![by_kernel.clone(), by_fuse];
    plans.extend(seen_by_both(&lazyrun, &lower, &upper_of_kernel));
    plans.extend(seen_by_both(&lazyrun, &lower, &upper_of_fuse));
    lazyrun.ok(&["umount", lower.to_str().unwrap()]);
    // What was just made has the time of its making.
    for tree in &mut plans {
        for entry in tree.values_mut() {
            let new = entry["mtime"].as_str().is_some_and(|t| !t.starts_with("1700000000"));
            if new {
                entry.insert("mtime".into(), "0.0".into());
            }
        }
    }
    for tree in &plans[1..] {
        assert_equal(&plans[0], tree);
    }
}

#[test]
fn a_container_by_plan_fuse_runs_and_keeps_what_it_writes() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let script = "hello && echo x > /etc/new && rm /data/first && mv /etc/passwd /etc/p && chmod 700 /etc/p \
                  && grep ' / ' /proc/mounts && cat /data/last && sha256sum /data/big.bin";
    let said = lazyrun.ok(&["run", "--name", "kept", "--union", "fuse", &image, "sh", "-c", script]);
    assert!(said.starts_with("hello from a script\n"), "{said}");
    assert!(said.contains(" / fuse.lazyrun rw,"), "{said}");
    assert!(said.contains(&sha256(&big())), "{said}");
    let containers = fs::read_dir(lazyrun.root().join("containers")).expect("containers");
    let upper = containers.map(|e| e.expect("a container").path().join("upper")).next().expect("one");
    assert_eq!(fs::read(upper.join("etc/new")).expect("written through"), b"x\n");
    let whiteout = fs::symlink_metadata(upper.join("data/first")).expect("a whiteout");
    assert_eq!((whiteout.mode() & libc::S_IFMT, whiteout.rdev()), (libc::S_IFCHR, 0));
    let servers = || crate::support::leaks::processes(&upper.to_string_lossy());
    wait_for("the union's server to end with its container", Duration::from_secs(20), || {
        servers().is_empty().then_some(())
    });
    lazyrun.ok(&["rm", "kept"]);
}

#[test]
fn a_read_only_mount_is_the_view_alone() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let dir = lazyrun.scratch("mount");
    lazyrun.ok(&["mount", "--union", "fuse", &fixture.image(), dir.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(dir.join("data/last")).expect("read"), "behind the big file\n");
    let error = fs::write(dir.join("data/new"), "x").expect_err("it is read-only");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    lazyrun.ok(&["umount", dir.to_str().unwrap()]);
}

fn kill_daemon(lazyrun: &Lazyrun) {
    let old = lazyrun.daemon_pid().expect("a daemon runs");
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
    wait_for("a new daemon", Duration::from_secs(60), || lazyrun.daemon_pid().filter(|pid| *pid != old));
}

/// Writes, reads back, renames and removes until told to stop; the number of rounds. Any error ends the test.
fn work_in(dir: &Path, number: u64, stop: &AtomicBool) -> u64 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let (one, two) = (dir.join(format!("{number}")), dir.join(format!("{number}.new")));
        let bytes = noise(number << 20 | rounds, 20_000);
        fs::write(&one, &bytes).expect("write");
        fs::rename(&one, &two).expect("rename");
        assert!(fs::read(&two).expect("read back") == bytes, "other bytes came back");
        fs::create_dir(&one).expect("make a directory");
        fs::remove_dir(&one).expect("remove a directory");
        fs::remove_file(&two).expect("remove");
        rounds += 1;
    }
    rounds
}

#[test]
fn a_union_outlives_the_daemon_with_all_that_is_open() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    // The index is here, none of the bytes.
    lazyrun.ok(&["pull", "--quiet", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    let dir = lazyrun.scratch("union");
    lazyrun.ok(&["mount", "--rw", "--union", "fuse", &image, dir.to_str().unwrap()]);
    let mut nameless = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join("data/tmp"))
        .expect("create");
    nameless.write_all(b"still here").expect("write");
    fs::remove_file(dir.join("data/tmp")).expect("unlink what is open");
    let removed = File::open(dir.join("data/small/007")).expect("open a lower file");
    fs::remove_file(dir.join("data/small/007")).expect("unlink a lower file");
    let lower = File::open(dir.join("data/small/008")).expect("open a lower file");
    let number = fs::metadata(dir.join("data/small/008")).expect("stat").ino();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=3)
            .map(|n| {
                let (dir, stop) = (dir.join("data"), &stop);
                scope.spawn(move || work_in(&dir, n, stop))
            })
            .collect();
        let reader =
            scope.spawn(|| sha256(&fs::read(dir.join("data/big.bin")).expect("read through faults")));
        for _ in 0..3 {
            kill_daemon(&lazyrun);
        }
        assert_eq!(reader.join().expect("the reader"), sha256(&big()));
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().expect("no operation failed") > 0);
        }
    });
    nameless.seek(SeekFrom::Start(0)).expect("seek");
    let mut text = String::new();
    nameless.read_to_string(&mut text).expect("read a file without a name");
    assert_eq!(text, "still here");
    let content = |i: u64| noise(1000 + i, 64 + 37 * i as usize);
    let mut bytes = vec![0; content(7).len()];
    removed.read_exact_at(&mut bytes, 0).expect("read an unlinked lower file");
    assert!(bytes == content(7), "an unlinked lower file reads otherwise");
    let mut bytes = vec![0; content(8).len()];
    lower.read_exact_at(&mut bytes, 0).expect("read a lower file");
    assert!(bytes == content(8), "a lower file reads otherwise");
    assert_eq!(fs::metadata(dir.join("data/small/008")).expect("stat").ino(), number);
    drop((nameless, removed, lower));
    lazyrun.ok(&["umount", dir.to_str().unwrap()]);
}

#[test]
fn a_busy_daemon_serves_many_unions_of_one_view() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["pull", "--quiet", &image]);
    let dirs: Vec<PathBuf> = (0..8).map(|i| lazyrun.scratch(&format!("many/{i}"))).collect();
    std::thread::scope(|scope| {
        for dir in &dirs {
            let (lazyrun, image) = (&lazyrun, &image);
            scope.spawn(move || {
                lazyrun.ok(&["mount", "--rw", "--union", "fuse", image, dir.to_str().unwrap()]);
                fs::write(dir.join("mine"), dir.to_str().unwrap()).expect("write");
            });
        }
    });
    for dir in &dirs {
        assert_eq!(fs::read_to_string(dir.join("mine")).expect("read"), dir.to_str().unwrap());
        assert_eq!(fs::read_to_string(dir.join("data/last")).expect("read"), "behind the big file\n");
        lazyrun.ok(&["umount", dir.to_str().unwrap()]);
    }
}

#[test]
fn what_keeps_a_union_from_being_served_is_said() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let dir = lazyrun.scratch("mount");
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    // No room for a directory where the mounts are kept.
    let mounts = lazyrun.root().join("mounts");
    fs::create_dir_all(&mounts).expect("mounts");
    mount(Some("none"), &mounts, Some("tmpfs"), MsFlags::empty(), Some("size=4k,nr_inodes=5"))
        .expect("tmpfs");
    let why = lazyrun.run(&["mount", "--rw", "--union", "fuse", &fixture.image(), dir.to_str().unwrap()]);
    umount2(&mounts, MntFlags::MNT_DETACH).expect("unmount");
    assert_eq!(why.code, Some(125), "{why:?}");
    assert!(why.stderr.contains("space") && !why.stderr.contains("panicked"), "{why:?}");
}
