//! A session: one process of the container with its standard streams, as the shim sees them.

use super::start::Child;
use crate::container::error::{Attempt, Result};
use crate::container::init::Message;
use crate::container::sys;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes for standard input that are held while the process does not read.
pub(super) const STDIN_HIGH: usize = 256 * 1024;

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Init is at work.
    Preparing,
    /// Init waits to be told to execute the command.
    Ready,
    /// The command runs.
    Running,
    /// The process ended with this code and its output has been read.
    Ended(i32),
}

/// One process and its streams.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    /// To init, until the command is executed.
    pub(super) control: Option<OwnedFd>,
    pub(super) phase: Phase,
    /// What init reported when it failed.
    pub(super) failure: Option<(u8, String)>,
    pub(super) streams: Streams,
    pub(super) terminal: bool,
    /// Start without anybody's word.
    pub(super) auto_start: bool,
}

/// Our ends of a process' standard streams.
#[derive(Debug, Default)]
pub(super) struct Streams {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) input: Vec<u8>,
    /// Close standard input once `input` is written.
    pub(super) input_ends: bool,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
}

/// The process' ends.
pub(super) struct ChildStreams(pub(super) [OwnedFd; 3]);

impl ChildStreams {
    pub(super) fn borrow(&self) -> [BorrowedFd<'_>; 3] {
        let [a, b, c] = &self.0;
        [a.as_fd(), b.as_fd(), c.as_fd()]
    }
}

/// Pipes for a process without a terminal; with one, all three are /dev/null until init makes it.
pub(super) fn make_streams(terminal: bool, with_stdin: bool) -> Result<(Streams, ChildStreams)> {
    let what = || "make the standard streams";
    let null = || open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).attempt(what);
    let pipe = || pipe2(OFlag::O_CLOEXEC).attempt(what);
    if terminal {
        return Ok((Streams::default(), ChildStreams([null()?, null()?, null()?])));
    }
    let (stdin, child_in) = if with_stdin {
        let (read, write) = pipe()?;
        (Some(nonblocking(write)?), read)
    } else {
        (None, null()?)
    };
    let (out, child_out) = pipe()?;
    let (err, child_err) = pipe()?;
    let streams = Streams {
        stdin,
        stdout: Some(nonblocking(out)?),
        stderr: Some(nonblocking(err)?),
        ..Streams::default()
    };
    Ok((streams, ChildStreams([child_in, child_out, child_err])))
}

pub(super) fn nonblocking(fd: OwnedFd) -> Result<OwnedFd> {
    let what = || "make a descriptor non-blocking";
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL).attempt(what)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).attempt(what)?;
    Ok(fd)
}

impl Session {
    pub(super) fn new(child: Child, streams: Streams, terminal: bool, auto_start: bool) -> Self {
        let Child { pid, pidfd, control } = child;
        let phase = Phase::Preparing;
        Self { pid, pidfd, control: Some(control), phase, failure: None, streams, terminal, auto_start }
    }

    pub(super) fn signal(&self, signal: i32) -> std::io::Result<()> {
        sys::pidfd_signal(self.pidfd.as_fd(), signal)
    }

    /// Sends init a message, while there is one.
    pub(super) fn tell(&self, message: Message) -> Result<()> {
        self.control.as_ref().map_or(Ok(()), |control| message.send(control.as_fd()))
    }

    pub(super) fn resize(&self, rows: u16, cols: u16) {
        if let Some(tty) = self.streams.stdout.as_ref().filter(|_| self.terminal) {
            // A size that cannot be set (the terminal just closed) changes nothing for the process.
            let _ = sys::set_winsize(tty.as_fd(), rows, cols);
        }
    }

    /// Takes the master side of the terminal that init made.
    pub(super) fn use_console(&mut self, master: OwnedFd) -> Result<()> {
        let master = nonblocking(master)?;
        self.streams.stdin = Some(master.try_clone().attempt(|| "copy the terminal's descriptor")?);
        self.streams.stdout = Some(master);
        Ok(())
    }
}

impl Streams {
    /// Queues bytes for standard input; without one they are dropped.
    pub(super) fn queue_input(&mut self, bytes: &[u8]) {
        if self.stdin.is_some() && !self.input_ends {
            self.input.extend_from_slice(bytes);
        }
    }

    /// No more input will come. A terminal stays open: its end of input is a character.
    pub(super) fn end_input(&mut self, terminal: bool) {
        if !terminal {
            self.input_ends = true;
        }
    }

    /// Writes as much queued input as the process takes now.
    pub(super) fn write_input(&mut self) {
        let Some(stdin) = &self.stdin else {
            self.input.clear();
            return;
        };
        while !self.input.is_empty() {
            match nix::unistd::write(stdin, &self.input) {
                Ok(n) => drop(self.input.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    // Nobody reads any more.
                    self.input.clear();
                    self.stdin = None;
                    return;
                }
            }
        }
        if self.input_ends {
            self.stdin = None;
        }
    }

    /// Reads once from standard output or error. `None`: nothing now; an empty slice: the stream ended (and is
    /// closed).
    pub(super) fn read_output<'b>(&mut self, error: bool, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        let slot = if error { &mut self.stderr } else { &mut self.stdout };
        let fd = slot.as_ref()?;
        loop {
            match nix::unistd::read(fd, buffer) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return None,
                // A terminal whose other side is gone reads as EIO.
                Ok(0) | Err(_) => {
                    *slot = None;
                    return Some(&[]);
                }
                Ok(n) => return buffer.get(..n),
            }
        }
    }
}
