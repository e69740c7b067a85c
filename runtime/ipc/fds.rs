//! Passing descriptors: over a Unix socket (SCM_RIGHTS), one byte of payload each time, and to a child process.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The most descriptors that go in one message; the kernel's own limit is 253.
pub const MAX_FDS: usize = 64;

/// All numbers that children find descriptors at are below.
const ABOVE_TARGETS: RawFd = 64;

/// Sends `fds` with one byte of payload.
///
/// # Errors
/// `InvalidInput` for more than [`MAX_FDS`], else the socket's error (`WouldBlock` on a full socket).
pub fn send(socket: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &control[..0] } else { &control[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"f")], control, flags, None)?;
    Ok(())
}

/// Receives what one [`send`] sent.
///
/// # Errors
/// `UnexpectedEof` when the peer closed, `InvalidData` when descriptors were cut off, else the socket's error.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0; 1];
    let mut payload = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut payload, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel made these descriptors for this process just now; nobody else owns them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors were cut off"));
    }
    if message.bytes == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
    }
    Ok(fds)
}

/// A copy whose number is above all targets of [`place`], so that a child still has it under that number.
///
/// # Errors
/// When no more descriptors can be had.
pub fn copy_above_targets(fd: impl AsFd) -> io::Result<OwnedFd> {
    let high = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(ABOVE_TARGETS))?;
    // SAFETY: fcntl made this descriptor just now and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(high) })
}

/// Has a child find descriptors at given numbers, whatever their numbers are here.
///
/// # Errors
/// When no more descriptors can be had.
pub fn place(command: &mut Command, fds: &[(BorrowedFd<'_>, RawFd)]) -> io::Result<()> {
    let mut placed = Vec::with_capacity(fds.len());
    for (fd, target) in fds {
        // So that placing one never overwrites another.
        placed.push((copy_above_targets(fd)?, *target));
    }
    let dup = move || {
        for (fd, target) in &placed {
            // SAFETY: dup2 takes two numbers; what it closes in the child is nobody's there.
            if unsafe { libc::dup2(fd.as_raw_fd(), *target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: only dup2 runs between fork and exec, which is async-signal-safe.
    unsafe { command.pre_exec(dup) };
    Ok(())
}

/// Gives a child a session of its own, so that the end of ours or its terminal does not reach it.
pub fn own_session(command: &mut Command) {
    let setsid = || nix::unistd::setsid().map(|_| ()).map_err(io::Error::from);
    // SAFETY: only setsid runs between fork and exec, which is async-signal-safe.
    unsafe { command.pre_exec(setsid) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_arrives_alive() {
        let (a, b) = UnixStream::pair().expect("pair");
        let (mut x, y) = UnixStream::pair().expect("pair");
        send(a.as_fd(), &[y.as_fd()]).expect("send");
        drop(y);
        let mut got = receive(b.as_fd()).expect("receive");
        let mut y = UnixStream::from(got.pop().expect("one"));
        x.write_all(b"hi").expect("write");
        let mut buf = [0; 2];
        y.read_exact(&mut buf).expect("read");
        assert_eq!(&buf, b"hi");
        drop(a);
        assert_eq!(receive(b.as_fd()).expect_err("closed").kind(), io::ErrorKind::UnexpectedEof);
    }
}
