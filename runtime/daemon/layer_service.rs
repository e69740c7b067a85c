//! What the FUSE servers read from: layer files by name, local bytes at once, missing ones by a fault.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use lazyrun_fetcher::{Fetcher, Layer};
use lazyrun_fs::fuse::{LayerFiles, ReadReply};
use lazyrun_index::{Digest, LayerId};
use tokio::runtime::Handle;

use super::metrics::Served;
use super::profile::Recorder;

/// Layer files of the store, served to FUSE.
pub struct LayerService {
    fetcher: Fetcher,
    runtime: Handle,
    // By inode number; a layer stays listed until it is removed from the store.
    known: RwLock<HashMap<u64, Arc<Known>>>,
    /// Recordings of what containers read as they start.
    pub recorder: Recorder,
    /// How reads were answered.
    pub served: Arc<Served>,
}

struct Known {
    layer: Arc<Layer>,
    reads: AtomicU64,
}

/// The inode number of a layer file by its name: the same in every life of the daemon, since the kernel remembers it.
pub fn inode_of(file_name: &str) -> u64 {
    // A tar layer file that was indexed here is named by its diffID, which will do as it is.
    let plain = format!("sha256:{file_name}").parse::<Digest>();
    let digest = plain.unwrap_or_else(|_| Digest::of(file_name.as_bytes()));
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    // 0 is no inode and 1 is the root.
    u64::from_le_bytes(first).max(2)
}

/// The layer file that a name means: its id, for an adopted one with a part of its index's digest behind it.
fn id_of(file_name: &str) -> Option<LayerId> {
    file_name.parse().ok().or_else(|| file_name.rsplit_once('.')?.0.parse().ok())
}

impl LayerService {
    /// A service over the fetcher's store; faults run on `runtime`.
    pub fn new(fetcher: Fetcher, runtime: Handle) -> Self {
        Self {
            fetcher,
            runtime,
            known: RwLock::default(),
            recorder: Recorder::default(),
            served: Arc::default(),
        }
    }

    /// Forgets a layer that is no longer in the store.
    pub fn forget(&self, file_name: &str) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&inode_of(file_name));
    }

    /// Reads of a layer file so far, by its inode number.
    pub fn reads(&self, ino: u64) -> u64 {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&ino).map_or(0, |known| known.reads.load(Ordering::Relaxed))
    }

    fn known(&self, ino: u64) -> Option<Arc<Known>> {
        if let Some(known) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(&ino) {
            return Some(Arc::clone(known));
        }
        // After a restart the kernel may ask for a file it looked up in an earlier life.
        let store = self.fetcher.store();
        let names = store.list().ok()?.into_iter().filter_map(|id| store.file_name(id));
        let name = names.into_iter().find(|name| inode_of(name) == ino)?;
        self.open(&name)
    }

    fn open(&self, file_name: &str) -> Option<Arc<Known>> {
        let layer = match self.fetcher.store().by_id(id_of(file_name)?) {
            Ok(layer) => layer?,
            Err(error) => {
                tracing::warn!(layer = file_name, %error, "a layer of the store can't be opened");
                return None;
            }
        };
        // With another index it is another file.
        if layer.file_name() != file_name {
            return None;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Known { layer, reads: AtomicU64::default() });
        Some(Arc::clone(known.entry(inode_of(file_name)).or_insert_with(new)))
    }
}

impl LayerFiles for LayerService {
    fn by_name(&self, name: &[u8]) -> Option<u64> {
        let name = std::str::from_utf8(name).ok()?;
        self.open(name).map(|_| inode_of(name))
    }

    fn size(&self, ino: u64) -> Option<u64> {
        self.known(ino).map(|known| known.layer.index().layer_size())
    }

    fn read(&self, ino: u64, offset: u64, len: u32, reply: Box<dyn ReadReply>) {
        let Some(known) = self.known(ino) else { return reply.error(libc::ENOENT) };
        let layer = &known.layer;
        known.reads.fetch_add(1, Ordering::Relaxed);
        self.recorder.note(ino, offset, len);
        let mut buffer = vec![0; len as usize];
        match layer.read_local(offset, &mut buffer) {
            Ok(Some(n)) => {
                self.served.answered(n, true);
                return reply.data(&buffer[..n]);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(layer = layer.file_name(), offset, %error, "a local layer file can't be read");
                self.served.failed();
                return reply.error(libc::EIO);
            }
        }
        let (fetcher, layer, served) = (self.fetcher.clone(), Arc::clone(layer), Arc::clone(&self.served));
        self.runtime.spawn(async move {
            match fetcher.read(&layer, offset, len as usize).await {
                Ok(bytes) => {
                    served.answered(bytes.len(), false);
                    reply.data(&bytes);
                }
                Err(error) => {
                    tracing::error!(layer = layer.file_name(), offset, len, %error, "a read could not be satisfied");
                    served.failed();
                    reply.error(libc::EIO);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inodes_follow_the_file_name() {
        let diff_id = Digest::of(b"x");
        let (tar, table) = (LayerId::tar(diff_id).to_string(), LayerId::table(diff_id).to_string());
        let adopted = format!("{tar}.0123456789abcdef");
        // As it has always been: kernels remember it.
        assert_eq!(inode_of(&tar).to_le_bytes(), diff_id.as_bytes()[..8]);
        let others = [inode_of(&tar), inode_of(&table), inode_of(&adopted)];
        assert!(others[0] != others[1] && others[0] != others[2] && others[1] != others[2]);
        assert_eq!(id_of(&tar), Some(LayerId::tar(diff_id)));
        assert_eq!(id_of(&adopted), Some(LayerId::tar(diff_id)));
        assert_eq!(id_of(&table), Some(LayerId::table(diff_id)));
        assert_eq!(id_of(&format!("{table}.0123456789abcdef")), Some(LayerId::table(diff_id)));
        assert_eq!(id_of("../x.table"), None);
    }
}
