//! Serving a mount: a fresh one, or one whose server died.
//!
//! fuser insists on an INIT handshake. For a connection that had its own long ago, it gets one over
//! a socket pair, and then the real descriptor is put under the session. Nothing of the negotiation needs
//! to be kept: each server asks for the same flags each time and depends on none of the answers.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{Config, Filesystem, InitFlags, KernelConfig, Session, SessionACL};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::journal::Journal;
use super::mount::{FuseError, abort_device};
use super::readonly::{Negotiated, ReadOnly, Server};
use super::relay::{self, Relay};
use super::stats::{Requests, StatsSnapshot};
use super::{MAX_READ, set_readahead, wire};
use crate::mount::device_of;

/// Readahead of both servers, in KiB. More saves little time when the bytes are local, and fetches what nobody
/// wants when they are not.
const READAHEAD_KIB: u32 = 128;

/// How to serve.
#[derive(Debug)]
pub struct ServeOptions {
    /// The connection was initialised before, by a server that is gone: take it over.
    pub adopt: bool,
    /// The journal of a connection that is taken over, if its first server made one
    /// ([`ServerHandle::journal_fd`]).
    pub journal: Option<OwnedFd>,
    /// Whether to rely on the kernel to resend requests, if it can. Otherwise a fresh connection gets a journal.
    pub resend: bool,
    /// Threads that read requests; reads are answered from elsewhere, so two are plenty.
    pub threads: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { adopt: false, journal: None, resend: true, threads: 2 }
    }
}

/// A running server. Dropping the handle changes nothing: the server lives until the last user of the mount
/// is gone or the process ends (and then the keeper's descriptor keeps the mount alive for a successor).
/// Only [`ServerHandle::abort`] takes a mount away from those who use it.
#[derive(Debug)]
pub struct ServerHandle {
    thread: JoinHandle<io::Result<()>>,
    dev: OwnedFd,
    device: (u32, u32),
    requests: Arc<Requests>,
    relay: Option<Arc<Relay>>,
}

/// Starts to serve the mount `tree` on its `/dev/fuse` descriptor. Returns when the kernel has its
/// answer to INIT (or, adopting, when unanswered requests were asked for again).
///
/// `dev` may be a duplicate of a descriptor that the keeper holds; hand it the keeper only after a fresh
/// `serve` has returned, because a connection without INIT cannot be adopted.
pub fn serve<S: Server>(
    server: S,
    tree: BorrowedFd<'_>,
    dev: OwnedFd,
    options: ServeOptions,
) -> Result<ServerHandle, FuseError> {
    let action = if options.adopt { "adopt" } else { "start" };
    let failed = |source: io::Error| FuseError::Session { action, source };
    let device = device_of(tree)?;
    let requests = Arc::clone(server.requests());
    let negotiated = Arc::new(Negotiated::default());
    let fs = ReadOnly::new(server, Arc::clone(&negotiated));
    let ours = dev.try_clone().map_err(failed)?;
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(options.threads.max(1));
    keep_buffers_off_the_heap();
    let session = if options.adopt {
        adopt(fs, &dev, config, options.journal, &negotiated)
    } else {
        fresh(fs, dev, config, options.resend, &negotiated)
    };
    let session = session.map_err(failed)?;
    if let Err(e) = set_readahead(tree, READAHEAD_KIB) {
        tracing::warn!("reads from the FUSE mount will be small: {e}");
    }
    let thread = std::thread::Builder::new()
        .name("fuse-session".into())
        .spawn(move || session.run())
        .map_err(failed)?;
    Ok(ServerHandle { thread, dev: ours, device, requests, relay: negotiated.relay().cloned() })
}

/// fuser takes a zeroed 16 MiB buffer per thread and per handshake, of which a read-only filesystem's requests
/// touch one page. The kernel gives zeroed memory page by page; but once such a buffer is freed, glibc moves
/// its threshold up and takes the next one from the heap, where it writes the zeros itself: 16 MiB resident.
/// A threshold that is set stays.
pub(super) fn keep_buffers_off_the_heap() {
    #[cfg(target_env = "gnu")]
    {
        const THRESHOLD: libc::c_int = 256 << 10;
        static ONCE: std::sync::Once = std::sync::Once::new();
        // SAFETY: changes a number of the allocator under its own lock.
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
        });
    }
}

