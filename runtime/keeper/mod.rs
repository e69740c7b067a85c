//! The keeper: a tiny parent that outlives the daemon.
//!
//! It holds the listening control socket and the descriptors that must not close when the daemon dies
//! (`/dev/fuse` connections and mount trees), and starts a new daemon with them. Callers that connect
//! meanwhile wait in the socket's backlog; readers of our mounts wait in the kernel, for as long as a fault may take.

mod child;
pub mod manager;
mod outage;
mod resume;
mod signals;
pub mod start;
pub mod store;
pub mod watchdog;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;

use crate::failure::EXIT_LAZYRUN;
use crate::file_limit;
use crate::ipc::frame;
use crate::ipc::protocol::Reply;
use crate::logs;
use crate::paths::Paths;
use crate::settings::Settings;
use child::{Child, Program};
use manager::Manager;
use outage::Outage;
pub use signals::block_signals;
use store::{FdStore, Replacement};
use watchdog::Watchdog;

/// Where a daemon started by the keeper finds its listening control socket.
pub const LISTENER_FD: RawFd = 3;
/// Where it finds the socket to the keeper's descriptor store.
pub const STORE_FD: RawFd = 4;
/// Where it says that it is ready, or why it can't be.
pub const READY_FD: RawFd = 5;
/// Where it finds the listening socket for containerd, when it is to serve that.
pub const SNAPSHOTTER_FD: RawFd = 6;

// A daemon that fell by itself so soon after it began to serve is as one that never did; this often in a row, starting it
// again at once won't help.
const SHORT_LIFE: Duration = Duration::from_secs(5);
const MAX_SHORT_LIVES: u32 = 5;
// The longest pause before the next try, while there are mounts to be served.
const MAX_PAUSE: Duration = Duration::from_secs(30);
// A daemon that does not serve after this never will; after failures the next ones get more, up to the longest, lest
// one that is only slow is killed again and again.
const START_BOUND: Duration = Duration::from_secs(60);
const MAX_START_BOUND: Duration = Duration::from_secs(600);
// A new program has half the time after which reads fail, so that the old one can be back before, but never less.
const MIN_REPLACEMENT_BOUND: Duration = Duration::from_secs(5);
// How long one that is to be replaced may take to finish what it was asked.
const HAND_OVER_BOUND: Duration = Duration::from_secs(20);

/// Runs the keeper until the daemon ends in peace; returns the process's exit code.
///
/// `ready` is told `ok` once the daemon serves, or the reason why it doesn't.
pub fn main(paths: &Paths, settings: &Settings, ready: Option<OwnedFd>, given: Given) -> ExitCode {
    run(paths, || Keeper::new(paths, settings, ready, given))
}

/// Goes on as the keeper that this process was before it began to run another program, whose state is behind `state`.
pub fn go_on(paths: &Paths, settings: &Settings, state: OwnedFd) -> ExitCode {
    run(paths, || Keeper::resume(paths, settings, state))
}

fn run<'a>(paths: &Paths, keeper: impl FnOnce() -> io::Result<Keeper<'a>>) -> ExitCode {
    let has_log = logs::is_stderr(&paths.log());
    match keeper().and_then(|mut keeper| keeper.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // The daemon may have begun another file since.
            if has_log {
                logs::follow(&paths.log());
            }
            eprintln!("lazyrun keeper: {e}");
            ExitCode::from(EXIT_LAZYRUN)
        }
    }
}

/// What a keeper gets from whoever starts it.
#[derive(Debug, Default)]
pub struct Given {
    /// For a daemon that serves containerd.
    pub snapshotter: Option<Snapshotter>,
    /// The service manager that is to hold copies of all descriptors.
    pub manager: Manager,
    /// What an earlier keeper had it hold.
    pub kept: BTreeMap<String, OwnedFd>,
}

