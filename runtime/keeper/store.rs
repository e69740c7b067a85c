//! Descriptors kept by name across the daemon's lives, and both ends of the protocol for it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use lazyrun_fs::fuse::ServerHandle;
use serde::{Deserialize, Serialize};

use super::manager::Manager;
use crate::ipc::{fds, frame};

// What follows a mount's name in those of its connection's descriptors.
const DEVICE: &str = ":dev";
const JOURNAL: &str = ":journal";

/// A mount that an earlier daemon served.
#[derive(Debug)]
pub struct KeptMount {
    /// The mount itself.
    pub tree: OwnedFd,
    /// Its FUSE connection, if it has one of its own.
    pub dev: Option<OwnedFd>,
    /// The journal of the connection, where it has one.
    pub journal: Option<OwnedFd>,
}

/// Takes the mount of this name out of what was kept.
pub fn take_mount(kept: &mut BTreeMap<String, OwnedFd>, name: &str) -> Option<KeptMount> {
    let dev = kept.remove(&format!("{name}{DEVICE}"));
    let journal = kept.remove(&format!("{name}{JOURNAL}"));
    Some(KeptMount { tree: kept.remove(name)?, dev, journal })
}

#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Keep the descriptor that follows under this name.
    Keep(String),
    /// Close what is kept under this name.
    Drop(String),
    /// Start the next daemon from the program whose descriptor follows, and tell the caller, whose connection comes
    /// with it, how that went.
    Replace,
    /// A sign of life. Keepers that don't say that they listen don't know it.
    Alive,
}

/// A daemon that asks to be replaced.
#[derive(Debug)]
pub struct Replacement {
    /// The program to start from now on.
    pub program: OwnedFd,
    /// The connection of whoever asked for it, for one [`Reply`](crate::ipc::protocol::Reply).
    pub caller: OwnedFd,
}

/// No daemon that is alive takes so long for its part of a message.
pub(super) const MESSAGE_BOUND: Duration = Duration::from_secs(10);

/// Has the keeper's end of a socket to a daemon wait no longer than `limit` for it, where it blocks at all.
///
/// # Errors
/// The socket's.
pub(super) fn bound(daemon: &UnixStream, limit: Duration) -> io::Result<()> {
    daemon.set_read_timeout(Some(limit))?;
    daemon.set_write_timeout(Some(limit))
}

/// The keeper's side: what is kept, by name.
#[derive(Debug, Default)]
pub struct FdStore {
    kept: BTreeMap<String, OwnedFd>,
    manager: Manager,
    replacement: Option<Replacement>,
    sign_of_life: bool,
}

impl FdStore {
    /// A store of these descriptors, which are from an earlier keeper. `manager` gets a copy of all that is kept.
    pub fn new(kept: BTreeMap<String, OwnedFd>, manager: Manager) -> Self {
        Self { kept, manager, replacement: None, sign_of_life: false }
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// All that is kept, by name.
    pub fn kept(&self) -> &BTreeMap<String, OwnedFd> {
        &self.kept
    }

    /// The FUSE connections among what is kept: name, `/dev/fuse` descriptor, and journal where there is one.
    pub fn connections(&self) -> impl Iterator<Item = (&str, &OwnedFd, Option<&OwnedFd>)> {
        self.kept.iter().filter_map(|(name, dev)| {
            let mount = name.strip_suffix(DEVICE)?;
            Some((mount, dev, self.kept.get(&format!("{mount}{JOURNAL}"))))
        })
    }

    /// Who has copies of it.
    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    /// What the daemon asked to be replaced by, once.
    pub fn take_replacement(&mut self) -> Option<Replacement> {
        self.replacement.take()
    }

    /// Whether the daemon has given a sign of life since this was last asked.
    pub fn take_sign_of_life(&mut self) -> bool {
        std::mem::take(&mut self.sign_of_life)
    }

    /// Gives a new daemon everything that is kept.
    ///
    /// # Errors
    /// The socket's, `WouldBlock` if the daemon does not take it.
    pub fn hand_over(&self, daemon: &UnixStream) -> io::Result<()> {
        frame::write(daemon, &self.kept.keys().collect::<Vec<_>>())?;
        for fd in self.kept.values() {
            fds::send(daemon.as_fd(), &[fd.as_fd()])?;
        }
        Ok(())
    }

    /// Does what the daemon has asked so far; `false` once it has closed its end. The socket is non-blocking.
    ///
    /// # Errors
    /// Those of the socket other than that nothing is there.
    pub fn serve(&mut self, daemon: &UnixStream) -> io::Result<bool> {
        let mut peek = [0u8; 1];
        loop {
            match nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(daemon),
                &mut peek,
                nix::sys::socket::MsgFlags::MSG_PEEK,
            ) {
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(true),
                Err(nix::errno::Errno::ECONNRESET) | Ok(0) => return Ok(false),
                Err(e) => return Err(e.into()),
                Ok(_) => {}
            }
            // A message has begun; its rest is on the way, unless the daemon dies right here.
            daemon.set_nonblocking(false)?;
            let served = self.one(daemon);
            daemon.set_nonblocking(true)?;
            match served {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                other => other?,
            }
        }
    }

