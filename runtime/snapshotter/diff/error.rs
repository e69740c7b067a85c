//! Why a difference can't be had from here.

use std::fmt::Display;
use std::io;

use tonic::Status;

use crate::containerd::ContainerdError;
use crate::snapshotter::error::SnapshotError;

/// Why a request for a difference is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiffError {
    /// Another differ is to do it.
    #[error("not a difference that lazyrun makes: {0}")]
    NotOurs(String),
    /// A layer can't say what is there.
    #[error("{0}")]
    Impossible(String),
    /// A file can't be read.
    #[error("the layer can't be made: can't {what} {path} in the container's changes: {error}")]
    Read {
        /// What was tried.
        what: &'static str,
        /// The path in the container.
        path: String,
        /// Why not.
        error: io::Error,
    },
    /// The layer can't be written.
    #[error("the layer can't be written: {0}")]
    Write(#[from] io::Error),
    /// containerd's content store does not take it.
    #[error("the layer can't be stored: {0}")]
    Containerd(#[from] ContainerdError),
    /// The snapshots can't be asked.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A thread of ours failed.
    #[error("the layer can't be made: a thread of lazyrun's own failed")]
    Thread,
}

impl DiffError {
    /// That a file can't be read.
    pub(super) fn read(what: &'static str, path: &[u8], error: impl Into<io::Error>) -> Self {
        Self::Read { what, path: shown(path), error: error.into() }
    }

    /// That another differ is to do it.
    pub(super) fn not_ours(why: impl Display) -> Self {
        Self::NotOurs(why.to_string())
    }
}

/// A path in a container, as it is told to people.
pub(super) fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path).escape_debug())
}

impl From<DiffError> for Status {
    fn from(error: DiffError) -> Self {
        let text = error.to_string();
        match error {
            DiffError::NotOurs(_) => Self::unimplemented(text),
            DiffError::Impossible(_) => Self::failed_precondition(text),
            DiffError::Read { .. } | DiffError::Write(_) | DiffError::Thread => Self::internal(text),
            DiffError::Containerd(error) => Self::new(error.code(), text),
            DiffError::Snapshot(error) => error.into(),
        }
    }
}
