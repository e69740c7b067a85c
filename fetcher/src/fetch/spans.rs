//! One request for a run of spans: fetched, decoded, verified and stored span by span as the bytes arrive.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::{Buf as _, Bytes, BytesMut};
use lazyrun_index::SpanInfo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use super::claims::Run;
use super::scheduler::Class;
use super::{Inner, blocking};
use crate::client::{BlobReader, BlobSource};
use crate::error::FetchError;
use crate::observe::DecodeSeen;
use crate::store::Layer;

/// Tries per source when what comes is corrupt.
const TRIES: usize = 2;

/// Starts fetching a run for faults, on its own: what has begun is finished even if the reader has gone.
pub(super) fn start(inner: &Arc<Inner>, layer: &Arc<Layer>, run: Run) {
    let (inner, layer) = (Arc::clone(inner), Arc::clone(layer));
    let ranks = &run.ranks;
    let span = tracing::debug_span!("fetch", layer = %layer.id(), class = %run.told, first = ranks.start, end = ranks.end);
    let fetching = async move {
        let result = match inner.scheduler.fault_request().await {
            Ok(slot) => fetch(&inner, &layer, Arc::new(run), slot).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::warn!(layer = %layer.id(), %error, "fault could not be served");
        }
    };
    tokio::spawn(fetching.instrument(span));
}

/// Fetches a run from the first source that can deliver it.
pub(super) async fn fetch(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    run: Arc<Run>,
    slot: OwnedSemaphorePermit,
) -> Result<(), FetchError> {
    let result = from_any_source(inner, layer, &run).await;
    drop(slot);
    let saved = Arc::clone(layer);
    let _ = blocking("saving the span map", move || {
        saved.save_map().map_err(|e| FetchError::store("writing", &saved.data_path(), e))
    })
    .await;
    match &result {
        Ok(()) if layer.is_whole() => inner.sync_later(layer),
        Ok(()) => {}
        // Not the readers' business: they will find that only a stream helps.
        Err(FetchError::RangeIgnored { .. } | FetchError::Protocol { .. }) => {
            tracing::info!(layer = %layer.id(), "ranges do not work here, the layer will be streamed");
            run.layer_state().give_up_ranges();
        }
        // Perhaps a checkpoint or digest is to blame that somebody else made: the stream needs none, and tells.
        Err(FetchError::Corrupt { .. }) if layer.adopted_from().is_some() => {
            tracing::warn!(layer = %layer.id(), "an adopted index is of no use, the layer will be streamed");
            run.layer_state().give_up_ranges();
        }
        Err(error) => run.fail(error),
    }
    result
}

async fn from_any_source(inner: &Arc<Inner>, layer: &Arc<Layer>, run: &Arc<Run>) -> Result<(), FetchError> {
    let mut next = run.ranks.start;
    let mut failure = FetchError::NoSource { diff_id: layer.diff_id() };
    let sources = inner.sources(layer)?;
    for (i, source) in sources.iter().enumerate() {
        let other = sources.get(i + 1).cloned();
        for _ in 0..TRIES {
            match from_source(inner, layer, run, source, other.clone(), &mut next).await {
                Ok(()) => return Ok(()),
                Err(error @ (FetchError::DiskFull { .. } | FetchError::Store { .. })) => return Err(error),
                Err(error @ FetchError::Corrupt { .. }) => {
                    tracing::warn!(%error, source = source.name(), "span is fetched again");
                    failure = error;
                }
                Err(error) => {
                    failure = error;
                    break;
                }
            }
        }
    }
    Err(failure)
}

/// A decode under way and the span it is for.
type Decoding = (usize, JoinHandle<Result<(), FetchError>>);

