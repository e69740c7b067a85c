//! The conversation with the helper: one length-prefixed JSON message each way, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message: some hundred layers with the longest paths fit.
const MAX_MESSAGE: u32 = 4 << 20;
/// Most descriptors that go with one message.
const MAX_FDS: usize = 16;

pub(super) fn send<T: Serialize>(
    socket: &mut UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let len = u32::try_from(body.len()).ok().filter(|&n| n <= MAX_MESSAGE);
    let len = len.ok_or_else(|| io::Error::other("the message to the mount helper is too long"))?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    // The descriptors ride on the length, so they are there before the body is read.
    let header = len.to_le_bytes();
    let sent =
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&header)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    socket.write_all(&header[sent..])?;
    socket.write_all(&body)
}

pub(super) fn receive<T: DeserializeOwned>(socket: &mut UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut header = [0u8; 4];
    let (got, fds) = receive_header(socket, &mut header)?;
    socket.read_exact(&mut header[got..])?;
    let len = u32::from_le_bytes(header);
    if len > MAX_MESSAGE {
        return Err(io::Error::other("the message announces an impossible length"));
    }
    let mut body = vec![0u8; len as usize];
    socket.read_exact(&mut body)?;
    Ok((serde_json::from_slice(&body)?, fds))
}

fn receive_header(socket: &UnixStream, header: &mut [u8; 4]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut iov = [IoSliceMut::new(header)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    if message.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut fds = Vec::new();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = item {
            // SAFETY: the kernel installed these descriptors for us with this very message.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}
