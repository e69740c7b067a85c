//! A daemon that is alive says so now and then. One that stopped to is ended, because whoever waits for a FUSE request
//! that was read can't even be killed; the next daemon gets the request again.

use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::store::Kept;

/// Milliseconds between two signs of life, in the environment of a daemon whose keeper listens to them.
const INTERVAL: &str = "LAZYRUN_WATCHDOG_MS";
/// A busy machine keeps a healthy daemon silent for a while.
const SHORTEST_BOUND: Duration = Duration::from_secs(5);
/// What is left to one that was silent for too long: the whole machine may have stood still.
const GRACE: Duration = Duration::from_secs(2);

/// The keeper's side: since when a daemon has been silent.
#[derive(Debug)]
pub(super) struct Watchdog {
    bound: Duration,
    due: Option<Instant>,
    in_grace: bool,
}

/// How long a daemon may be silent.
fn bound(fault_timeout: Duration) -> Duration {
    fault_timeout.max(SHORTEST_BOUND)
}

impl Watchdog {
    /// For daemons that may be silent as long as a fault may take. It begins with the first sign of life: earlier
    /// programs gave none.
    pub(super) fn new(fault_timeout: Duration) -> Self {
        Self { bound: bound(fault_timeout), due: None, in_grace: false }
    }

    /// Has a daemon that is about to be started give signs of life.
    pub(super) fn ask(fault_timeout: Duration, command: &mut Command) {
        let interval = bound(fault_timeout) / 5;
        command.env(INTERVAL, interval.as_millis().to_string());
    }

    /// The daemon has given a sign.
    pub(super) fn heard(&mut self) {
        self.due = Some(Instant::now() + self.bound);
        self.in_grace = false;
    }

    /// When the next look is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Whether the daemon hangs. Nothing more is said of it then.
    pub(super) fn hangs(&mut self, daemon: Pid) -> bool {
        let now = Instant::now();
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        if !self.in_grace || is_traced(daemon) {
            self.in_grace = true;
            self.due = Some(now + GRACE);
            return false;
        }
        self.due = None;
        true
    }
}

/// Whether somebody looks into the process with a debugger.
fn is_traced(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().filter_map(|line| line.strip_prefix("TracerPid:")).any(|tracer| tracer.trim() != "0")
}

/// The daemon's side: gives signs of life for as long as the runtime does what it is asked, if the keeper listens.
/// A thread of its own, so that threads that wait for a disk are no hang.
///
/// # Errors
/// When no thread can be started.
pub fn feed(kept: &Arc<Kept>, runtime: tokio::runtime::Handle) -> std::io::Result<()> {
    let interval = std::env::var(INTERVAL).ok().and_then(|text| text.parse().ok());
    let Some(interval) = interval.map(Duration::from_millis) else { return Ok(()) };
    let kept = Arc::downgrade(kept);
    let beat = move || {
        loop {
            let (done, wait) = mpsc::sync_channel(1);
            runtime.spawn(async move {
                let _ = done.send(());
            });
            // A runtime that has ended drops what it is given.
            let Some(kept) = wait.recv().ok().and_then(|()| kept.upgrade()) else { return };
            if kept.alive().is_err() {
                return;
            }
            drop(kept);
            std::thread::sleep(interval);
        }
    };
    std::thread::Builder::new().name("watchdog".into()).spawn(beat)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_a_hang_only_after_signs_of_life_and_a_second_look() {
        let none = Pid::from_raw(0);
        let mut watchdog = Watchdog::new(Duration::from_secs(30));
        assert!(!watchdog.hangs(none) && watchdog.deadline().is_none(), "it may be one that gives none");
        watchdog.heard();
        assert!(!watchdog.hangs(none));
        let past = || Instant::now().checked_sub(Duration::from_millis(1));
        watchdog.due = past();
        assert!(!watchdog.hangs(none), "it gets a moment more");
        assert!(watchdog.deadline().is_some_and(|due| due <= Instant::now() + GRACE));
        watchdog.due = past();
        assert!(watchdog.hangs(none));
        assert!(!watchdog.hangs(none), "once is enough");
        watchdog.heard();
        watchdog.due = past();
        assert!(!watchdog.hangs(none), "what it said meanwhile counts");
    }
}
