//! The other side of a shim's socket: attach, exec, kill, state; and reading a container's log.
//!
//! Blocking code on threads and descriptors, for the command line; nothing is printed but the container's own
//! bytes to the writers given.

mod connection;
mod logs;
mod session;
pub mod tty;

pub use connection::Connection;
pub use logs::{LogOptions, read_logs};
pub use session::{Ending, SessionOptions, attach, exec};

use super::error::{Attempt, ContainerError, Result};
use super::proto::{Frame, Request, State};
use std::path::Path;

/// Sends `signal` to the container's first process (SIGKILL: to all of the container).
///
/// # Errors
/// The shim cannot be reached, or the container is not running.
pub fn kill(socket: &Path, signal: i32) -> Result<()> {
    simple(socket, &Request::Kill { signal })
}

/// Sets the size of the container's terminal.
///
/// # Errors
/// The shim cannot be reached.
pub fn resize(socket: &Path, rows: u16, cols: u16) -> Result<()> {
    simple(socket, &Request::Resize { rows, cols })
}

fn simple(socket: &Path, request: &Request) -> Result<()> {
    let mut connection = Connection::open(socket, request)?;
    match connection.receive()? {
        Some(Frame::Exit(0)) => Ok(()),
        Some(Frame::Error(code, message)) => Err(failed(code, message)),
        _ => Err(ContainerError::invalid("the container ended before it could answer")),
    }
}

/// How the container is.
///
/// # Errors
/// The shim cannot be reached or answers nonsense.
pub fn state(socket: &Path) -> Result<State> {
    let connection = Connection::open(socket, &Request::State)?;
    let line = connection.receive_line()?;
    serde_json::from_str(&line).attempt(|| "understand the shim's answer")
}

/// An error frame as an error.
fn failed(code: i32, message: String) -> ContainerError {
    ContainerError::Failed { code: u8::try_from(code).unwrap_or(super::error::EXIT_RUNNER), message }
}
