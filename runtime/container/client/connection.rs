//! A connection to a shim: the request line, then frames.

use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::proto::{Frame, Request};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// One conversation with a shim.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Connection {
    /// Connects and sends the request.
    ///
    /// # Errors
    /// Nobody listens on the socket (the container has ended) or the request cannot be sent.
    pub fn open(socket: &Path, request: &Request) -> Result<Self> {
        let what = || format!("reach the container at {}", socket.display());
        let mut stream = UnixStream::connect(socket).attempt(what)?;
        let mut line = serde_json::to_vec(request).attempt(|| "encode the request")?;
        line.push(b'\n');
        stream.write_all(&line).attempt(what)?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// A handle for sending from another thread.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn sender(&self) -> Result<Sender> {
        self.stream.try_clone().map(Sender).attempt(|| "copy the connection")
    }

    /// The next frame; `None` when the shim closed the connection between frames.
    ///
    /// # Errors
    /// The connection broke, within a frame or otherwise, or carried something that is no frame.
    pub fn receive(&mut self) -> Result<Option<Frame>> {
        let mut buffer = [0u8; 64 * 1024];
        loop {
            match Frame::decode(&self.received) {
                Ok(Some((frame, used))) => {
                    self.received.drain(..used);
                    return Ok(Some(frame));
                }
                Ok(None) => {}
                Err(e) => return Err(ContainerError::Invalid(format!("the shim sent nonsense: {e}"))),
            }
            match self.stream.read(&mut buffer) {
                Ok(0) if self.received.is_empty() => return Ok(None),
                Ok(0) => return Err(ContainerError::invalid("the shim hung up in the middle of a frame")),
                Ok(n) => self.received.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset && self.received.is_empty() => {
                    return Ok(None);
                }
                Err(e) => return Err(e).attempt(|| "hear from the container's shim"),
            }
        }
    }

    pub(super) fn receive_line(self) -> Result<String> {
        let mut line = String::new();
        BufReader::new(self.stream.take(1 << 16)).read_line(&mut line).attempt(|| "hear from the shim")?;
        Ok(line)
    }
}

/// The sending half of a [`Connection`].
#[derive(Debug)]
pub struct Sender(UnixStream);

impl Sender {
    /// Sends one frame.
    ///
    /// # Errors
    /// The shim is gone.
    pub fn send(&mut self, frame: &Frame) -> Result<()> {
        self.0.write_all(&frame.to_bytes()).attempt(|| "send to the container's shim")
    }

    /// Ends the conversation for both halves.
    pub fn hang_up(&self) {
        // Fails only when it has ended already.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}
