//! Which spans go when there is no room.
//!
//! Layers that no view in use has go first, least recently used first and each as a whole: an image that is not in use
//! and was not used for longest goes before one byte of another does, and a layer that several images share is as
//! young as the youngest of them. Only for readers that wait go spans of layers in use: of mounts before those of
//! running containers, longest unused first over all of them. What has a pin on it, and what could not be fetched
//! again, never goes.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use lazyrun_index::LayerId;

use super::room::Need;
use super::{Inner, Layer, USED, touched};

/// How a layer is in use. Ordered by who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InUse {
    /// By a mount.
    Mounted,
    /// By a running container.
    Running,
}

/// What only those above the store know of its layers.
pub trait LayerUsers: Send + Sync {
    /// Layers in use; `None` while that can't be told, and nothing may go. Called while a fill waits for room: takes no
    /// long locks.
    fn in_use(&self) -> Option<HashMap<LayerId, InUse>>;
    /// Lets go of what holds the layer open without need, because it is about to be evicted. Whether there was such.
    fn release(&self, layer: LayerId) -> bool;
}

type Refetch = dyn Fn(&Layer) -> bool + Send + Sync;

/// Who is asked.
#[derive(Default)]
pub(super) struct Hooks {
    users: RwLock<Option<Arc<dyn LayerUsers>>>,
    /// Whether somebody is known who has the layer's blob.
    refetch: RwLock<Option<Arc<Refetch>>>,
}

impl Hooks {
    pub(super) fn set_users(&self, users: Arc<dyn LayerUsers>) {
        *self.users.write().unwrap_or_else(PoisonError::into_inner) = Some(users);
    }

    pub(super) fn set_refetch(&self, refetch: Arc<Refetch>) {
        *self.refetch.write().unwrap_or_else(PoisonError::into_inner) = Some(refetch);
    }

    fn users(&self) -> Option<Arc<dyn LayerUsers>> {
        self.users.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether what is evicted of the layer can be fetched again. Nobody to ask means no.
    pub(super) fn can_refetch(&self, layer: &Layer) -> bool {
        let refetch = self.refetch.read().unwrap_or_else(PoisonError::into_inner).clone();
        !layer.is_origin_gone() && layer.lie().is_none() && refetch.is_some_and(|refetch| refetch(layer))
    }
}

/// Evicts spans until about `want` bytes of disk are freed, or nothing is left that may go. Returns what was freed.
pub(super) fn evict(store: &Arc<Inner>, hooks: &Hooks, want: u64, need: Need) -> u64 {
    let users = hooks.users();
    let Some(in_use) = users.as_ref().map_or_else(|| Some(HashMap::new()), |users| users.in_use()) else {
        return 0;
    };
    let Ok(ids) = store.list() else { return 0 };
    let mut idle: Vec<(u64, LayerId)> = Vec::new();
    for id in ids.iter().filter(|id| !in_use.contains_key(id)) {
        idle.push((last_use(store, *id), *id));
    }
    idle.sort_unstable_by_key(|(last, id)| (*last, id.to_string()));
    let mut freed = 0;
    for (_, id) in idle {
        if freed >= want {
            return freed;
        }
        let Some(layer) = open(store, hooks, id, need) else { continue };
        // A view that nobody uses is mounted still, and its pin goes with it.
        let released = users.as_ref().is_some_and(|users| users.release(id));
        freed += evict_of(&layer, want - freed, released);
    }
    if need == Need::Reader && freed < want {
        freed += evict_in_use(store, hooks, &in_use, want - freed);
    }
    freed
}

/// Drops everything that may go of layers that are not in use. Returns the bytes of disk freed.
pub(super) fn evict_idle(store: &Arc<Inner>, hooks: &Hooks) -> u64 {
    evict(store, hooks, u64::MAX, Need::Ahead)
}

fn last_use(store: &Inner, id: LayerId) -> u64 {
    match store.opened(id) {
        Some(layer) => layer.touched.layer(),
        None => touched::of_layer(&store.path_of(id).join(USED)),
    }
}

/// A layer of which something may go.
fn open(store: &Arc<Inner>, hooks: &Hooks, id: LayerId, need: Need) -> Option<Arc<Layer>> {
    let layer = store.by_id(id).ok().flatten()?;
    let held = need == Need::Ahead && layer.pins.hold_for_filling();
    (!held && layer.local_bytes() > 0 && hooks.can_refetch(&layer)).then_some(layer)
}

/// Evicts spans of one layer, longest unused first.
fn evict_of(layer: &Layer, want: u64, released: bool) -> u64 {
    let mut spans = Vec::new();
    let mut bytes = 0u64;
    for (_, _, span, len) in layer.evictable() {
        if bytes >= want {
            break;
        }
        spans.push(span);
        bytes = bytes.saturating_add(len);
    }
    evict_spans(layer, &mut spans, released)
}

fn evict_in_use(store: &Arc<Inner>, hooks: &Hooks, in_use: &HashMap<LayerId, InUse>, want: u64) -> u64 {
    let open = |(id, class): (&LayerId, &InUse)| Some((*class, open(store, hooks, *id, Need::Reader)?));
    let layers: Vec<(InUse, Arc<Layer>)> = in_use.iter().filter_map(open).collect();
    let mut spans = Vec::new();
    for (i, (class, layer)) in layers.iter().enumerate() {
        let evictable = layer.evictable().into_iter();
        spans.extend(evictable.map(|(whole, time, span, len)| (*class, whole, time, i, span, len)));
    }
    spans.sort_unstable();
    let mut of_layer = vec![Vec::new(); layers.len()];
    let mut bytes = 0u64;
    for (_, _, _, i, span, len) in spans {
        if bytes >= want {
            break;
        }
        of_layer[i].push(span);
        bytes = bytes.saturating_add(len);
    }
    layers.iter().zip(&mut of_layer).map(|((_, layer), spans)| evict_spans(layer, spans, false)).sum()
}

fn evict_spans(layer: &Layer, spans: &mut [usize], released: bool) -> u64 {
    if spans.is_empty() {
        return 0;
    }
    spans.sort_unstable();
    layer.evict(spans, released).unwrap_or_else(|error| {
        tracing::warn!(layer = %layer.id(), %error, "spans can't be evicted");
        0
    })
}
