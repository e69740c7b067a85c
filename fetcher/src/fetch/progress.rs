//! How far a request has come, and since when it has not moved.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bytes of the blob that a request has brought, of all its runs.
pub(super) struct Progress {
    begun: Instant,
    bytes: AtomicU64,
    /// Milliseconds after the begin at which the last of them came.
    moved: AtomicU64,
}

impl Progress {
    pub(super) fn new() -> Self {
        Progress { begun: Instant::now(), bytes: AtomicU64::new(0), moved: AtomicU64::new(0) }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    pub(super) fn came(&self, bytes: u64, now: Instant) {
        self.bytes.fetch_add(bytes, Relaxed);
        let after = now.saturating_duration_since(self.begun).as_millis();
        self.moved.store(u64::try_from(after).unwrap_or(u64::MAX), Relaxed);
    }

    /// How long nothing has come, waiting for its turn included.
    pub(super) fn idle(&self, now: Instant) -> Duration {
        let moved = Duration::from_millis(self.moved.load(Relaxed));
        now.saturating_duration_since(self.begun).saturating_sub(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_idle_since_its_last_byte() {
        let progress = Progress::new();
        let at = |ms: u64| progress.begun + Duration::from_millis(ms);
        assert_eq!(progress.idle(at(700)), Duration::from_millis(700));
        progress.came(10, at(500));
        progress.came(20, at(600));
        assert_eq!((progress.bytes(), progress.idle(at(700))), (30, Duration::from_millis(100)));
        assert_eq!(progress.idle(at(100)), Duration::ZERO);
    }
}