/// Reads spans from `next` on; `next` moves with every span that is stored. A fault that is slow is asked of `other`
/// as well.
async fn from_source(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    run: &Arc<Run>,
    source: &BlobSource,
    other: Option<BlobSource>,
    next: &mut usize,
) -> Result<(), FetchError> {
    let index = layer.index();
    let begin = layer.span_at(*next).blob_offset;
    let ends = (*next..run.ranks.end).map(|i| layer.span_at(i));
    let end = ends.map(|s| s.blob_offset.saturating_add(s.blob_len)).max();
    let end = end.unwrap_or(begin).min(index.blob_size());
    let reader = source.reader(index.blob_digest(), begin..end, Some(index.blob_size())).for_class(run.told);
    let mut arriving = Arriving {
        inner,
        run,
        reader: match run.class {
            Class::Fault => reader.hedged(other),
            Class::Background => reader.patient(),
        },
        buffer: BytesMut::new(),
        base: begin,
    };
    let requests = match run.class {
        Class::Fault => &inner.counters.fault_requests,
        Class::Background => &inner.counters.background_requests,
    };
    requests.fetch_add(1, Relaxed);
    arriving.reader.connect().await?;
    if let Some(waited) = arriving.reader.first_byte() {
        inner.scheduler.link.answered(waited);
    }
    // One span is decoded while the next one arrives.
    let mut decoding: Option<Decoding> = None;
    for rank in *next..run.ranks.end {
        let span = layer.span_at(rank);
        let arrived = arriving.span(&span).await;
        if let Some((done, task)) = decoding.take() {
            join(task).await?;
            *next = done + 1;
        }
        let compressed = arrived?;
        if layer.has_span(span.index as usize) || !run.owns(rank) {
            // A run may not be resumed in front of a span that somebody else delivers.
            decoding = Some((rank, tokio::spawn(std::future::ready(Ok(())))));
            continue;
        }
        let permit = inner.scheduler.decode().await?;
        let (inner, layer, run) = (Arc::clone(inner), Arc::clone(layer), Arc::clone(run));
        let fetching = tracing::Span::current();
        let task = tokio::task::spawn_blocking(move || {
            let _of = fetching.enter();
            let result = store(&inner, &layer, &run, rank, &span, &compressed);
            drop(permit);
            result
        });
        decoding = Some((rank, task));
    }
    if let Some((done, task)) = decoding {
        join(task).await?;
        *next = done + 1;
    }
    Ok(())
}

async fn join(task: JoinHandle<Result<(), FetchError>>) -> Result<(), FetchError> {
    task.await.unwrap_or(Err(FetchError::Interrupted { what: "decoding a span" }))
}

/// Decodes, verifies and stores one span (blocking).
fn store(
    inner: &Inner,
    layer: &Layer,
    run: &Run,
    rank: usize,
    span: &SpanInfo,
    compressed: &[u8],
) -> Result<(), FetchError> {
    let began = Instant::now();
    let mut decoded = Vec::new();
    let number = span.index as usize;
    let corrupt = |reason: String| {
        inner.counters.corrupt_spans.fetch_add(1, Relaxed);
        FetchError::Corrupt {
            digest: layer.index().blob_digest(),
            start: span.blob_offset,
            end: span.blob_offset + span.blob_len,
            reason,
        }
    };
    layer
        .index()
        .decode_span(number, compressed, &mut decoded)
        .map_err(|error| corrupt(error.to_string()))?;
    inner.counters.spans.fetch_add(1, Relaxed);
    let stored =
        layer.write_span(span, &decoded).map_err(|e| FetchError::store("writing", &layer.data_path(), e))?;
    // One that the stream has brought meanwhile is right.
    if !stored && !layer.has_span(number) {
        return Err(corrupt(format!(
            "span {number} decodes to other bytes than the stream of the layer did"
        )));
    }
    run.done(rank);
    let (bytes, took) = (span.len, began.elapsed());
    inner.counters.decoded(bytes, took);
    inner.options.watch.decoded(&DecodeSeen { layer: layer.id(), span: number, bytes, took });
    Ok(())
}

/// The bytes of a run as they come.
struct Arriving<'a> {
    inner: &'a Inner,
    run: &'a Run,
    reader: BlobReader,
    buffer: BytesMut,
    /// Byte of the blob at which `buffer` starts.
    base: u64,
}

impl Arriving<'_> {
    /// The compressed bytes of a span. Spans are asked for in the order of their first bytes; they may overlap.
    async fn span(&mut self, span: &SpanInfo) -> Result<Bytes, FetchError> {
        let end = span.blob_offset.saturating_add(span.blob_len);
        while self.base + (self.buffer.len() as u64) < end {
            let Some(chunk) = self.reader.next().await? else {
                return Err(FetchError::Corrupt {
                    digest: self.digest(),
                    start: span.blob_offset,
                    end,
                    reason: "the index points beyond the end of the blob".to_owned(),
                });
            };
            self.buffer.extend_from_slice(&chunk);
            let counter = match self.run.class {
                Class::Fault => &self.inner.counters.fault_bytes,
                Class::Background => &self.inner.counters.background_bytes,
            };
            counter.fetch_add(chunk.len() as u64, Relaxed);
            self.inner.scheduler.link.arrived(chunk.len() as u64, Instant::now());
            self.run.position.store(self.base + self.buffer.len() as u64, Relaxed);
        }
        // Both differences are lengths inside the buffer, so they fit.
        self.buffer.advance((span.blob_offset - self.base) as usize);
        self.base = span.blob_offset;
        Ok(Bytes::copy_from_slice(&self.buffer[..span.blob_len as usize]))
    }

    fn digest(&self) -> lazyrun_index::Digest {
        self.reader.digest()
    }
}
