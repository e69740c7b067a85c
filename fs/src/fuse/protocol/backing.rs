//! Files that the kernel reads and writes instead of asking (passthrough, Linux 6.9).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::abi::BackingMap;

mod ioctl {
    use super::BackingMap;

    nix::ioctl_write_ptr!(open, 229, 1, BackingMap);
    nix::ioctl_write_ptr!(close, 229, 2, u32);
}

/// A file that the kernel was told of. It forgets it when this is dropped; files that are open by then stay so.
#[derive(Debug)]
pub(in crate::fuse) struct Backing {
    dev: Arc<OwnedFd>,
    id: i32,
}

impl Backing {
    /// Tells the kernel behind `dev` of an open file (`FUSE_DEV_IOC_BACKING_OPEN`).
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`, `ELOOP` for a file of a filesystem that is stacked too deeply.
    pub(in crate::fuse) fn open(dev: &Arc<OwnedFd>, file: &OwnedFd) -> io::Result<Self> {
        let map = BackingMap { fd: file.as_raw_fd(), ..BackingMap::default() };
        // SAFETY: both descriptors are open; the kernel reads the record.
        let id = unsafe { ioctl::open(dev.as_raw_fd(), &raw const map) }?;
        Ok(Self { dev: Arc::clone(dev), id })
    }

    /// The number that an answer to OPEN names it by.
    pub(in crate::fuse) fn id(&self) -> i32 {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let id = self.id.cast_unsigned();
        // SAFETY: the descriptor is open; the kernel reads the number. It fails only when the connection is gone.
        let _ = unsafe { ioctl::close(self.dev.as_raw_fd(), &raw const id) };
    }
}
