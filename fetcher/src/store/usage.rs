//! What the store holds, told without opening layers that nobody uses.

use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Weak};

use super::{DATA, Layer, LayerStore};
use crate::error::FetchError;

/// What `st_blocks` counts in, in bytes.
const BLOCK: u64 = 512;

impl LayerStore {
    /// Bytes that layer files take on the disk, holes not counted.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub fn disk_bytes(&self) -> Result<u64, FetchError> {
        let files = self.list()?.into_iter().map(|id| self.path_of(id).join(DATA));
        // A layer may go while they are counted.
        let sizes = files.filter_map(|file| std::fs::metadata(file).ok());
        Ok(sizes.map(|file| file.blocks().saturating_mul(BLOCK)).sum())
    }

    /// The layers that are open: in use, or lately so.
    pub fn opened(&self) -> Vec<Arc<Layer>> {
        self.open_layers().values().filter_map(Weak::upgrade).collect()
    }
}
