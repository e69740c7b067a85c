//! What a layer may unpack to.

use lazyrun_index::{IndexError, LayerIndex};

/// Decoded bytes that a layer may have whatever its size.
const SMALL_LAYER: u64 = 8 << 30;
/// Decoded bytes for each byte of the blob beyond that. Programs compress to a third; a disk image full of zeros by a
/// thousand, which is what bombs are made of.
const MAX_EXPANSION: u64 = 256;

/// Most decoded bytes of a layer whose blob has `blob_size` bytes. The manifest says that size, so a registry that wants
/// to fill a disk has to send something for it.
pub(crate) fn layer_limit(blob_size: u64) -> u64 {
    blob_size.saturating_mul(MAX_EXPANSION).max(SMALL_LAYER)
}

/// Refuses an index of a layer that would be refused as a stream.
pub(crate) fn check_expansion(index: &LayerIndex) -> Result<(), IndexError> {
    let limit = layer_limit(index.blob_size());
    if index.layer_size() > limit { Err(IndexError::TooLong { limit }) } else { Ok(()) }
}
