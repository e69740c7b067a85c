//! Metrics: what the libraries and the daemon count, as text for Prometheus. docs/OBSERVABILITY.md lists them.
//!
//! Whoever counts does so in atomics of its own; here they are only read. So counting costs a reader nothing, and a daemon
//! that nobody asks has nothing to do.

mod collect;
pub mod layers;
mod serve;
pub mod text;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use lazyrun_fetcher::Histogram;

pub(super) use collect::{sum_clients, sum_hosts};
pub use serve::Address;

/// What the FUSE servers have answered reads of layer files with.
#[derive(Debug, Default)]
pub struct Served {
    /// Reads whose bytes were all here.
    pub hits: AtomicU64,
    /// Reads that had to be satisfied by the fetcher.
    pub misses: AtomicU64,
    /// Reads that failed.
    pub errors: AtomicU64,
    /// Bytes answered.
    pub bytes: AtomicU64,
}

impl Served {
    /// A read was answered with so many bytes.
    pub fn answered(&self, bytes: usize, local: bool) {
        let counter = if local { &self.hits } else { &self.misses };
        counter.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// A read failed.
    pub fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }
}

/// What the daemon counts itself.
#[derive(Debug, Default)]
pub struct Counted {
    /// Views whose metadata image was written, by how long it took.
    pub view_builds: Histogram,
    /// Views that were mounted, by how long it took.
    pub view_mounts: Histogram,
}
