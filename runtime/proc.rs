//! Processes told apart from others that get their number later.

use std::os::fd::{FromRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

/// A process: its id and when it started, in clock ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`.
    pub start: u64,
}

impl Identity {
    /// The process that has this id now.
    pub fn of(pid: u32) -> Option<Self> {
        let (state, start) = stat(pid)?;
        (state != b'Z').then_some(Self { pid, start })
    }

    /// Whether it still runs (a zombie doesn't).
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// A descriptor that becomes readable when it ends; `None` when it has ended.
    pub fn pidfd(self) -> Option<OwnedFd> {
        let pid = i32::try_from(self.pid).ok()?;
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel made it just now, and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The number may have been given anew between the record and the open.
        self.is_alive().then_some(fd)
    }

    /// Sends it a signal, if it is still the same process.
    pub fn signal(self, signal: i32) -> bool {
        use std::os::fd::AsRawFd;
        let Some(fd) = self.pidfd() else { return false };
        // SAFETY: a valid pidfd, a signal number, no siginfo, no flags.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, 0usize, 0) == 0 }
    }
}

fn stat(pid: u32) -> Option<(u8, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may itself hold parentheses and spaces.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Resident memory of a process in bytes, 0 when it is gone.
pub fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_another_start_is_another_process() {
        let me = Identity::of(std::process::id()).expect("me");
        assert!(me.is_alive() && me.pidfd().is_some());
        assert!(!Identity { start: me.start + 1, ..me }.is_alive());
        assert!(resident(me.pid) > 0);
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().expect("spawn");
        let id = Identity::of(child.id());
        let fd = id.and_then(Identity::pidfd);
        child.wait().expect("wait");
        drop(fd);
        assert!(!id.is_some_and(Identity::is_alive));
    }
}
