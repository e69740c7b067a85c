//! Files of other layers that have the same content.
//!
//! Digests count only of layer files that are tars and whose index is built or proven here: a claim could name the
//! digest of a file of somebody else's image to get at its bytes. (A table's proof does not cover every digest in it.)

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lazyrun_index::{LayerId, Layout};

use super::contents::{CONTENTS, Contents, PlainFile};
use super::{DATA, INDEX, Inner, Layer, LayerStore};

/// Layers that nobody else has open are kept open for the next lookup: so many.
const KEPT: usize = 4;
/// A layer that nobody has open is not opened for a lookup if its index has more bytes than this.
const MAX_INDEX: u64 = 32 << 20;

type Tables = HashMap<LayerId, Contents>;

/// What a store knows of its layers' contents.
#[derive(Default)]
pub(super) struct Twins {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Those of all layers; `None` when it has to be looked.
    tables: Option<Arc<Tables>>,
    /// Layers whose table was made, or could not be made, by this process.
    tried: HashSet<LayerId>,
    kept: VecDeque<Arc<Layer>>,
}

impl Twins {
    /// Layers have come or gone.
    pub(super) fn changed(&self) {
        let mut state = self.lock();
        state.tables = None;
        state.tried.clear();
        let kept = std::mem::take(&mut state.kept);
        drop(state);
        // A layer writes a file when it is closed.
        drop(kept);
    }

    fn keep(&self, layer: Arc<Layer>) {
        let mut state = self.lock();
        state.kept.retain(|kept| kept.id() != layer.id());
        state.kept.push_front(layer);
        let old = if state.kept.len() > KEPT { state.kept.pop_back() } else { None };
        drop(state);
        drop(old);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file with the same content as another one's, whose bytes are local.
pub(crate) struct Twin {
    /// Its layer.
    pub(crate) layer: Arc<Layer>,
    /// Where it starts in the layer file.
    pub(crate) offset: u64,
}

/// What a twin must have.
struct Wanted<'a> {
    file: &'a PlainFile,
    lead: u64,
    part: &'a Range<u64>,
}

/// A look for twins of the files of one layer.
pub(crate) struct Search<'a> {
    store: &'a Inner,
    layer: &'a Layer,
    tables: Arc<Tables>,
    /// Where the last twin ended: the next one is often there.
    last: Option<(LayerId, u64)>,
}

impl Layer {
    /// Whether the content digests in the index are known to be those of the bytes.
    pub(crate) fn has_proven_contents(&self) -> bool {
        self.is_proven() && self.id().layout == Layout::Tar && self.lie().is_none()
    }

    /// Whether all of these bytes are local and verified.
    pub(crate) fn has_bytes(&self, bytes: Range<u64>) -> bool {
        let len = bytes.end.saturating_sub(bytes.start);
        self.index.spans_covering(bytes.start, len).all(|span| self.has_span(span))
    }
}

impl LayerStore {
    /// Makes a layer's files known by their contents, if its digests count and that was not done before. Reads all
    /// entries the first time: not for an async task.
    pub(crate) fn know_contents(&self, layer: &Layer) {
        if layer.has_proven_contents() && !self.inner.path_of(layer.id()).join(CONTENTS).exists() {
            self.write_contents(layer);
        }
    }

    fn write_contents(&self, layer: &Layer) {
        // What can't be made is not tried for every read.
        if !self.inner.twins.lock().tried.insert(layer.id()) {
            return;
        }
        let began = Instant::now();
        match Contents::write(&self.inner.path_of(layer.id()), layer.index()) {
            Ok(()) => {
                self.inner.twins.lock().tables = None;
                let entries = layer.index().entry_count();
                tracing::debug!(layer = %layer.id(), entries, took = ?began.elapsed(), "contents written down");
            }
            Err(error) => {
                tracing::debug!(layer = %layer.id(), %error, "a layer's contents can't be written down");
            }
        }
    }

    /// A look for twins of the files of a layer; `None` when its digests do not count. Not for an async task.
    pub(crate) fn twins_of<'a>(&'a self, layer: &'a Layer) -> Option<Search<'a>> {
        if !layer.has_proven_contents() {
            return None;
        }
        let mut tables = self.inner.tables();
        if !tables.contains_key(&layer.id()) {
            self.write_contents(layer);
            tables = self.inner.tables();
        }
        Some(Search { store: &self.inner, layer, tables, last: None })
    }
}

impl Inner {
    fn tables(&self) -> Arc<Tables> {
        let mut state = self.twins.lock();
        let look = || {
            let ids = self.list().unwrap_or_default();
            let table = |id| Some((id, Contents::open(&self.path_of(id))?));
            Arc::new(ids.into_iter().filter_map(table).collect())
        };
        Arc::clone(state.tables.get_or_insert_with(look))
    }

    /// A layer to take bytes from. One that nobody has open is opened if that is cheap and it has any bytes.
    fn open_twin(&self, id: LayerId) -> Option<Arc<Layer>> {
        let layer = match self.opened(id) {
            Some(layer) => layer,
            None => {
                let dir = self.path_of(id);
                let small = fs::metadata(dir.join(INDEX)).is_ok_and(|index| index.len() <= MAX_INDEX);
                if !small || !fs::metadata(dir.join(DATA)).is_ok_and(|data| data.blocks() > 0) {
                    return None;
                }
                let layer = self.by_id(id).ok().flatten()?;
                self.twins.keep(Arc::clone(&layer));
                layer
            }
        };
        layer.has_proven_contents().then_some(layer)
    }
}

impl Search<'_> {
    /// The layer's files in the order of the layer file, from the first one that ends behind `offset` on.
    pub(crate) fn files_from(&self, offset: u64) -> impl Iterator<Item = PlainFile> {
        let table = self.tables.get(&self.layer.id());
        table.into_iter().flat_map(move |table| table.files_from(self.layer.index(), offset))
    }

    /// A twin of `file` of which the bytes `part` are local, and so are the `lead` bytes in front of it.
    pub(crate) fn find(&mut self, file: &PlainFile, lead: u64, part: &Range<u64>) -> Option<Twin> {
        let wanted = Wanted { file, lead, part };
        let found = self.last.and_then(|(id, end)| self.find_in(id, &wanted, end));
        let found = found.or_else(|| {
            let others = self.tables.keys().filter(|id| self.last.is_none_or(|(last, _)| last != **id));
            others.into_iter().find_map(|id| self.find_in(*id, &wanted, file.offset))
        });
        if let Some(twin) = &found {
            self.last = Some((twin.layer.id(), twin.offset.saturating_add(file.len)));
        }
        found
    }

    /// The one nearest to a place in a layer: of files that are there twice one may be followed by what follows here.
    fn find_in(&self, id: LayerId, wanted: &Wanted<'_>, near: u64) -> Option<Twin> {
        let Wanted { file, lead, part } = wanted;
        let table = self.tables.get(&id)?;
        // Before the layer is opened.
        if !table.may_have(&file.content) {
            return None;
        }
        let layer = self.store.open_twin(id)?;
        let usable = |twin: &PlainFile| {
            let start = twin.offset.checked_add(part.start).and_then(|start| start.checked_sub(*lead));
            start.is_some_and(|start| layer.has_bytes(start..twin.offset.saturating_add(part.end)))
        };
        let twins = table.files_with(layer.index(), file).filter(usable);
        let offset = twins.map(|twin| twin.offset).min_by_key(|offset| offset.abs_diff(near))?;
        Some(Twin { layer, offset })
    }
}
