//! A daemon as the keeper sees it: a process, its end of the descriptor store, and what it says when it is ready.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::store::FdStore;
use super::{Keeper, LISTENER_FD, READY_FD, SNAPSHOTTER_FD, STORE_FD, start};
use crate::ipc::fds;
use crate::logs;

/// What a daemon says when it can't start may be this long, in bytes.
const MAX_SAID: usize = 4096;

/// What daemons are started from.
#[derive(Debug)]
pub(super) enum Program {
    /// The program that the keeper is.
    Own,
    /// Another one that is open.
    File(OwnedFd),
}

impl Program {
    /// Where it can be executed from, in this process and in those that it starts.
    pub(super) fn path(&self) -> String {
        match self {
            Self::Own => "/proc/self/exe".into(),
            Self::File(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Success,
    /// By SIGKILL, which no program sends itself.
    Killed,
    Signal(Signal),
    Code(i32),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Success => f.write_str("exit status 0"),
            Self::Killed => f.write_str("it was killed"),
            Self::Signal(signal) => write!(f, "{signal}"),
            Self::Code(code) => write!(f, "exit status {code}"),
        }
    }
}

/// A daemon.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: Pid,
    pub(super) born: Instant,
    /// Since when it serves.
    pub(super) served: Option<Instant>,
    // Its ends, until it closes them.
    pub(super) store: Option<UnixStream>,
    ready: Option<UnixStream>,
    said: String,
}

impl Child {
    /// Starts a daemon and hands it over what is kept.
    pub(super) fn spawn(keeper: &Keeper<'_>) -> io::Result<Self> {
        let (store, its_store) = UnixStream::pair()?;
        let (ready, its_ready) = UnixStream::pair()?;
        if keeper.has_log {
            logs::follow(&keeper.paths.log());
        }
        let mut command = Command::new(keeper.program.path());
        command.arg0("lazyrun").arg("--root").arg(keeper.paths.root()).args(["daemon", "--kept"]);
        command.envs(keeper.settings.environment());
        command.stdin(Stdio::null());
        let mut placed = vec![
            (keeper.listener.as_fd(), LISTENER_FD),
            (its_store.as_fd(), STORE_FD),
            (its_ready.as_fd(), READY_FD),
        ];
        if let Some(snapshotter) = &keeper.snapshotter {
            command.arg("--snapshotter").arg(&snapshotter.options);
            placed.push((snapshotter.listener.as_fd(), SNAPSHOTTER_FD));
        }
        place(&mut command, &placed)?;
        let pid = Pid::from_raw(command.spawn()?.id().cast_signed());
        drop((command, its_store, its_ready));
        let mut child = Self {
            pid,
            born: Instant::now(),
            served: None,
            store: None,
            ready: Some(ready),
            said: String::new(),
        };
        match keeper.store.hand_over(&store) {
            Ok(()) => {
                store.set_nonblocking(true)?;
                child.store = Some(store);
            }
            // It died before it had taken all; its end will tell.
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
            Err(e) => return Err(e),
        }
        child.ready.iter().try_for_each(|ready| ready.set_nonblocking(true))?;
        Ok(child)
    }

    /// The daemon of the keeper that this process was before, which serves.
    pub(super) fn resumed(pid: Pid, store: UnixStream) -> Self {
        let now = Instant::now();
        Self { pid, born: now, served: Some(now), store: Some(store), ready: None, said: start::READY.into() }
    }

    /// What becomes readable when it has something to say.
    pub(super) fn fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.store.as_ref().map(AsFd::as_fd), self.ready.as_ref().map(AsFd::as_fd)]
    }

    /// Does what it has asked of the descriptor store so far.
    pub(super) fn serve_store(&mut self, store: &mut FdStore) -> io::Result<()> {
        if let Some(socket) = &self.store
            && !store.serve(socket)?
        {
            self.store = None;
        }
        Ok(())
    }

    /// Takes what it has said so far; `true` the one time that this is that it serves.
    pub(super) fn hear(&mut self) -> io::Result<bool> {
        let Some(ready) = &mut self.ready else { return Ok(false) };
        let mut buffer = [0; 512];
        loop {
            match ready.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) if self.said.len() < MAX_SAID => self.said += &String::from_utf8_lossy(&buffer[..n]),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // It died.
                Err(_) => break,
            }
        }
        self.ready = None;
        if self.said != start::READY {
            return Ok(false);
        }
        self.served = Some(Instant::now());
        Ok(true)
    }

    /// Why it does not serve, in its own words, if it said any.
    pub(super) fn said(&self) -> &str {
        if self.served.is_some() { "" } else { self.said.trim() }
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> io::Result<Option<Status>> {
        Ok(match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::Exited(_, 0) => Some(Status::Success),
            WaitStatus::Exited(_, code) => Some(Status::Code(code)),
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => Some(Status::Killed),
            WaitStatus::Signaled(_, signal, _) => Some(Status::Signal(signal)),
            _ => None,
        })
    }
}

/// Gives the daemon its descriptors, its signals, and an end with the keeper's: without it nobody would hold the mounts
/// when the daemon dies, and the next keeper would find the root in use.
fn place(command: &mut Command, placed: &[(BorrowedFd<'_>, RawFd)]) -> io::Result<()> {
    fds::place(command, placed)?;
    let keeper = nix::unistd::getpid();
    let prepare = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // It may have died before that.
        if nix::unistd::getppid() != keeper {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // The keeper takes its signals from a descriptor; its children are to get theirs the usual way.
        Ok(SigSet::all().thread_unblock()?)
    };
    // SAFETY: only prctl, getppid and sigprocmask run between fork and exec, which are async-signal-safe.
    unsafe { command.pre_exec(prepare) };
    Ok(())
}
