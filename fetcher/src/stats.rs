//! Counters. All are monotonous and cheap; readers take differences.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Hosts that are counted apart. Redirects are foreign text and may name any number; the rest is counted together.
const MAX_HOSTS: usize = 64;
/// What hosts beyond that are counted under.
const OTHER_HOSTS: &str = "other";

/// What a [`RegistryClient`](crate::RegistryClient) has asked and received since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// HTTP requests sent, token requests, redirects and retries included.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
    /// Answers by which a host said that it is too much (429, 503).
    pub throttled: u64,
    /// Second requests sent beside a fault's slow one.
    pub hedges: u64,
    /// Second requests that brought bytes first.
    pub hedges_won: u64,
    /// Requests that were repeated, or resumed where a body broke off.
    pub retries: u64,
    /// Tokens asked for.
    pub tokens: u64,
    /// Answers that led elsewhere (3xx).
    pub redirects: u64,
    /// Body bytes received, by [`Class::ALL`](crate::Class::ALL).
    pub bytes_by_class: [u64; 5],
    /// Requests that are over, by [`Class::ALL`](crate::Class::ALL).
    pub requests_by_class: [u64; 5],
}

/// How one host has answered.
#[derive(Clone, Debug, PartialEq)]
pub struct HostStats {
    /// The host, with its port if that is not the default one; `other` for all beyond the first 64.
    pub host: String,
    /// Answers with status 1xx to 5xx, then requests that got none.
    pub answers: [u64; 6],
    /// Requests that may wait for its answer at a time; `None` when it has no window yet.
    pub window: Option<f64>,
}

/// What a [`Fetcher`](crate::Fetcher) has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchStats {
    /// Reads that found something missing.
    pub faults: u64,
    /// Faults that ended in an error.
    pub failed_faults: u64,
    /// Sum of the time that faults waited, in nanoseconds.
    pub fault_nanos: u64,
    /// Longest wait of a fault, in nanoseconds.
    pub fault_max_nanos: u64,
    /// Blob reads started for faults (ranged GETs before retries).
    pub fault_requests: u64,
    /// Compressed bytes that arrived for faults.
    pub fault_bytes: u64,
    /// Blob reads started in the background (hydration).
    pub background_requests: u64,
    /// Compressed bytes that arrived in the background (hydration).
    pub background_bytes: u64,
    /// Compressed bytes of layers streamed for the first time.
    pub stream_bytes: u64,
    /// Layers streamed for the first time.
    pub streams: u64,
    /// Spans decoded and verified.
    pub spans: u64,
    /// Spans whose bytes did not have the digest the index says.
    pub corrupt_spans: u64,
    /// Bytes that decoding spans gave.
    pub decoded_bytes: u64,
    /// Time that cores spent on decoding, verifying and storing spans, in nanoseconds.
    pub decode_nanos: u64,
    /// Bytes of layer files that were missing and came from files of other layers with the same content.
    pub shared_bytes: u64,
}

#[derive(Default)]
pub(crate) struct ClientCounters {
    pub(crate) requests: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) throttled: AtomicU64,
    pub(crate) hedges: AtomicU64,
    pub(crate) hedges_won: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) tokens: AtomicU64,
    pub(crate) redirects: AtomicU64,
    pub(crate) bytes_by_class: [AtomicU64; 5],
    pub(crate) requests_by_class: [AtomicU64; 5],
    hosts: RwLock<HashMap<String, Arc<HostCounters>>>,
}

/// Answers of one host, as [`HostStats::answers`].
#[derive(Default)]
pub(crate) struct HostCounters([AtomicU64; 6]);

impl HostCounters {
    /// A request is over: answered with this status, or not at all.
    pub(crate) fn count(&self, status: Option<u16>) {
        let class = status.map_or(6, |status| usize::from(status / 100).clamp(1, 5));
        self.0[class - 1].fetch_add(1, Relaxed);
    }
}

impl ClientCounters {
    pub(crate) fn snapshot(&self) -> ClientStats {
        ClientStats {
            requests: self.requests.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            hedges: self.hedges.load(Relaxed),
            hedges_won: self.hedges_won.load(Relaxed),
            retries: self.retries.load(Relaxed),
            tokens: self.tokens.load(Relaxed),
            redirects: self.redirects.load(Relaxed),
            bytes_by_class: self.bytes_by_class.each_ref().map(|n| n.load(Relaxed)),
            requests_by_class: self.requests_by_class.each_ref().map(|n| n.load(Relaxed)),
        }
    }

    /// The counters of a host.
    pub(crate) fn host(&self, host: &str) -> Arc<HostCounters> {
        if let Some(found) = self.hosts.read().unwrap_or_else(PoisonError::into_inner).get(host) {
            return Arc::clone(found);
        }
        let mut hosts = self.hosts.write().unwrap_or_else(PoisonError::into_inner);
        let name = if hosts.len() < MAX_HOSTS { host } else { OTHER_HOSTS };
        Arc::clone(hosts.entry(name.to_owned()).or_default())
    }

    /// How all hosts have answered, without their windows.
    pub(crate) fn hosts(&self) -> Vec<HostStats> {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        let stats = |(host, counters): (&String, &Arc<HostCounters>)| HostStats {
            host: host.clone(),
            answers: counters.0.each_ref().map(|n| n.load(Relaxed)),
            window: None,
        };
        hosts.iter().map(stats).collect()
    }
}