fn fresh<F: Filesystem>(
    fs: F,
    dev: OwnedFd,
    config: Config,
    resend: bool,
    negotiated: &Negotiated,
) -> io::Result<Session<F>> {
    let real = dev.try_clone()?;
    let session = Session::from_fd(fs, dev, SessionACL::All, config)?;
    if !resend || !negotiated.kernel_resends() {
        let (kernel, ours) = relay::pair()?;
        replace(session.as_fd(), ours.as_fd())?;
        negotiated.relay_by(Relay::start(Journal::create()?, real, kernel)?);
    }
    Ok(session)
}

fn adopt<F: Filesystem>(
    fs: F,
    dev: &OwnedFd,
    config: Config,
    journal: Option<OwnedFd>,
    negotiated: &Negotiated,
) -> io::Result<Session<F>> {
    let (kernel, session) = relay::pair()?;
    let mut kernel = UnixStream::from(kernel);
    kernel.write_all(&wire::init_request())?;
    let session = Session::from_fd(fs, session, SessionACL::All, config)?;
    let mut answer = [0u8; 256];
    let n = kernel.read(&mut answer)?;
    if wire::answer_header(&answer[..n]).is_none_or(|header| header.error != 0) {
        return Err(io::Error::other("the server refused the replayed INIT"));
    }
    if let Some(journal) = journal {
        negotiated.relay_by(Relay::start(Journal::open(journal)?, dev.try_clone()?, kernel.into())?);
    } else {
        replace(session.as_fd(), dev.as_fd())?;
        resend(dev.as_fd())?;
    }
    Ok(session)
}

/// Puts the file behind `new` under the descriptor number of `old`.
fn replace(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open descriptors; `old` stays owned by its session, which from here on
    // reads and writes the other file through the same number, as intended.
    let ret = unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks for the requests that a dead server read and did not answer. Without a journal, kernels before 6.9 cannot give
/// them again: who waits for those waits until the connection is aborted; everything else goes on.
fn resend(dev: BorrowedFd<'_>) -> io::Result<()> {
    match wire::ask_to_resend(dev) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            tracing::warn!("this kernel cannot resend FUSE requests: reads in flight at the crash are stuck");
            Ok(())
        }
        other => other,
    }
}

/// What every server asks of the kernel. Capabilities the kernel lacks are left out one by one.
pub(super) fn configure(config: &mut KernelConfig, wanted: InitFlags) {
    let offered = config.capabilities();
    if let Err(missing) = config.add_capabilities(wanted & offered) {
        tracing::debug!("the kernel lacks FUSE capabilities {missing:?}");
    }
    // Also sets the pages per request, which bounds READ.
    if let Err(max) = config.set_max_write(MAX_READ) {
        let _ = config.set_max_write(max);
    }
    // Readahead comes as background requests; the default of 16 makes a cold scan wait. And while a registry is away,
    // readahead of what is missing there must not keep out that of what is here.
    let _ = config.set_max_background(512);
    let _ = config.set_congestion_threshold(384);
}

impl ServerHandle {
    /// Requests served so far, by opcode.
    pub fn stats(&self) -> StatsSnapshot {
        self.requests.snapshot()
    }

    /// Whether the mount is still there and being served.
    pub fn is_alive(&self) -> bool {
        !self.thread.is_finished() && is_connected(self.dev.as_fd())
    }

    /// A duplicate of the descriptor of the connection's journal, if it has one: for the keeper, before it gets
    /// that of the connection itself.
    pub fn journal_fd(&self) -> io::Result<Option<OwnedFd>> {
        self.relay.as_ref().map(|relay| relay.journal_fd()).transpose()
    }

    /// The `/dev/fuse` descriptor.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.dev.as_fd()
    }

    /// A duplicate of the `/dev/fuse` descriptor, for the keeper.
    pub fn device_fd(&self) -> io::Result<OwnedFd> {
        self.dev.try_clone()
    }

    /// Ends the connection for everybody (reads in flight and to come fail, nobody hangs) and waits for the
    /// server's threads.
    pub fn abort(self) -> Result<(), FuseError> {
        // A connection that ended by itself may have left its device number to somebody else's.
        if self.is_alive() {
            abort_device(self.device)?;
        }
        self.join();
        Ok(())
    }

    /// Waits until the mount is gone and with it the server.
    pub fn join(self) {
        if let Ok(Err(e)) = self.thread.join() {
            tracing::debug!("a FUSE session ended with: {e}");
        }
    }
}

/// Whether the connection behind a `/dev/fuse` descriptor still has a mount.
pub fn is_connected(dev: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(dev, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(0) => true,
        Ok(_) => !fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR)),
        Err(_) => false,
    }
}
