//! The keeper's signals, taken from a descriptor.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Blocks the signals that the keeper takes from a descriptor; to be called before there are other threads, which must not
/// get them.
///
/// # Errors
/// When the kernel refuses, which does not happen.
pub fn block_signals() -> io::Result<SigSet> {
    let set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD, Signal::SIGHUP]);
    set.thread_block()?;
    Ok(set)
}

/// The descriptor.
pub(super) fn take() -> io::Result<SignalFd> {
    Ok(SignalFd::with_flags(&block_signals()?, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}