    fn one(&mut self, daemon: &UnixStream) -> io::Result<()> {
        match frame::read(daemon)? {
            Some(Message::Keep(name)) => {
                let fd = fds::receive(daemon.as_fd())?.pop();
                let fd =
                    fd.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no descriptor came"))?;
                if self.kept.contains_key(&name) {
                    // The manager would keep both.
                    self.manager.discard(&name);
                }
                self.manager.keep(&name, fd.as_fd());
                self.kept.insert(name, fd);
            }
            Some(Message::Drop(name)) => {
                if self.kept.remove(&name).is_some() {
                    self.manager.discard(&name);
                }
            }
            Some(Message::Replace) => {
                let odd = || io::Error::new(io::ErrorKind::InvalidData, "no program came");
                let [program, caller] =
                    <[OwnedFd; 2]>::try_from(fds::receive(daemon.as_fd())?).map_err(|_| odd())?;
                // Children are started by its number, and in them low numbers are taken by what is placed there.
                let program = fds::copy_above_targets(program)?;
                self.replacement = Some(Replacement { program, caller });
            }
            Some(Message::Alive) => self.sign_of_life = true,
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }
}

/// The daemon's side of the store. Without a keeper (in tests) nothing is kept.
#[derive(Debug, Default)]
pub struct Kept {
    keeper: Option<Mutex<UnixStream>>,
}

impl Kept {
    /// Takes over what the keeper has, by name.
    ///
    /// # Errors
    /// The socket's.
    pub fn connect(keeper: UnixStream) -> io::Result<(Self, BTreeMap<String, OwnedFd>)> {
        let names: Vec<String> = frame::read(&keeper)?.unwrap_or_default();
        let mut kept = BTreeMap::new();
        for name in names {
            if let Some(fd) = fds::receive(keeper.as_fd())?.pop() {
                kept.insert(name, fd);
            }
        }
        Ok((Self { keeper: Some(Mutex::new(keeper)) }, kept))
    }

    /// Has the keeper hold a copy of the descriptor under this name.
    ///
    /// # Errors
    /// That the keeper is gone.
    pub fn keep(&self, name: &str, fd: &OwnedFd) -> io::Result<()> {
        self.with(|keeper| {
            frame::write(keeper, &Message::Keep(name.to_owned()))?;
            fds::send(keeper.as_fd(), &[fd.as_fd()])
        })
    }

    /// Has the keeper hold a mount that is served: its tree under this name, and its connection with it.
    ///
    /// # Errors
    /// That the keeper is gone.
    pub fn keep_served(&self, name: &str, tree: &OwnedFd, server: &ServerHandle) -> io::Result<()> {
        // In this order: a connection without its journal can't be taken over.
        if let Some(journal) = server.journal_fd()? {
            self.keep(&format!("{name}{JOURNAL}"), &journal)?;
        }
        self.keep(&format!("{name}{DEVICE}"), &server.device_fd()?)?;
        self.keep(name, tree)
    }

    /// Has the keeper close all that it holds of a mount.
    ///
    /// # Errors
    /// That the keeper is gone.
    pub fn discard_served(&self, name: &str) -> io::Result<()> {
        self.discard(name)?;
        self.discard(&format!("{name}{DEVICE}"))?;
        self.discard(&format!("{name}{JOURNAL}"))
    }

