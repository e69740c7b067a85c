//! What can be wrong with a table of contents, each in one sentence.

use crate::error::Name;
use crate::{Digest, IndexError};

/// Why a layer's own table of contents is not usable. The layer can always be streamed instead.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The footer or an annotation gives a place where no table can be.
    #[error("the place of the layer's table of contents makes no sense: {reason}")]
    Place {
        /// What is wrong.
        reason: String,
    },
    /// The bytes handed in are not the ones asked for.
    #[error("{what} has {actual} bytes instead of {expected}")]
    Length {
        /// What was measured.
        what: &'static str,
        /// Length asked for or announced.
        expected: u64,
        /// Length found.
        actual: u64,
    },
    /// The table is not the one that the manifest names.
    #[error("{what} has digest {actual} instead of {expected}, which the manifest says")]
    Digest {
        /// "the table of contents", packed or not.
        what: &'static str,
        /// The digest in the manifest.
        expected: Digest,
        /// The digest of the data.
        actual: Digest,
    },
    /// The table cannot be unpacked.
    #[error("the layer's table of contents cannot be unpacked: {reason}")]
    Packed {
        /// What is wrong.
        reason: String,
    },
    /// The table is larger than anything that makes sense.
    #[error("the layer's table of contents is too large: {what} is over {limit}")]
    TooLarge {
        /// What was counted.
        what: &'static str,
        /// The most that is taken.
        limit: u64,
    },
    /// The table is not the JSON it should be.
    #[error("the layer's table of contents is malformed: {reason}")]
    Json {
        /// What is wrong, with line and column.
        reason: String,
    },
    /// The table is of a version that nobody has defined yet.
    #[error("the layer's table of contents has version {found}; only version 1 is known")]
    Version {
        /// Version in the table.
        found: i64,
    },
    /// An entry that makes no sense or that no container root may hold.
    #[error("the layer's table of contents has an entry that cannot be taken, {name}: {reason}")]
    Entry {
        /// The entry's name as found.
        name: Name,
        /// What is wrong.
        reason: String,
    },
    /// The index could not be built.
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl TableError {
    pub(crate) fn place(reason: impl Into<String>) -> Self {
        Self::Place { reason: reason.into() }
    }

    pub(crate) fn packed(reason: impl Into<String>) -> Self {
        Self::Packed { reason: reason.into() }
    }

    pub(crate) fn entry(name: &[u8], reason: impl Into<String>) -> Self {
        Self::Entry { name: Name::new(name), reason: reason.into() }
    }
}
