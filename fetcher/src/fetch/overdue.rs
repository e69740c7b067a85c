//! Reads that timed out a moment ago.
//!
//! The kernel asks again for what a failed readahead did not bring, once for each page cache between the reader and
//! us, before it gives the error to the reader. If each of those waited anew, a bound of 30 s would be one of two
//! minutes. And who waited in the kernel for the same page meanwhile asks as soon as the page is unlocked. All of them
//! have waited, and get the error at once. Whoever comes later gets the whole time.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lazyrun_index::LayerId;

/// Asking again so soon after an error is no new read.
const ECHO: Duration = Duration::from_millis(250);
/// Nothing is refused longer than this after a time-out: who asks again and again deserves a new try.
const LONGEST: Duration = Duration::from_secs(2);
/// Reads that are remembered.
const REMEMBERED: usize = 256;

/// The latest reads that timed out, oldest first.
#[derive(Default)]
pub(super) struct Overdue(Mutex<VecDeque<Failed>>);

struct Failed {
    layer: LayerId,
    bytes: Range<u64>,
    first: Instant,
    last: Instant,
}

impl Overdue {
    /// A read has waited as long as it may.
    pub(super) fn note(&self, layer: LayerId, bytes: Range<u64>, now: Instant) {
        let mut failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.len() >= REMEMBERED {
            failed.pop_front();
        }
        failed.push_back(Failed { layer, bytes, first: now, last: now });
    }

    /// Whether a read is the echo of one that has waited.
    pub(super) fn refuses(&self, layer: LayerId, bytes: &Range<u64>, now: Instant) -> bool {
        let mut failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = |f: &Failed| {
            now.saturating_duration_since(f.last) < ECHO && now.saturating_duration_since(f.first) < LONGEST
        };
        failed.retain(fresh);
        let mut refused = false;
        for f in failed.iter_mut().filter(|f| f.layer == layer) {
            if f.bytes.start < bytes.end && bytes.start < f.bytes.end {
                f.last = now;
                refused = true;
            }
        }
        refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazyrun_index::Digest;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn echoes_are_refused_and_new_reads_are_not() {
        let (a, b) = (LayerId::tar(Digest::of(b"a")), LayerId::tar(Digest::of(b"b")));
        let (overdue, t) = (Overdue::default(), Instant::now());
        overdue.note(a, 4096..8192, t);
        assert!(overdue.refuses(a, &(4096..4097), t + MS));
        assert!(overdue.refuses(a, &(0..4097), t + 2 * MS));
        assert!(!overdue.refuses(a, &(8192..9000), t + 2 * MS));
        assert!(!overdue.refuses(b, &(4096..4097), t + 2 * MS));
        // An echo of the echo, then silence.
        assert!(overdue.refuses(a, &(5000..5001), t + 200 * MS));
        assert!(!overdue.refuses(a, &(5000..5001), t + 500 * MS));
    }

    #[test]
    fn who_asks_on_and_on_gets_a_new_try() {
        let (a, t) = (LayerId::tar(Digest::of(b"a")), Instant::now());
        let overdue = Overdue::default();
        overdue.note(a, 0..1, t);
        let refused = (1..30).take_while(|i| overdue.refuses(a, &(0..1), t + i * 100 * MS)).count();
        assert_eq!(refused, 19);
    }
}
