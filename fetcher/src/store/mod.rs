//! The store of layer files on disk.

mod contents;
mod distrusted;
mod evict;
mod intact;
mod layer;
mod learnt;
mod lease;
mod limits;
mod order;
mod page_cache;
mod pins;
mod room;
mod span_map;
mod staging;
mod standing;
mod touched;
mod twins;
mod usage;
mod victims;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lazyrun_index::{Digest, LayerId, LayerIndex, Layout};

pub(crate) use contents::PlainFile;
pub use intact::Checked;
pub use layer::Layer;
pub use limits::{CacheLimit, CacheLimits, ParseLimitError, parse_bytes};
pub use pins::LayerPin;
pub use room::EvictionStats;
pub(crate) use room::{Need, NoRoom, Room, is_full};
pub(crate) use staging::Staging;
pub(crate) use twins::{Search, Twin};
pub use victims::{InUse, LayerUsers};

use crate::bounds::check_expansion;
use crate::error::FetchError;
use crate::trust::Origin;
use distrusted::Distrusted;
use standing::Standing;
use twins::Twins;

/// Names inside a layer's directory.
pub(crate) const DATA: &str = "data";
pub(crate) const SPANS: &str = "spans";
pub(crate) const INDEX: &str = "index";
pub(crate) const DIGESTS: &str = "digests";
/// When spans were last of use.
pub(crate) const USED: &str = "used";
/// There while no source has the layer's blob any more.
pub(crate) const GONE: &str = "gone";
/// The list of claims that are never adopted again, in the root directory.
const DISTRUSTED: &str = "distrusted.json";

/// All layers that are known here, `<root>/layers/<layer id>/{data,spans,index}`; an adopted one has `origin` or
/// `adopted`, and `digests` if its index lacks any, beside these.
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
    open: Mutex<HashMap<LayerId, Weak<Layer>>>,
    distrusted: Distrusted,
    room: Arc<Room>,
    twins: Twins,
}

impl Inner {
    fn path_of(&self, id: LayerId) -> PathBuf {
        self.layers.join(id.to_string())
    }

    fn open_layers(&self) -> MutexGuard<'_, HashMap<LayerId, Weak<Layer>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A layer, if it is open already.
    fn opened(&self, id: LayerId) -> Option<Arc<Layer>> {
        self.open_layers().get(&id).and_then(Weak::upgrade)
    }

    fn by_id(&self, id: LayerId) -> Result<Option<Arc<Layer>>, FetchError> {
        self.open_in(&mut self.open_layers(), id)
    }

    fn open_in(
        &self,
        open: &mut HashMap<LayerId, Weak<Layer>>,
        id: LayerId,
    ) -> Result<Option<Arc<Layer>>, FetchError> {
        if let Some(layer) = open.get(&id).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let dir = self.path_of(id);
        if !dir.exists() {
            return Ok(None);
        }
        match Layer::open(&dir, id, self.boot_id, Arc::clone(&self.room)) {
            Ok(layer) => {
                let layer = Arc::new(layer);
                open.retain(|_, weak| weak.strong_count() > 0);
                open.insert(id, Arc::downgrade(&layer));
                Ok(Some(layer))
            }
            Err(layer::OpenError::Damaged(reason)) => {
                tracing::warn!(layer = %id, reason, "damaged layer is dropped from the store");
                staging::discard(&self.layers, &dir)?;
                Ok(None)
            }
            Err(layer::OpenError::Io(error)) => Err(error),
        }
    }

