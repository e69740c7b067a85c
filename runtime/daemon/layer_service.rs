//! What the FUSE servers read from: layer files by name, local bytes at once, missing ones by a fault.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use lazyrun_fetcher::{Fetcher, Layer};
use lazyrun_fs::fuse::{LayerFiles, ReadReply};
use lazyrun_index::Digest;
use tokio::runtime::Handle;

use super::profile::Recorder;

/// Layer files of the store, served to FUSE.
pub struct LayerService {
    fetcher: Fetcher,
    runtime: Handle,
    // By inode number; a layer stays listed until it is removed from the store.
    known: RwLock<HashMap<u64, Arc<Layer>>>,
    /// Recordings of what containers read as they start.
    pub recorder: Recorder,
}

/// The inode number of a layer file: the same in every life of the daemon, since the kernel remembers it.
pub fn inode_of(diff_id: Digest) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&diff_id.as_bytes()[..8]);
    // 0 is no inode and 1 is the root.
    u64::from_le_bytes(first).max(2)
}

impl LayerService {
    /// A service over the fetcher's store; faults run on `runtime`.
    pub fn new(fetcher: Fetcher, runtime: Handle) -> Self {
        Self { fetcher, runtime, known: RwLock::default(), recorder: Recorder::default() }
    }

    /// Forgets a layer that is no longer in the store.
    pub fn forget(&self, diff_id: Digest) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&inode_of(diff_id));
    }

    fn layer(&self, ino: u64) -> Option<Arc<Layer>> {
        if let Some(layer) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(&ino) {
            return Some(Arc::clone(layer));
        }
        // After a restart the kernel may ask for a file it looked up in an earlier life.
        let diff_id = self.fetcher.store().list().ok()?.into_iter().find(|d| inode_of(*d) == ino)?;
        self.open(diff_id)
    }

    fn open(&self, diff_id: Digest) -> Option<Arc<Layer>> {
        let layer = match self.fetcher.store().get(diff_id) {
            Ok(layer) => layer?,
            Err(error) => {
                tracing::warn!(layer = %diff_id, %error, "a layer of the store can't be opened");
                return None;
            }
        };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(known.entry(inode_of(diff_id)).or_insert(layer)))
    }
}

impl LayerFiles for LayerService {
    fn by_name(&self, name: &[u8]) -> Option<u64> {
        let name = std::str::from_utf8(name).ok()?;
        let diff_id: Digest = format!("sha256:{name}").parse().ok()?;
        self.open(diff_id).map(|_| inode_of(diff_id))
    }

    fn size(&self, ino: u64) -> Option<u64> {
        self.layer(ino).map(|layer| layer.index().layer_size())
    }

    fn read(&self, ino: u64, offset: u64, len: u32, reply: Box<dyn ReadReply>) {
        let Some(layer) = self.layer(ino) else { return reply.error(libc::ENOENT) };
        self.recorder.note(ino, offset, len);
        let mut buffer = vec![0; len as usize];
        match layer.read_local(offset, &mut buffer) {
            Ok(Some(n)) => return reply.data(&buffer[..n]),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(layer = %layer.diff_id(), offset, %error, "a local layer file can't be read");
                return reply.error(libc::EIO);
            }
        }
        let fetcher = self.fetcher.clone();
        self.runtime.spawn(async move {
            match fetcher.read(&layer, offset, len as usize).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => {
                    tracing::error!(layer = %layer.diff_id(), offset, len, %error, "a read could not be satisfied");
                    reply.error(libc::EIO);
                }
            }
        });
    }
}
