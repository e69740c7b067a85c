//! The keeper becomes another program: the one that a daemon was just replaced with. Its process, and with it the
//! daemon's parent, stays; its descriptors stay open, and a description of them tells the new program which is which.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::child::{Child, Program};
use super::manager::Manager;
use super::outage::Outage;
use super::store::FdStore;
use super::{Keeper, Snapshotter, replaced, signals, tell};
use crate::file_limit;
use crate::logs;
use crate::paths::Paths;
use crate::settings::Settings;

/// What a keeper is, for the next program: numbers of descriptors and what cannot be found out again. Fields may be
/// added, with a default; what is here stays, because the next program may be newer or older.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    listener: RawFd,
    lock: RawFd,
    kept: BTreeMap<String, RawFd>,
    managed: bool,
    snapshotter: Option<SnapshotterState>,
    daemon: i32,
    store: RawFd,
    caller: RawFd,
}

#[derive(Debug, Serialize, Deserialize)]
struct SnapshotterState {
    listener: RawFd,
    options: String,
    bound: Option<PathBuf>,
}

impl<'a> Keeper<'a> {
    /// Becomes the program that `child`, which serves, was started from. Returns only if that fails;
    /// else the new program tells the caller that it went well.
    pub(super) fn become_program(&self, child: &Child, caller: &OwnedFd) -> io::Error {
        let Some(store) = &child.store else { return io::Error::other("the new daemon is gone again") };
        let mut fds = vec![self.listener.as_fd(), self.lock.as_fd(), store.as_fd(), caller.as_fd()];
        fds.extend(self.store.kept().values().map(AsFd::as_fd));
        fds.extend(self.snapshotter.as_ref().map(|s| s.listener.as_fd()));
        let state = State {
            listener: self.listener.as_raw_fd(),
            lock: self.lock.as_raw_fd(),
            kept: self.store.kept().iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())).collect(),
            managed: self.store.manager().is_present(),
            snapshotter: self.snapshotter.as_ref().map(|s| SnapshotterState {
                listener: s.listener.as_raw_fd(),
                options: s.options.clone(),
                bound: s.bound.clone(),
            }),
            daemon: child.pid.as_raw(),
            store: store.as_raw_fd(),
            caller: caller.as_raw_fd(),
        };
        let written = match write(&state) {
            Ok(file) => file,
            Err(e) => return e,
        };
        fds.push(written.as_fd());
        let open = |flag| fds.iter().try_for_each(|fd| fcntl(fd, FcntlArg::F_SETFD(flag)).map(drop));
        if let Err(e) = open(FdFlag::empty()) {
            return e.into();
        }
        let mut command = Command::new(self.program.path());
        command.arg0("lazyrun").arg("--root").arg(self.paths.root()).args(["keeper", "--state"]);
        command.arg(written.as_raw_fd().to_string()).envs(self.settings.environment());
        file_limit::give_back(&mut command);
        let error = command.exec();
        file_limit::raise();
        // It has set that to what programs begin with; a log that nobody reads any more must not end the keeper.
        // SAFETY: no handler is installed.
        let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
        // The next daemon must not get them.
        let _ = open(FdFlag::FD_CLOEXEC);
        error
    }

    /// The keeper whose state was written down there.
    pub(super) fn resume(paths: &'a Paths, settings: &'a Settings, state: OwnedFd) -> io::Result<Self> {
        file_limit::raise();
        let mut text = String::new();
        std::fs::File::from(state).read_to_string(&mut text)?;
        let state: State = serde_json::from_str(&text)?;
        let kept: Result<BTreeMap<String, OwnedFd>, io::Error> =
            state.kept.into_iter().map(|(name, fd)| Ok((name, take(fd)?))).collect();
        let manager = if state.managed { Manager::of_this_process() } else { Manager::default() };
        let snapshotter = state.snapshotter.map(|s| {
            let listener = UnixListener::from(take(s.listener)?);
            io::Result::Ok(Snapshotter { listener, options: s.options, bound: s.bound })
        });
        // It is locked already; this is to have it as what it is.
        let lock = Flock::lock(std::fs::File::from(take(state.lock)?), FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| io::Error::from(e))?;
        let store = UnixStream::from(take(state.store)?);
        let caller = take(state.caller)?;
        let keeper = Self {
            snapshotter: snapshotter.transpose()?,
            paths,
            settings,
            has_log: logs::is_stderr(&paths.log()),
            listener: UnixListener::from(take(state.listener)?),
            signals: signals::take()?,
            store: FdStore::new(kept?, manager),
            outage: Outage::new(settings.fault_timeout()),
            program: Program::Own,
            ready: None,
            used: true,
            running: Some(Child::resumed(Pid::from_raw(state.daemon), store)?),
            replacing: None,
            failures: 0,
            stopping: false,
            lock,
        };
        tell(&caller, &replaced());
        Ok(keeper)
    }
}

fn write(state: &State) -> io::Result<OwnedFd> {
    let mut file = std::fs::File::from(memfd_create(c"lazyrun-keeper", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(state)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// A descriptor that the program before left open for this one.
fn take(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only asks whether there is such a descriptor, which this function is the first to use.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, and the state names each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
