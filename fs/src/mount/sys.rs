//! The mount system calls as thin, safe functions on file descriptors.
//!
//! nix has only mount(2) and umount2(2); the calls that make detached mounts (fsopen and what
//! belongs to it, Linux 5.2) are called by number.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_int, c_long, c_uint};

const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_SET_FD: c_uint = 5;
const FSCONFIG_CMD_CREATE: c_uint = 6;
const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const OPEN_TREE_CLONE: c_uint = 1;
const OPEN_TREE_CLOEXEC: c_uint = libc::O_CLOEXEC as c_uint;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 4;

const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;

/// The argument of mount_setattr(2), `MOUNT_ATTR_SIZE_VER0`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn check(ret: c_long) -> io::Result<c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn owned(ret: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(ret)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn fsopen(fs_type: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the pointer is a NUL-terminated string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, fs_type.as_ptr(), FSOPEN_CLOEXEC) })
}

pub(super) fn fsconfig_flag(ctx: BorrowedFd<'_>, key: &CStr) -> io::Result<()> {
    let null = ptr::null::<libc::c_char>();
    // SAFETY: `key` is NUL-terminated; SET_FLAG takes neither value nor aux.
    let ret = unsafe {
        libc::syscall(libc::SYS_fsconfig, ctx.as_raw_fd(), FSCONFIG_SET_FLAG, key.as_ptr(), null, 0 as c_int)
    };
    check(ret).map(drop)
}

pub(super) fn fsconfig_string(ctx: BorrowedFd<'_>, key: &CStr, value: &CStr) -> io::Result<()> {
    // SAFETY: both strings are NUL-terminated and outlive the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            ctx.as_raw_fd(),
            FSCONFIG_SET_STRING,
            key.as_ptr(),
            value.as_ptr(),
            0 as c_int,
        )
    };
    check(ret).map(drop)
}

pub(super) fn fsconfig_fd(ctx: BorrowedFd<'_>, key: &CStr, fd: BorrowedFd<'_>) -> io::Result<()> {
    let null = ptr::null::<libc::c_char>();
    // SAFETY: `key` is NUL-terminated; SET_FD takes its value in aux.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            ctx.as_raw_fd(),
            FSCONFIG_SET_FD,
            key.as_ptr(),
            null,
            fd.as_raw_fd(),
        )
    };
    check(ret).map(drop)
}

pub(super) fn fsconfig_create(ctx: BorrowedFd<'_>) -> io::Result<()> {
    let null = ptr::null::<libc::c_char>();
    // SAFETY: CMD_CREATE takes no key, value or aux.
    let ret = unsafe {
        libc::syscall(libc::SYS_fsconfig, ctx.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0 as c_int)
    };
    check(ret).map(drop)
}

pub(super) fn fsmount(ctx: BorrowedFd<'_>, attrs: u64) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, ctx.as_raw_fd(), FSMOUNT_CLOEXEC, attrs as c_uint) })
}

pub(super) fn clone_tree(tree: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as c_uint;
    // SAFETY: the path is an empty NUL-terminated string.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, tree.as_raw_fd(), c"".as_ptr(), flags) })
}

pub(super) fn move_mount(tree: BorrowedFd<'_>, target: &CStr) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated and outlive the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(ret).map(drop)
}

pub(super) fn mount_setattr(tree: BorrowedFd<'_>, set: u64, clear: u64) -> io::Result<()> {
    setattr(tree, &MountAttr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 })
}

pub(super) fn set_idmap(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = u64::try_from(namespace.as_raw_fd()).unwrap_or(u64::MAX);
    setattr(tree, &MountAttr { attr_set: MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd })
}

fn setattr(tree: BorrowedFd<'_>, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: `attr` lives across the call and the size passed is its own.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as c_uint,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    check(ret).map(drop)
}

/// Device number (major, minor) of the filesystem behind `fd`, without asking the filesystem.
pub(super) fn device(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let mut buf = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is empty and NUL-terminated, and `buf` is as large as the kernel's struct.
    // The empty mask with DONT_SYNC keeps FUSE from sending a GETATTR to the very process that asks.
    let ret = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC,
            0,
            buf.as_mut_ptr(),
        )
    };
    check(c_long::from(ret))?;
    // SAFETY: zeroed is a valid statx, and the kernel filled it in.
    let st = unsafe { buf.assume_init() };
    Ok((st.stx_dev_major, st.stx_dev_minor))
}
