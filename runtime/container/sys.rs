//! Thin wrappers over system calls that neither std nor nix offer: the mount API on file descriptors,
//! clone3, pidfds. Each returns `io::Error` and owns the descriptors it makes.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const OPEN_TREE_CLONE: libc::c_long = 1;
const OPEN_TREE_CLOEXEC: libc::c_long = libc::O_CLOEXEC as libc::c_long;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_long = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_long = 0x40;
const FSOPEN_CLOEXEC: libc::c_long = 1;
const FSMOUNT_CLOEXEC: libc::c_long = 1;
const FSCONFIG_SET_FLAG: libc::c_long = 0;
const FSCONFIG_SET_STRING: libc::c_long = 1;
const FSCONFIG_CMD_CREATE: libc::c_long = 6;
const TIOCGPTPEER: libc::Ioctl = 0x5441;

/// `MOUNT_ATTR_*` flags of mount_setattr(2) and fsmount(2).
pub(crate) mod attr {
    pub(crate) const RDONLY: u64 = 0x1;
    pub(crate) const NOSUID: u64 = 0x2;
    pub(crate) const NODEV: u64 = 0x4;
    pub(crate) const NOEXEC: u64 = 0x8;
    pub(crate) const ATIME: u64 = 0x70;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const NOSYMFOLLOW: u64 = 0x0020_0000;
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns_fd: u64,
}

pub(crate) fn cstring(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn owned(ret: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(ret)?;
    // SAFETY: the kernel just returned this descriptor to us alone; descriptors fit in an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A detached copy of the mount that `path` is on, rooted at `path` (a directory or a file).
pub(crate) fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    open_tree(libc::AT_FDCWD, &cstring(path)?, recursive, 0)
}

/// As [`clone_tree`], of what `fd` refers to.
pub(crate) fn clone_tree_at(fd: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    open_tree(fd.as_raw_fd(), c"", recursive, libc::c_long::from(libc::AT_EMPTY_PATH))
}

fn open_tree(dir: RawFd, path: &CStr, recursive: bool, extra: libc::c_long) -> io::Result<OwnedFd> {
    let rec = if recursive { libc::c_long::from(libc::AT_RECURSIVE) } else { 0 };
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | rec | extra;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir, path.as_ptr(), flags) })
}

/// Attaches the detached mount `tree` on top of what `target` refers to.
pub(crate) fn move_mount(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both descriptors are open and the paths are static empty strings.
    let ret = unsafe {
        let (from, to) = (tree.as_raw_fd(), target.as_raw_fd());
        libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, c"".as_ptr(), flags)
    };
    check(ret).map(drop)
}

/// Changes attributes of the mount `fd` is the root of.
pub(crate) fn mount_setattr(fd: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> io::Result<()> {
    let rec = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = libc::c_long::from(libc::AT_EMPTY_PATH | rec);
    let size = size_of::<MountAttr>();
    // SAFETY: `attr` is a valid struct mount_attr of the size given.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attr as *const MountAttr,
            size,
        )
    };
    check(ret).map(drop)
}

/// A detached read-only mount of one file or directory: nothing can be written through it, whoever holds it.
pub(crate) fn readonly_tree(path: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::AsFd;
    let tree = clone_tree(path, false)?;
    mount_setattr(tree.as_fd(), false, &MountAttr { set: attr::RDONLY, ..MountAttr::default() })?;
    Ok(tree)
}

/// A new, detached filesystem mount. `options` are (name, value) as mount(8) data; `attrs` are `attr::*`.
pub(crate) fn fs_mount(
    fstype: &str,
    source: Option<&str>,
    options: &[(String, Option<String>)],
    sb_flags: &[&str],
    attrs: u64,
) -> io::Result<OwnedFd> {
    let c = |s: &str| CString::new(s).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let name = c(fstype)?;
    // SAFETY: `name` is NUL-terminated and outlives the call.
    let fs = owned(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) })?;
    if let Some(source) = source {
        fsconfig(&fs, FSCONFIG_SET_STRING, Some(c"source"), Some(&c(source)?))?;
    }
    for flag in sb_flags {
        fsconfig(&fs, FSCONFIG_SET_FLAG, Some(&c(flag)?), None)?;
    }
    for (key, value) in options {
        match value {
            Some(value) => fsconfig(&fs, FSCONFIG_SET_STRING, Some(&c(key)?), Some(&c(value)?))?,
            None => fsconfig(&fs, FSCONFIG_SET_FLAG, Some(&c(key)?), None)?,
        }
    }
    fsconfig(&fs, FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: `fs` is an open filesystem context.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, attrs) })
}

fn fsconfig(fs: &OwnedFd, cmd: libc::c_long, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
    let key = key.map_or(std::ptr::null(), CStr::as_ptr);
    let value = value.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: key and value are NULL or NUL-terminated strings that outlive the call, as the command wants.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), cmd, key, value, 0) }).map(drop)
}

/// What clone3 returned: in the parent the child's pid and pidfd, in the child nothing.
pub(crate) enum Cloned {
    Parent(i32, OwnedFd),
    Child,
}

/// Forks with the namespaces of `flags` (`CLONE_NEW*`), the child placed in the v2 `cgroup` if given.
///
/// # Safety
/// As fork(2): the caller must be single-threaded, and the child gets a copy of everything.
pub(crate) unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` is a valid struct clone_args; without CLONE_VM the child has its own copy of memory.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: CLONE_PIDFD made the kernel store a new descriptor for us.
    Ok(Cloned::Parent(pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// A pidfd for a process that is known to be alive or not yet reaped.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends `signal` to the process of `pidfd`; a process already gone is `ESRCH`.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let null: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a NULL siginfo is allowed and means the default one.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, null, 0) }).map(drop)
}

/// Sets close-on-exec on every descriptor from `first` up.
pub(crate) fn cloexec_from(first: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    check(ret).map(drop)
}

/// The other end of a pseudo-terminal, opened without any path.
pub(crate) fn pty_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a descriptor.
    owned(libc::c_long::from(unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) }))
}

/// Sets the window size of a terminal.
pub(crate) fn set_winsize(tty: BorrowedFd<'_>, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is a valid struct winsize for the call's duration.
    check(libc::c_long::from(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }))
        .map(drop)
}

/// One prctl(2) with one integer argument.
pub(crate) fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: only options that take integers are passed here.
    check(libc::c_long::from(unsafe { libc::prctl(option, value, 0, 0, 0) })).map(drop)
}

/// `fd` moved to a number of at least 10, close-on-exec, so that it survives the shuffling of 0..=5.
pub(crate) fn move_high(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer.
    owned(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10) }))
}

/// Takes over a descriptor that was inherited under a known number.
pub(crate) fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD on any number is harmless; it fails for closed ones.
    check(libc::c_long::from(unsafe { libc::fcntl(fd, libc::F_GETFD) }))?;
    // SAFETY: it is open, and by the protocol between parent and child it belongs to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A non-blocking inotify descriptor.
pub(crate) fn inotify() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(libc::c_long::from(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) }))
}

/// Adds a watch for the events of `mask` on `path`.
pub(crate) fn inotify_watch(inotify: BorrowedFd<'_>, path: &Path, mask: u32) -> io::Result<()> {
    let path = cstring(path)?;
    // SAFETY: `path` is NUL-terminated and outlives the call.
    let ret = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) };
    check(libc::c_long::from(ret)).map(drop)
}
