//! The journal of a FUSE connection: the requests that a server took from the kernel and has not answered.
//!
//! Kernels before 6.9 do not hand out a request twice, so one that a killed server had taken would wait for ever. The
//! journal is a file in memory whose descriptor the keeper holds. The kernel itself copies a request into its slot in
//! the call that takes it from the queue, and a killed process ends such a call first: at no moment is a request in
//! neither. Its slot is cleared after the answer was written; one that was answered and not cleared is answered a second
//! time, which the kernel refuses.

use std::io::{self, IoSliceMut};
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::protocol::abi::InHeader;

/// Requests that can be unanswered at the same time. More stay in the kernel's queue until there is room.
pub(super) const SLOTS: usize = 1024;
/// Bytes of a slot. A request of a read-only filesystem has two names of at most 255 bytes at most.
const SLOT: usize = 512;
const SIZE: usize = SLOTS * SLOT;

/// A journal, shared with whoever else holds its descriptor.
#[derive(Debug)]
pub(super) struct Journal {
    fd: OwnedFd,
    base: NonNull<libc::c_void>,
}

// SAFETY: the mapping is not tied to a thread. A slot has one user at a time: its length is written by the kernel while
// the slot belongs to the thread that takes requests, and by `clear` when it belongs to the one that answered.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

/// A request that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) slot: usize,
    pub(super) header: InHeader,
    /// The whole request, or less of it if it did not fit into a slot and was found after a crash.
    pub(super) bytes: Vec<u8>,
}

impl Taken {
    /// Whether all of the request is there.
    pub(super) fn is_whole(&self) -> bool {
        self.bytes.len() == self.header.len as usize
    }
}

impl Journal {
    /// An empty journal.
    pub(super) fn create() -> io::Result<Self> {
        let fd = memfd_create(c"lazyrun-requests", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&fd, SIZE as i64)?;
        Self::open(fd)
    }

    /// The journal behind a descriptor.
    pub(super) fn open(fd: OwnedFd) -> io::Result<Self> {
        // A shorter file would kill the process that touches the end of the mapping.
        if nix::sys::stat::fstat(&fd)?.st_size != SIZE as i64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a journal of requests has an odd size"));
        }
        let size = NonZeroUsize::new(SIZE).ok_or(io::ErrorKind::InvalidInput)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Populated: the kernel gives up a request whose slot it would have to find a page for while the process is
        // being killed.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice, as long as the file.
        let base = unsafe { mmap(None, size, rights, flags, &fd, 0) }?;
        Ok(Self { fd, base })
    }

    /// A duplicate of the descriptor.
    pub(super) fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    fn slot(&self, slot: usize) -> *mut u8 {
        assert!(slot < SLOTS, "no slot {slot}");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().cast::<u8>().add(slot * SLOT) }
    }

    /// Takes the next request from the kernel into a slot that is free; what does not fit goes into `rest`, which has
    /// room for the largest request that was negotiated. Blocks until there is one.
    pub(super) fn take(&self, dev: BorrowedFd<'_>, slot: usize, rest: &mut [u8]) -> io::Result<Taken> {
        // SAFETY: the slot is free, so that nobody else looks at it before this returns.
        let start = unsafe { std::slice::from_raw_parts_mut(self.slot(slot), SLOT) };
        let n = nix::sys::uio::readv(dev, &mut [IoSliceMut::new(start), IoSliceMut::new(rest)])?;
        let mut bytes = start[..n.min(SLOT)].to_vec();
        bytes.extend_from_slice(&rest[..n.saturating_sub(SLOT)]);
        let header = InHeader::parse(&bytes).filter(|header| header.len as usize == n);
        let odd = || io::Error::new(io::ErrorKind::InvalidData, "the kernel sent a request of an odd length");
        Ok(Taken { slot, header: header.ok_or_else(odd)?, bytes })
    }

    /// Forgets the request in a slot.
    pub(super) fn clear(&self, slot: usize) {
        // SAFETY: the request's length, aligned as slots are, within the mapping, which nobody else writes now.
        let len = unsafe { AtomicU32::from_ptr(self.slot(slot).cast()) };
        len.store(0, Ordering::Release);
    }

    /// What a server that is gone left unanswered. Nobody may be taking requests meanwhile.
    pub(super) fn unanswered(&self) -> Vec<Taken> {
        (0..SLOTS).filter_map(|slot| self.left(slot)).collect()
    }

    fn left(&self, slot: usize) -> Option<Taken> {
        // SAFETY: within the mapping; nobody writes there, as the caller promises.
        let bytes = unsafe { std::slice::from_raw_parts(self.slot(slot), SLOT) };
        let header = InHeader::parse(bytes).filter(|header| header.len as usize >= size_of::<InHeader>())?;
        Some(Taken { slot, header, bytes: bytes[..SLOT.min(header.len as usize)].to_vec() })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; no slice of it is left.
        let _ = unsafe { munmap(self.base, SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn request(unique: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![7; len];
        bytes[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
        bytes[4..8].copy_from_slice(&15u32.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        bytes
    }

    #[test]
    fn what_was_taken_and_not_cleared_is_found_by_the_next_server() {
        let (kernel, dev) = UnixDatagram::pair().unwrap();
        let journal = Journal::create().unwrap();
        let mut rest = vec![0; 4096];
        for (slot, len) in [(3, 80), (0, 300), (SLOTS - 1, SLOT + 100)] {
            kernel.send(&request(slot as u64, len)).unwrap();
            let taken = journal.take(dev.as_fd(), slot, &mut rest).unwrap();
            assert!(taken.is_whole() && taken.bytes == request(slot as u64, len));
        }
        journal.clear(0);
        let next = Journal::open(journal.try_clone_fd().unwrap()).unwrap();
        drop(journal);
        let left = next.unanswered();
        assert_eq!(left.iter().map(|t| t.header.unique).collect::<Vec<_>>(), [3, SLOTS as u64 - 1]);
        assert!(left[0].is_whole() && left[0].bytes == request(3, 80));
        assert!(!left[1].is_whole() && left[1].slot == SLOTS - 1);
    }

    #[test]
    fn an_odd_file_or_request_is_refused() {
        let file = tempfile::tempfile().unwrap();
        (&file).write_all(b"short").unwrap();
        assert_eq!(Journal::open(file.into()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (kernel, dev) = UnixDatagram::pair().unwrap();
        let journal = Journal::create().unwrap();
        for odd in [&request(1, 80)[..60], b"x"] {
            kernel.send(odd).unwrap();
            let error = journal.take(dev.as_fd(), 0, &mut [0; 64]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
