//! What keeps spans of a layer from being evicted.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Layer;

/// How a layer is held. Ordered by how much is held off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    /// Its file is read directly, without [`Layer::read_local`]: a hole would be read as zeros.
    Direct,
    /// Somebody is in the middle of something that needs every span to stay what it is.
    Busy,
    /// It is to become whole. Only readers who wait may take spans away from it.
    Filling,
}

/// The holds of one layer.
#[derive(Default)]
pub(super) struct Pins {
    direct: AtomicUsize,
    busy: AtomicUsize,
    filling: AtomicUsize,
    /// Spans that readers wait for.
    wanted: Mutex<Vec<Range<usize>>>,
}

impl Pins {
    fn counter(&self, hold: Hold) -> &AtomicUsize {
        match hold {
            Hold::Direct => &self.direct,
            Hold::Busy => &self.busy,
            Hold::Filling => &self.filling,
        }
    }

    pub(super) fn are_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire) > 0
    }

    /// Whether no span may go at all.
    pub(super) fn hold_all(&self) -> bool {
        self.are_direct() || self.busy.load(Ordering::Acquire) > 0
    }

    pub(super) fn hold_for_filling(&self) -> bool {
        self.filling.load(Ordering::Acquire) > 0
    }

    pub(super) fn wanted(&self) -> Vec<Range<usize>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A hold of a layer, until it is dropped.
pub struct LayerPin {
    layer: Arc<Layer>,
    hold: Hold,
}

impl LayerPin {
    /// Whether it holds this layer.
    pub(crate) fn is_of(&self, layer: &Arc<Layer>) -> bool {
        Arc::ptr_eq(&self.layer, layer)
    }
}

impl Drop for LayerPin {
    fn drop(&mut self) {
        self.layer.pins.counter(self.hold).fetch_sub(1, Ordering::AcqRel);
    }
}

impl std::fmt::Debug for LayerPin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerPin({:?}, {:?})", self.layer, self.hold)
    }
}

/// Spans that a reader waits for, until it is dropped.
pub(crate) struct Wanted {
    layer: Arc<Layer>,
    spans: Range<usize>,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let mut wanted = self.layer.pins.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = wanted.iter().position(|spans| *spans == self.spans) {
            wanted.swap_remove(at);
        }
    }
}

impl Layer {
    /// Keeps everything local that is local now, for somebody who reads the layer file without
    /// [`Layer::read_local`]. Whether the layer is whole must be looked at *after* this returns: what is whole then
    /// stays whole.
    pub fn pin_direct(self: &Arc<Self>) -> LayerPin {
        self.pin(Hold::Direct)
    }

    /// Keeps everything local while spans are compared with each other.
    pub(crate) fn pin_busy(self: &Arc<Self>) -> LayerPin {
        self.pin(Hold::Busy)
    }

    /// Keeps what is local for as long as no reader needs the room: for a layer that is being made whole.
    pub fn pin_filling(self: &Arc<Self>) -> LayerPin {
        self.pin(Hold::Filling)
    }

    fn pin(self: &Arc<Self>, hold: Hold) -> LayerPin {
        // An eviction looks at the pins and takes the spans out while it holds the gate alone.
        let _gate = self.enter();
        self.pins.counter(hold).fetch_add(1, Ordering::AcqRel);
        LayerPin { layer: Arc::clone(self), hold }
    }

    /// Keeps these spans, once they are here, until their reader has had them.
    pub(crate) fn want(self: &Arc<Self>, spans: Range<usize>) -> Wanted {
        self.pins.wanted.lock().unwrap_or_else(PoisonError::into_inner).push(spans.clone());
        Wanted { layer: Arc::clone(self), spans }
    }
}
