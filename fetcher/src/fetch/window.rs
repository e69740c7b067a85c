//! How far to read ahead of a fault.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Faults that are looked back on.
const MEMORY: Duration = Duration::from_secs(1);
/// So many faults within that time on one layer mean that it is being read as a whole.
const DENSE_FAULTS: usize = 12;
/// Or faults for this share of the blob (one in so many bytes).
const DENSE_SHARE: u64 = 4;
/// First step of a sequential read.
const FIRST_STEP: u64 = 1 << 20;

/// What the faults of one layer look like.
#[derive(Default)]
pub(super) struct Window {
    next_span: usize,
    bytes: u64,
    recent: VecDeque<(Instant, u64)>,
}

impl Window {
    /// Compressed bytes to read beyond a fault.
    ///
    /// `first` is the first missing span, `wanted` the compressed bytes of the missing spans, `free` what the link
    /// gives for nothing, `max` the bound. A read that goes on where the last one ended doubles the window; dense
    /// faults open it wholly, which turns the layer over to streaming in pieces; else only what is free is taken.
    pub(super) fn ahead(
        &mut self,
        now: Instant,
        first: usize,
        wanted: u64,
        blob: u64,
        free: u64,
        max: u64,
    ) -> u64 {
        while self.recent.front().is_some_and(|(at, _)| now.duration_since(*at) > MEMORY) {
            self.recent.pop_front();
        }
        self.recent.push_back((now, wanted));
        let share: u64 = self.recent.iter().map(|(_, bytes)| bytes).sum();
        let dense =
            self.recent.len() >= DENSE_FAULTS || (self.recent.len() >= 4 && share >= blob / DENSE_SHARE);
        let sequential = first > 0 && first == self.next_span;
        self.bytes = match (dense, sequential) {
            (true, _) => max,
            (false, true) => (self.bytes * 2).max(FIRST_STEP).max(free).min(max),
            (false, false) => free.min(max),
        };
        self.bytes
    }

    /// Remembers where the last request for a fault ended.
    pub(super) fn ended(&mut self, next_span: usize) {
        self.next_span = next_span;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn sequential_reads_double_and_jumps_start_over() {
        let mut window = Window::default();
        let mut now = Instant::now();
        let mut ahead = |window: &mut Window, first| {
            now += Duration::from_secs(2);
            window.ahead(now, first, MIB, 1000 * MIB, 0, 8 * MIB)
        };
        assert_eq!(ahead(&mut window, 0), 0);
        for (span, expected) in [(1, MIB), (2, 2 * MIB), (3, 4 * MIB), (4, 8 * MIB), (5, 8 * MIB)] {
            window.ended(span);
            assert_eq!(ahead(&mut window, span), expected);
        }
        assert_eq!(ahead(&mut window, 500), 0);
    }

    #[test]
    fn dense_faults_open_the_window() {
        let mut window = Window::default();
        let now = Instant::now();
        let sizes: Vec<u64> = (0..12u32)
            .map(|i| window.ahead(now, (i * 10) as usize + 1, MIB, 1000 * MIB, 0, 8 * MIB))
            .collect();
        assert_eq!(sizes[10], 0);
        assert_eq!(sizes[11], 8 * MIB);
        // A second later all is forgotten.
        assert_eq!(window.ahead(now + Duration::from_secs(2), 300, MIB, 1000 * MIB, 0, 8 * MIB), 0);
    }

    #[test]
    fn a_large_share_of_a_small_blob_is_dense() {
        let mut window = Window::default();
        let now = Instant::now();
        for i in 0..3 {
            assert_eq!(window.ahead(now, i * 3 + 1, MIB, 16 * MIB, 0, 8 * MIB), 0);
        }
        assert_eq!(window.ahead(now, 14, MIB, 16 * MIB, 0, 8 * MIB), 8 * MIB);
    }
}
