//! What mounted views have the kernel cache of layer files.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use lazyrun_fetcher::Layer;
use lazyrun_fs::fuse::ServerHandle;
use lazyrun_fs::mount::MountError;
use lazyrun_fs::plan::Plan;

use super::Views;
use crate::daemon::layer_service::inode_of;

/// A layer of mounted views, and how they read it.
pub struct ReadLayer {
    /// The layer.
    pub layer: Arc<Layer>,
    /// By EROFS through FUSE.
    pub by_flat: bool,
    /// By EROFS from the layer file, where this process sees no reads.
    pub direct: bool,
}

impl Views {
    /// Layers of the mounted views by inode number.
    pub fn layers(&self) -> HashMap<u64, ReadLayer> {
        let mut layers = HashMap::new();
        for view in self.lock().values() {
            for layer in &view.layers {
                let new = ReadLayer { layer: Arc::clone(layer), by_flat: false, direct: false };
                let read = layers.entry(inode_of(layer.file_name())).or_insert(new);
                read.direct |= view.direct;
                read.by_flat |= view.plan == Plan::Erofs && !view.direct;
            }
        }
        layers
    }

    /// Has the kernel let go of what it caches of these layer files for EROFS. Blocks for some milliseconds.
    ///
    /// # Errors
    /// When the helper fails that does it.
    pub fn let_go(&self, layers: Vec<String>) -> Result<(), MountError> {
        self.mounter.let_go(self.flat.as_fd(), layers)
    }

    /// Has the kernel forget what it caches of these layer files for EROFS; `flat` serves them. Blocks while they are being
    /// read, but no longer than a helper may take.
    ///
    /// # Errors
    /// When the helper fails that does it. What is being read then is forgotten later.
    pub fn invalidate(&self, flat: &ServerHandle, layers: &[&str]) -> Result<(), MountError> {
        if layers.is_empty() {
            return Ok(());
        }
        self.mounter.invalidate(flat.device(), layers.iter().map(|name| inode_of(name)).collect())
    }
}
