//! A daemon as the keeper sees it: a process, its end of the descriptor store, and what it says when it is ready.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::store::{self, FdStore, MESSAGE_BOUND};
use super::watchdog::Watchdog;
use super::{Keeper, LISTENER_FD, READY_FD, SNAPSHOTTER_FD, STORE_FD, start};
use crate::ipc::fds;
use crate::{file_limit, logs};

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
    // Why the keeper had to end it.
    pub(super) broken: Option<String>,
}

impl Child {
    /// Starts a daemon and hands it over what is kept. There is none left where that fails.
    pub(super) fn spawn(keeper: &Keeper<'_>) -> io::Result<Self> {
        let (store, its_store) = UnixStream::pair()?;
        let (ready, its_ready) = UnixStream::pair()?;
        if keeper.has_log {
            logs::follow(&keeper.paths.log());
        }
        let mut command = Command::new(keeper.program.path());
        command.arg0("lazyrun").arg("--root").arg(keeper.paths.root()).args(["daemon", "--kept"]);
        command.envs(keeper.settings.environment());
        Watchdog::ask(keeper.settings.fault_timeout(), &mut command);
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
        store::bound(&store, MESSAGE_BOUND)?;
        ready.set_nonblocking(true)?;
        let pid = Pid::from_raw(command.spawn()?.id().cast_signed());
        drop((command, its_store, its_ready));
        let mut child = Self {
            pid,
            born: Instant::now(),
            served: None,
            store: None,
            ready: Some(ready),
            said: String::new(),
            broken: None,
        };
        match keeper.store.hand_over(&store).and_then(|()| store.set_nonblocking(true)) {
            Ok(()) => child.store = Some(store),
            // It died before it had taken all; its end will tell.
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
            Err(e) => {
                child.kill();
                let _ = waitpid(child.pid, None);
                return Err(io::Error::new(e.kind(), format!("it does not take over what is kept: {e}")));
            }
        }
        Ok(child)
    }

    /// The daemon of the keeper that this process was before, which serves.
    pub(super) fn resumed(pid: Pid, store: UnixStream) -> io::Result<Self> {
        store::bound(&store, MESSAGE_BOUND)?;
        let (now, said) = (Instant::now(), start::READY.into());
        Ok(Self { pid, born: now, served: Some(now), store: Some(store), ready: None, said, broken: None })
    }

    /// Ends it at once, if it has not ended.
    pub(super) fn kill(&self) {
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    /// What becomes readable when it has something to say.
    pub(super) fn fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.store.as_ref().map(AsFd::as_fd), self.ready.as_ref().map(AsFd::as_fd)]
    }

    /// Does what it has asked of the descriptor store so far. One that asks what can't be done is killed: what is kept
    /// would no longer be what it takes that for.
    pub(super) fn serve_store(&mut self, store: &mut FdStore) {
        match self.store.as_ref().map(|socket| store.serve(socket)) {
            None | Some(Ok(true)) => {}
            Some(Ok(false)) => self.store = None,
            Some(Err(error)) => {
                self.broken = Some(format!("what it asks of the keeper can't be done: {error}"));
                self.store = None;
                self.kill();
            }
        }
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
    file_limit::give_back(command);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::frame;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn one_that_asks_nonsense_is_ended() {
        let mut process = Command::new("sleep").arg("1000").spawn().expect("a process");
        let (ours, theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let mut child = Child::resumed(Pid::from_raw(process.id().cast_signed()), ours).expect("a child");
        let mut store = FdStore::default();
        child.serve_store(&mut store);
        assert!(child.broken.is_none(), "nothing was asked");
        frame::write(&theirs, &"Something new").expect("ask");
        child.serve_store(&mut store);
        assert!(child.broken.is_some() && child.store.is_none());
        assert_eq!(process.wait().expect("its end").signal(), Some(libc::SIGKILL));
    }
}
