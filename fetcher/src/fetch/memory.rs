//! What work that nobody waits for may take of the memory. Spans of 16 MiB are nothing special where a layer unpacks very
//! well or its encoder made one block of it, and there may be many layers.

use std::sync::Arc;

use lazyrun_index::SpanInfo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::FetchError;
use crate::store::Layer;

/// For spans that come by ranges: one of the largest usual ones, or some dozens of others, in KiB.
const RANGES: u64 = 17 << 10;
/// For the span that each stream gathers until its digest is known, in KiB.
const STREAMS: u64 = 17 << 10;

/// Room in memory, by the use that is made of it: a stream holds its part for as long as it takes.
pub(super) struct Memory {
    ranges: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Default for Memory {
    fn default() -> Self {
        let room = |kib: u64| Arc::new(Semaphore::new(kib as usize));
        Memory { ranges: room(RANGES), streams: room(STREAMS) }
    }
}

impl Memory {
    /// Room for a span, compressed and decoded. One that is larger than all room gets all of it.
    pub(super) async fn span(&self, span: &SpanInfo) -> Result<OwnedSemaphorePermit, FetchError> {
        take(&self.ranges, span.blob_len.saturating_add(span.len), RANGES).await
    }

    /// Room for a stream of a layer.
    pub(super) async fn stream(&self, layer: &Layer) -> Result<OwnedSemaphorePermit, FetchError> {
        let largest = layer.index().spans().map(|span| span.len).max().unwrap_or(0);
        take(&self.streams, largest, STREAMS).await
    }
}

async fn take(room: &Arc<Semaphore>, bytes: u64, all: u64) -> Result<OwnedSemaphorePermit, FetchError> {
    let permits = u32::try_from((bytes >> 10).clamp(1, all)).unwrap_or(u32::MAX);
    Arc::clone(room)
        .acquire_many_owned(permits)
        .await
        .map_err(|_| FetchError::Interrupted { what: "a fetch" })
}
