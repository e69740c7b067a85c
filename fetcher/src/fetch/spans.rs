//! One request for a run of spans: fetched, decoded, verified and stored span by span as the bytes arrive.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyrun_index::SpanInfo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;

use super::claims::Run;
use super::scheduler::Class;
use super::{Inner, blocking};
use crate::client::{BlobReader, BlobSource};
use crate::error::FetchError;
use crate::store::Layer;

/// Tries per source when what comes is corrupt.
const TRIES: usize = 2;

/// A fault waits so long for one of the places for its like. They may all be taken by a registry that does not answer,
/// and this one may be for another; how many wait for one host is bounded anyhow.
const PLACE_PATIENCE: Duration = Duration::from_secs(1);

/// Starts fetching a run for faults, on its own: what has begun is finished even if the reader has gone, as long as
/// something comes.
pub(super) fn start(inner: &Arc<Inner>, layer: &Arc<Layer>, run: Run) {
    let (inner, layer, run) = (Arc::clone(inner), Arc::clone(layer), Arc::new(run));
    tokio::spawn(async move {
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
    });
}

/// Waits until a run has brought nothing for `limit`. Nobody waits for it any more then, and whoever comes next shall
/// get a request of their own.
async fn nothing_comes(run: &Run, limit: Duration) {
    let mut before = run.position.load(Relaxed);
    loop {
        tokio::time::sleep(limit).await;
        let now = run.position.load(Relaxed);
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
    let reader = source.reader(index.blob_digest(), begin..end, Some(index.blob_size()));
    let mut arriving = Arriving {
        inner,
        run,
        reader: match run.class {
            Class::Fault => reader.hedged(other),
            Class::Background => reader.patient(),
        },
        pieces: VecDeque::new(),
        range: begin..begin,
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
        let next_begin =
            if rank + 1 < run.ranks.end { layer.span_at(rank + 1).blob_offset } else { u64::MAX };
        let room = match run.class {
            Class::Fault => None,
            Class::Background => Some(inner.memory.span(&span).await?),
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
        let task = tokio::task::spawn_blocking(move || {
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
    // After each span: a daemon that is killed fetches nothing twice but what was on the way. Losing it costs no more.
    let _ = layer.save_map();
    Ok(())
}

/// The bytes of a run as they come.
struct Arriving<'a> {
    inner: &'a Inner,
    run: &'a Run,
    reader: BlobReader,
    /// Pieces that follow each other, as the network gave them: a span may be large, and is copied once.
    pieces: VecDeque<Bytes>,
    /// Byte of the blob at which the first piece starts, and byte behind the last.
    range: Range<u64>,
}

impl Arriving<'_> {
    /// The compressed bytes of a span. Spans are asked for in the order of their first bytes; they may overlap. Nothing
    /// in front of `next` is asked for after this.
    async fn span(&mut self, span: &SpanInfo, next: u64) -> Result<Vec<u8>, FetchError> {
        let end = span.blob_offset.saturating_add(span.blob_len);
        while self.range.end < end {
            let Some(chunk) = self.reader.next().await? else {
                return Err(FetchError::Corrupt {
                    digest: self.reader.digest(),
                    start: span.blob_offset,
                    end,
                    reason: "the index points beyond the end of the blob".to_owned(),
                });
            };
            let counter = match self.run.class {
                Class::Fault => &self.inner.counters.fault_bytes,
                Class::Background => &self.inner.counters.background_bytes,
            };
            counter.fetch_add(chunk.len() as u64, Relaxed);
            self.inner.scheduler.link.arrived(chunk.len() as u64, Instant::now());
            self.range.end += chunk.len() as u64;
            self.pieces.push_back(chunk);
            self.run.position.store(self.range.end, Relaxed);
            self.drop_until(span.blob_offset);
        }
        Ok(self.take(span.blob_offset..end, next))
    }

    /// Copies a range that has come, dropping pieces on the way as far as nothing needs them any more.
    fn take(&mut self, range: Range<u64>, next: u64) -> Vec<u8> {
        // A span's length was bounded when its index was checked.
        let len = (range.end - range.start) as usize;
        let mut bytes = Vec::with_capacity(len);
        let mut at = self.range.start;
        let mut needed = VecDeque::new();
        while bytes.len() < len
            && let Some(piece) = self.pieces.pop_front()
        {
            let skip = range.start.saturating_sub(at).min(piece.len() as u64) as usize;
            let rest = &piece[skip..];
            bytes.extend_from_slice(&rest[..rest.len().min(len - bytes.len())]);
            at += piece.len() as u64;
            if at > next {
                needed.push_back(piece);
            } else {
                self.range.start = at;
            }
        }
        while let Some(piece) = needed.pop_back() {
            self.pieces.push_front(piece);
        }
        bytes
    }

    fn drop_until(&mut self, offset: u64) {
        while self.pieces.front().is_some_and(|piece| self.range.start + piece.len() as u64 <= offset) {
            self.range.start += self.pieces.pop_front().map_or(0, |piece| piece.len() as u64);
        }
    }
}
