//! The store of layer files on disk.

mod layer;
mod span_map;
mod staging;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use lazyrun_index::Digest;

pub use layer::Layer;
pub(crate) use staging::Staging;

use crate::error::FetchError;

/// Names inside a layer's directory.
pub(crate) const DATA: &str = "data";
pub(crate) const SPANS: &str = "spans";
pub(crate) const INDEX: &str = "index";

/// All layers that are known here, `<root>/layers/<diffID>/{data,spans,index}`.
///
/// One process owns a store. All handles of one layer share one [`Layer`], because what is local is tracked in
/// memory and only mirrored on disk.
#[derive(Clone)]
pub struct LayerStore {
    inner: Arc<Inner>,
}

struct Inner {
    layers: PathBuf,
    boot_id: [u8; 16],
    open: Mutex<HashMap<Digest, Weak<Layer>>>,
}

impl LayerStore {
    /// Opens (or makes) the store below `root` and removes what interrupted streams left.
    ///
    /// # Errors
    /// When directories cannot be made or read.
    pub fn open(root: &Path) -> Result<LayerStore, FetchError> {
        LayerStore::open_at_boot(root, span_map::boot_id())
    }

    fn open_at_boot(root: &Path, boot_id: [u8; 16]) -> Result<LayerStore, FetchError> {
        let layers = root.join("layers");
        fs::create_dir_all(&layers).map_err(|e| FetchError::store("creating", &layers, e))?;
        staging::sweep(&layers)?;
        Ok(LayerStore { inner: Arc::new(Inner { layers, boot_id, open: Mutex::default() }) })
    }

    /// The layer with this diffID, when its index is here; its bytes may be missing in part or whole.
    ///
    /// A layer whose files are damaged is dropped and counts as absent: it can be fetched again.
    ///
    /// # Errors
    /// When the files cannot be opened for reasons other than damage.
    pub fn get(&self, diff_id: Digest) -> Result<Option<Arc<Layer>>, FetchError> {
        let mut open = self.open_layers();
        if let Some(layer) = open.get(&diff_id).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let dir = self.path_of(diff_id);
        if !dir.exists() {
            return Ok(None);
        }
        match Layer::open(&dir, diff_id, self.inner.boot_id) {
            Ok(layer) => {
                let layer = Arc::new(layer);
                open.retain(|_, weak| weak.strong_count() > 0);
                open.insert(diff_id, Arc::downgrade(&layer));
                Ok(Some(layer))
            }
            Err(layer::OpenError::Damaged(reason)) => {
                tracing::warn!(layer = %diff_id, reason, "damaged layer is dropped from the store");
                staging::discard(&self.inner.layers, &dir)?;
                Ok(None)
            }
            Err(layer::OpenError::Io(error)) => Err(error),
        }
    }

    /// diffIDs of all layers in the store, in no order.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Digest>, FetchError> {
        let path = &self.inner.layers;
        let failed = |e| FetchError::store("listing", path, e);
        let mut found = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(digest) = name.to_str().and_then(|n| format!("sha256:{n}").parse().ok()) {
                found.push(digest);
            }
        }
        Ok(found)
    }

    /// Removes a layer and its bytes; one that is not there is no error. Handles that are still held keep
    /// working on the removed files.
    ///
    /// # Errors
    /// When the directory cannot be moved away.
    pub fn remove(&self, diff_id: Digest) -> Result<(), FetchError> {
        let mut open = self.open_layers();
        open.remove(&diff_id);
        staging::discard(&self.inner.layers, &self.path_of(diff_id))
    }

    /// Makes everything that is local survive a power cut without being verified again. Blocks on the disk; for
    /// an orderly shutdown.
    ///
    /// # Errors
    /// The first failure; the other layers are written nevertheless.
    pub fn sync(&self) -> io::Result<()> {
        let layers: Vec<Arc<Layer>> = self.open_layers().values().filter_map(Weak::upgrade).collect();
        layers.iter().map(|layer| layer.sync()).fold(Ok(()), io::Result::and)
    }

    /// A place to build a layer in; it disappears unless published.
    pub(crate) fn stage(&self, diff_id: Digest) -> Result<Staging, FetchError> {
        Staging::new(&self.inner.layers, diff_id)
    }

    /// Publishes a finished layer, of which all spans are present.
    pub(crate) fn publish(&self, staging: Staging, span_count: usize) -> Result<Arc<Layer>, FetchError> {
        let diff_id = staging.diff_id();
        let final_dir = self.path_of(diff_id);
        staging.publish(&final_dir, span_count, self.inner.boot_id)?;
        self.get(diff_id)?.ok_or(FetchError::Interrupted { what: "publishing a layer" })
    }

    fn path_of(&self, diff_id: Digest) -> PathBuf {
        self.inner.layers.join(diff_id.hex())
    }

    fn open_layers(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Weak<Layer>>> {
        self.inner.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a rename or creation in `dir` durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests;
