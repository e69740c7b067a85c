//! The limit of hydration: a bucket of bytes for all layers and registries together.
//!
//! A request is paid for as a whole when it is sent and may leave the bucket in debt; the next one waits until the debt
//! is paid. So no request is slowed half-way, where a reader may have come to need it, and none is read slower than the
//! network delivers, which would only fill the buffers in between.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// What an idle time may save up, as a time at the limit: little, or pauses would be made up for by bursts.
const SAVED: f64 = 0.1;
/// One request under a limit is no longer than this at the limit (or one span).
const TURN: f64 = 0.25;

/// How fast hydration may be.
pub(super) struct Throttle {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    /// Bytes per second; `None` is no limit.
    rate: Option<f64>,
    /// Bytes that may be asked for at `at`; a debt when negative.
    balance: f64,
    at: Instant,
}

impl Throttle {
    pub(super) fn new(rate: Option<u64>) -> Throttle {
        let rate = rate.map(|rate| rate.max(1) as f64);
        let state = State { rate, balance: 0.0, at: Instant::now() };
        Throttle { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Bytes per second from now on. Debts are forgiven.
    pub(super) fn set(&self, rate: Option<u64>) {
        let mut state = self.lock();
        state.rate = rate.map(|rate| rate.max(1) as f64);
        (state.balance, state.at) = (0.0, Instant::now());
        drop(state);
        self.changed.notify_waiters();
    }

    /// The limit in bytes per second.
    pub(super) fn rate(&self) -> Option<u64> {
        self.lock().rate.map(|rate| rate as u64)
    }

    /// Bytes that one request should have at most.
    pub(super) fn turn(&self) -> u64 {
        self.lock().rate.map_or(u64::MAX, |rate| (rate * TURN) as u64)
    }

    /// Waits until there is no debt.
    pub(super) async fn ready(&self) {
        loop {
            let changed = self.changed.notified();
            let Some(wait) = self.wait(Instant::now()) else { return };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Bytes have been asked for or, of a stream, have come.
    pub(super) fn charge(&self, bytes: u64) {
        self.add(-(bytes as f64));
    }

    /// Bytes that were charged do not come after all.
    pub(super) fn give_back(&self, bytes: u64) {
        self.add(bytes as f64);
    }

    fn add(&self, bytes: f64) {
        let mut state = self.lock();
        state.advance(Instant::now());
        if state.rate.is_some() {
            state.balance += bytes;
        }
    }

    fn wait(&self, now: Instant) -> Option<Duration> {
        let mut state = self.lock();
        state.advance(now);
        let rate = state.rate?;
        // A debt of less than a byte takes no time that a timer could measure.
        (state.balance < 0.0).then(|| Duration::from_secs_f64((-state.balance / rate).clamp(0.001, 3600.0)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn advance(&mut self, now: Instant) {
        if let Some(rate) = self.rate {
            let passed = now.saturating_duration_since(self.at).as_secs_f64();
            self.balance = (self.balance + passed * rate).min(rate * SAVED);
        }
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debts_are_paid_at_the_limit() {
        let throttle = Throttle::new(Some(1000));
        let now = Instant::now();
        throttle.lock().at = now;
        assert_eq!(throttle.wait(now), None);
        throttle.charge(2000);
        let wait = throttle.wait(now).unwrap().as_secs_f64();
        assert!((1.9..2.01).contains(&wait), "{wait}");
        assert!(throttle.wait(now + Duration::from_millis(1900)).is_some());
        assert_eq!(throttle.wait(now + Duration::from_millis(2100)), None);
        // An hour of rest is no licence for a burst.
        let later = now + Duration::from_secs(3600);
        assert_eq!(throttle.wait(later), None);
        assert!(throttle.lock().balance <= 100.0);
        throttle.set(None);
        throttle.charge(1 << 40);
        assert_eq!((throttle.wait(later), throttle.turn()), (None, u64::MAX));
    }

    #[tokio::test]
    async fn who_waits_hears_of_a_new_limit() {
        let throttle = std::sync::Arc::new(Throttle::new(Some(1)));
        throttle.charge(1_000_000);
        let other = std::sync::Arc::clone(&throttle);
        let waiter = tokio::spawn(async move { other.ready().await });
        tokio::task::yield_now().await;
        throttle.set(Some(1_000_000));
        tokio::time::timeout(Duration::from_secs(10), waiter).await.unwrap().unwrap();
    }
}