#[derive(Default)]
pub(crate) struct FetchCounters {
    pub(crate) faults: AtomicU64,
    pub(crate) failed_faults: AtomicU64,
    pub(crate) fault_nanos: AtomicU64,
    pub(crate) fault_max_nanos: AtomicU64,
    pub(crate) fault_requests: AtomicU64,
    pub(crate) fault_bytes: AtomicU64,
    pub(crate) background_requests: AtomicU64,
    pub(crate) background_bytes: AtomicU64,
    pub(crate) stream_bytes: AtomicU64,
    pub(crate) streams: AtomicU64,
    pub(crate) spans: AtomicU64,
    pub(crate) corrupt_spans: AtomicU64,
    pub(crate) decoded_bytes: AtomicU64,
    pub(crate) decode_nanos: AtomicU64,
    pub(crate) shared_bytes: AtomicU64,
    pub(crate) fault_latency: Histogram,
}

impl FetchCounters {
    pub(crate) fn fault_done(&self, waited: Duration, ok: bool) {
        let nanos = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.faults.fetch_add(1, Relaxed);
        self.fault_nanos.fetch_add(nanos, Relaxed);
        self.fault_max_nanos.fetch_max(nanos, Relaxed);
        if !ok {
            self.failed_faults.fetch_add(1, Relaxed);
        }
        self.fault_latency.observe(waited);
    }

    pub(crate) fn decoded(&self, bytes: u64, took: Duration) {
        self.decoded_bytes.fetch_add(bytes, Relaxed);
        self.decode_nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn snapshot(&self) -> FetchStats {
        FetchStats {
            faults: self.faults.load(Relaxed),
            failed_faults: self.failed_faults.load(Relaxed),
            fault_nanos: self.fault_nanos.load(Relaxed),
            fault_max_nanos: self.fault_max_nanos.load(Relaxed),
            fault_requests: self.fault_requests.load(Relaxed),
            fault_bytes: self.fault_bytes.load(Relaxed),
            background_requests: self.background_requests.load(Relaxed),
            background_bytes: self.background_bytes.load(Relaxed),
            stream_bytes: self.stream_bytes.load(Relaxed),
            streams: self.streams.load(Relaxed),
            spans: self.spans.load(Relaxed),
            corrupt_spans: self.corrupt_spans.load(Relaxed),
            decoded_bytes: self.decoded_bytes.load(Relaxed),
            decode_nanos: self.decode_nanos.load(Relaxed),
            shared_bytes: self.shared_bytes.load(Relaxed),
        }
    }
}

/// Times, counted by how long they were. Counting is two additions to atomics.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
}

/// The counts of a [`Histogram`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// Times in each bucket alone; the last one has those that are longer than every bound.
    pub buckets: [u64; BUCKETS],
    /// All times together, in nanoseconds.
    pub nanos: u64,
}

const BUCKETS: usize = 15;

impl Histogram {
    /// Longest time of each bucket but the last, in milliseconds: from what a near link takes to the fault timeout.
    pub const BOUNDS_MS: [u64; BUCKETS - 1] =
        [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000];

    /// Counts a time.
    pub fn observe(&self, time: Duration) {
        let bucket = Histogram::BOUNDS_MS.partition_point(|ms| Duration::from_millis(*ms) < time);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Adds what another one has counted.
    pub fn add(&self, other: &HistogramSnapshot) {
        for (own, more) in self.buckets.iter().zip(other.buckets) {
            own.fetch_add(more, Relaxed);
        }
        self.nanos.fetch_add(other.nanos, Relaxed);
    }

    /// The counts now.
    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: self.buckets.each_ref().map(|n| n.load(Relaxed)),
            nanos: self.nanos.load(Relaxed),
        }
    }
}

impl HistogramSnapshot {
    /// Number of times.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_their_buckets() {
        let histogram = Histogram::default();
        for ms in [0, 1, 2, 3, 30_000, 30_001, 1 << 40] {
            histogram.observe(Duration::from_millis(ms));
        }
        let seen = histogram.snapshot();
        assert_eq!((seen.buckets[0], seen.buckets[1], seen.buckets[2]), (2, 1, 1));
        assert_eq!((seen.buckets[13], seen.buckets[14], seen.count()), (1, 2, 7));
        let both = Histogram::default();
        both.add(&seen);
        both.add(&seen);
        assert_eq!(both.snapshot().count(), 14);
    }

    #[test]
    fn foreign_hosts_are_counted_without_growing_for_ever() {
        let counters = ClientCounters::default();
        for number in 0..1000u16 {
            counters.host(&format!("h{number}")).count(Some(200 + number % 400));
        }
        counters.host("h0").count(None);
        counters.host("h0").count(Some(0));
        let hosts = counters.hosts();
        assert_eq!(hosts.len(), MAX_HOSTS + 1);
        assert_eq!(hosts.iter().flat_map(|h| h.answers).sum::<u64>(), 1002);
        let first = hosts.iter().find(|h| h.host == "h0").unwrap();
        assert_eq!(first.answers, [1, 1, 0, 0, 0, 1]);
        assert!(hosts.iter().any(|h| h.host == OTHER_HOSTS));
    }
}
