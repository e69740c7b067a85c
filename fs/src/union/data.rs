//! Copying a file's contents.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, ftruncate, lseek64};

use super::sys::Result;

/// Bytes per system call: enough to be cheap, little enough to be interrupted.
const STEP: u64 = 64 << 20;

mod ioctl {
    nix::ioctl_write_int!(ficlone, 0x94, 9);
}

/// Copies the first `size` bytes, sharing blocks where the filesystem can and keeping holes.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd, size: u64, whole: bool) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    // SAFETY: FICLONE takes a descriptor by value and touches no memory of ours.
    if whole && unsafe { ioctl::ficlone(to.as_raw_fd(), from.as_raw_fd() as u64) }.is_ok() {
        return Ok(());
    }
    let mut at = 0;
    while at < size {
        let (start, end) = next_data(from, at, size);
        copy_range(from, to, start, end)?;
        at = end.max(start);
    }
    // A hole at the end.
    ftruncate(to, i64::try_from(size).map_err(|_| Errno::EFBIG)?)
}

/// The next run of data at or after `at`; empty at `size` if there is none.
fn next_data(from: &OwnedFd, at: u64, size: u64) -> (u64, u64) {
    if at == 0 && size <= 4096 {
        return (0, size);
    }
    let seek = |offset: u64, whence| {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        lseek64(from, offset, whence).map(|n| u64::try_from(n).unwrap_or(0))
    };
    match seek(at, Whence::SeekData) {
        Ok(start) if start < size => {
            let end = seek(start, Whence::SeekHole).unwrap_or(size);
            (start, end.clamp(start + 1, size))
        }
        Ok(_) | Err(Errno::ENXIO) => (size, size),
        Err(_) => (at, size),
    }
}

fn copy_range(from: &OwnedFd, to: &OwnedFd, start: u64, end: u64) -> Result<()> {
    let mut at = start;
    while at < end {
        let len = usize::try_from((end - at).min(STEP)).unwrap_or(1 << 20);
        let pos = i64::try_from(at).map_err(|_| Errno::EFBIG)?;
        let (mut off_in, mut off_out) = (pos, pos);
        match copy_file_range(from, Some(&mut off_in), to, Some(&mut off_out), len) {
            // Shorter than it said it was: somebody else truncates a lower layer.
            Ok(0) => return Ok(()),
            Ok(n) => at += n as u64,
            Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EPERM) => {
                return copy_by_hand(from, to, at, end);
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &OwnedFd, to: &OwnedFd, start: u64, end: u64) -> Result<()> {
    let mut buf = vec![0u8; 1 << 20];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buf.len());
        let pos = i64::try_from(at).map_err(|_| Errno::EFBIG)?;
        let n = pread(from, &mut buf[..want], pos)?;
        if n == 0 {
            return Ok(());
        }
        write_all(to, &buf[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

/// Writes all of `data` at `offset`.
pub(super) fn write_all(to: &OwnedFd, data: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < data.len() {
        let pos = i64::try_from(offset + done as u64).map_err(|_| Errno::EFBIG)?;
        match pwrite(to, &data[done..], pos) {
            Ok(0) => return Err(Errno::EIO),
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
