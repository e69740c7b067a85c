//! Inode flags: what lsattr(1) shows and chattr(1) sets.
//!
//! Those that tell the filesystem how to store a file are the real file's. Append-only and immutable can't be set:
//! on the real file they would keep the upper directory from being removed, and overlayfs, which keeps them in an
//! attribute of its own, can heed them only because it has the kernel's inode.

use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::FileStat;

use super::Union;
use super::create::Caller;
use super::node::Node;
use super::sys::{Real, Result, kind_of};

/// Bytes of `struct fsxattr`.
pub const EXTENDED_FLAGS: usize = 28;

/// The flags that can be changed, of `linux/fs.h`: compress, sync, no dump, no atime, no compression, dirsync, no
/// copy-on-write. None of them needs a right that we have and the caller may lack.
const CHANGEABLE: u32 = 0x4 | 0x8 | 0x40 | 0x80 | 0x400 | 0x1_0000 | 0x80_0000;

/// The flags that go with a file when it is copied up, as on overlayfs: sync, no atime.
const COPIED: u32 = 0x8 | 0x80;

mod ioctl {
    use super::{EXTENDED_FLAGS, size_of};

    // The numbers say `long`, but filesystems read and write an `int`.
    nix::ioctl_read_bad!(get_flags, nix::request_code_read!(b'f', 1, size_of::<libc::c_long>()), u32);
    nix::ioctl_write_ptr_bad!(set_flags, nix::request_code_write!(b'f', 2, size_of::<libc::c_long>()), u32);
    nix::ioctl_read!(get_extended, b'X', 31, [u8; EXTENDED_FLAGS]);
}

impl Union {
    /// The inode flags of a file or directory (`FS_IOC_GETFLAGS`).
    ///
    /// # Errors
    /// `ENOTTY` if it is something else, or the layer's filesystem has no flags.
    pub fn flags(&self, node: &Node) -> Result<u32> {
        self.with_open(node, get)
    }

    /// Gives a copy the flags that go with the file. What has none, and a filesystem that can't keep them, is no error.
    pub(super) fn copy_flags(&self, from: &Real, to: &Real, stat: &FileStat) {
        let without = || self.without_flags.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(kind_of(stat), libc::S_IFREG | libc::S_IFDIR) || without().contains(&stat.st_dev) {
            return;
        }
        match open(from).and_then(|fd| get(&fd)) {
            Ok(flags) if flags & COPIED == 0 => {}
            Ok(flags) => {
                let done = open(to).and_then(|fd| set(&fd, get(&fd)? | flags & COPIED));
                if let Err(error) = done {
                    tracing::debug!(%error, "inode flags are lost on copy-up");
                }
            }
            // Asking may take as long as the copy: another server answers for a view.
            Err(Errno::ENOTTY | Errno::ENOSYS | Errno::EOPNOTSUPP) => without().push(stat.st_dev),
            Err(_) => {}
        }
    }

    /// The same with project number and hints of the filesystem, as the kernel has them (`FS_IOC_FSGETXATTR`).
    ///
    /// # Errors
    /// As [`flags`](Self::flags).
    pub fn extended_flags(&self, node: &Node) -> Result<[u8; EXTENDED_FLAGS]> {
        self.with_open(node, |fd| {
            let mut out = [0; EXTENDED_FLAGS];
            // SAFETY: an open descriptor, and room for a `struct fsxattr`.
            unsafe { ioctl::get_extended(fd.as_raw_fd(), &raw mut out) }.map(|_| out)
        })
    }

    /// Sets the inode flags of a file or directory (`FS_IOC_SETFLAGS`).
    ///
    /// # Errors
    /// `EPERM` if the caller is neither root nor the owner, `EOPNOTSUPP` if others change than can be changed here, and
    /// as [`flags`](Self::flags).
    pub fn set_flags(&self, node: &Arc<Node>, flags: u32, caller: Caller) -> Result<()> {
        // Kernels before 5.13 leave it to us to ask.
        if caller.uid != 0 && caller.uid != self.attr(node)?.stat.st_uid {
            return Err(Errno::EPERM);
        }
        if (flags ^ self.flags(node)?) & !CHANGEABLE != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        self.copy_up(node)?;
        // What says how the upper file is stored is its own: the lower one may have been of another filesystem.
        let flags = self.flags(node)? & !CHANGEABLE | flags & CHANGEABLE;
        self.with_open(node, |fd| set(fd, flags))
    }

    fn with_open<T>(&self, node: &Node, f: impl FnOnce(&OwnedFd) -> Result<T>) -> Result<T> {
        // A device would be asked itself.
        if !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(Errno::ENOTTY);
        }
        f(&self.with_real(node, open)?)
    }
}

fn open(real: &Real) -> Result<OwnedFd> {
    real.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)
}

fn get(fd: &OwnedFd) -> Result<u32> {
    let mut flags = 0;
    // SAFETY: an open descriptor, and an `int` to write to.
    unsafe { ioctl::get_flags(fd.as_raw_fd(), &raw mut flags) }.map(|_| flags)
}

fn set(fd: &OwnedFd, flags: u32) -> Result<()> {
    // SAFETY: an open descriptor, and an `int` to read.
    unsafe { ioctl::set_flags(fd.as_raw_fd(), &raw const flags) }.map(drop)
}
