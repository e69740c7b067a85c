//! What the traffic tells about the link to the registries: its rate and its round trip.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Arrivals are counted in buckets of this length: long against the pauses between two packets, short against a start.
const BUCKET: Duration = Duration::from_millis(50);
/// Buckets that count: a link that has become slower is known to be so after this many.
const MEMORY: u64 = 200;
/// Before so many bytes have come, what is known of the rate is what is known of TCP's slow start.
const PROBE: u64 = 3 << 20;

/// Learns from every request and every piece that arrives, whatever it is for.
#[derive(Default)]
pub(super) struct Link {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    began: Option<Instant>,
    /// Number of a bucket and the bytes that arrived in it, oldest first.
    buckets: VecDeque<(u64, u64)>,
    arrived: u64,
    /// Bytes per second of the best bucket that was remembered; 0 is unknown.
    rate: f64,
    /// Seconds to the first byte: near the least seen, since queues add to it and are no property of the link.
    latency: f64,
}

impl Link {
    /// `bytes` have come at `now`.
    pub(super) fn arrived(&self, bytes: u64, now: Instant) {
        let mut state = self.lock();
        let began = *state.began.get_or_insert(now);
        let number = (now.saturating_duration_since(began).as_nanos() / BUCKET.as_nanos()) as u64;
        state.arrived = state.arrived.saturating_add(bytes);
        match state.buckets.back_mut() {
            Some((last, sum)) if *last >= number => *sum += bytes,
            _ => {
                state.buckets.push_back((number, bytes));
                let oldest = number.saturating_sub(MEMORY);
                while state.buckets.front().is_some_and(|(first, _)| *first < oldest) {
                    state.buckets.pop_front();
                }
                state.learn_rate();
            }
        }
    }

    /// A response's first byte has come after `waited`.
    pub(super) fn answered(&self, waited: Duration) {
        let mut state = self.lock();
        let new = waited.as_secs_f64();
        let queued = state.latency > 0.0 && new > state.latency;
        state.latency = if queued { state.latency * 0.97 + new * 0.03 } else { new };
    }

    /// Bytes per second, as far as known.
    pub(super) fn rate(&self) -> Option<f64> {
        let state = self.lock();
        (state.arrived >= PROBE && state.rate > 0.0).then_some(state.rate)
    }

    /// Bytes that the link carries during one round trip, as far as known.
    pub(super) fn in_flight(&self) -> Option<u64> {
        let state = self.lock();
        let known = state.arrived >= PROBE && state.rate > 0.0 && state.latency > 0.0;
        known.then(|| (state.rate * state.latency.min(1.0)) as u64)
    }

    #[cfg(test)]
    pub(super) fn pretend(&self, rate: u64, round_trip: Duration) {
        let mut state = self.lock();
        (state.arrived, state.rate, state.latency) = (PROBE, rate as f64, round_trip.as_secs_f64());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The newest bucket is not full yet. The second best of the others counts: one may hold what a socket had gathered
    /// while nobody read from it.
    fn learn_rate(&mut self) {
        let full = self.buckets.len().saturating_sub(1);
        let (mut best, mut second) = (0, 0);
        for &(_, bytes) in self.buckets.iter().take(full) {
            if bytes > best {
                (best, second) = (bytes, best);
            } else {
                second = second.max(bytes);
            }
        }
        if full >= 2 {
            self.rate = second as f64 / BUCKET.as_secs_f64();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn fed(rate: u64, seconds: u32) -> (Link, Instant) {
        let (link, began) = (Link::default(), Instant::now());
        let steps = seconds * 100;
        for step in 0..steps {
            link.arrived(rate / 100, began + 10 * step * MS);
        }
        (link, began + 10 * steps * MS)
    }

    #[test]
    fn nothing_is_known_before_slow_start_is_over() {
        let (link, now) = (Link::default(), Instant::now());
        link.answered(20 * MS);
        link.arrived(PROBE / 2, now);
        link.arrived(1, now + 60 * MS);
        assert_eq!((link.rate(), link.in_flight()), (None, None));
    }

    #[test]
    fn the_rate_is_that_of_the_busy_times() {
        let (link, end) = fed(25_000_000, 1);
        link.answered(20 * MS);
        let rate = link.rate().unwrap();
        assert!((24e6..26e6).contains(&rate), "{rate}");
        // A second in which little is asked for says nothing.
        for step in 0..20 {
            link.arrived(1000, end + 50 * step * MS);
        }
        assert!((24e6..26e6).contains(&link.rate().unwrap()));
        let in_flight = link.in_flight().unwrap();
        assert!((480_000..520_000).contains(&in_flight), "{in_flight}");
    }

    #[test]
    fn one_burst_counts_little_and_old_times_are_forgotten() {
        let (link, end) = fed(5_000_000, 1);
        link.arrived(6_000_000, end);
        link.arrived(1, end + 50 * MS);
        assert!(link.rate().unwrap() < 6e6);
        for step in 1..300 {
            link.arrived(10_000, end + 50 * step * MS);
        }
        assert!(link.rate().unwrap() < 1e6);
    }

    #[test]
    fn the_round_trip_is_near_the_least() {
        let (link, _) = fed(100_000_000, 1);
        link.answered(20 * MS);
        for _ in 0..5 {
            link.answered(60 * MS);
        }
        let in_flight = link.in_flight().unwrap();
        assert!((2_000_000..3_000_000).contains(&in_flight), "{in_flight}");
        link.answered(10 * MS);
        assert!(link.in_flight().unwrap() < 1_100_000);
    }
}
