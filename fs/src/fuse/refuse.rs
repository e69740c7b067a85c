//! Refusing what nobody can answer: who holds a connection whose server is gone, and does not come back, answers every
//! waiting request with EIO. A reader that waits behind EROFS could not even be killed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use super::MAX_READ;
use super::journal::Journal;
use super::protocol::abi::InHeader;
use super::wire;

/// Requests that are looked at before the caller is at work again.
const AT_A_TIME: usize = 256;

nix::ioctl_read!(fuse_dev_clone, 229, 0, u32);

/// A second server of a connection, which answers everything with EIO. Dropping it changes nothing for the first.
#[derive(Debug)]
pub struct Refuser {
    // Of its own, because reading must not block here, while others may well wait on theirs.
    clone: OwnedFd,
}

/// Where requests are read before they are refused; one is enough for all connections.
#[derive(Debug)]
pub struct RefusedRequest(Vec<u8>);

impl Default for RefusedRequest {
    fn default() -> Self {
        // As large as the kernel wants it; only its first page is touched.
        Self(vec![0; MAX_READ as usize + 4096])
    }
}

impl Refuser {
    /// For the connection behind a `/dev/fuse` descriptor.
    ///
    /// # Errors
    /// That the device can't be opened once more, or that the connection has ended.
    pub fn new(dev: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let clone =
            std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/fuse")?;
        let mut source = u32::try_from(dev.as_raw_fd()).map_err(io::Error::other)?;
        // SAFETY: the request reads one u32, the number of an open descriptor.
        unsafe { fuse_dev_clone(clone.as_raw_fd(), &raw mut source) }?;
        Ok(Self { clone: clone.into() })
    }

    /// Refuses requests that wait now, not without end, and returns how many. Call it again when the descriptor is
    /// readable.
    ///
    /// # Errors
    /// `ENODEV` when the connection has ended, else the device's.
    pub fn refuse_waiting(&self, buffer: &mut RefusedRequest) -> io::Result<usize> {
        let buffer = &mut buffer.0;
        let mut refused = 0;
        // Readers that try again at once would keep the caller here for ever.
        for _ in 0..AT_A_TIME {
            let n = match nix::unistd::read(&self.clone, buffer) {
                Ok(n) => n,
                Err(Errno::EAGAIN) => return Ok(refused),
                Err(Errno::ENOENT | Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            };
            let Some(header) = InHeader::parse(&buffer[..n]) else { continue };
            if header.wants_answer() {
                wire::answer(&self.clone, header.unique, libc::EIO, &[])?;
                refused += 1;
            }
        }
        Ok(refused)
    }
}

impl AsFd for Refuser {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.clone.as_fd()
    }
}

/// Brings back what a server that is gone had taken and not answered: with a journal it is refused at once, else the
/// kernel is asked to hand it out again (Linux 6.9). No server may be at work on a connection with a journal.
///
/// # Errors
/// That the journal can't be read, or the device's.
pub fn recall_unanswered(dev: BorrowedFd<'_>, journal: Option<OwnedFd>) -> io::Result<()> {
    let Some(journal) = journal else {
        return match wire::ask_to_resend(dev) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        };
    };
    let journal = Journal::open(journal)?;
    for taken in journal.unanswered() {
        wire::answer(dev, taken.header.unique, libc::EIO, &[])?;
        journal.clear(taken.slot);
    }
    Ok(())
}
