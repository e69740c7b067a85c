//! Where readers are: hydration goes on next to the latest faults, because what lies there is wanted next far more
//! often than what lies at the start of a layer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::store::Layer;

/// Places that are remembered.
const PLACES: usize = 8;

/// The places of the latest faults, newest first.
#[derive(Default)]
pub(super) struct Interest {
    places: Mutex<VecDeque<Place>>,
}

struct Place {
    layer: Weak<Layer>,
    /// Rank of the span behind the last one that was fetched there.
    next: usize,
}

impl Interest {
    /// A fault on `layer` fetched spans up to the one with rank `next`.
    pub(super) fn note(&self, layer: &Arc<Layer>, next: usize) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.push_front(Place { layer: Arc::downgrade(layer), next });
        places.truncate(PLACES);
    }

    /// The places, newest first.
    pub(super) fn places(&self) -> Vec<(Arc<Layer>, usize)> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.iter().filter_map(|p| Some((p.layer.upgrade()?, p.next))).collect()
    }
}
