//! Attach and exec: the user's streams on one side, the container's on the other.

use super::connection::{Connection, Sender};
use super::failed;
use super::tty::{self, DetachKeys, RawMode};
use crate::container::error::{Attempt, Result};
use crate::container::proto::{ExecProcess, Frame, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The process ended with this code.
    Exited(i32),
    /// The user detached; the process goes on.
    Detached,
    /// The connection closed without a word: the shim is gone.
    Lost,
}

/// What connects to what. The streams are descriptors so that waiting for input can be ended.
#[derive(Debug)]
pub struct SessionOptions<'a> {
    /// Where typed bytes come from; `None` sends nothing.
    pub stdin: Option<BorrowedFd<'a>>,
    /// The process has a terminal: put ours into raw mode, follow its size, watch for the detach keys.
    pub terminal: bool,
    /// Pass on the signals this process gets (SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2).
    pub signal_proxy: bool,
}

/// Follows the container until it ends or the user detaches. `logs` shows first what it wrote before.
///
/// # Errors
/// The shim cannot be reached, reports a failure (with its exit code), or a writer fails.
pub fn attach(
    socket: &Path,
    logs: bool,
    options: &SessionOptions<'_>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Ending> {
    let connection = Connection::open(socket, &Request::Attach { stdin: options.stdin.is_some(), logs })?;
    follow(connection, options, out, err)
}

/// Runs one more process in the container and follows it to its end.
///
/// # Errors
/// As [`attach`]; 126 and 127 when the command cannot be executed or found.
pub fn exec(
    socket: &Path,
    process: &ExecProcess,
    options: &SessionOptions<'_>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Ending> {
    let mut process = process.clone();
    process.size = process.size.or_else(|| options.stdin.filter(|_| options.terminal).and_then(tty::size));
    let connection = Connection::open(socket, &Request::Exec { process })?;
    follow(connection, options, out, err)
}

fn follow(
    mut connection: Connection,
    options: &SessionOptions<'_>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Ending> {
    let raw = match options.stdin.filter(|fd| options.terminal && tty::size(*fd).is_some()) {
        Some(stdin) => Some(RawMode::enter(stdin)?),
        None => None,
    };
    let typist = Typist::start(&connection, options)?;
    let mut ending = Ok(Ending::Lost);
    loop {
        match connection.receive() {
            Ok(Some(Frame::Stdout(bytes))) => pass_on(out, &bytes)?,
            Ok(Some(Frame::Stderr(bytes))) => pass_on(err, &bytes)?,
            Ok(Some(Frame::Exit(code))) => {
                ending = Ok(Ending::Exited(code));
                break;
            }
            Ok(Some(Frame::Error(code, message))) => {
                ending = Err(failed(code, message));
                break;
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(e) => {
                ending = Err(e);
                break;
            }
        }
    }
    let detached = typist.stop();
    drop(raw);
    match ending {
        Ok(Ending::Lost) | Err(_) if detached => Ok(Ending::Detached),
        other => other,
    }
}

fn pass_on(to: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).attempt(|| "write the container's output")
}

/// The thread that sends what is typed, the terminal's size and signals.
struct Typist {
    thread: Option<JoinHandle<bool>>,
    /// Closing it ends the thread.
    stop: Option<OwnedFd>,
    mask_before: Option<SigSet>,
}

impl Typist {
    fn start(connection: &Connection, options: &SessionOptions<'_>) -> Result<Self> {
        let mut watched = SigSet::empty();
        if options.terminal {
            watched.add(Signal::SIGWINCH);
        }
        if options.signal_proxy {
            for signal in [
                Signal::SIGINT,
                Signal::SIGTERM,
                Signal::SIGHUP,
                Signal::SIGQUIT,
                Signal::SIGUSR1,
                Signal::SIGUSR2,
            ] {
                watched.add(signal);
            }
        }
        let mut before = SigSet::empty();
        // Blocked here, so that the new thread inherits it and the signals wait for the signalfd.
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&watched), Some(&mut before))
            .attempt(|| "block signals")?;
        let (wake, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).attempt(|| "make a pipe")?;
        let signals = SignalFd::with_flags(&watched, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .attempt(|| "receive signals")?;
        let stdin = options.stdin.map(|fd| fd.try_clone_to_owned()).transpose().attempt(|| "copy stdin")?;
        let worker =
            Worker { sender: connection.sender()?, stdin, wake, signals, terminal: options.terminal };
        let thread = std::thread::Builder::new()
            .name("typist".to_owned())
            .spawn(move || worker.run())
            .attempt(|| "start a thread for the input")?;
        Ok(Self { thread: Some(thread), stop: Some(stop), mask_before: Some(before) })
    }

    /// Ends the thread; true when the user had detached.
    fn stop(mut self) -> bool {
        self.finish()
    }

    fn finish(&mut self) -> bool {
        self.stop = None;
        let detached = self.thread.take().is_some_and(|t| t.join().unwrap_or(false));
        if let Some(before) = self.mask_before.take() {
            // Restoring a mask that was valid before cannot fail.
            let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
        }
        detached
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        self.finish();
    }
}

struct Worker {
    sender: Sender,
    stdin: Option<OwnedFd>,
    wake: OwnedFd,
    signals: SignalFd,
    terminal: bool,
}

impl Worker {
    /// True when the user detached.
    fn run(mut self) -> bool {
        let mut keys = DetachKeys::default();
        let size_source = self.stdin.as_ref().and_then(|s| s.try_clone().ok());
        self.send_size(size_source.as_ref());
        loop {
            let mut fds = vec![
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            if let Some(stdin) = &self.stdin {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                continue;
            }
            let fired = |i: usize| fds.get(i).and_then(PollFd::any).unwrap_or(false);
            let (stop, signal, typed) = (fired(0), fired(1), fired(2));
            drop(fds);
            if stop {
                return false;
            }
            if signal {
                self.pass_signals(size_source.as_ref());
            }
            if typed && self.pass_input(&mut keys) {
                return true;
            }
        }
    }

    fn pass_signals(&mut self, tty: Option<&OwnedFd>) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo == libc::SIGWINCH as u32 {
                self.send_size(tty);
            } else {
                // A shim that is gone shows on the receiving side.
                let _ = self.sender.send(&Frame::Signal(info.ssi_signo));
            }
        }
    }

    fn send_size(&mut self, tty: Option<&OwnedFd>) {
        if let Some((rows, cols)) = tty.filter(|_| self.terminal).and_then(|fd| tty::size(fd.as_fd())) {
            let _ = self.sender.send(&Frame::Resize(rows, cols));
        }
    }

    /// Sends what was typed; true when the user detached.
    fn pass_input(&mut self, keys: &mut DetachKeys) -> bool {
        let Some(stdin) = &self.stdin else { return false };
        let mut buffer = [0u8; 32 * 1024];
        let n = match nix::unistd::read(stdin, &mut buffer) {
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => return false,
            Ok(0) | Err(_) => {
                let _ = self.sender.send(&Frame::StdinEof);
                self.stdin = None;
                return false;
            }
            Ok(n) => n,
        };
        let typed = buffer.get(..n).unwrap_or_default();
        let mut bytes = Vec::with_capacity(n);
        let detached = if self.terminal {
            keys.filter(typed, &mut bytes)
        } else {
            bytes.extend_from_slice(typed);
            false
        };
        if !bytes.is_empty() && self.sender.send(&Frame::Stdin(bytes)).is_err() {
            self.stdin = None;
        }
        if detached {
            self.sender.hang_up();
        }
        detached
    }
}
