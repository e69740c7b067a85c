//! Network namespaces that no process and no mount holds, only a descriptor.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::error::NetworkError;
use super::link;

/// Makes a fresh network namespace. It lives as long as the descriptor (or a process in it); its loopback
/// interface is still down, see [`loopback_up`]. Inherits nothing from and changes nothing in the calling
/// thread.
///
/// # Errors
/// When the kernel refuses (not root, or the limit of namespaces is reached).
pub fn new_netns() -> Result<OwnedFd, NetworkError> {
    on_thread(|| {
        // unshare is per thread for CLONE_NEWNET, and this thread ends right here.
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| NetworkError::kernel("create a network namespace", e))?;
        let path = "/proc/thread-self/ns/net";
        let file = File::open(path).map_err(|e| NetworkError::file("open", path, e))?;
        Ok(OwnedFd::from(file))
    })
}

/// Brings the loopback interface of a namespace up: all that a container with `--network none` gets.
/// [`super::Instance::attach`] does it itself.
///
/// # Errors
/// When the namespace cannot be entered or the kernel refuses.
pub fn loopback_up(netns: BorrowedFd<'_>) -> Result<(), NetworkError> {
    run_in(netns, || link::with_netlink_here(async |nl| nl.loopback_up().await))
}

/// Runs `work` in a thread of its own that has entered `netns`.
pub(super) fn run_in<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    on_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET)
            .map_err(|e| NetworkError::kernel("enter the container's network namespace", e))?;
        work()
    })
}

/// Runs `work` in a short-lived thread, which starts in the network namespace of the calling thread.
/// A panic in it goes on in the caller.
pub(super) fn on_thread<T: Send>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)
            .map_err(|e| NetworkError::kernel("start a thread", e))?;
        handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
