//! Processes told apart from others that get their number later.

use std::os::fd::{FromRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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

/// Waits until the process behind a pidfd has ended.
///
/// # Errors
/// The poller's.
pub async fn ended(pidfd: OwnedFd) -> std::io::Result<()> {
    // SAFETY: the descriptor is owned by the AsyncFd and stays open until that is dropped.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
    pidfd.readable().await.map(drop)
}

/// Waits for a child in the background, so that no zombie stays; after a restart of the daemon init does it. No thread
/// waits: a node may have more containers than a pool has threads. To be called in a runtime.
///
/// # Errors
/// When the process can't be waited for; then it is a zombie once it has ended.
pub fn reap(mut child: std::process::Child) -> std::io::Result<()> {
    // One that has ended has none.
    let Some(pidfd) = Identity::of(child.id()).and_then(Identity::pidfd) else {
        return child.try_wait().map(drop);
    };
    tokio::spawn(async move {
        let _ = ended(pidfd).await;
        let _ = child.wait();
    });
    Ok(())
}

/// Resident memory of a process in bytes, 0 when it is gone.
pub fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}

/// What this process uses. What can't be read is 0.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Processor time of all threads, in seconds.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub resident: u64,
    /// Address space in bytes.
    pub virtual_memory: u64,
    /// Open descriptors.
    pub open_fds: usize,
    /// Limit of open descriptors.
    pub max_fds: u64,
    /// Threads.
    pub threads: u64,
    /// When it was started, in seconds since the epoch.
    pub started: f64,
}

impl Usage {
    /// What it is now.
    pub fn now() -> Usage {
        use nix::sys::resource::{Resource, getrlimit};
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let status = read("/proc/self/status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|l| l.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        // Fields 14, 15 and 22 of the line, behind the name, which may hold anything.
        let stat = read("/proc/self/stat");
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<u64> =
            rest.split_ascii_whitespace().skip(1).map(|f| f.parse().unwrap_or(0)).collect();
        let at = |number: usize| fields.get(number - 4).copied().unwrap_or(0) as f64;
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
        let ticks = ticks.unwrap_or(100).max(1) as f64;
        let boot = read("/proc/stat").lines().find_map(|l| l.strip_prefix("btime ")?.parse::<f64>().ok());
        Usage {
            cpu_seconds: (at(14) + at(15)) / ticks,
            resident: field("VmRSS:") * 1024,
            virtual_memory: field("VmSize:") * 1024,
            // One of them is that of the listing itself.
            open_fds: std::fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count().saturating_sub(1)),
            max_fds: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
            threads: field("Threads:"),
            started: boot.unwrap_or(0.0) + at(22) / ticks,
        }
    }
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
    fn what_this_process_uses() {
        let usage = Usage::now();
        assert!(usage.resident > 1 << 20 && usage.virtual_memory > usage.resident, "{usage:?}");
        assert!(usage.open_fds >= 3 && usage.max_fds >= usage.open_fds as u64 && usage.threads >= 1);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("now");
        assert!((0.0..3600.0).contains(&(now.as_secs_f64() - usage.started)), "{usage:?}");
        assert!(usage.cpu_seconds >= 0.0);
    }

    #[test]
    fn children_are_reaped_without_a_thread_for_each() {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).max_blocking_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let _entered = runtime.enter();
        let children: Vec<_> = (0..20)
            .map(|_| {
                let child = std::process::Command::new("sleep").arg("1000").spawn().expect("spawn");
                let id = Identity::of(child.id()).expect("a process");
                reap(child).expect("reap");
                id
            })
            .collect();
        runtime.block_on(tokio::task::spawn_blocking(|| ())).expect("a free thread");
        children.iter().for_each(|child| assert!(child.signal(libc::SIGKILL)));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while children.iter().any(|child| stat(child.pid).is_some_and(|(_, start)| start == child.start)) {
            assert!(std::time::Instant::now() < deadline, "a zombie stays");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
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
