//! Clients of the shim's socket: their requests, what they are owed, and how slow ones are treated.

use crate::container::proto::{Frame, MAX_REQUEST};
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes owed to a client at which the process it follows is no longer read from.
pub(super) const OUTPUT_HIGH: usize = 1 << 20;
/// A client that follows without being the foreground one and takes nothing for so long is dropped.
pub(super) const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// What a client is here for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Has not sent its request yet.
    Greeting,
    /// Follows the container.
    Attached {
        /// Its input is the container's.
        stdin: bool,
        /// The container waits for it.
        foreground: bool,
    },
    /// Has its own process.
    Exec(u32),
    /// Gets what it is owed, then is closed.
    Done,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) role: Role,
    pub(super) input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    /// Since when it owes us progress.
    stalled: Option<Instant>,
    /// The log it is being shown before what comes live.
    pub(super) replay: Option<BufReader<File>>,
    /// It closed its side or broke.
    pub(super) gone: bool,
}

impl Client {
    pub(super) fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (input, output) = (Vec::new(), Vec::new());
        Ok(Self {
            stream,
            role: Role::Greeting,
            input,
            output,
            sent: 0,
            stalled: None,
            replay: None,
            gone: false,
        })
    }

    /// Bytes not yet taken.
    pub(super) fn owed(&self) -> usize {
        self.output.len() - self.sent
    }

    pub(super) fn send(&mut self, frame: &Frame) {
        frame.encode(&mut self.output);
    }

    pub(super) fn send_raw(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    pub(super) fn send_output(&mut self, error: bool, bytes: &[u8]) {
        crate::container::proto::encode_output(error, bytes, &mut self.output);
    }

    /// Sends a last frame and closes after it.
    pub(super) fn finish(&mut self, frame: &Frame) {
        self.send(frame);
        self.role = Role::Done;
    }

    /// Writes what the socket takes now.
    pub(super) fn flush(&mut self) {
        while self.owed() > 0 {
            match self.stream.write(self.output.get(self.sent..).unwrap_or_default()) {
                Ok(n) => {
                    self.sent += n;
                    self.stalled = None;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.stalled.get_or_insert_with(Instant::now);
                    break;
                }
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
        if self.owed() == 0 {
            self.output.clear();
            self.sent = 0;
            self.stalled = None;
        } else if self.sent > OUTPUT_HIGH {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Reads what is there now into `input`.
    pub(super) fn fill(&mut self) {
        let mut buffer = [0u8; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.gone = true;
                    return;
                }
                Ok(n) => {
                    self.input.extend_from_slice(buffer.get(..n).unwrap_or_default());
                    if n < buffer.len() || self.input.len() > MAX_REQUEST {
                        return;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }

    /// Feeds the log to the client while it takes it; true once the log has been shown to its present end.
    pub(super) fn feed_replay(&mut self) -> bool {
        let Some(mut reader) = self.replay.take() else { return true };
        let mut line = String::new();
        while self.owed() < OUTPUT_HIGH {
            line.clear();
            match reader.read_line(&mut line) {
                Ok(0) | Err(_) => return true,
                Ok(_) => {
                    if let Ok(entry) = serde_json::from_str::<super::log::Entry>(&line) {
                        self.send_output(entry.stream == "stderr", entry.log.as_bytes());
                    }
                }
            }
        }
        self.replay = Some(reader);
        false
    }

    /// It follows the container without the right to hold it up, and has done so for too long.
    pub(super) fn out_of_patience(&self) -> bool {
        let follows =
            matches!(self.role, Role::Attached { foreground: false, .. } | Role::Greeting | Role::Done);
        follows && self.owed() > 0 && self.stalled.is_some_and(|s| s.elapsed() > PATIENCE)
    }

    pub(super) const fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }
}