/// What a daemon that serves snapshots to containerd gets: containerd waits in the backlog of the socket while there
/// is no daemon.
#[derive(Debug)]
pub struct Snapshotter {
    /// The listening socket.
    pub listener: UnixListener,
    /// The daemon's options for it, as JSON.
    pub options: String,
    /// The socket's file, to be removed in the end, if it is the keeper's own.
    pub bound: Option<PathBuf>,
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
    outage: Outage,
    // What daemons are started from.
    program: Program,
    // Who waits to hear that the first daemon serves.
    ready: Option<OwnedFd>,
    // Whether somebody may use what is kept: what an earlier keeper left, or what a daemon has served.
    used: bool,
    // A daemon that was there before this program was.
    running: Option<Child>,
    // What has just taken the place of another daemon, and who waits to hear of it.
    replacing: Option<Replacing>,
    // Daemons that never served, or not for long, in a row.
    failures: u32,
    stopping: bool,
    lock: Flock<std::fs::File>,
}

struct Replacing {
    caller: OwnedFd,
    old: Program,
}

/// How a daemon ended.
enum Ended {
    /// As it was told to.
    InPeace,
    /// It can't start, for this reason, and nobody uses anything yet.
    Told(String),
    /// For the next one to come.
    Replaced(Replacement),
    /// By somebody's hand, or after it had served for long: the next one starts at once.
    Fell,
    /// By itself, soon, or before it served.
    Failed(String),
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
    fn new(
        paths: &'a Paths,
        settings: &'a Settings,
        ready: Option<OwnedFd>,
        given: Given,
    ) -> io::Result<Self> {
        // What is made here must look the same whoever started it: upper directories show in containers.
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        file_limit::raise();
        let lock = take_over(paths)?;
        let socket = paths.control();
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        let mut outage = Outage::new(settings.fault_timeout());
        let used = !given.kept.is_empty();
        if used {
            // Since the last keeper was killed nobody serves what it held.
            outage.begin();
        }
        Ok(Self {
            snapshotter: given.snapshotter,
            paths,
            settings,
            has_log: logs::is_stderr(&paths.log()),
            listener,
            signals: signals::take()?,
            store: FdStore::new(given.kept, given.manager),
            outage,
            program: Program::Own,
            ready,
            used,
            running: None,
            replacing: None,
            failures: 0,
            stopping: false,
            lock,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let mut child = match self.running.take() {
                Some(child) => child,
                None => match Child::spawn(self) {
                    Ok(child) => child,
                    Err(error) => {
                        self.outage.begin();
                        self.failed(&format!("it can't be started: {error}"))?;
                        if self.stop_asked()? || self.stopping {
                            break;
                        }
                        continue;
                    }
                },
            };
            let ended = self.watch(&mut child)?;
            drop(child);
            self.outage.begin();
            // A request that no daemon survives ends here as well, once it has had its time.
            self.outage.refuse(&self.store, true);
            match ended {
                Ended::InPeace => break,
                Ended::Told(reason) if self.ready.is_none() => {
                    self.clean_up();
                    return Err(io::Error::other(reason));
                }
                Ended::Told(reason) => {
                    self.say_ready(&reason);
                    break;
                }
                _ if self.stopping => break,
                Ended::Replaced(replacement) => {
                    let old = std::mem::replace(&mut self.program, Program::File(replacement.program));
                    self.replacing = Some(Replacing { caller: replacement.caller, old });
                }
                Ended::Fell => {}
                Ended::Failed(reason) => self.failed(&reason)?,
            }
            // Also while it waited before the next try.
            if self.stopping {
                break;
            }
        }
        self.clean_up();
        Ok(())
    }

    // A daemon did not serve, or not for long.
    fn failed(&mut self, reason: &str) -> io::Result<()> {
        if let Some(Replacing { caller, old }) = self.replacing.take() {
            self.program = old;
            let message = format!("the new daemon does not start, the old one does again: {reason}");
            tell(&caller, &Reply::Failed { code: EXIT_LAZYRUN, message });
            return Ok(());
        }
        self.failures += 1;
        if self.failures < MAX_SHORT_LIVES {
            return Ok(());
        }
        if self.store.is_empty() {
            let message = format!("the daemon died {MAX_SHORT_LIVES} times in a row: {reason}");
            self.say_ready(&message);
            return Err(io::Error::other(message));
        }
        // Whoever uses the mounts gets them back when what is wrong has been put right.
        let doublings = (self.failures - MAX_SHORT_LIVES).min(5);
        let pause = MAX_PAUSE.min(Duration::from_secs(1 << doublings));
        eprintln!(
            "lazyrun keeper: the daemon died {} times in a row: {reason}; next try in {pause:?}",
            self.failures
        );
        self.pause(pause, reason)
    }

    // Nothing of this instance's is left behind.
    fn clean_up(&self) {
        let _ = std::fs::remove_file(self.paths.control());
        if let Some(address) = self.snapshotter.as_ref().and_then(|s| s.bound.as_ref()) {
            let _ = std::fs::remove_file(address);
        }
        // Whoever opens the lock from now on makes a new one. Commands that have started keepers left a lock of their
        // own, and the directory stays.
        let _ = std::fs::remove_file(self.paths.keeper_lock());
        let _ = std::fs::remove_dir(self.paths.run());
        for name in self.store.kept().keys() {
            self.store.manager().discard(name);
        }
    }

    // How long the next daemon may take until it serves.
    fn start_bound(&self) -> Duration {
        if self.replacing.is_some() {
            return START_BOUND.min(self.settings.fault_timeout() / 2).max(MIN_REPLACEMENT_BOUND);
        }
        MAX_START_BOUND.min(START_BOUND * (self.failures + 1))
    }

    /// Watches a daemon until its end.
    fn watch(&mut self, child: &mut Child) -> io::Result<Ended> {
        let mut replacement = None;
        let start_bound = self.start_bound();
        let mut kill_at = child.served.is_none().then(|| child.born + start_bound);
        let mut late = None;
        let mut watchdog = Watchdog::new(self.settings.fault_timeout());
        loop {
            let healthy_at = child.served.filter(|_| self.outage.is_on()).map(|served| served + SHORT_LIFE);
            let until = [kill_at, healthy_at, self.outage.deadline(), watchdog.deadline()]
                .into_iter()
                .flatten()
                .min();
            self.wait(child.fds(), until)?;
            // What the daemon stored before it died counts, so its messages come first.
            child.serve_store(&mut self.store);
            if child.hear()? {
                self.serves(child);
                kill_at = None;
            }
            if self.store.take_sign_of_life() {
                watchdog.heard();
            }
            if let Some(asked) = self.store.take_replacement() {
                kill_at = Some(Instant::now() + HAND_OVER_BOUND);
                replacement = Some(asked);
            }
            if self.stop_asked()? {
                let _ = kill(child.pid, Signal::SIGTERM);
            }
            if let Some(status) = child.ended()? {
                child.serve_store(&mut self.store);
                // It may have been about to ask that.
                replacement = self.store.take_replacement().or(replacement);
                child.hear()?;
                return Ok(self.judge(child, status, replacement, late));
            }
            let now = Instant::now();
            if healthy_at.is_some_and(|at| at <= now) {
                self.failures = 0;
                self.outage.end();
            }
            if kill_at.is_some_and(|at| at <= now) {
                late = child.served.is_none().then_some(start_bound);
                kill_at = None;
                child.kill();
            }
            if watchdog.hangs(child.pid) {
                eprintln!("lazyrun keeper: the daemon hangs and is ended; the next one takes over");
                child.kill();
            }
            self.outage.refuse(&self.store, false);
        }
    }

    // A daemon says that it serves.
    fn serves(&mut self, child: &Child) {
        self.used = true;
        self.say_ready(start::READY);
        self.outage.interrupt();
        if self.failures == 0 {
            self.outage.end();
        }
        let Some(Replacing { caller, .. }) = self.replacing.take() else { return };
        let error = self.become_program(child, &caller);
        let note = format!("the daemon is the new one, but its keeper is still the old one: {error}");
        tell(&caller, &Reply::Note(note));
        tell(&caller, &replaced());
    }

    // Whoever started this keeper waits for a word.
    fn say_ready(&mut self, word: &str) {
        if let Some(ready) = self.ready.take() {
            let _ = std::fs::File::from(ready).write_all(word.as_bytes());
        }
    }

    fn judge(
        &mut self,
        child: &Child,
        status: child::Status,
        replacement: Option<Replacement>,
        late: Option<Duration>,
    ) -> Ended {
        if let Some(replacement) = replacement {
            return Ended::Replaced(replacement);
        }
        if let Some(reason) = &child.broken {
            return Ended::Failed(reason.clone());
        }
        match (child.served, status) {
            (Some(_), child::Status::Success) => return Ended::InPeace,
            // Whoever killed it, it was not the daemon.
            (Some(served), status) if status == child::Status::Killed || served.elapsed() >= SHORT_LIFE => {
                self.failures = 0;
                self.outage.end();
                return Ended::Fell;
            }
            _ => {}
        }
        let said = match (child.said(), late) {
            ("", Some(bound)) => format!("it did not serve within {bound:?}"),
            ("", None) => format!("it ended without a word ({status}); see daemon.log in its root"),
            (said, _) => said.to_owned(),
        };
        // Starting it again would only say it again. What the very first one stored nobody uses.
        let unused = self.store.is_empty() || !self.used;
        if child.served.is_none() && !child.said().is_empty() && self.replacing.is_none() && unused {
            return Ended::Told(said);
        }
        Ended::Failed(said)
    }

    // Waits before the next try; readers are refused meanwhile, and callers told why.
    fn pause(&mut self, pause: Duration, reason: &str) -> io::Result<()> {
        let end = Instant::now() + pause;
        self.listener.set_nonblocking(true)?;
        while Instant::now() < end && !self.stopping {
            self.outage.refuse(&self.store, true);
            let until = self.outage.deadline().map_or(end, |deadline| deadline.min(end));
            self.wait([Some(self.listener.as_fd()), None], Some(until))?;
            self.stop_asked()?;
            while let Ok((caller, _)) = self.listener.accept() {
                let message = format!("there is no lazyrun daemon, and the next try has to wait: {reason}");
                tell(&caller.into(), &Reply::Failed { code: EXIT_LAZYRUN, message });
            }
        }
        Ok(())
    }

    // Until one of these is readable, a signal or a request to be refused comes, or the time has come.
    fn wait(&self, more: [Option<BorrowedFd<'_>>; 2], until: Option<Instant>) -> io::Result<()> {
        let own = std::iter::once(self.signals.as_fd());
        let fds = own.chain(more.into_iter().flatten()).chain(self.outage.waiting());
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let timeout = match until {
            None => PollTimeout::NONE,
            Some(until) => {
                // Rounded up, or the last millisecond would be spent spinning.
                let left = until.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    // Takes the signals that have come; whether one asks to end.
    fn stop_asked(&mut self) -> io::Result<bool> {
        let mut asked = false;
        while let Some(signal) = self.signals.read_signal()? {
            asked |= matches!(signal.ssi_signo.cast_signed(), libc::SIGTERM | libc::SIGINT);
        }
        self.stopping |= asked;
        Ok(asked)
    }
}

// A caller that is gone needs no answer.
fn tell(caller: &OwnedFd, reply: &Reply) {
    let Ok(caller) = caller.try_clone().map(UnixStream::from) else { return };
    let _ = caller.set_nonblocking(false);
    if let Err(error) = frame::write(&caller, reply) {
        eprintln!("lazyrun keeper: a caller can't be told how it went: {error}");
    }
}

// What the caller hears whose program has taken over.
fn replaced() -> Reply {
    Reply::Done { value: serde_json::Value::Null, fd: false }
}
