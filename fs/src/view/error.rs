//! Why an image's layers make no tree.

use thiserror::Error;

/// The layers cannot be merged; the whole image is refused.
#[derive(Debug, Error)]
pub enum ViewError {
    /// More layers than 16 bits can number.
    #[error("the image has {0} layers, more than the 65000 a view can hold")]
    TooManyLayers(usize),
    /// More entries or name bytes than 32 bits can number.
    #[error("{0} brings the view above 4 billion names or 4 GiB of names")]
    TooLarge(EntryName),
    /// A whiteout that names nothing that could exist.
    #[error("{0} is a whiteout of an empty name, of '.' or of '..'")]
    BadWhiteout(EntryName),
    /// A hard link whose target exists neither earlier in its layer nor below.
    #[error("{0} is a hard link to '{target}', which neither an earlier entry nor a lower layer has", target = .1)]
    LinkToNothing(EntryName, String),
    /// A hard link to a directory.
    #[error("{0} is a hard link to the directory '{target}'", target = .1)]
    LinkToDirectory(EntryName, String),
    /// The entry's path leads through more symlinks than any sane image has.
    #[error("{0} lies behind a loop of symlinks, or behind too many of them")]
    SymlinkLoop(EntryName),
    /// Extents that overlap, are unsorted or reach past the end of the file.
    #[error("{0} has extents that overlap or reach past its size of {1} bytes")]
    BadExtents(EntryName, u64),
}

/// Names an entry in an error: which layer, which path.
#[derive(Debug)]
pub struct EntryName {
    /// Number of the layer, 1 at the bottom.
    pub layer: usize,
    /// diffID of the layer.
    pub diff_id: String,
    /// Path of the entry, unprintable bytes escaped.
    pub path: String,
}

impl std::fmt::Display for EntryName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "entry '{}' of layer {} ({})", self.path, self.layer, self.diff_id)
    }
}

/// Bytes of a path as an error shows them.
pub(super) fn printable(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}
