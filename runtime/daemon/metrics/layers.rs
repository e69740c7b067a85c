//! Faults by image and layer. A label costs whoever stores the metrics, so there is one only for images that are mounted
//! or were lately, and for a bounded number of them; what others had is counted together.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use lazyrun_fetcher::observe::{FaultSeen, SharedSeen};
use lazyrun_fetcher::{Histogram, HistogramSnapshot, Layer};
use lazyrun_index::LayerId;

use crate::daemon::views::MountedView;

/// An image that is not mounted has labels for so long after it was.
const LATELY: Duration = Duration::from_secs(3600);
/// Images that have labels.
const MAX_IMAGES: usize = 32;

/// Latencies of faults by image and layer.
#[derive(Debug, Default)]
pub struct FaultsByLayer {
    state: RwLock<State>,
    /// Of layers that belong to no image that is known, or not any more.
    others: Counts,
}

#[derive(Debug, Default)]
struct State {
    images: HashMap<String, Image>,
    /// Where faults of a layer are counted: for the image that was the last to be started from it.
    layers: HashMap<LayerId, Arc<Counts>>,
}

#[derive(Debug)]
struct Image {
    used: Instant,
    views: Vec<Weak<MountedView>>,
    layers: Vec<(LayerId, Weak<Layer>, Arc<Counts>)>,
}

/// What is counted of a layer.
#[derive(Debug, Default)]
struct Counts {
    faults: Histogram,
    shared: AtomicU64,
}

/// What is told of a layer of an image.
#[derive(Debug, Clone)]
pub struct LayerFaults {
    /// The image.
    pub image: String,
    /// Beginning of the layer's diffID; with `.table` behind it for the layer file of a table.
    pub layer: String,
    /// Its faults.
    pub faults: HistogramSnapshot,
    /// Bytes that it missed and other layers had.
    pub shared: u64,
}

/// How far an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageBytes {
    /// The image.
    pub image: String,
    /// Bytes of its layer files that are local.
    pub local: u64,
    /// Bytes of them in all.
    pub total: u64,
}

/// The short name of a layer file.
pub fn short(id: LayerId) -> String {
    let name = id.to_string();
    match name.split_once('.') {
        Some((hex, rest)) => format!("{hex:.12}.{rest}"),
        None => name.chars().take(12).collect(),
    }
}

impl FaultsByLayer {
    /// A fault is over. This is on the path that a reader waits for: a look-up and two additions.
    pub fn note(&self, fault: &FaultSeen) {
        match self.read().layers.get(&fault.layer) {
            Some(counts) => counts.faults.observe(fault.waited),
            None => self.others.faults.observe(fault.waited),
        }
    }

    /// A layer got bytes from others.
    pub fn note_shared(&self, shared: &SharedSeen) {
        let state = self.read();
        let counts = state.layers.get(&shared.layer).map_or(&self.others, |counts| counts);
        counts.shared.fetch_add(shared.bytes, Relaxed);
    }

    /// Something starts from this image.
    pub fn uses(&self, image: &str, layers: &[Arc<Layer>]) {
        let mut state = self.write();
        if state.images.len() >= MAX_IMAGES && !state.images.contains_key(image) {
            let idle = |(_, known): &(&String, &Image)| !known.is_mounted();
            let oldest = state.images.iter().filter(idle).min_by_key(|(_, known)| known.used);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else { return };
            self.drop_image(&mut state, &oldest);
        }
        let new = || Image { used: Instant::now(), views: Vec::new(), layers: Vec::new() };
        let mut known = state.images.remove(image).unwrap_or_else(new);
        known.used = Instant::now();
        for layer in layers {
            let id = layer.id();
            let counts = match known.layers.iter_mut().find(|(known, ..)| *known == id) {
                Some((_, file, counts)) => {
                    *file = Arc::downgrade(layer);
                    Arc::clone(counts)
                }
                None => {
                    let counts = Arc::<Counts>::default();
                    known.layers.push((id, Arc::downgrade(layer), Arc::clone(&counts)));
                    counts
                }
            };
            state.layers.insert(id, counts);
        }
        state.images.insert(image.to_owned(), known);
    }

    /// This view of the image is in use for as long as anybody but the list of views has it.
    pub fn mounted(&self, image: &str, view: &Arc<MountedView>) {
        if let Some(known) = self.write().images.get_mut(image) {
            known.views.retain(|view| view.strong_count() > 0);
            known.views.push(Arc::downgrade(view));
        }
    }

    /// The image is gone, and its labels with it.
    pub fn forget(&self, image: &str) {
        self.drop_image(&mut self.write(), image);
    }

    /// What there is now, by image and layer; the last one is for all others together.
    pub fn snapshot(&self) -> Vec<LayerFaults> {
        self.drop_old();
        let state = self.read();
        let mut all = Vec::new();
        for (image, known) in &state.images {
            for (id, _, counts) in &known.layers {
                all.push(counts.told(image.clone(), short(*id)));
            }
        }
        all.sort_by(|a, b| (&a.image, &a.layer).cmp(&(&b.image, &b.layer)));
        all.push(self.others.told("other".to_owned(), "other".to_owned()));
        all
    }

    /// How far the images are.
    pub fn progress(&self) -> Vec<ImageBytes> {
        let layers: Vec<(String, Vec<Arc<Layer>>)> = {
            let state = self.read();
            let open = |known: &Image| known.layers.iter().filter_map(|(_, l, _)| l.upgrade()).collect();
            state.images.iter().map(|(image, known)| (image.clone(), open(known))).collect()
        };
        let mut all: Vec<ImageBytes> = layers
            .into_iter()
            .map(|(image, layers)| ImageBytes {
                image,
                local: layers.iter().map(|l| l.local_bytes()).sum(),
                total: layers.iter().map(|l| l.index().layer_size()).sum(),
            })
            .collect();
        all.sort_by(|a, b| a.image.cmp(&b.image));
        all
    }

    fn drop_old(&self) {
        let old = |known: &Image| known.used.elapsed() > LATELY && !known.is_mounted();
        let names: Vec<String> = {
            let state = self.read();
            state.images.iter().filter(|(_, known)| old(known)).map(|(name, _)| name.clone()).collect()
        };
        for name in names {
            self.drop_image(&mut self.write(), &name);
        }
    }

    // Counts go to the others, so that the sum over all labels never shrinks.
    fn drop_image(&self, state: &mut State, image: &str) {
        for (id, _, counts) in state.images.remove(image).into_iter().flat_map(|known| known.layers) {
            if state.layers.get(&id).is_some_and(|current| Arc::ptr_eq(current, &counts)) {
                state.layers.remove(&id);
            }
            self.others.faults.add(&counts.faults.snapshot());
            self.others.shared.fetch_add(counts.shared.load(Relaxed), Relaxed);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn told(&self, image: String, layer: String) -> LayerFaults {
        LayerFaults { image, layer, faults: self.faults.snapshot(), shared: self.shared.load(Relaxed) }
    }
}

impl Image {
    fn is_mounted(&self) -> bool {
        // The list of views has each of them once, and so has this look at it.
        self.views.iter().filter_map(Weak::upgrade).any(|view| Arc::strong_count(&view) > 2)
    }
}
