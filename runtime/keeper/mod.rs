//! The keeper: a tiny parent that outlives the daemon.
//!
//! It holds the listening control socket and the descriptors that must not close when the daemon dies
//! (`/dev/fuse` connections and mount trees), and starts a new daemon with them. Callers that connect
//! meanwhile wait in the socket's backlog; readers of our mounts wait in the kernel.

pub mod start;
pub mod store;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use crate::ipc::fds;
use crate::logs;
use crate::paths::Paths;
use crate::settings::Settings;
use store::FdStore;

/// Where a daemon started by the keeper finds its listening control socket.
pub const LISTENER_FD: RawFd = 3;
/// Where it finds the socket to the keeper's descriptor store.
pub const STORE_FD: RawFd = 4;
/// Where it says that it is ready, or why it can't be.
pub const READY_FD: RawFd = 5;
/// Where it finds the listening socket for containerd, when it is to serve that.
pub const SNAPSHOTTER_FD: RawFd = 6;

// A daemon that dies this soon after its start, this often in a row, won't get better by starting it again.
const SHORT_LIFE: Duration = Duration::from_secs(5);
const MAX_SHORT_LIVES: u32 = 5;

/// Runs the keeper until the daemon ends in peace; returns the process's exit code.
///
/// `ready` is told `ok` once the daemon serves, or the reason why it doesn't.
pub fn main(
    paths: &Paths,
    settings: &Settings,
    ready: Option<OwnedFd>,
    snapshotter: Option<Snapshotter>,
) -> ExitCode {
    let has_log = logs::is_stderr(&paths.log());
    match Keeper::new(paths, settings, snapshotter).and_then(|mut k| k.run(ready)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // The daemon may have begun another file since.
            if has_log {
                logs::follow(&paths.log());
            }
            eprintln!("lazyrun keeper: {e}");
            ExitCode::from(crate::failure::EXIT_LAZYRUN)
        }
    }
}

/// What a daemon that serves snapshots to containerd gets: containerd waits in the backlog of the socket while there
/// is no daemon.
#[derive(Debug)]
pub struct Snapshotter {
    /// The listening socket.
    pub listener: UnixListener,
    /// The daemon's options for it, as JSON.
    pub options: String,
}

struct Keeper<'a> {
    snapshotter: Option<Snapshotter>,
    paths: &'a Paths,
    settings: &'a Settings,
    // Whether what it and its daemons say goes to the log file.
    has_log: bool,
    listener: UnixListener,
    signals: SignalFd,
    store: FdStore,
    _lock: Flock<std::fs::File>,
}

enum Ended {
    InPeace,
    Died,
}

/// Makes the directories of the root and takes the lock that there is one of for each.
fn take_over(paths: &Paths) -> io::Result<Flock<std::fs::File>> {
    loop {
        paths.create()?;
        let file = match std::fs::File::create(paths.keeper_lock()) {
            // A keeper that has just ended took the directory along.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| io::Error::new(io::Error::from(e).kind(), "this root already has a keeper"))?;
        // A lock on a file that was deleted meanwhile keeps nobody out.
        let named = std::fs::metadata(paths.keeper_lock());
        if named.is_ok_and(|named| lock.metadata().is_ok_and(|own| own.ino() == named.ino())) {
            return Ok(lock);
        }
    }
}

impl<'a> Keeper<'a> {
    fn new(paths: &'a Paths, settings: &'a Settings, snapshotter: Option<Snapshotter>) -> io::Result<Self> {
        // What is made here must look the same whoever started it: upper directories show in containers.
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        let lock = take_over(paths)?;
        let socket = paths.control();
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let has_log = logs::is_stderr(&paths.log());
        let store = FdStore::default();
        Ok(Self { snapshotter, paths, settings, has_log, listener, signals, store, _lock: lock })
    }

    fn run(&mut self, mut ready: Option<OwnedFd>) -> io::Result<()> {
        let mut short_lives = 0;
        loop {
            let born = Instant::now();
            match self.one_daemon(ready.take())? {
                Ended::InPeace => break,
                Ended::Died if born.elapsed() < SHORT_LIFE => short_lives += 1,
                Ended::Died => short_lives = 0,
            }
            if short_lives >= MAX_SHORT_LIVES {
                // Dropping the descriptors fails every waiting read, which is better than waiting for ever.
                return Err(io::Error::other(format!("the daemon died {MAX_SHORT_LIVES} times in a row")));
            }
        }
        let _ = std::fs::remove_file(self.paths.control());
        // Whoever opens the lock from now on makes a new one. Commands that have started keepers left a lock of their
        // own, and the directory stays.
        let _ = std::fs::remove_file(self.paths.keeper_lock());
        let _ = std::fs::remove_dir(self.paths.run());
        Ok(())
    }

    fn one_daemon(&mut self, ready: Option<OwnedFd>) -> io::Result<Ended> {
        let (ours, theirs) = UnixStream::pair()?;
        let ready = match ready {
            Some(fd) => fd,
            None => std::fs::OpenOptions::new().write(true).open("/dev/null")?.into(),
        };
        let mut child = self.spawn(theirs.as_fd(), ready.as_fd())?;
        drop((theirs, ready));
        self.store.hand_over(&ours)?;
        ours.set_nonblocking(true)?;
        self.watch(&mut child, &ours)
    }

    fn spawn(&self, store: BorrowedFd<'_>, ready: BorrowedFd<'_>) -> io::Result<Child> {
        if self.has_log {
            logs::follow(&self.paths.log());
        }
        let mut command = Command::new("/proc/self/exe");
        command.arg0("lazyrun").arg("--root").arg(self.paths.root()).args(["daemon", "--kept"]);
        command.envs(self.settings.environment());
        command.stdin(Stdio::null());
        let mut placed = vec![(self.listener.as_fd(), LISTENER_FD), (store, STORE_FD), (ready, READY_FD)];
        if let Some(snapshotter) = &self.snapshotter {
            command.arg("--snapshotter").arg(&snapshotter.options);
            placed.push((snapshotter.listener.as_fd(), SNAPSHOTTER_FD));
        }
        fds::place(&mut command, &placed)?;
        // The keeper takes its signals from a descriptor; its children are to get theirs the usual way.
        let unblock = || Ok(SigSet::all().thread_unblock()?);
        // SAFETY: only sigprocmask runs between fork and exec, which is async-signal-safe.
        unsafe { command.pre_exec(unblock) };
        command.spawn()
    }

    fn watch(&mut self, child: &mut Child, daemon: &UnixStream) -> io::Result<Ended> {
        let pid = Pid::from_raw(child.id().cast_signed());
        loop {
            let mut fds = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(daemon.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            // What the daemon stored before it died counts, so its messages come first.
            let closed = !self.store.serve(daemon)?;
            while let Some(signal) = self.signals.read_signal()? {
                if matches!(signal.ssi_signo.cast_signed(), libc::SIGTERM | libc::SIGINT) {
                    let _ = kill(pid, Signal::SIGTERM);
                }
            }
            if let Some(status) = child.try_wait()? {
                self.store.serve(daemon)?;
                return Ok(if status.success() { Ended::InPeace } else { Ended::Died });
            }
            if closed {
                // It closed its store: it is on its way out; only its end is left to wait for.
                let status = child.wait()?;
                return Ok(if status.success() { Ended::InPeace } else { Ended::Died });
            }
        }
    }
}
