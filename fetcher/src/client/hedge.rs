//! When a slow request is worth a second one beside it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A second request is never sent earlier than this.
const LEAST_PATIENCE: Duration = Duration::from_millis(300);
/// The same for a host that has not answered anything yet.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);
/// As many times the usual time to the first byte is slow.
const SLOW: u32 = 3;
/// One second request for so many first ones, in the long run.
const SHARE: u64 = 20;
/// Second requests that may be sent before their share allows them.
const BURST: u64 = 4;
/// Hosts remembered.
const MAX_HOSTS: usize = 256;

/// What is usual, and how many second requests were sent.
#[derive(Default)]
pub(crate) struct Hedges(Mutex<State>);

#[derive(Default)]
struct State {
    /// Time to the first byte by registry, smoothed.
    usual: HashMap<String, Duration>,
    requests: u64,
    hedges: u64,
}

impl Hedges {
    /// A request was answered so fast.
    pub(crate) fn observe(&self, registry: &str, first_byte: Duration) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.requests += 1;
        if let Some(usual) = state.usual.get_mut(registry) {
            *usual = (*usual * 7 + first_byte) / 8;
            return;
        }
        if state.usual.len() >= MAX_HOSTS {
            state.usual.clear();
        }
        state.usual.insert(registry.to_owned(), first_byte);
    }

    /// How long a request may bring nothing until it is slow.
    pub(crate) fn patience(&self, registry: &str) -> Duration {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.usual.get(registry).map_or(FIRST_PATIENCE, |usual| (*usual * SLOW).max(LEAST_PATIENCE))
    }

    /// Takes the right to one second request, if there is one.
    pub(crate) fn take(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = state.hedges < state.requests / SHARE + BURST;
        state.hedges += u64::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_what_is_usual() {
        let hedges = Hedges::default();
        assert_eq!(hedges.patience("h"), FIRST_PATIENCE);
        hedges.observe("h", Duration::from_millis(20));
        assert_eq!(hedges.patience("h"), LEAST_PATIENCE);
        for _ in 0..100 {
            hedges.observe("h", Duration::from_millis(400));
        }
        assert!(hedges.patience("h") > Duration::from_millis(1150));
        assert_eq!(hedges.patience("other"), FIRST_PATIENCE);
    }

    #[test]
    fn second_requests_are_a_small_share() {
        let hedges = Hedges::default();
        assert_eq!((0..100).filter(|_| hedges.take()).count() as u64, BURST);
        for _ in 0..10 * SHARE {
            hedges.observe("h", Duration::from_millis(1));
        }
        assert_eq!((0..100).filter(|_| hedges.take()).count(), 10);
    }
}
