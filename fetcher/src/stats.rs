//! Counters. All are monotonous and cheap; readers take differences.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

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
}

#[derive(Default)]
pub(crate) struct ClientCounters {
    pub(crate) requests: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) throttled: AtomicU64,
    pub(crate) hedges: AtomicU64,
    pub(crate) hedges_won: AtomicU64,
}

impl ClientCounters {
    pub(crate) fn snapshot(&self) -> ClientStats {
        ClientStats {
            requests: self.requests.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            hedges: self.hedges.load(Relaxed),
            hedges_won: self.hedges_won.load(Relaxed),
        }
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
        }
    }
}
