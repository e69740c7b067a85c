//! Open regular files.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, copy_file_range, fallocate};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, fdatasync, fsync, lseek64};

use super::Union;
use super::copyup::open_lower;
use super::create::Caller;
use super::node::Node;
use super::setattr::drop_set_ids;
use super::sys::{Real, Result};

/// What of the caller's open flags the real file is opened with. Appending is done by offset, and alignment for
/// direct I/O is nothing that requests keep.
pub(super) const KEPT_FLAGS: OFlag =
    OFlag::O_ACCMODE.union(OFlag::O_SYNC).union(OFlag::O_DSYNC).union(OFlag::O_NOATIME);

/// A regular file that somebody has opened.
#[derive(Debug)]
pub struct OpenFile {
    /// The file.
    pub node: Arc<Node>,
    fd: OwnedFd,
    writable: bool,
    /// Opened in a lower layer: after copy-up the upper file is read instead.
    lower: bool,
    upper: OnceLock<OwnedFd>,
}

impl OpenFile {
    pub(super) fn upper(node: Arc<Node>, fd: OwnedFd, flags: OFlag) -> Self {
        let writable = (flags & OFlag::O_ACCMODE) != OFlag::O_RDONLY;
        OpenFile { node, fd, writable, lower: false, upper: OnceLock::new() }
    }

    /// The descriptor, if it can be written to.
    pub fn writable(&self) -> Option<&OwnedFd> {
        self.writable.then_some(&self.fd)
    }

    /// Whether the file is in the upper layer, where it stays.
    pub fn is_upper(&self) -> bool {
        !self.lower
    }

    /// The descriptor to read from now.
    pub fn fd(&self) -> Result<&OwnedFd> {
        if !self.lower || !self.node.is_upper() {
            return Ok(&self.fd);
        }
        if let Some(fd) = self.upper.get() {
            return Ok(fd);
        }
        let fd = self.node.with(|real| real.open(OFlag::O_RDONLY))?;
        Ok(self.upper.get_or_init(|| fd))
    }

    /// Reads at most `buf.len()` bytes; fewer only at the end.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let fd = self.fd()?;
        let mut done = 0;
        while done < buf.len() {
            let pos = i64::try_from(offset + done as u64).map_err(|_| Errno::EINVAL)?;
            match pread(fd, &mut buf[done..], pos) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Writes; with `kill` the set-id bits go unless the caller may keep them.
    pub fn write(&self, data: &[u8], offset: u64, kill: Option<Caller>) -> Result<usize> {
        let fd = self.writable().ok_or(Errno::EBADF)?;
        let pos = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let n = pwrite(fd, data, pos)?;
        if let Some(caller) = kill {
            self.node.with(|real| drop_set_ids(real, caller))?;
        }
        Ok(n)
    }

    /// fallocate(2).
    pub fn allocate(&self, mode: i32, offset: u64, len: u64) -> Result<()> {
        let fd = self.writable().ok_or(Errno::EBADF)?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let number = |n: u64| i64::try_from(n).map_err(|_| Errno::EFBIG);
        fallocate(fd, mode, number(offset)?, number(len)?)
    }

    /// The next data or hole.
    pub fn seek(&self, offset: i64, whence: i32) -> Result<i64> {
        let whence = match whence {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(Errno::EINVAL),
        };
        lseek64(self.fd()?, offset, whence)
    }

    /// copy_file_range(2) into another file.
    pub fn copy_to(&self, offset: u64, to: &OpenFile, to_offset: u64, len: u64) -> Result<usize> {
        let number = |n: u64| i64::try_from(n).map_err(|_| Errno::EFBIG);
        let (mut off_in, mut off_out) = (number(offset)?, number(to_offset)?);
        let out = to.writable().ok_or(Errno::EBADF)?;
        let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
        copy_file_range(self.fd()?, Some(&mut off_in), out, Some(&mut off_out), len)
    }
}

impl Union {
    /// Opens a regular file. `flags` are those of open(2); to write is to copy up first.
    pub fn open_file(&self, node: &Arc<Node>, flags: i32, caller: Caller) -> Result<OpenFile> {
        let flags = OFlag::from_bits_truncate(flags);
        let truncate = flags.contains(OFlag::O_TRUNC);
        let writes = (flags & OFlag::O_ACCMODE) != OFlag::O_RDONLY;
        if writes || truncate {
            self.copy_up_data(node, truncate.then_some(0))?;
        }
        let kept = flags & (KEPT_FLAGS | OFlag::O_TRUNC);
        let upper = self.is_writable() && node.is_upper();
        let fd = node.with(|real| {
            let fd = if upper { open_upper(real, kept)? } else { open_lower(real)? };
            if truncate {
                drop_set_ids(real, caller)?;
            }
            Ok(fd)
        })?;
        let mut file = OpenFile::upper(Arc::clone(node), fd, flags);
        file.lower = !upper;
        Ok(file)
    }

    /// Makes a file durable.
    pub fn sync_file(&self, file: &OpenFile, data_only: bool) -> Result<()> {
        if self.config.volatile || !file.is_upper() {
            return Ok(());
        }
        if data_only { fdatasync(&file.fd) } else { fsync(&file.fd) }
    }
}

fn open_upper(real: &Real, flags: OFlag) -> Result<OwnedFd> {
    match real.open(flags) {
        Err(Errno::EPERM) if flags.contains(OFlag::O_NOATIME) => real.open(flags - OFlag::O_NOATIME),
        other => other,
    }
}
