//! The end of a container: exit statuses, the record, and everything that must be gone afterwards.

use super::attach::{PATIENCE, Role};
use super::run::{CONTAINER, Shim};
use super::{Status, record};
use crate::container::cgroup::{Cgroup, Hierarchies};
use crate::container::config::{ExitRecord, ShimConfig};
use crate::container::error::{ContainerError, Result};
use crate::container::proto::Frame;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long clients may take for what they are owed after the container's end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Clears away what a shim that was killed could not: remaining processes, groups, the socket; and writes the
/// exit record (137) if there is none. For the daemon, once the shim is known to be dead.
///
/// # Errors
/// A group cannot be removed or the record cannot be written.
pub fn sweep(config: &ShimConfig) -> Result<ExitRecord> {
    if let Some(path) = &config.cgroup {
        let group = Cgroup::new(Hierarchies::detect()?, path)?;
        let deadline = Instant::now() + FAREWELL;
        group.kill_all();
        while let Err(e) = group.remove() {
            if Instant::now() > deadline {
                return Err(e);
            }
            // The kernel takes a moment to end killed processes and offers nothing to wait on in v1.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let _ = std::fs::remove_file(&config.socket);
    if let Some(found) = ExitRecord::load(&config.dir)? {
        return Ok(found);
    }
    let why = "the container's shim was killed".to_owned();
    record(&config.dir, 128 + libc::SIGKILL, false, Some(why))?;
    ExitRecord::load(&config.dir)?.ok_or_else(|| ContainerError::invalid("the exit record vanished"))
}

impl Shim<'_> {
    /// Collects ended children.
    pub(super) fn reap(&mut self) {
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if self.sessions.values().any(|s| s.pid == pid) {
                self.exits.insert(pid, code);
            }
        }
    }

    /// The container has ended: record, clean up, tell everybody.
    pub(super) fn ended(&mut self, code: i32, status: &mut Status) -> Result<()> {
        let oom = self.cgroup.as_ref().is_some_and(Cgroup::oom_killed);
        let failure = self.sessions.get_mut(&CONTAINER).and_then(|s| s.failure.take());
        self.log.flush();
        if let Some((code, message)) = failure {
            // Reported, recorded and told to the clients by the callers of an error.
            return Err(ContainerError::Failed { code, message });
        }
        if let Some(pid) = self.container().map(|s| s.pid) {
            // Nothing but a container that ended at once can leave this unsaid.
            status.started(pid);
        }
        self.clean_up();
        record(&self.config.dir, code, oom, None)?;
        self.say_goodbye(&Frame::Exit(code));
        Ok(())
    }

    /// Ends whatever of the container is left. Safe to call again.
    pub(super) fn clean_up(&mut self) {
        if let Some(foreign) = self.foreign.take() {
            foreign.delete();
        }
        self.kill_container(libc::SIGKILL);
        let Some(group) = self.cgroup.take() else { return };
        if !group.pids().is_empty() {
            group.kill_all();
        }
        // Children must be reaped before the group is empty; the kernel tells by SIGCHLD.
        let deadline = Instant::now() + FAREWELL;
        while group.remove().is_err() && Instant::now() < deadline {
            let mut fd = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fd, PollTimeout::from(20u16));
            let _ = self.signals.read_signal();
            while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(s) if s != WaitStatus::StillAlive) {}
        }
    }

    /// Sends every client its last frame and waits a bounded time for them to take it.
    pub(super) fn say_goodbye(&mut self, last: &Frame) {
        let _ = std::fs::remove_file(&self.config.socket);
        self.accept();
        for client in &mut self.clients {
            if client.role == Role::Greeting {
                client.fill();
            }
            while !client.feed_replay() {
                client.flush();
                if client.gone || client.is_stalled() {
                    break;
                }
            }
            if client.role != Role::Done {
                client.finish(last);
            }
            client.flush();
        }
        let deadline = Instant::now() + FAREWELL.max(PATIENCE / 2);
        loop {
            self.clients.retain(|c| !c.gone && c.owed() > 0);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.clients.is_empty() || left.is_zero() {
                return;
            }
            let mut fds: Vec<PollFd<'_>> =
                self.clients.iter().map(|c| PollFd::new(c.stream.as_fd(), PollFlags::POLLOUT)).collect();
            let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO));
            drop(fds);
            for client in &mut self.clients {
                client.flush();
            }
        }
    }
}
