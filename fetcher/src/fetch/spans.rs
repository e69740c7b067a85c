//! One request for a run of spans: fetched, decoded, verified and stored span by span as the bytes arrive.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use lazyrun_index::SpanInfo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinError, JoinHandle};
use tracing::Instrument as _;

use super::Inner;
use super::arriving::{Arriving, Reader};
use super::claims::Run;
use super::polite::Polite;
use crate::client::{BlobReader, BlobSource};
use crate::error::FetchError;
use crate::observe::{Class, DecodeSeen};
use crate::store::{Layer, Need};

/// Tries per source when what comes is corrupt.
const TRIES: usize = 2;

/// A fault waits so long for one of the places for its like. They may all be taken by a registry that does not answer,
/// and this one may be for another; how many wait for one host is bounded anyhow.
const PLACE_PATIENCE: Duration = Duration::from_secs(1);

/// Starts fetching a run for faults, on its own: what has begun is finished even if the reader has gone, as long as
/// something comes.
pub(super) fn start(inner: &Arc<Inner>, layer: &Arc<Layer>, run: Run) {
    let (inner, layer, run) = (Arc::clone(inner), Arc::clone(layer), Arc::new(run));
    let ranks = run.ranks.clone();
    let span = tracing::debug_span!("fetch", layer = %layer.id(), class = %run.class, first = ranks.start, end = ranks.end);
    let fetching = async move {
        let slot = match tokio::time::timeout(PLACE_PATIENCE, inner.scheduler.fault_request()).await {
            Ok(Ok(slot)) => Some(slot),
            Ok(Err(_)) => return,
            Err(_) => None,
        };
        let result = tokio::select! {
            result = fetch(&inner, &layer, Arc::clone(&run), slot) => result,
            () = nothing_comes(&run, inner.options.fault_timeout) => Ok(()),
        };
        if let Err(error) = result {
            tracing::warn!(layer = %layer.id(), %error, "fault could not be served");
        }
    };
    tokio::spawn(fetching.instrument(span));
}

/// Waits until a run has brought nothing for `limit`. Nobody waits for it any more then, and whoever comes next shall
/// get a request of their own.
async fn nothing_comes(run: &Run, limit: Duration) {
    let mut before = run.progress.bytes();
    loop {
        tokio::time::sleep(limit).await;
        let now = run.progress.bytes();
        if now == before {
            return;
        }
        before = now;
    }
}

/// Fetches a run from the first source that can deliver it.
pub(super) async fn fetch(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    run: Arc<Run>,
    slot: Option<OwnedSemaphorePermit>,
) -> Result<(), FetchError> {
    let result = from_any_source(inner, layer, &run).await;
    drop(slot);
    settle(layer, &result).await;
    match &result {
        Ok(()) if layer.is_whole() => inner.sync_later(layer),
        Ok(()) => {}
        // Not the readers' business: they will find that only a stream helps.
        Err(FetchError::RangeIgnored { .. } | FetchError::Protocol { .. }) => {
            tracing::info!(layer = %layer.id(), "ranges do not work here, the layer will be streamed");
            run.layer_state().give_up_ranges(inner.options.ranges_again);
        }
        // Perhaps a checkpoint or digest is to blame that somebody else made: the stream needs none, and tells.
        Err(FetchError::Corrupt { .. }) if layer.adopted_from().is_some() => {
            tracing::warn!(layer = %layer.id(), "an adopted index is of no use, the layer will be streamed");
            run.layer_state().give_up_ranges(inner.options.ranges_again);
        }
        Err(error) => run.fail(error),
    }
    result
}

/// Remembers whether the layer's blob can still be had. Which spans are here has been written down one by one.
pub(super) async fn settle(layer: &Arc<Layer>, result: &Result<(), FetchError>) {
    // What nobody has any more can't be fetched again, so nothing of it may be evicted.
    let gone = match result {
        Ok(()) => false,
        Err(FetchError::BlobNotFound { .. } | FetchError::ImageNotFound { .. }) => true,
        Err(_) => return,
    };
    if layer.is_origin_gone() != gone {
        let layer = Arc::clone(layer);
        let _ = tokio::task::spawn_blocking(move || layer.set_origin_gone(gone)).await;
    }
}

