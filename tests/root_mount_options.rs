//! `lazyrun mount -o`: what mount(8)'s options do to a mount of an image, by every plan.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::fixture::Fixture;
use crate::support::instance::Lazyrun;

const PLANS: [&str; 3] = ["erofs", "overlay", "fuse"];
const IDMAP: &str = "X-mount.idmap=u:0:100000:65536 g:0:200000:65536";

struct Case {
    fixture: Fixture,
    lazyrun: Lazyrun,
    dir: PathBuf,
}

fn case() -> Case {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let dir = lazyrun.scratch("mount");
    Case { fixture, lazyrun, dir }
}

impl Case {
    fn args<'a>(&'a self, plan: &'a str, options: &'a str, image: &'a str) -> [&'a str; 6] {
        ["mount", "--union", plan, "-o", options, image]
    }

    fn mounted(&self, plan: &str, options: &str, check: impl FnOnce(&Path)) {
        let image = self.fixture.image();
        let dir = self.dir.to_str().expect("a path in UTF-8");
        self.lazyrun.ok(&[&self.args(plan, options, &image)[..], &[dir]].concat());
        check(&self.dir);
        self.lazyrun.ok(&["umount", dir]);
    }

    fn refused(&self, plan: &str, options: &str) -> String {
        let image = self.fixture.image();
        let dir = self.dir.to_str().expect("a path in UTF-8");
        let why = self.lazyrun.fails(125, &[&self.args(plan, options, &image)[..], &[dir]].concat());
        assert_eq!(why.trim_end().lines().count(), 1, "one sentence: {why}");
        why
    }

    /// The options of the mount itself, as the kernel has them.
    fn options(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
        let dir = self.dir.to_str().expect("a path in UTF-8");
        let line = table.lines().rev().find(|line| line.split(' ').nth(4) == Some(dir)).expect("the mount");
        line.split(' ').nth(5).expect("its options").split(',').map(str::to_owned).collect()
    }
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).expect("stat");
    (meta.uid(), meta.gid())
}

/// Writes a file as a user and a group.
fn write_as(user: u32, group: u32, path: &Path) -> io::Result<bool> {
    let line = format!("echo x > {}", path.display());
    Command::new("sh").args(["-c", &line]).uid(user).gid(group).status().map(|status| status.success())
}

#[test]
fn flags_are_those_of_the_mount() {
    let case = case();
    for plan in PLANS {
        case.mounted(plan, "nosuid,nodev,noexec,noatime", |dir| {
            let options = case.options();
            for flag in ["ro", "nosuid", "nodev", "noexec", "noatime"] {
                assert!(options.iter().any(|option| option == flag), "{plan}: {options:?}");
            }
            let refused = Command::new(dir.join("bin/busybox")).status().expect_err("noexec");
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            let refused = fs::write(dir.join("new"), "").expect_err("read-only");
            assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
        });
        // Another mount of the same image is as it was.
        case.mounted(plan, "rw,nosuid", |dir| {
            let options = case.options();
            assert!(options.contains(&"nosuid".to_owned()) && !options.contains(&"noexec".to_owned()));
            fs::write(dir.join("new"), "").expect("writable");
            assert!(Command::new(dir.join("bin/busybox")).arg("true").status().expect("run").success());
        });
    }
}

#[test]
fn owners_are_shown_as_the_mapping_says() {
    let case = case();
    for plan in PLANS {
        case.mounted(plan, IDMAP, |dir| {
            assert_eq!(owner(&dir.join("bin/busybox")), (100_000, 200_000), "{plan}");
            assert_eq!(fs::read(dir.join("data/first")).expect("read"), b"replaced\n");
        });
        case.mounted(plan, "ro", |dir| assert_eq!(owner(&dir.join("bin/busybox")), (0, 0), "{plan}"));
    }
    for plan in ["erofs", "overlay"] {
        case.mounted(plan, &format!("rw,{IDMAP}"), |dir| {
            assert_eq!(owner(&dir.join("bin/busybox")), (100_000, 200_000), "{plan}");
            assert!(write_as(100_000, 200_000, &dir.join("data/new")).expect("write"), "{plan}");
            assert_eq!(owner(&dir.join("data/new")), (100_000, 200_000));
            assert!(!write_as(7, 7, &dir.join("data/others")).expect("write"), "nobody's id is mapped to 7");
            let upper = case.lazyrun.root().join("mounts");
            let made = Command::new("find").arg(&upper).args(["-name", "new", "-printf", "%U:%G"]).output();
            assert_eq!(
                String::from_utf8_lossy(&made.expect("find").stdout),
                "100000:200000",
                "{plan}: on disk"
            );
        });
    }
    let why = case.refused("fuse", &format!("rw,{IDMAP}"));
    assert!(why.contains("--union erofs"), "{why}");
    let why = case.refused("erofs", "X-mount.idmap=/nonexistent");
    assert!(why.contains("/nonexistent"), "{why}");
}

#[test]
fn labels_reach_the_filesystem() {
    let case = case();
    let label = r#"context="system_u:object_r:container_file_t:s0:c1,c2""#;
    if Path::new("/sys/fs/selinux/enforce").exists() {
        case.mounted("erofs", label, |dir| {
            assert!(case.options().contains(&"ro".to_owned()));
            let output = Command::new("stat").args(["-c", "%C"]).arg(dir).output().expect("stat");
            let shown = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(shown.starts_with("system_u:object_r:container_file_t"), "{shown}");
        });
    } else {
        // Overlayfs gets it, and knows no such thing where no security module takes it first.
        let why = case.refused("erofs", label);
        assert!(why.contains("context") && why.contains("an overlay"), "{why}");
    }
    let why = case.refused("fuse", &format!("rw,{label}"));
    assert!(why.contains("plan fuse"), "{why}");
}

#[test]
fn what_is_no_option_is_refused_before_anything_is_mounted() {
    let case = case();
    for (options, said) in [("bind", "bind"), ("context=", "context="), ("X-mount.idmap=u:0:1", "u:0:1")] {
        let why = case.refused("erofs", options);
        assert!(why.contains(said), "{why}");
    }
    let image = case.fixture.image();
    let dir = case.dir.to_str().expect("a path in UTF-8");
    let why = case.lazyrun.fails(125, &["mount", "--rw", "-o", "ro", &image, dir]);
    assert!(why.contains("contradict"), "{why}");
}
