//! Which layers are hydrated before others, and which without regard to the limit.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lazyrun_index::LayerId;
use tokio::sync::Notify;

/// How urgent it is that a layer becomes whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Haste {
    /// When there is nothing better to do.
    #[default]
    Background,
    /// Before all other background work, within its limit.
    First,
    /// Somebody waits for all of it: before background work, not limited as that is, and a registry that does not
    /// answer is an error instead of something to wait for.
    Unlimited,
}

/// The layers that somebody wants whole now.
#[derive(Default)]
pub(super) struct Hastes {
    layers: Mutex<HashMap<LayerId, Counts>>,
    changed: Notify,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    background: usize,
    first: usize,
    unlimited: usize,
}

impl Counts {
    fn of(&mut self, haste: Haste) -> &mut usize {
        match haste {
            Haste::Background => &mut self.background,
            Haste::First => &mut self.first,
            Haste::Unlimited => &mut self.unlimited,
        }
    }

    fn in_haste(self) -> bool {
        self.first + self.unlimited > 0
    }
}

/// A layer is in haste for as long as this lives.
pub(super) struct InHaste<'a> {
    of: &'a Hastes,
    layer: LayerId,
    haste: Haste,
}

impl Hastes {
    pub(super) fn enter(&self, layer: LayerId, haste: Haste) -> InHaste<'_> {
        self.count(layer, haste, |n| n + 1);
        InHaste { of: self, layer, haste }
    }

    /// Whether the limit does not hold for a layer.
    pub(super) fn is_unlimited(&self, layer: LayerId) -> bool {
        self.lock().get(&layer).is_some_and(|counts| counts.unlimited > 0)
    }

    /// Whether only background work wants a layer, which has all the time in the world.
    pub(super) fn is_patient(&self, layer: LayerId) -> bool {
        self.lock()
            .get(&layer)
            .is_some_and(|counts| counts.unlimited == 0 && counts.background + counts.first > 0)
    }

    /// Waits until no layer is in haste, unless this one is.
    pub(super) async fn turn(&self, layer: LayerId) {
        loop {
            let changed = self.changed.notified();
            {
                let layers = self.lock();
                let this = layers.get(&layer).is_some_and(|counts| counts.in_haste());
                if this || !layers.values().any(|counts| counts.in_haste()) {
                    return;
                }
            }
            changed.await;
        }
    }

    fn count(&self, layer: LayerId, haste: Haste, change: impl Fn(usize) -> usize) {
        let mut layers = self.lock();
        let counts = layers.entry(layer).or_default();
        let count = counts.of(haste);
        *count = change(*count);
        if counts.background == 0 && !counts.in_haste() {
            layers.remove(&layer);
        }
        drop(layers);
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<LayerId, Counts>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InHaste<'_> {
    fn drop(&mut self) {
        self.of.count(self.layer, self.haste, |n| n.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazyrun_index::Digest;
    use std::time::Duration;

    #[tokio::test]
    async fn what_is_in_haste_goes_first() {
        let (a, b) = (LayerId::tar(Digest::of(b"a")), LayerId::tar(Digest::of(b"b")));
        let hastes = Hastes::default();
        hastes.turn(a).await;
        let idle = hastes.enter(a, Haste::Background);
        let first = hastes.enter(b, Haste::First);
        hastes.turn(b).await;
        assert!(tokio::time::timeout(Duration::from_millis(20), hastes.turn(a)).await.is_err());
        assert!(!hastes.is_unlimited(b));
        assert!(hastes.is_patient(a) && hastes.is_patient(b));
        let more = hastes.enter(b, Haste::Unlimited);
        drop(first);
        assert!(hastes.is_unlimited(b) && !hastes.is_patient(b));
        drop(more);
        assert!(!hastes.is_unlimited(b));
        hastes.turn(a).await;
        drop(idle);
        assert!(!hastes.is_patient(a));
    }
}
