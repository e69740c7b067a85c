//! Machines that lack something: rights, a device, a program, disk space. One sentence, exit code 125, nothing
//! left behind, and the daemon goes on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::support::fixture::Fixture;
use crate::support::instance::{EXE, Lazyrun};

fn sentence(output: &std::process::Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(output.stdout.is_empty() && !stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn not_root() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    // The program lies where other users may not look.
    let program = lazyrun.scratch("bin").join("lazyrun");
    fs::copy(EXE, &program).unwrap();
    for dir in program.ancestors().skip(1).take(3) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(&program);
    command.arg("--root").arg(lazyrun.root()).args(["run", "--rm", &fixture.image(), "true"]);
    let output = command.uid(65534).gid(65534).output().unwrap();
    assert!(sentence(&output).contains("root"), "{output:?}");
    assert!(!lazyrun.root().exists(), "an unprivileged command made the root");
}

#[test]
fn no_nft() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    // The daemon lives in the mount namespace of the command that starts it.
    let run = |args: &[&str]| {
        let mut command = lazyrun.command(args);
        // SAFETY: the child has one thread, and what runs before exec are system calls.
        unsafe { command.pre_exec(|| Ok(hide(&["/usr/sbin", "/usr/local/sbin"])?)) };
        command.output().unwrap()
    };
    let output = run(&["run", "--rm", &fixture.image(), "true"]);
    let said = sentence(&output);
    assert!(said.contains("nft") && said.contains("--network host"), "{said}");
    let output = run(&["run", "--rm", "--network", "none", &fixture.image(), "echo", "fine"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "fine\n", "{output:?}");
    assert!(lazyrun.ok(&["ps", "-a", "-q"]).is_empty(), "a refused container is listed");
}

/// Empties directories, in a mount namespace of the calling process's own.
fn hide(dirs: &[&str]) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    for dir in dirs {
        mount(Some("none"), *dir, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    }
    Ok(())
}

/// A /dev without fuse.
fn hide_fuse() -> nix::Result<()> {
    hide(&["/dev"])?;
    for (name, minor) in [("null", 3), ("zero", 5), ("urandom", 9)] {
        let path = format!("/dev/{name}");
        mknod(path.as_str(), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, minor))?;
    }
    Ok(())
}

#[test]
fn no_fuse_device() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let mut command = lazyrun.command(&["run", "--rm", &image, "true"]);
    // SAFETY: the child has one thread, and what runs before exec are system calls and short-lived strings.
    unsafe { command.pre_exec(|| Ok(hide_fuse()?)) };
    let said = sentence(&command.output().unwrap());
    assert!(said.contains("/dev/fuse"), "{said}");
    // Where the device is, the same root works.
    assert_eq!(lazyrun.ok(&["run", "--rm", &image, "echo", "fine"]), "fine\n");
}

/// A small filesystem that is unmounted whatever happens.
struct SmallDisk<'a>(&'a Path);

impl SmallDisk<'_> {
    fn mount(dir: &Path, bytes: u64) -> SmallDisk<'_> {
        let options = format!("size={bytes},mode=0755");
        let flags = MsFlags::empty();
        mount(Some("none"), dir, Some("tmpfs"), flags, Some(options.as_str()))
            .expect("mount a small filesystem");
        SmallDisk(dir)
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = umount(self.0);
    }
}

#[test]
fn a_full_disk() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    fs::create_dir_all(lazyrun.root()).unwrap();
    // Room for the small layers and the daemon's own files, not for the large one.
    let disk = SmallDisk::mount(lazyrun.root(), 16 << 20);
    let said = lazyrun.fails(125, &["run", "--rm", "--network", "none", &fixture.image(), "true"]);
    assert!(said.contains("space") || said.contains("full"), "{said}");
    assert_eq!(lazyrun.ok(&["images", "-q"]), "", "something half-made is listed");
    assert!(lazyrun.daemon_pid().is_some(), "the daemon is gone");
    // With room it works, without starting anything anew.
    let (before, more) = (lazyrun.daemon_pid(), "remount,size=200m");
    mount(None::<&str>, lazyrun.root(), None::<&str>, MsFlags::MS_REMOUNT, Some(&more[8..])).unwrap();
    assert_eq!(lazyrun.ok(&["run", "--rm", "--network", "none", &fixture.image(), "echo", "fine"]), "fine\n");
    assert_eq!(lazyrun.daemon_pid(), before);
    // The root itself is a mount point here, which a reset can't delete.
    let reset = lazyrun.run(&["system", "reset", "--force"]);
    assert!(reset.code == Some(0) || reset.stderr.contains("deleted"), "{reset:?}");
    drop(disk);
}
