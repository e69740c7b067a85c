//! The one error type of containers, with the exit code each failure stands for.

use std::io;

/// Exit code of a runner that failed before the command ran.
pub const EXIT_RUNNER: u8 = 125;
/// Exit code when the command exists but cannot be executed.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// Exit code when the command cannot be found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Why a container could not be prepared, started or talked to.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A system call or file operation failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was attempted, on what.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The spec or an option asks for something impossible or unsupported.
    #[error("{0}")]
    Invalid(String),
    /// The container's command cannot be run, or the other side reported a failure with its exit code.
    #[error("{message}")]
    Failed {
        /// 125 (runner), 126 (not executable) or 127 (not found).
        code: u8,
        /// One sentence.
        message: String,
    },
}

impl ContainerError {
    /// An [`ContainerError::Invalid`] from anything printable.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }

    /// The exit code a command line should end with: 125, 126 or 127.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed { code, .. } => *code,
            Self::Io { .. } | Self::Invalid(_) => EXIT_RUNNER,
        }
    }
}

/// Result of this module.
pub type Result<T, E = ContainerError> = std::result::Result<T, E>;

/// Says what was attempted when an I/O result is an error.
pub(crate) trait Attempt<T> {
    /// `action` completes the sentence "cannot …".
    fn attempt<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| ContainerError::Io { action: action().into(), source: e.into() })
    }
}
