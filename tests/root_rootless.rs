//! Without privileges: an unprivileged user, with and without a user namespace of its own. Only the test itself is
//! root, to become that user.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::fixture::Fixture;
use crate::support::instance::EXE;
use crate::support::leaks::processes;
use crate::support::need_root;

/// The user `nobody`, and its group: fusermount3 wants one that has a name.
const USER: u32 = 65_534;

/// A place that belongs to the user, with the program in it.
struct Site(tempfile::TempDir);

impl Drop for Site {
    fn drop(&mut self) {
        // A script that failed leaves its daemon, and nobody else ends it.
        for (pid, _) in processes(&self.path().display().to_string()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

impl Site {
    fn new() -> Site {
        need_root();
        let dir = tempfile::Builder::new().prefix("lazyrun-rootless-").tempdir().expect("a directory");
        let at = dir.path();
        fs::copy(EXE, at.join("lazyrun")).expect("copy the program to where the user can see it");
        for name in ["lower", "lower/dir", "upper", "work", "merged", "device"] {
            fs::create_dir(at.join(name)).expect("a directory");
        }
        for name in ["one", "two", "three"] {
            fs::write(at.join("lower/dir").join(name), name).expect("a file");
        }
        let owned = ["", "lower", "lower/dir", "lower/dir/one", "lower/dir/two", "lower/dir/three"];
        for path in owned.iter().chain(&["upper", "work", "merged"]) {
            chown(at.join(path), Some(USER), Some(USER)).expect("chown");
        }
        Site(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs a script in the place as the user. Not every machine lets users have FUSE, and not every /tmp has device
    /// nodes: in a mount namespace of the test's own `/dev/fuse` has the given mode, 666 where udev makes it.
    fn as_user(&self, mode: u32, inside: &str, script: &str) -> String {
        let device = format!("mount -t tmpfs none device && mknod -m {mode} device/fuse c 10 229");
        let user = format!("setpriv --reuid={USER} --regid={USER} --clear-groups");
        let outer =
            format!("{device} && mount --bind device/fuse /dev/fuse && exec {user} {inside} sh -eu script");
        fs::write(self.path().join("script"), script).expect("write the script");
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &outer])
            .current_dir(self.path())
            .env("HOME", self.path())
            .output()
            .expect("unshare");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let wrong = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}\n{wrong}", output.status);
        said
    }

    /// What the user's changes left, seen from outside.
    fn judge(&self, said: &str) {
        assert_eq!(said, "onenew\none\nmoved\n", "what the user saw");
        let upper = self.path().join("upper");
        assert_eq!(fs::read(upper.join("dir/one")).expect("copied up"), b"onenew\n");
        for name in ["dir/two", "dir/three"] {
            let whiteout = fs::symlink_metadata(upper.join(name)).expect("a whiteout");
            assert_eq!((whiteout.mode() & libc::S_IFMT, whiteout.rdev()), (libc::S_IFCHR, 0));
        }
        let made = fs::metadata(upper.join("made")).expect("made");
        assert_eq!((made.uid(), made.gid()), (USER, USER));
    }
}

/// Reads, copies up, hides, makes, moves. The opaque mark is checked by what is not seen after the next mount.
const CHANGES: &str = "
    options=lowerdir=lower,upperdir=upper,workdir=work
    ./lazyrun union -o $options merged
    echo new >> merged/dir/one
    cat merged/dir/one
    rm merged/dir/two
    mkdir merged/made
    mv merged/dir/three merged/made/moved
    UNMOUNT
    ./lazyrun union -o $options merged
    ls merged/dir merged/made | grep -v -e '^$' -e ':$'
    UNMOUNT
";

#[test]
fn a_union_in_a_user_namespace() {
    let site = Site::new();
    let said =
        site.as_user(666, "unshare --map-root-user --mount", &CHANGES.replace("UNMOUNT", "umount merged"));
    site.judge(&said);
    // Where a whiteout was, a directory must be opaque: by an attribute that the user may set.
    site.as_user(
        666,
        "unshare --map-root-user --mount",
        "./lazyrun union -o lowerdir=lower,upperdir=upper,workdir=work merged
         rm -r merged/dir; mkdir merged/dir; test -z \"$(ls merged/dir)\"; umount merged
         ./lazyrun union -o lowerdir=lower,upperdir=upper,workdir=work merged
         test -z \"$(ls merged/dir)\"; umount merged",
    );
}

#[test]
fn a_union_of_a_user_with_fusermount() {
    let site = Site::new();
    let said = site.as_user(666, "", &CHANGES.replace("UNMOUNT", "fusermount3 -u merged"));
    site.judge(&said);
}

/// An image mounted by a user, under each plan that can be had, in a namespace that the script is run in.
fn mounts_of_images(inside: &str) {
    let (site, fixture) = (Site::new(), Fixture::new());
    let image = fixture.image();
    let script = format!(
        "export XDG_DATA_HOME=$PWD/data XDG_RUNTIME_DIR=$PWD/run
         for plan in fuse overlay; do
             ./lazyrun mount --rw --union $plan {image} merged 2>> said
             cat merged/data/last
             echo changed > merged/data/last; rm merged/data/big.bin; mkdir merged/made
             cat merged/data/last; ls merged/data | grep big || ls -d merged/made
             ./lazyrun umount merged
         done
         ./lazyrun mount {image} merged; cat merged/data/last; ./lazyrun umount merged
         ./lazyrun system reset --force; ls data run run/lazyrun"
    );
    fs::create_dir(site.path().join("run")).expect("a directory");
    chown(site.path().join("run"), Some(USER), Some(USER)).expect("chown");
    let said = site.as_user(666, inside, &script);
    let last = "behind the big file\n";
    let once = format!("{last}changed\nmerged/made\n");
    assert_eq!(said, format!("{once}{once}{last}data:\n\nrun:\nlazyrun\n\nrun/lazyrun:\n"));
}

#[test]
fn images_in_a_user_namespace() {
    mounts_of_images("unshare --map-root-user --mount");
}

#[test]
fn images_in_the_user_namespace_that_a_user_gets() {
    mounts_of_images("./lazyrun unshare");
}

#[test]
fn a_user_finds_the_way_to_mounts() {
    let site = Site::new();
    let said = site.as_user(
        666,
        "",
        "export XDG_DATA_HOME=$PWD/data XDG_RUNTIME_DIR=$PWD
         ./lazyrun mount some/image merged 2>&1 || echo \"exit $?\"
         ./lazyrun unshare sh -c 'id -u; pwd' | grep -v $PWD
         ./lazyrun unshare ./nothing 2>&1 || echo \"exit $?\"
         ./lazyrun images -q; ./lazyrun unshare ./lazyrun unshare 2>&1 || echo \"exit $?\"",
    );
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].contains("lazyrun unshare") && lines[1] == "exit 125", "{said}");
    assert_eq!(lines[2], "0");
    assert!(lines[3].contains("./nothing can't be run") && lines[4] == "exit 127", "{said}");
    assert!(lines[5].contains("may mount already") && lines[6] == "exit 125", "{said}");
}

#[test]
fn a_user_without_the_device_is_told() {
    let site = Site::new();
    let said = site.as_user(
        600,
        "",
        "./lazyrun union -o lowerdir=lower,upperdir=upper,workdir=work merged 2>&1 || echo \"exit $?\"",
    );
    assert!(said.contains("/dev/fuse can't be opened: Permission denied"), "{said}");
    assert!(said.ends_with("exit 1\n"), "{said}");
}
