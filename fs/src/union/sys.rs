//! System calls on real files. Every file is named by one component below an open directory and never through
//! a symlink, or by a descriptor of its own.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, readlinkat, renameat2};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, UtimensatFlags, fchmodat, fstatat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};

/// What operations of the union answer: the errno that the caller gets to see.
pub type Result<T> = std::result::Result<T, Errno>;

/// A directory that is held open to name files in it.
pub(super) type Dir = Arc<OwnedFd>;

/// How a real file is reached.
#[derive(Clone, Debug)]
pub(super) enum Real {
    /// A name in a directory.
    Named(Dir, CString),
    /// A descriptor (`O_PATH`) of the file itself, for one that may have no name any more.
    Held(Arc<OwnedFd>),
}

/// The file's type bits of `st_mode`.
pub(super) fn kind_of(st: &FileStat) -> u32 {
    st.st_mode & libc::S_IFMT
}

pub(super) fn is_dir(st: &FileStat) -> bool {
    kind_of(st) == libc::S_IFDIR
}

/// A character device 0:0: what overlayfs hides a name with.
pub(super) fn is_whiteout(st: &FileStat) -> bool {
    kind_of(st) == libc::S_IFCHR && st.st_rdev == 0
}

/// Attributes of a name in a directory; `None` if there is no such name.
pub(super) fn stat_at(dir: &OwnedFd, name: &CStr) -> Result<Option<FileStat>> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(st) => Ok(Some(st)),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Opens a directory to name files in it.
pub(super) fn open_dir(dir: &OwnedFd, name: &CStr) -> Result<Dir> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(dir, name, flags, Mode::empty()).map(Arc::new)
}

/// Renames within the upper layer's filesystem.
pub(super) fn rename(from: (&OwnedFd, &CStr), to: (&OwnedFd, &CStr), flags: RenameFlags) -> Result<()> {
    renameat2(from.0, from.1, to.0, to.1, flags)
}

/// `/proc/self/fd/N`: the path of what a descriptor refers to.
fn fd_path(fd: &OwnedFd) -> CString {
    to_c(format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes())
}

