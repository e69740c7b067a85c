//! What shim and init say to each other: the plan in a memfd, and small packets on a seqpacket socket.

use crate::container::error::{Attempt, ContainerError, EXIT_RUNNER, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, send, sendmsg};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

/// Longest error sentence sent over the socket, in bytes.
const LONGEST_PACKET: usize = 16 * 1024;

/// Everything init needs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Join a running container in place of building one.
    pub(crate) exec: bool,
    pub(crate) bundle: PathBuf,
    pub(crate) spec: Spec,
    /// For `exec`: `CLONE_NEW*` flags of the namespaces to enter.
    pub(crate) join: i32,
    /// Execute at once, without waiting for [`Message::Start`].
    pub(crate) auto_start: bool,
    /// The network namespace is new, so its loopback interface is down.
    pub(crate) fresh_network: bool,
    /// The container's groups: (name of the directory under `/sys/fs/cgroup`, its path on the host).
    pub(crate) cgroup: CgroupView,
}

/// What of the control groups the container gets to see.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct CgroupView {
    /// v1 hierarchies: their controllers and the container's directory on the host.
    pub(crate) v1: Vec<(Vec<String>, PathBuf)>,
    /// The container's directory in the unified hierarchy.
    pub(crate) v2: Option<PathBuf>,
}

impl Plan {
    /// The plan as an anonymous file, for inheriting.
    pub(crate) fn to_memfd(&self) -> Result<OwnedFd> {
        let what = || "hand over the plan";
        let fd = memfd_create(c"lazyrun-plan", MFdFlags::MFD_CLOEXEC).attempt(what)?;
        let mut file = File::from(fd);
        let json = serde_json::to_vec(self).attempt(what)?;
        file.write_all(&json).and_then(|()| file.rewind()).attempt(what)?;
        Ok(file.into())
    }

    pub(super) fn read(fd: OwnedFd) -> Result<Self> {
        let mut json = Vec::new();
        File::from(fd).read_to_end(&mut json).attempt(|| "read the plan")?;
        serde_json::from_slice(&json).attempt(|| "understand the plan")
    }
}

/// Shim to init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// The process is in the container's control groups.
    CgroupReady,
    /// Execute the command.
    Start,
}

impl Message {
    const fn byte(self) -> u8 {
        match self {
            Self::CgroupReady => b'c',
            Self::Start => b's',
        }
    }

    pub(crate) fn send(self, socket: BorrowedFd<'_>) -> Result<()> {
        send(socket.as_raw_fd(), &[self.byte()], MsgFlags::MSG_NOSIGNAL).map(drop).attempt(|| "reach init")
    }
}

/// Init to shim.
#[derive(Debug)]
pub(crate) enum Report {
    /// Master side of the container's terminal.
    Console(OwnedFd),
    /// Everything is prepared; only the exec is left.
    Ready,
    /// It failed, with the exit code.
    Error(u8, String),
    /// The socket closed: the exec happened, or init died.
    Closed,
}

impl Report {
    /// Receives one report; blocks unless the socket is non-blocking (then `WouldBlock`).
    pub(crate) fn receive(socket: BorrowedFd<'_>) -> std::io::Result<Self> {
        let mut buffer = vec![0u8; LONGEST_PACKET];
        let mut space = nix::cmsg_space!([i32; 1]);
        let (len, fd) = {
            let mut iov = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                // Init died without having read all we sent it. That is told once, before its last words.
                Err(nix::errno::Errno::ECONNRESET) => return Self::receive(socket),
                other => other?,
            };
            let mut fd = None;
            for cmsg in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = cmsg {
                    for raw in fds {
                        // SAFETY: the kernel just installed this descriptor for us.
                        fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
                    }
                }
            }
            (message.bytes, fd)
        };
        let packet = buffer.get(..len).unwrap_or_default();
        Ok(match (packet, fd) {
            ([], _) => Self::Closed,
            ([b'C', ..], Some(fd)) => Self::Console(fd),
            ([b'R', ..], _) => Self::Ready,
            ([b'E', code, text @ ..], _) => Self::Error(*code, String::from_utf8_lossy(text).into_owned()),
            _ => Self::Error(EXIT_RUNNER, "init sent a report that makes no sense".to_owned()),
        })
    }
}

/// Init's end of the socket.
pub(crate) struct Control(OwnedFd);

impl Control {
    pub(super) const fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Blocks until the shim says `wanted`. A shim that is gone is an error.
    pub(super) fn wait_for(&self, wanted: Message) -> Result<()> {
        let mut byte = [0u8];
        loop {
            match recv(self.0.as_raw_fd(), &mut byte, MsgFlags::empty()) {
                Ok(1) if byte[0] == wanted.byte() => return Ok(()),
                Ok(1) => {}
                Ok(_) => return Err(ContainerError::invalid("the shim is gone")),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e).attempt(|| "hear from the shim"),
            }
        }
    }

    pub(super) fn report_ready(&self) -> Result<()> {
        send(self.0.as_raw_fd(), b"R", MsgFlags::MSG_NOSIGNAL).map(drop).attempt(|| "reach the shim")
    }

    pub(super) fn report_console(&self, master: &OwnedFd) -> Result<()> {
        let fds = [master.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(b"C")], &rights, MsgFlags::MSG_NOSIGNAL, None)
            .map(drop)
            .attempt(|| "hand the terminal to the shim")
    }

    pub(super) fn report_error(&self, error: &ContainerError) {
        let mut packet = vec![b'E', error.exit_code()];
        packet.extend(error.to_string().into_bytes());
        packet.truncate(LONGEST_PACKET);
        // If the shim cannot be reached there is nobody left to tell.
        let _ = send(self.0.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL);
    }
}