    /// Asks the keeper to start the next daemon from this program, once this one has ended, and to tell the caller behind
    /// this connection.
    ///
    /// # Errors
    /// That the keeper is gone, or that there is none.
    pub fn replace(&self, program: &OwnedFd, caller: BorrowedFd<'_>) -> io::Result<()> {
        if self.keeper.is_none() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "this daemon has no keeper"));
        }
        self.with(|keeper| {
            frame::write(keeper, &Message::Replace)?;
            fds::send(keeper.as_fd(), &[program.as_fd(), caller])
        })
    }

    /// Tells a keeper that listens to it that the daemon is alive.
    ///
    /// # Errors
    /// That the keeper is gone.
    pub fn alive(&self) -> io::Result<()> {
        self.with(|keeper| frame::write(keeper, &Message::Alive))
    }

    /// Has the keeper close what it holds under this name.
    ///
    /// # Errors
    /// That the keeper is gone.
    pub fn discard(&self, name: &str) -> io::Result<()> {
        self.with(|keeper| frame::write(keeper, &Message::Drop(name.to_owned())))
    }

    fn with(&self, f: impl FnOnce(&UnixStream) -> io::Result<()>) -> io::Result<()> {
        match &self.keeper {
            Some(keeper) => f(&keeper.lock().unwrap_or_else(std::sync::PoisonError::into_inner)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    #[test]
    fn what_one_daemon_leaves_the_next_one_gets() {
        let (a, b) = UnixStream::pair().expect("pair");
        let mut store = FdStore::default();
        store.hand_over(&a).expect("nothing yet");
        let (kept, none) = Kept::connect(b).expect("connect");
        assert!(none.is_empty());
        let (mut end, other) = UnixStream::pair().expect("pair");
        kept.keep("x", &other.into()).expect("keep");
        kept.keep("y", &UnixStream::pair().expect("pair").0.into()).expect("keep");
        kept.discard("y").expect("discard");
        drop(kept);
        a.set_nonblocking(true).expect("nonblocking");
        assert!(!store.serve(&a).expect("serve"), "the first daemon is gone");

        let (a, b) = UnixStream::pair().expect("pair");
        store.hand_over(&a).expect("hand over");
        let (_kept, mut got) = Kept::connect(b).expect("connect");
        assert_eq!(got.keys().collect::<Vec<_>>(), ["x"]);
        UnixStream::from(got.remove("x").expect("x")).write_all(b"!").expect("write");
        let mut byte = [0];
        end.read_exact(&mut byte).expect("read");
    }

    #[test]
    fn a_program_to_come_is_not_overwritten_by_what_daemons_find_in_place() {
        let (a, b) = UnixStream::pair().expect("pair");
        let mut store = FdStore::default();
        store.hand_over(&a).expect("nothing yet");
        let (kept, _) = Kept::connect(b).expect("connect");
        let program = std::fs::File::open("/proc/self/exe").expect("a program").into();
        kept.replace(&program, a.as_fd()).expect("ask");
        a.set_nonblocking(true).expect("nonblocking");
        assert!(store.serve(&a).expect("serve"));
        let program = store.take_replacement().expect("a program").program;
        let placed = [super::super::LISTENER_FD, super::super::SNAPSHOTTER_FD];
        assert!(placed.iter().all(|target| program.as_raw_fd() > *target), "{program:?}");
    }

    #[test]
    fn a_daemon_that_does_not_say_all_of_a_message_holds_nobody_up() {
        let (a, b) = UnixStream::pair().expect("pair");
        bound(&a, Duration::from_millis(50)).expect("a bound");
        a.set_nonblocking(true).expect("nonblocking");
        (&b).write_all(&[9, 0]).expect("half a length");
        let error = FdStore::default().serve(&a).expect_err("the rest does not come");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        // Nor one that takes nothing.
        let (a, _b) = UnixStream::pair().expect("pair");
        bound(&a, Duration::from_millis(50)).expect("a bound");
        let mut store = FdStore::default();
        store.kept.insert("x".into(), a.as_fd().try_clone_to_owned().expect("a copy"));
        let mut refused = None;
        while refused.is_none() {
            refused = store.hand_over(&a).err();
        }
        assert_eq!(refused.map(|e| e.kind()), Some(io::ErrorKind::WouldBlock));
    }
}
