//! Inode flags (chattr, lsattr) of files of a union.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use lazyrun_fs::union::{Caller, ROOT, Union};
use nix::errno::Errno;

use crate::union_support::{case, get_flags, set_flags};

const NO_DUMP: u32 = 0x40;
const NO_ATIME: u32 = 0x80;
const SYNC: u32 = 0x8;
const APPEND: u32 = 0x20;
const IMMUTABLE: u32 = 0x10;

#[test]
fn inode_flags_are_those_of_the_real_file() {
    let case = case(|l| {
        fs::write(l.join("f"), "text").unwrap();
        fs::create_dir(l.join("d")).unwrap();
        set_flags(&l.join("f"), get_flags(&l.join("f")).unwrap() | NO_ATIME).unwrap();
    });
    let union = case.mount();
    for name in ["f", "d"] {
        let (at, lower, upper) =
            (union.at.join(name), case.lower.join(name), case.site.path("upper").join(name));
        let before = get_flags(&lower).unwrap();
        assert_eq!(get_flags(&at).unwrap(), before);
        set_flags(&at, before | NO_DUMP).unwrap();
        assert_eq!(get_flags(&at).unwrap(), before | NO_DUMP);
        assert_eq!(get_flags(&upper).unwrap() & NO_DUMP, NO_DUMP);
        assert_eq!(get_flags(&lower).unwrap(), before, "the lower file is not touched");
        // These would keep the upper directory from being removed.
        for flag in [APPEND, IMMUTABLE] {
            assert_eq!(set_flags(&at, before | NO_DUMP | flag), Err(Errno::EOPNOTSUPP));
        }
        assert_eq!(get_flags(&at).unwrap(), before | NO_DUMP);
    }
    assert_eq!(fs::read(union.at.join("f")).unwrap(), b"text");
}

/// Overlayfs takes sync and no atime along, and nothing else.
#[test]
fn copy_up_keeps_the_flags_that_overlayfs_keeps() {
    let flags_of = |kernel: bool| {
        let case = case(|l| {
            fs::create_dir(l.join("d")).unwrap();
            for name in ["f", "d/g", "d/none"] {
                fs::write(l.join(name), "text").unwrap();
            }
            // The directory last: what is made in it would get its flags.
            for (name, flags) in [("f", SYNC | NO_DUMP), ("d/g", NO_ATIME), ("d", SYNC | NO_ATIME)] {
                set_flags(&l.join(name), get_flags(&l.join(name)).unwrap() | flags).unwrap();
            }
        });
        let union = if kernel { case.kernel() } else { case.mount() };
        ["d", "f", "d/g", "d/none"].map(|name| {
            fs::set_permissions(union.at.join(name), fs::Permissions::from_mode(0o700)).unwrap();
            let upper = get_flags(&case.site.path("upper").join(name)).unwrap();
            assert_eq!(get_flags(&union.at.join(name)).unwrap(), upper, "{name}");
            upper & (SYNC | NO_ATIME | NO_DUMP)
        })
    };
    assert_eq!(flags_of(false), flags_of(true));
    assert_eq!(flags_of(false), [SYNC | NO_ATIME, SYNC, NO_ATIME, 0]);
}

#[test]
fn inode_flags_are_the_owners_to_set() {
    let case = case(|l| {
        fs::write(l.join("f"), "text").unwrap();
        std::os::unix::fs::chown(l.join("f"), Some(7), Some(8)).unwrap();
    });
    let union = Union::open(case.config()).unwrap();
    let (node, _) = union.lookup(&union.node(ROOT).unwrap(), c"f").unwrap().unwrap();
    let flags = union.flags(&node).unwrap() | NO_DUMP;
    let set = |uid| union.set_flags(&node, flags, Caller { uid, gid: uid, pid: 0 });
    assert_eq!(set(9), Err(Errno::EPERM));
    assert!(!case.site.path("upper/f").exists(), "nothing was copied up");
    set(7).unwrap();
    assert_eq!(union.flags(&node).unwrap(), flags);
    assert_eq!(union.extended_flags(&node).unwrap().len(), lazyrun_fs::union::EXTENDED_FLAGS);
}

#[test]
fn other_controls_are_refused() {
    let case = case(|l| fs::write(l.join("f"), "text").unwrap());
    let union = case.mount();
    let file = File::open(union.at.join("f")).unwrap();
    // EXT4_IOC_GETVERSION: the upper filesystem's own are not passed on.
    let mut out: libc::c_long = 0;
    // SAFETY: an open descriptor, and more than what is written to.
    let ret = unsafe { libc::ioctl(file.as_raw_fd(), 0x8008_6603, &raw mut out) };
    assert_eq!(Errno::result(ret), Err(Errno::ENOTTY));
    let file = OpenOptions::new().write(true).open(union.at.join("f")).unwrap();
    let from = File::open(case.lower.join("f")).unwrap();
    // SAFETY: FICLONE takes two descriptors.
    let ret = unsafe { libc::ioctl(file.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    assert!(matches!(Errno::result(ret), Err(Errno::EOPNOTSUPP | Errno::EXDEV)), "{ret}: cp(1) copies then");
}
