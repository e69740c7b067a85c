//! systemd's store of descriptors: copies of what the keeper holds, which it gets back when it was killed and started
//! again (`FileDescriptorStoreMax=`, sd_notify(3), sd_listen_fds(3)).

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Where the manager listens, for processes that it started.
const SOCKET: &str = "NOTIFY_SOCKET";

// Names of descriptors may have no colon there, and ours have no plus sign.
const OURS: char = ':';
const THEIRS: &str = "+";
// What distinguishes them from the sockets that systemd passes.
const PREFIX: &str = "lazyrun+";

/// The service manager that started the keeper, if one did.
#[derive(Debug, Default)]
pub struct Manager {
    present: bool,
}

impl Manager {
    /// The manager that this process's environment names.
    pub fn of_this_process() -> Self {
        Self { present: std::env::var_os(SOCKET).is_some() }
    }

    pub(super) fn is_present(&self) -> bool {
        self.present
    }

    pub(super) fn keep(&self, name: &str, fd: BorrowedFd<'_>) {
        if self.present {
            // Unasked, systemd (246 and later) polls what it stores, to drop what has ended; mount trees can't be
            // polled, and it would not take them.
            let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}\n", their_name(name));
            if let Err(error) = tell(&message, &[fd.as_raw_fd()]) {
                eprintln!(
                    "lazyrun keeper: systemd can't be given {name}, which ends with this process: {error}"
                );
            }
        }
    }

    pub(super) fn discard(&self, name: &str) {
        if self.present {
            let _ = tell(&format!("FDSTOREREMOVE=1\nFDNAME={}\n", their_name(name)), &[]);
        }
    }
}

/// What a service manager passed to this process.
#[derive(Debug, Default)]
pub struct Passed {
    /// Sockets that it listens on for this service.
    pub sockets: Vec<OwnedFd>,
    /// What an earlier keeper had it store, by name.
    pub kept: BTreeMap<String, OwnedFd>,
}

/// Takes what the service manager passed. To be called once, before other descriptors are looked at.
///
/// # Errors
/// That the environment makes no sense.
pub fn passed() -> io::Result<Passed> {
    let mut passed = Passed::default();
    for (fd, name) in sd_notify::listen_fds_with_names()? {
        // SAFETY: the manager opened it for this process, and nothing has used it since.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        match our_name(&name) {
            Some(name) => drop(passed.kept.insert(name, fd)),
            None => passed.sockets.push(fd),
        }
    }
    Ok(passed)
}

fn tell(message: &str, fds: &[RawFd]) -> io::Result<()> {
    let address = std::env::var_os(SOCKET).ok_or(io::ErrorKind::NotFound)?;
    let socket = UnixDatagram::unbound()?;
    socket.connect(address)?;
    let control = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[] } else { &control[..] };
    let payload = [IoSlice::new(message.as_bytes())];
    sendmsg::<()>(socket.as_raw_fd(), &payload, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn their_name(name: &str) -> String {
    format!("{PREFIX}{}", name.replace(OURS, THEIRS))
}

fn our_name(name: &str) -> Option<String> {
    Some(name.strip_prefix(PREFIX)?.replace(THEIRS, &OURS.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        let name = "view:0123:overlay:fuse:rb-4567:dev";
        let theirs = their_name(name);
        assert!(!theirs.contains(':') && theirs.len() < 256);
        assert_eq!(our_name(&theirs).as_deref(), Some(name));
        assert_eq!(our_name("lazyrun-snapshotter.socket"), None);
    }
}