/// Another descriptor (`O_PATH`) of an open file.
pub(super) fn hold_open(fd: &OwnedFd) -> Result<Arc<OwnedFd>> {
    openat(fd, fd_path(fd).as_c_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map(Arc::new)
}

/// Names come from the kernel and never hold a NUL; one that did would name nothing.
pub(super) fn to_c(bytes: Vec<u8>) -> CString {
    CString::new(bytes).unwrap_or_default()
}

impl Real {
    pub(super) fn named(dir: &Dir, name: &CStr) -> Self {
        Real::Named(Arc::clone(dir), name.to_owned())
    }

    pub(super) fn stat(&self) -> Result<FileStat> {
        match self {
            Real::Named(dir, name) => fstatat(dir, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW),
            Real::Held(fd) => fstatat(fd, c"", AtFlags::AT_EMPTY_PATH),
        }
    }

    /// Opens the file itself, never what a symlink points to. `flags` must not create.
    pub(super) fn open(&self, flags: OFlag) -> Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC;
        match self {
            Real::Named(dir, name) => openat(dir, name.as_c_str(), flags | OFlag::O_NOFOLLOW, Mode::empty()),
            Real::Held(fd) => openat(fd, fd_path(fd).as_c_str(), flags, Mode::empty()),
        }
    }

    /// A descriptor that stays when the name goes.
    pub(super) fn hold(&self) -> Result<Arc<OwnedFd>> {
        match self {
            Real::Named(..) => self.open(OFlag::O_PATH).map(Arc::new),
            Real::Held(fd) => Ok(Arc::clone(fd)),
        }
    }

    pub(super) fn read_link(&self) -> Result<Vec<u8>> {
        use std::os::unix::ffi::OsStringExt;
        match self {
            Real::Named(dir, name) => readlinkat(dir, name.as_c_str()),
            Real::Held(fd) => readlinkat(fd, c""),
        }
        .map(OsStringExt::into_vec)
    }

    pub(super) fn chmod(&self, mode: u32) -> Result<()> {
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        match self {
            Real::Named(dir, name) => fchmodat(dir, name.as_c_str(), mode, FchmodatFlags::NoFollowSymlink),
            Real::Held(fd) => fchmodat(fd, fd_path(fd).as_c_str(), mode, FchmodatFlags::FollowSymlink),
        }
    }

    pub(super) fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        match self {
            Real::Named(dir, name) => fchownat(dir, name.as_c_str(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW),
            Real::Held(fd) => fchownat(fd, c"", uid, gid, AtFlags::AT_EMPTY_PATH),
        }
    }

    pub(super) fn set_times(&self, atime: &TimeSpec, mtime: &TimeSpec) -> Result<()> {
        match self {
            Real::Named(dir, name) => {
                utimensat(dir, name.as_c_str(), atime, mtime, UtimensatFlags::NoFollowSymlink)
            }
            Real::Held(fd) => {
                utimensat(fd, fd_path(fd).as_c_str(), atime, mtime, UtimensatFlags::FollowSymlink)
            }
        }
    }

    /// The path by which the xattr calls reach the file, and whether its last component is to be followed
    /// (only where that is the link of a descriptor, which ends at the file whatever it is).
    fn xattr_path(&self) -> (CString, bool) {
        match self {
            Real::Named(dir, name) => {
                let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
                path.extend_from_slice(name.as_bytes());
                (to_c(path), false)
            }
            Real::Held(fd) => (fd_path(fd), true),
        }
    }

    /// Reads an attribute into `buf`; an empty one asks for the size.
    pub(super) fn get_xattr(&self, name: &CStr, buf: &mut [u8]) -> Result<usize> {
        let (path, follow) = self.xattr_path();
        let call = if follow { libc::getxattr } else { libc::lgetxattr };
        // SAFETY: the strings end with NUL; the kernel writes at most `buf.len()` bytes to `buf`.
        let n = unsafe { call(path.as_ptr(), name.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
        Errno::result(n).map(|n| n as usize)
    }

    /// The names of all attributes, each ended by NUL.
    pub(super) fn list_xattr(&self) -> Result<Vec<u8>> {
        let (path, follow) = self.xattr_path();
        let call = if follow { libc::listxattr } else { libc::llistxattr };
        grow(|buf: &mut [u8]| {
            // SAFETY: the path ends with NUL; the kernel writes at most `buf.len()` bytes to `buf`.
            let n = unsafe { call(path.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
            Errno::result(n).map(|n| n as usize)
        })
    }

    pub(super) fn set_xattr(&self, name: &CStr, value: &[u8], flags: i32) -> Result<()> {
        let (path, follow) = self.xattr_path();
        let call = if follow { libc::setxattr } else { libc::lsetxattr };
        // SAFETY: the strings end with NUL; the kernel reads `value.len()` bytes from `value`.
        let ret = unsafe { call(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
        Errno::result(ret).map(drop)
    }

    pub(super) fn remove_xattr(&self, name: &CStr) -> Result<()> {
        let (path, follow) = self.xattr_path();
        let call = if follow { libc::removexattr } else { libc::lremovexattr };
        // SAFETY: both strings end with NUL.
        Errno::result(unsafe { call(path.as_ptr(), name.as_ptr()) }).map(drop)
    }

    /// The whole value of an attribute; `None` if there is none or the filesystem has no such thing.
    pub(super) fn xattr(&self, name: &CStr) -> Result<Option<Vec<u8>>> {
        match grow(|buf| self.get_xattr(name, buf)) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Calls `read` with a buffer that is large enough: Linux bounds values and lists to 64 KiB.
fn grow(read: impl Fn(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    let mut small = [0u8; 256];
    match read(&mut small) {
        Ok(n) => return Ok(small[..n].to_vec()),
        Err(Errno::ERANGE) => {}
        Err(e) => return Err(e),
    }
    let mut buf = vec![0u8; 64 << 10];
    let n = read(&mut buf)?;
    buf.truncate(n);
    Ok(buf)
}
