//! What can go wrong with a snapshot, in containerd's classes of errors.

use tonic::Status;

/// Why a request about snapshots is refused. containerd decides by the class what it does next.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is no such snapshot.
    #[error("snapshot {0} does not exist")]
    NotFound(String),
    /// There is one of that name, or of that layer, already.
    #[error("snapshot {0} already exists")]
    AlreadyExists(String),
    /// It exists, but is not of a kind, or in a state, that allows this.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request makes no sense.
    #[error("{0}")]
    InvalidArgument(String),
    /// It may work later.
    #[error("{0}")]
    Unavailable(String),
    /// This node's own trouble: disk, database, kernel.
    #[error("{0}")]
    Internal(String),
}

impl From<redb::Error> for SnapshotError {
    fn from(error: redb::Error) -> Self {
        Self::Internal(format!("the database of snapshots can't be used: {error}"))
    }
}

macro_rules! from_database {
    ($($error:ident),*) => {
        $(impl From<redb::$error> for SnapshotError {
            fn from(error: redb::$error) -> Self {
                redb::Error::from(error).into()
            }
        })*
    };
}

from_database!(CommitError, DatabaseError, StorageError, TableError, TransactionError);

impl From<serde_json::Error> for SnapshotError {
    fn from(error: serde_json::Error) -> Self {
        Self::Internal(format!("a record in the database of snapshots is damaged: {error}"))
    }
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        let text = error.to_string();
        match error {
            SnapshotError::NotFound(_) => Self::not_found(text),
            SnapshotError::AlreadyExists(_) => Self::already_exists(text),
            SnapshotError::FailedPrecondition(_) => Self::failed_precondition(text),
            SnapshotError::InvalidArgument(_) => Self::invalid_argument(text),
            SnapshotError::Unavailable(_) => Self::unavailable(text),
            SnapshotError::Internal(_) => Self::internal(text),
        }
    }
}