async fn from_any_source(inner: &Arc<Inner>, layer: &Arc<Layer>, run: &Arc<Run>) -> Result<(), FetchError> {
    let mut next = run.ranks.start;
    let mut failure = FetchError::NoSource { diff_id: layer.diff_id() };
    let sources = inner.sources(layer)?;
    for (i, source) in sources.iter().enumerate() {
        let other = sources.get(i + 1).cloned();
        let mut tries = 0;
        while tries < TRIES {
            tries += 1;
            let reader = reader(layer, run, source, other.clone(), next);
            let witness = reader.witness();
            match read_spans(inner, layer, run, reader, &mut next).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_of_store() => return Err(error),
                Err(error @ FetchError::Corrupt { .. }) => {
                    tracing::warn!(%error, source = source.name(), "span is fetched again");
                    // What a mirror has spoilt is no try of the registry.
                    tries -= usize::from(witness.disown());
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

/// The bytes of the blob that a run takes.
pub(super) fn blob_range(layer: &Layer, ranks: Range<usize>) -> Range<u64> {
    let begin = layer.span_at(ranks.start).blob_offset;
    let ends = ranks.map(|i| layer.span_at(i)).map(|s| s.blob_offset.saturating_add(s.blob_len));
    begin..ends.max().unwrap_or(begin).min(layer.index().blob_size())
}

/// A reader of a run from its span `next` on. A fault that is slow is asked of `other` as well.
fn reader(
    layer: &Layer,
    run: &Run,
    source: &BlobSource,
    other: Option<BlobSource>,
    next: usize,
) -> BlobReader {
    let index = layer.index();
    let range = blob_range(layer, next..run.ranks.end);
    let reader = source.reader(index.blob_digest(), range, Some(index.blob_size())).for_class(run.class);
    match run.class {
        Class::Fault => reader.hedged(other),
        _ => reader.patient(),
    }
}

/// Reads spans from `next` on; `next` moves with every span that is stored.
async fn read_spans(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    run: &Arc<Run>,
    mut reader: BlobReader,
    next: &mut usize,
) -> Result<(), FetchError> {
    let requests = match run.class {
        Class::Fault => &inner.counters.fault_requests,
        _ => &inner.counters.background_requests,
    };
    requests.fetch_add(1, Relaxed);
    reader.connect().await?;
    if let Some(waited) = reader.first_byte() {
        inner.scheduler.link.answered(waited);
    }
    let mut arriving = Arriving::new(inner, run.class, &run.progress, Reader::One(reader));
    // One span is decoded while the next one arrives.
    let mut decoding: Option<Decoding> = None;
    for rank in *next..run.ranks.end {
        let span = layer.span_at(rank);
        let next_begin =
            if rank + 1 < run.ranks.end { layer.span_at(rank + 1).blob_offset } else { u64::MAX };
        let room = match run.class {
            Class::Fault => None,
            _ => Some(inner.memory.span(&span).await?),
        };
        let arrived = arriving.span(&span, next_begin).await;
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
            let (_of, _polite) = (fetching.enter(), Polite::for_class(run.class));
            let result = store(&inner, &layer, &run, rank, &span, &compressed);
            drop((permit, compressed, room));
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
    decoded(task.await)
}

/// What came of decoding a span.
pub(super) fn decoded(done: Result<Result<(), FetchError>, JoinError>) -> Result<(), FetchError> {
    done.unwrap_or(Err(FetchError::Interrupted { what: "decoding a span" }))
}

/// Decodes, verifies and stores one span (blocking).
pub(super) fn store(
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
    let need = match run.class {
        Class::Fault => Need::Reader,
        _ => Need::Ahead,
    };
    let stored = layer
        .write_span_for(need, span, &decoded)
        .map_err(|e| FetchError::store("writing", &layer.data_path(), e))?;
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
    // After each span: a daemon that is killed fetches nothing twice but what was on the way. Losing it costs no more.
    let _ = layer.save_map();
    Ok(())
}