    fn list(&self) -> Result<Vec<LayerId>, FetchError> {
        let path = &self.layers;
        let failed = |e| FetchError::store("listing", path, e);
        let mut found = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(id) = name.to_str().and_then(|n| n.parse().ok()) {
                found.push(id);
            }
        }
        Ok(found)
    }
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
        let list = root.join(DISTRUSTED);
        let distrusted =
            Distrusted::open(list.clone()).map_err(|e| FetchError::store("reading", &list, e))?;
        let inner = Arc::new_cyclic(|inner| Inner {
            room: Arc::new(Room::new(layers.clone(), Weak::clone(inner))),
            layers,
            boot_id,
            open: Mutex::default(),
            distrusted,
            twins: Twins::default(),
        });
        Ok(LayerStore { inner })
    }

    /// The layer with this diffID to start something new from, when an index of it is here; its bytes may be missing
    /// in part or whole. The tar layer file wins over the table one; one whose index is a lie does not count.
    ///
    /// # Errors
    /// When the files cannot be opened for reasons other than damage.
    pub fn get(&self, diff_id: Digest) -> Result<Option<Arc<Layer>>, FetchError> {
        for id in [LayerId::tar(diff_id), LayerId::table(diff_id)] {
            if let Some(layer) = self.by_id(id)?
                && layer.lie().is_none()
            {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    /// Exactly this layer file, whatever it is worth.
    ///
    /// A layer whose files are damaged is dropped and counts as absent: it can be fetched again.
    ///
    /// # Errors
    /// When the files cannot be opened for reasons other than damage.
    pub fn by_id(&self, id: LayerId) -> Result<Option<Arc<Layer>>, FetchError> {
        self.inner.by_id(id)
    }

    /// Takes over an index that somebody else made, for a layer that has none here: an empty layer file with that
    /// index, not proven until [`Fetcher::hydrate`](crate::Fetcher::hydrate) has. A layer that is here already is
    /// returned as it is, unless its own index is a lie. Blocks on the disk.
    ///
    /// Whether the origin's trust is admitted is the caller's to decide, and that the index is about the blob and the
    /// diffID that the image names.
    ///
    /// # Errors
    /// When the index is no good, or comes from where a lie came from before, or the disk fails.
    pub fn adopt(&self, index: &[u8], origin: &Origin) -> Result<Arc<Layer>, FetchError> {
        let parsed = LayerIndex::from_bytes(index.to_vec())
            .map_err(|source| FetchError::BadClaim { origin: origin.kind, source: Arc::new(source) })?;
        let id = parsed.id();
        if let Err(source) = check_expansion(&parsed) {
            return Err(FetchError::BadClaim { origin: origin.kind, source: Arc::new(source) });
        }
        if let Some(reason) = self.distrusts(origin, parsed.blob_digest()) {
            return Err(FetchError::Distrusted { layer: id.diff_id, origin: origin.kind, reason });
        }
        let staging = self.stage(id)?;
        let index_path = staging.index_path();
        let failed = |path: &Path, e| FetchError::store("writing", path, e);
        io::Write::write_all(&mut staging.create(&index_path)?, index).map_err(|e| failed(&index_path, e))?;
        let data_path = staging.data_path();
        staging.create(&data_path)?.set_len(parsed.layer_size()).map_err(|e| failed(&data_path, e))?;
        Standing::claim(staging.dir(), Digest::of(index), origin).map_err(|e| failed(staging.dir(), e))?;
        let spans = parsed.span_count();
        self.publish_with(staging, spans, &vec![0; span_map::words(spans)], false)
    }

    /// Why a claim from this origin about this blob is not to be believed: one turned out to be a lie before.
    pub fn distrusts(&self, origin: &Origin, blob: Digest) -> Option<String> {
        self.inner.distrusted.reason(origin, blob)
    }

    /// The artifacts that a lie came from.
    pub fn refused_artifacts(&self) -> HashSet<Digest> {
        self.inner.distrusted.artifacts()
    }

    /// Remembers that a layer's index is a lie: all its reads fail from now on, nothing new starts from it, and what
    /// it came from is never adopted again.
    pub(crate) fn condemn(&self, layer: &Layer, reason: &str) -> FetchError {
        let failed = |error: io::Error| {
            tracing::error!(layer = %layer.id(), %error, "that an index is a lie cannot be written down");
        };
        if let Err(error) = layer.condemn(reason) {
            failed(error);
        }
        let Some(origin) = layer.adopted_from() else {
            return FetchError::Interrupted { what: "proving a layer" };
        };
        if let Err(error) = self.inner.distrusted.add(&origin, layer.index().blob_digest(), reason) {
            failed(error);
        }
        FetchError::Lie { layer: layer.diff_id(), origin: origin.kind, reason: reason.to_owned() }
    }

    /// Names of all layer files in the store, in no order.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<LayerId>, FetchError> {
        self.inner.list()
    }

    /// [`Layer::file_name`] of a layer, without opening it; `None` when it is not here.
    pub fn file_name(&self, id: LayerId) -> Option<String> {
        let dir = self.path_of(id);
        if !dir.exists() {
            return None;
        }
        standing::file_name_in(&dir, &id.to_string()).ok()
    }

    /// Removes a layer and its bytes; one that is not there is no error. Handles that are still held keep
    /// working on the removed files.
    ///
    /// # Errors
    /// When the directory cannot be moved away.
    pub fn remove(&self, id: LayerId) -> Result<(), FetchError> {
        {
            let mut open = self.open_layers();
            open.remove(&id);
            staging::discard(&self.inner.layers, &self.path_of(id))?;
        }
        self.inner.twins.changed();
        Ok(())
    }

    /// Removes what nothing new would be started from and `in_use` does not name: table layer files beside a
    /// hydrated tar one, and layers whose index is a lie. Returns the file names of what was removed.
    ///
    /// # Errors
    /// When the store cannot be read or a directory cannot be moved away.
    pub fn remove_superseded(&self, in_use: impl Fn(LayerId) -> bool) -> Result<Vec<String>, FetchError> {
        let mut removed = Vec::new();
        for id in self.list()?.into_iter().filter(|id| !in_use(*id)) {
            let own =
                id.layout == Layout::Tar && self.file_name(id).is_some_and(|name| name == id.to_string());
            // Not opened, because that takes time and a daemon that starts asks about all.
            let Some(layer) = (if own { None } else { self.by_id(id)? }) else { continue };
            let better = match id.layout {
                Layout::Tar => None,
                Layout::Table => self.by_id(LayerId::tar(id.diff_id))?,
            };
            if layer.lie().is_some() || better.is_some_and(|tar| tar.is_hydrated()) {
                self.remove(id)?;
                removed.push(layer.file_name().to_owned());
            }
        }
        Ok(removed)
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

    /// Writes down when spans were last of use, so that a restart keeps the order of eviction.
    pub fn save_uses(&self) {
        let layers: Vec<Arc<Layer>> = self.open_layers().values().filter_map(Weak::upgrade).collect();
        layers.iter().for_each(|layer| layer.save_touched());
    }

    /// How much the store may take.
    pub fn limits(&self) -> CacheLimits {
        self.inner.room.limits()
    }

    /// Sets how much the store may take and evicts at once what is beyond that and may go. Blocks on the disk.
    ///
    /// # Errors
    /// When the disk can't be looked at.
    pub fn set_limits(&self, limits: CacheLimits) -> io::Result<()> {
        self.inner.room.set_limits(limits)
    }

    /// Bytes of disk that the store takes, what is being streamed included.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn disk_bytes(&self) -> io::Result<u64> {
        room::used_below(&self.inner.layers)
    }

    /// What has been evicted so far.
    pub fn evictions(&self) -> EvictionStats {
        self.inner.room.stats()
    }

    /// Says who knows which layers are in use.
    pub fn set_users(&self, users: Arc<dyn LayerUsers>) {
        self.inner.room.hooks.set_users(users);
    }

    /// Says who knows whether a layer's blob can be had. Without anybody who does nothing is ever evicted.
    pub(crate) fn set_refetch(&self, refetch: impl Fn(&Layer) -> bool + Send + Sync + 'static) {
        self.inner.room.hooks.set_refetch(Arc::new(refetch));
    }

    /// Whether what is evicted of a layer can be fetched again, as far as is known.
    pub fn can_refetch(&self, layer: &Layer) -> bool {
        self.inner.room.hooks.can_refetch(layer)
    }

    /// Evicts everything that may go of layers that are not in use, and returns the bytes of disk freed. Blocks on the
    /// disk.
    pub fn evict_idle(&self) -> u64 {
        victims::evict_idle(&self.inner, &self.inner.room.hooks)
    }

    /// Directories of interrupted streams that no living process holds.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>, FetchError> {
        staging::leftovers(&self.inner.layers)
    }

    /// Asked before anything of a layer is written.
    pub(crate) fn room(&self) -> &Room {
        &self.inner.room
    }

    /// A place to build a layer in; it disappears unless published.
    pub(crate) fn stage(&self, id: LayerId) -> Result<Staging, FetchError> {
        Staging::new(&self.inner.layers, id)
    }

    /// Publishes a finished layer, of which all spans are present. One that is here already stays and is returned
    /// unless it is to be replaced.
    pub(crate) fn publish(
        &self,
        staging: Staging,
        span_count: usize,
        replace: bool,
    ) -> Result<Arc<Layer>, FetchError> {
        self.publish_with(staging, span_count, &span_map::full(span_count), replace)
    }

    /// As [`LayerStore::publish`], for a layer of which only the spans that end within the first `stored` bytes are
    /// present.
    pub(crate) fn publish_start(
        &self,
        staging: Staging,
        stored: u64,
        replace: bool,
    ) -> Result<Arc<Layer>, FetchError> {
        let path = staging.index_path();
        let index = LayerIndex::open(&path)
            .map_err(|e| FetchError::store("reading", &path, io::Error::other(e.to_string())))?;
        let mut present = vec![0; span_map::words(index.span_count())];
        for (i, _) in index.spans().enumerate().filter(|(_, s)| s.offset.saturating_add(s.len) <= stored) {
            present[i / 64] |= 1 << (i % 64);
        }
        let spans = index.span_count();
        drop(index);
        self.publish_with(staging, spans, &present, replace)
    }

    fn publish_with(
        &self,
        staging: Staging,
        spans: usize,
        present: &[u64],
        replace: bool,
    ) -> Result<Arc<Layer>, FetchError> {
        let layer = self.publish_in(&mut self.open_layers(), staging, spans, present, replace)?;
        self.inner.twins.changed();
        self.know_contents(&layer);
        Ok(layer)
    }

    fn publish_in(
        &self,
        open: &mut HashMap<LayerId, Weak<Layer>>,
        staging: Staging,
        spans: usize,
        present: &[u64],
        replace: bool,
    ) -> Result<Arc<Layer>, FetchError> {
        let id = staging.id();
        if self.inner.open_in(open, id)?.is_some_and(|old| replace || old.lie().is_some()) {
            open.remove(&id);
            staging::discard(&self.inner.layers, &self.path_of(id))?;
        }
        staging.publish(&self.path_of(id), spans, present, self.inner.boot_id)?;
        self.inner.open_in(open, id)?.ok_or(FetchError::Interrupted { what: "publishing a layer" })
    }

    fn path_of(&self, id: LayerId) -> PathBuf {
        self.inner.path_of(id)
    }

    fn open_layers(&self) -> MutexGuard<'_, HashMap<LayerId, Weak<Layer>>> {
        self.inner.open_layers()
    }
}

/// Makes a rename or creation in `dir` durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod evict_tests;
#[cfg(test)]
pub(crate) mod tests;
