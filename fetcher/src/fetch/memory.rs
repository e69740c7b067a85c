//! What work that nobody waits for may take of the memory. Spans of 16 MiB are nothing special where a layer unpacks very
//! well or its encoder made one block of it, and there may be many layers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyrun_index::SpanInfo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::FetchError;
use crate::store::Layer;

/// For spans that come by ranges: one of the largest usual ones, or some dozens of others, in KiB.
const RANGES: u64 = 17 << 10;
/// For the span that each stream gathers until its digest is known, in KiB.
const STREAMS: u64 = 17 << 10;

/// Spans of more bytes are in memory one at a time, whether they come by range or by stream: two of them would be half
/// of what the daemon may take.
const LARGE: u64 = 8 << 20;
/// So long one waits for another: whose registry has gone silent shall not keep all others out.
const LARGE_WAIT: Duration = Duration::from_secs(60);
/// How often one that waits looks whether somebody is in a hurry.
const TICK: Duration = Duration::from_millis(50);

/// Room in memory, by the use that is made of it: a stream holds its part for as long as it takes.
pub(super) struct Memory {
    ranges: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

/// What a span that comes by range holds as long as it is in memory.
pub(super) struct SpanRoom {
    _large: Option<OwnedSemaphorePermit>,
    _room: OwnedSemaphorePermit,
}

impl Default for Memory {
    fn default() -> Self {
        let room = |kib: u64| Arc::new(Semaphore::new(kib as usize));
        Memory { ranges: room(RANGES), streams: room(STREAMS), large: Arc::new(Semaphore::new(1)) }
    }
}

impl Memory {
    /// Room for a span, compressed and decoded. One that is larger than all room gets all of it.
    pub(super) async fn span(&self, span: &SpanInfo) -> Result<SpanRoom, FetchError> {
        let large = self.large(span.len, || false).await;
        let room = take(&self.ranges, span.blob_len.saturating_add(span.len), RANGES).await?;
        Ok(SpanRoom { _large: large, _room: room })
    }

    /// The turn of a large span of `len` bytes; none for others, after too long a wait, and when `hurry` says so.
    pub(super) async fn large(&self, len: u64, hurry: impl Fn() -> bool) -> Option<OwnedSemaphorePermit> {
        let until = Instant::now() + LARGE_WAIT;
        while len > LARGE && Instant::now() < until && !hurry() {
            if let Ok(turn) = tokio::time::timeout(TICK, Arc::clone(&self.large).acquire_owned()).await {
                return turn.ok();
            }
        }
        None
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_spans_take_turns_unless_somebody_is_in_a_hurry() {
        let memory = Memory::default();
        assert!(memory.large(LARGE, || false).await.is_none(), "small ones need none");
        let first = memory.large(LARGE + 1, || false).await;
        assert!(first.is_some());
        assert!(memory.large(LARGE + 1, || true).await.is_none());
        let waits = memory.large(LARGE + 1, || false);
        let (second, ()) = tokio::join!(waits, async {
            tokio::time::sleep(3 * TICK).await;
            drop(first);
        });
        assert!(second.is_some());
    }
}
