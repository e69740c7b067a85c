//! What can go wrong with a layer or an index, each in one sentence.

use std::fmt;
use std::io;

use crate::Digest;
use crate::compare::Mismatch;

/// A name out of an archive, shown with escapes and cut to a bearable length.
#[derive(Clone, PartialEq, Eq)]
pub struct Name(Vec<u8>);

impl Name {
    /// The name as it is.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 120;
        let cut = &self.0[..self.0.len().min(SHOWN)];
        write!(f, "\"{}\"", cut.escape_ascii())?;
        if self.0.len() > SHOWN {
            write!(f, " (cut; {} bytes)", self.0.len())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a layer could not be indexed or decoded, or why an index is not usable.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The blob's reader failed.
    #[error("reading the layer blob failed at byte {offset}: {source}")]
    Read {
        /// Byte of the blob.
        offset: u64,
        /// What the reader said.
        source: io::Error,
    },
    /// The caller's sink refused bytes or a span.
    #[error("storing the layer file failed at byte {offset}: {source}")]
    Sink {
        /// Byte of the layer file.
        offset: u64,
        /// What the sink said.
        source: io::Error,
    },
    /// The index could not be written or read.
    #[error("{what} the layer index failed: {source}")]
    IndexIo {
        /// "writing" or "opening".
        what: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// A decoder or one of its threads could not be set up.
    #[error("the {what} could not be set up: {source}")]
    Setup {
        /// What could not be set up.
        what: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The blob ends inside its compressed data.
    #[error("the layer blob is cut off: the {format} data ends early at byte {offset}")]
    BlobTruncated {
        /// "gzip" or "zstd".
        format: &'static str,
        /// Byte of the blob.
        offset: u64,
    },
    /// The compressed data is damaged.
    #[error("the layer blob is damaged: bad {format} data near byte {offset}: {reason}")]
    BlobCorrupt {
        /// "gzip" or "zstd".
        format: &'static str,
        /// Byte of the blob.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The archive ends inside an entry.
    #[error("the layer's tar is cut off at byte {offset}, inside {inside}")]
    TarTruncated {
        /// Byte of the layer file.
        offset: u64,
        /// What the end fell into.
        inside: String,
    },
    /// A header or extended header of the archive makes no sense.
    #[error("the layer's tar has a bad header at byte {offset}: {reason}")]
    TarHeader {
        /// Byte of the layer file where the header starts.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// An entry that no container root may hold.
    #[error("the layer's tar has an entry that cannot be taken, {name}: {reason}")]
    Entry {
        /// The entry's name as found.
        name: Name,
        /// What is wrong.
        reason: String,
    },
    /// A span, the blob or the layer file has another digest than the index says.
    #[error(
        "{what} has digest {actual} instead of {expected}: the data is damaged or not what was asked for"
    )]
    DigestMismatch {
        /// What was hashed.
        what: String,
        /// The digest in the index.
        expected: Digest,
        /// The digest of the data.
        actual: Digest,
    },
    /// The layer has more decoded bytes than are allowed ([`StreamOptions::max_layer_len`](crate::StreamOptions)).
    #[error("it unpacks to more than the {limit} bytes that are allowed for its size")]
    TooLong {
        /// Decoded bytes that it may have.
        limit: u64,
    },
    /// The data has another length than the index says.
    #[error("{what} has {actual} bytes instead of {expected}")]
    LengthMismatch {
        /// What was measured.
        what: String,
        /// The length in the index.
        expected: u64,
        /// The length of the data.
        actual: u64,
    },
    /// The span has no checkpoint: it only comes by streaming the whole blob.
    #[error("span {index} cannot be decoded on its own; its layer has to be streamed from the start")]
    NotRestartable {
        /// Number of the span.
        index: usize,
    },
    /// There is no such span.
    #[error("the layer has no span {index}, only {count}")]
    NoSuchSpan {
        /// Number asked for.
        index: usize,
        /// Number of spans in the layer.
        count: usize,
    },
    /// The index file is damaged or was not written by lazyrun.
    #[error("the layer index is not usable: {reason}; delete it and stream the layer again")]
    BadIndex {
        /// What is wrong.
        reason: String,
    },
    /// A table of contents in somebody else's format cannot be made an index.
    #[error("the {format} is not usable: {reason}")]
    BadTable {
        /// "SOCI zTOC", "eStargz TOC" and the like.
        format: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The index file was written by a newer lazyrun.
    #[error(
        "the layer index has format version {found}, this lazyrun knows up to version {known}: \
         use a newer lazyrun or delete the index"
    )]
    UnknownVersion {
        /// Version in the file.
        found: u32,
        /// Newest version this code reads.
        known: u32,
    },
    /// The blob is what it should be, but the index that came from elsewhere does not tell the truth about it.
    #[error("the layer index does not tell the truth about its layer: {0}")]
    Lie(#[from] Mismatch),
    /// A layer file in table order was to be filled from a stream.
    #[error("a layer file in table order cannot be filled by streaming its blob, only span by span")]
    TableLayout,
    /// A thread of the pipeline panicked: a defect of lazyrun.
    #[error("internal error: the {thread} thread of the layer decoder died")]
    Internal {
        /// Which thread.
        thread: &'static str,
    },
}

impl IndexError {
    pub(crate) fn bad_index(reason: impl Into<String>) -> Self {
        Self::BadIndex { reason: reason.into() }
    }

    pub(crate) fn writing(source: io::Error) -> Self {
        Self::IndexIo { what: "writing", source }
    }
}
