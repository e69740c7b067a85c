//! Serving through a [`Journal`], for kernels that cannot resend (before 6.9).
//!
//! fuser reads requests where it likes; here they have to be read into the journal. So the session gets one end of a
//! socket pair for its `/dev/fuse`, one thread takes requests from the kernel and passes them on, and another brings the
//! answers back. Answers to READ, the large ones, go straight to the kernel ([`Answer`](super::content::Answer)).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};

use super::MAX_READ;
use super::journal::{Journal, SLOTS, Taken};
use super::wire;

/// What a request may have beside the bytes of a WRITE, for which the kernel wants room in every buffer.
const HEADERS: usize = 4096;
/// Entries in one answer to READDIR or READDIRPLUS: what they take at most fits into a message of the socket.
pub(super) const MAX_ENTRIES: usize = 256;

/// The kernel's side of a session that reads through a journal.
#[derive(Debug)]
pub(super) struct Relay {
    journal: Journal,
    dev: OwnedFd,
    open: Mutex<Open>,
    room: Condvar,
}

/// Which slots hold a request.
#[derive(Debug)]
struct Open {
    slots: HashMap<u64, usize>,
    free: Vec<usize>,
}

/// A socket pair for a session: the end that stands for the kernel, and the session's.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

impl Relay {
    /// Starts to relay between the kernel and the session behind `session`, beginning with what an earlier server left
    /// in the journal. It ends with the connection.
    pub(super) fn start(journal: Journal, dev: OwnedFd, session: OwnedFd) -> io::Result<Arc<Self>> {
        let mut left = journal.unanswered();
        // One that was taken and not yet cleared gets no answer, with which its slot would be cleared.
        left.retain(|taken| {
            let open = taken.header.wants_answer();
            if !open {
                journal.clear(taken.slot);
            }
            open
        });
        let mut open = Open { slots: HashMap::new(), free: (0..SLOTS).rev().collect() };
        open.free.retain(|slot| left.iter().all(|taken| taken.slot != *slot));
        open.slots.extend(left.iter().map(|taken| (taken.header.unique, taken.slot)));
        let relay = Arc::new(Self { journal, dev, open: Mutex::new(open), room: Condvar::new() });
        let session = Arc::new(session);
        let (requests, answers) = (Arc::clone(&relay), Arc::clone(&relay));
        let socket = Arc::clone(&session);
        std::thread::Builder::new().name("fuse-requests".into()).spawn(move || {
            if let Err(error) = requests.requests(left, &socket) {
                tracing::debug!(%error, "requests are no longer relayed");
            }
            // Without requests there is nothing to serve.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        })?;
        std::thread::Builder::new().name("fuse-answers".into()).spawn(move || answers.answers(&session))?;
        Ok(relay)
    }

    /// A duplicate of the journal's descriptor, for the keeper.
    pub(super) fn journal_fd(&self) -> io::Result<OwnedFd> {
        self.journal.try_clone_fd()
    }

    /// Answers a request. One whose answer the kernel refuses stays open.
    pub(super) fn answer(&self, unique: u64, errno: i32, bytes: &[u8]) {
        match wire::answer(&self.dev, unique, errno, bytes) {
            Ok(()) => self.settle(unique),
            Err(error) => tracing::error!(unique, %error, "the kernel refuses the answer to a FUSE request"),
        }
    }

    fn requests(&self, left: Vec<Taken>, session: &OwnedFd) -> io::Result<()> {
        for taken in left {
            self.pass_on(&taken, session)?;
        }
        // Only its first pages are ever touched.
        let mut rest = vec![0; MAX_READ as usize + HEADERS];
        loop {
            let slot = self.free_slot();
            let taken = match self.journal.take(self.dev.as_fd(), slot, &mut rest) {
                Ok(taken) => taken,
                // Whoever asked was interrupted before the request was read, or this thread was.
                Err(e) if matches!(raw(&e), Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => {
                    self.put_back(slot);
                    continue;
                }
                Err(e) if raw(&e) == Errno::ENODEV => return Ok(()),
                Err(e) => return Err(e),
            };
            if !taken.header.wants_answer() {
                // Servers that are read-only forget nothing and cannot be interrupted.
                self.journal.clear(slot);
                self.put_back(slot);
                continue;
            }
            self.lock().slots.insert(taken.header.unique, slot);
            self.pass_on(&taken, session)?;
        }
    }

    fn pass_on(&self, taken: &Taken, session: &OwnedFd) -> io::Result<()> {
        if !taken.is_whole() {
            self.answer(taken.header.unique, libc::EIO, &[]);
            return Ok(());
        }
        match send(session.as_raw_fd(), &taken.bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::EMSGSIZE) => {
                self.answer(taken.header.unique, libc::EIO, &[]);
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn answers(&self, session: &OwnedFd) {
        let mut buffer = vec![0; MAX_READ as usize + HEADERS];
        loop {
            let n = match recv(session.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(0) => return,
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::debug!(%error, "answers are no longer relayed");
                    return;
                }
            };
            let Some(unique) = wire::answer_header(&buffer[..n]).map(|header| header.unique) else {
                continue;
            };
            // The rest of a READ that was answered directly.
            if !self.lock().slots.contains_key(&unique) {
                continue;
            }
            match nix::unistd::write(&self.dev, &buffer[..n]) {
                Ok(_) | Err(Errno::ENOENT) => self.settle(unique),
                Err(error) => {
                    tracing::error!(unique, %error, "the kernel refuses the answer to a FUSE request");
                    self.answer(unique, libc::EIO, &[]);
                }
            }
        }
    }

    // The answer was written, so that nobody needs the request any more.
    fn settle(&self, unique: u64) {
        let mut open = self.lock();
        let Some(slot) = open.slots.remove(&unique) else { return };
        self.journal.clear(slot);
        open.free.push(slot);
        drop(open);
        self.room.notify_one();
    }

    // Waits until there is one: what is not taken stays in the kernel's queue.
    fn free_slot(&self) -> usize {
        let mut open = self.lock();
        loop {
            if let Some(slot) = open.free.pop() {
                return slot;
            }
            open = self.room.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put_back(&self, slot: usize) {
        self.lock().free.push(slot);
        self.room.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn raw(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
