//! The command line's side of the control protocol.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::protocol::{Reply, Request};
use super::{fds, frame};
use crate::failure::Failure;

/// A connection to the daemon, good for one request.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

/// What happens on the way to a result.
pub trait Events {
    /// A layer has moved on.
    fn progress(&mut self, _layer: &str, _done: u64, _total: u64) {}
    /// Something for the user's eyes.
    fn note(&mut self, message: &str);
}

/// Events that nobody wants to see, but for notes, which go to stderr.
#[derive(Debug, Default)]
pub struct Quiet;

impl Events for Quiet {
    fn note(&mut self, message: &str) {
        eprintln!("lazyrun: {message}");
    }
}

impl Connection {
    /// Connects to the daemon's control socket.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when no daemon is there.
    pub fn open(socket: &Path) -> io::Result<Self> {
        Ok(Self { stream: UnixStream::connect(socket)? })
    }

    /// Sends the request and waits for its result.
    ///
    /// # Errors
    /// What the daemon says went wrong, or that the connection broke.
    pub fn call<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        events: &mut dyn Events,
    ) -> Result<T, Failure> {
        self.call_fd(request, events).map(|(value, _)| value)
    }

    /// As [`Connection::call`], with the descriptor that came with the result.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub fn call_fd<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        events: &mut dyn Events,
    ) -> Result<(T, Option<OwnedFd>), Failure> {
        let lost = |e: io::Error| Failure::daemon(format!("the connection to the lazyrun daemon broke: {e}"));
        // Who has no daemon to offer says so and hangs up without listening.
        let unheard = match frame::write(&self.stream, request) {
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                Some(e)
            }
            other => other.map(|()| None).map_err(lost)?,
        };
        loop {
            let reply = match (frame::read(&self.stream), &unheard) {
                (Ok(None) | Err(_), Some(e)) => return Err(lost(e.kind().into())),
                (reply, _) => reply.map_err(lost)?,
            };
            match reply {
                Some(Reply::Progress { layer, done, total }) => {
                    events.progress(&layer.hex()[..12], done, total);
                }
                Some(Reply::Note(message)) => events.note(&message),
                Some(Reply::Failed { code, message }) => return Err(Failure::new(code, message)),
                Some(Reply::Done { value, fd }) => {
                    let fd = if fd { fds::receive(self.stream.as_fd()).map_err(lost)?.pop() } else { None };
                    let value = serde_json::from_value(value)
                        .map_err(|e| Failure::daemon(format!("the daemon's answer makes no sense: {e}")))?;
                    return Ok((value, fd));
                }
                None => {
                    return Err(Failure::daemon(
                        "the lazyrun daemon ended before it answered; see daemon.log in its root directory",
                    ));
                }
            }
        }
    }

    /// Tells the daemon that what it sent is in place.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn acknowledge(&mut self) -> Result<(), Failure> {
        frame::write(&self.stream, &true)
            .map_err(|e| Failure::daemon(format!("the connection to the lazyrun daemon broke: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_without_listening_is_heard() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        frame::write(&theirs, &Reply::Failed { code: 7, message: "no daemon".into() }).expect("reply");
        drop(theirs);
        let mut connection = Connection { stream: ours };
        let failure = connection.call::<()>(&Request::Info, &mut Quiet).expect_err("no daemon");
        assert_eq!((failure.code, failure.message.as_str()), (7, "no daemon"));
        let (stream, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        let failure = Connection { stream }.call::<()>(&Request::Info, &mut Quiet).expect_err("no daemon");
        assert!(failure.message.contains("broke"), "{failure}");
    }
}
