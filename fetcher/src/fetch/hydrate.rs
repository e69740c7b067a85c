//! Hydration: everything that is missing, in the background.
//!
//! Missing runs come by ranged requests, each short enough that a fault which comes meanwhile is not held up, and
//! none is started while faults are being served. A layer whose spans cannot be entered, or whose server does
//! not do ranges, is streamed from its start instead. So is one whose adopted index is not proven yet: that is its
//! proof.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use lazyrun_index::{LayerSink, Layout, SpanInfo, hydrate_layer};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::claims::{LayerState, Run};
use super::polite::Polite;
use super::pump::{Failure, Pace, pump};
use super::{Inner, NoProgress, Progress, blocking, ingest, prove, spans, twins};
use crate::error::FetchError;
use crate::observe::Class;
use crate::store::Layer;

/// Requests of one hydration at a time: the second hides the first one's round trip.
const PIPELINE: usize = 2;
/// Spans behind a fault that are more likely to be wanted than others.
const NEIGHBOURHOOD: usize = 16;
/// How long to wait for what others fetch before looking again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Passes over one blob; more would bring nothing that these did not.
const MAX_STREAMS: u32 = 3;
/// Blobs' worth of bytes after which what is fetched is obviously dropped again by somebody.
const MAX_BLOBS: u64 = 2;
/// Streamed spans between two writes of the map.
const SAVE_EVERY: u32 = 16;

/// [`run`] for those whom it calls itself.
pub(super) fn boxed(
    inner: Arc<Inner>,
    layer: Arc<Layer>,
    progress: Arc<dyn Progress>,
) -> BoxFuture<'static, Result<(), FetchError>> {
    Box::pin(async move { run(&inner, &layer, &progress).await })
}

pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    let _pin = layer.pin_filling();
    if layer.has_suspects() {
        let layer = Arc::clone(layer);
        blocking("verifying a layer", move || {
            layer.verify_suspects().map_err(|e| FetchError::store("reading", &layer.data_path(), e))
        })
        .await?;
    }
    let state = inner.state(layer.id());
    if !layer.is_proven() {
        stream(inner, layer, progress).await?;
    }
    twins::fill_all(inner, layer).await;
    let (mut streams, mut asked) = (0, 0);
    // Dropping the set aborts what is in it, and the runs give their claims back.
    let mut requests: JoinSet<Result<(), FetchError>> = JoinSet::new();
    while !layer.is_hydrated() {
        let changed = state.changed.notified();
        if let Some(lie) = layer.lie() {
            return Err(lie);
        }
        let mut exhausted = false;
        while requests.len() < PIPELINE && !exhausted {
            inner.hastes.turn(layer.id()).await;
            if !inner.hastes.is_unlimited(layer.id()) {
                inner.throttle.ready().await;
            }
            let slot = inner.scheduler.background_request().await?;
            match next_run(inner, layer, &state) {
                Some((target, run)) => {
                    let own = target.id() == layer.id();
                    let paid = Paid::for_run(inner, &target, &run);
                    asked += if own { paid.len } else { 0 };
                    if asked > MAX_BLOBS * layer.index().blob_size().max(1 << 20) {
                        return Err(FetchError::Forgotten { diff_id: layer.diff_id() });
                    }
                    let inner = Arc::clone(inner);
                    requests.spawn(async move {
                        let run = Arc::new(run);
                        let result = spans::fetch(&inner, &target, Arc::clone(&run), Some(slot)).await;
                        paid.settle(&inner, &run);
                        // What fails for another layer is for that layer's own hydration to tell.
                        if own { result } else { Ok(()) }
                    });
                }
                None => exhausted = true,
            }
        }
        match requests.join_next().await {
            Some(Ok(Ok(()))) => report(layer, progress),
            Some(Ok(Err(error))) if !state.no_ranges() => return Err(error),
            Some(Ok(Err(_))) => {}
            Some(Err(_)) => return Err(FetchError::Interrupted { what: "hydrating a layer" }),
            None if needs_stream(layer, &state) => {
                if streams == MAX_STREAMS {
                    return Err(FetchError::Interrupted { what: "hydrating a layer" });
                }
                streams += 1;
                stream(inner, layer, progress).await?;
            }
            // The rest is being fetched for faults.
            None => {
                let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
            }
        }
    }
    report(layer, progress);
    inner.sync_later(layer);
    Ok(())
}

/// What a request was charged for.
struct Paid {
    len: u64,
}

impl Paid {
    fn for_run(inner: &Inner, layer: &Layer, run: &Run) -> Paid {
        let spans = || run.ranks.clone().map(|rank| layer.span_at(rank));
        let begin = spans().map(|span| span.blob_offset).min().unwrap_or(0);
        let end = spans().map(|span| span.blob_offset.saturating_add(span.blob_len)).max().unwrap_or(begin);
        let len = end.saturating_sub(begin);
        inner.throttle.charge(len);
        Paid { len }
    }

    /// Gives back what did not come.
    fn settle(&self, inner: &Inner, run: &Run) {
        let came = run.progress.bytes();
        inner.throttle.give_back(self.len.saturating_sub(came));
    }
}

/// What to fetch next: what lies behind the latest faults, in whichever layer that is hydrated now too, and else
/// the first that is missing here.
fn next_run(inner: &Arc<Inner>, layer: &Arc<Layer>, state: &Arc<LayerState>) -> Option<(Arc<Layer>, Run)> {
    let bytes = inner.scheduler.background_bytes().min(inner.throttle.turn());
    let near = inner.interest.places().into_iter().find_map(|(near, next)| {
        // What is not proven comes by a stream anyhow.
        if !near.is_proven() || !inner.hydrations.is_active(&near.id()) {
            return None;
        }
        let state = inner.state(near.id());
        let end = next.saturating_add(NEIGHBOURHOOD).min(near.index().span_count());
        Some((Arc::clone(&near), state.plan_background(&near, next..end, bytes)?))
    });
    near.or_else(|| {
        let all = 0..layer.index().span_count();
        Some((Arc::clone(layer), state.plan_background(layer, all, bytes)?))
    })
}

/// Whether something is missing that ranges will not bring.
fn needs_stream(layer: &Layer, state: &LayerState) -> bool {
    let all = state.no_ranges();
    (0..layer.index().span_count())
        .any(|i| layer.lacks_span(i) && (all || !layer.can_fault(&layer.index().span(i))))
}

fn report(layer: &Layer, progress: &Arc<dyn Progress>) {
    let index = layer.index();
    let done: u64 = if layer.is_whole() {
        index.blob_size()
    } else {
        let local = (0..index.span_count()).filter(|&i| layer.has_span(i));
        local.map(|i| index.span(i).blob_len).sum::<u64>().min(index.blob_size())
    };
    progress.advance(layer.diff_id(), done, index.blob_size());
}

/// Streams the layer for faults that need it. It goes on when they have timed out, so that a later read finds
/// more of it.
pub(super) fn start_stream(inner: &Arc<Inner>, layer: &Arc<Layer>) {
    let (owned_inner, owned_layer) = (Arc::clone(inner), Arc::clone(layer));
    let work = || async move {
        let progress: Arc<dyn Progress> = Arc::new(NoProgress);
        stream_once(&owned_inner, &owned_layer, &progress).await
    };
    // What was dropped behind the stream did not come: its readers have to look again.
    let state = inner.state(layer.id());
    inner.streams.join_detached(layer.id(), work, move || state.changed.notify_waiters());
}

/// Streams the layer, or joins the stream under way.
async fn stream(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    let (owned_inner, owned_layer, progress) = (Arc::clone(inner), Arc::clone(layer), Arc::clone(progress));
    let flight = inner
        .streams
        .join(layer.id(), || async move { stream_once(&owned_inner, &owned_layer, &progress).await });
    flight.wait("streaming a layer").await
}

async fn stream_once(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    // An index that is claimed, or that lacks digests, takes the pass that can do with it.
    let result = if !layer.is_proven() || layer.lacks_digests() || layer.id().layout == Layout::Table {
        prove::run(inner, layer, progress).await
    } else {
        stream_from_any(inner, layer, progress).await
    };
    match &result {
        Ok(()) => inner.sync_later(layer),
        Err(error) => inner.state(layer.id()).fail_stream(error.clone()),
    }
    result
}

async fn stream_from_any(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    let _slot = inner.scheduler.stream().await?;
    let _memory = inner.memory.stream(layer).await?;
    let mut failure = FetchError::NoSource { diff_id: layer.diff_id() };
    let mut sources = VecDeque::from(inner.sources(layer)?);
    while let Some(source) = sources.pop_front() {
        let (digest, size) = (layer.index().blob_digest(), layer.index().blob_size());
        let pace = Pace::background(inner, layer, sources.is_empty(), progress);
        let problem = Failure::default();
        let (feeder, reader) = pump(problem.clone());
        let mut sink = StreamSink {
            inner: Arc::clone(inner),
            begun: false,
            large: None,
            layer: Arc::clone(layer),
            state: inner.state(layer.id()),
            span: Vec::new(),
            next: 0,
            offset: 0,
            unsaved: 0,
            progress: Arc::clone(progress),
        };
        let worker = blocking("streaming a layer", move || {
            let _polite = Polite::now();
            let layer = Arc::clone(&sink.layer);
            let result = hydrate_layer(layer.index(), reader, &mut sink);
            let _ = layer.save_map();
            match result {
                Ok(_) => Ok(()),
                Err(_) if layer.is_whole() => Ok(()),
                Err(error) => Err(ingest::layer_error(digest, error, &problem, &layer.data_path())),
            }
        });
        inner.counters.background_requests.fetch_add(1, Relaxed);
        let blob = source.reader(digest, 0..size, Some(size)).for_class(Class::Hydrate);
        let witness = blob.witness();
        let feed = feeder.run(blob, pace, |n| {
            inner.counters.background_bytes.fetch_add(n, Relaxed);
            inner.scheduler.link.arrived(n, Instant::now());
        });
        let ((), result) = tokio::join!(feed, worker);
        match result {
            Ok(()) => return Ok(()),
            Err(error) => {
                if ingest::is_damage(&error) && witness.disown() {
                    sources.push_front(source);
                }
                failure = error;
            }
        }
    }
    Err(failure)
}

/// Stores streamed spans once they are verified. Until then they are held in memory: the layer file may already
/// have the same span, proven and in use.
struct StreamSink {
    inner: Arc<Inner>,
    /// Whether there is room for the span.
    begun: bool,
    /// The turn of a large span.
    large: Option<OwnedSemaphorePermit>,
    layer: Arc<Layer>,
    state: Arc<LayerState>,
    span: Vec<u8>,
    /// Its number.
    next: usize,
    /// Byte of the layer file at which `span` starts.
    offset: u64,
    unsaved: u32,
    progress: Arc<dyn Progress>,
}

impl LayerSink for StreamSink {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset != self.offset + self.span.len() as u64 {
            return Err(io::Error::other("streamed bytes are not in order"));
        }
        if !self.begun && self.next < self.layer.index().span_count() {
            let len = self.layer.index().span(self.next).len;
            let turn = self.inner.memory.large(len, || self.state.stream_wanted());
            self.large = Handle::current().block_on(turn);
            // Its length was bounded when the index was checked; growing by doubling would take twice as much.
            self.span.reserve_exact((len as usize).saturating_sub(self.span.len()));
            self.begun = true;
        }
        self.span.extend_from_slice(bytes);
        Ok(())
    }

    fn span(&mut self, span: &SpanInfo) -> io::Result<()> {
        let len = usize::try_from(span.len).unwrap_or(usize::MAX);
        if span.offset != self.offset || len > self.span.len() {
            return Err(io::Error::other("a streamed span is not where its index says"));
        }
        if !self.layer.has_span(span.index as usize) {
            // The index has all digests here, so what is stored is right.
            let _ = self.layer.write_span_for(self.state.stream_need(), span, &self.span[..len])?;
            self.state.changed.notify_waiters();
            self.unsaved += 1;
        }
        self.next = span.index as usize + 1;
        self.span.drain(..len);
        // The next one may be a thousand times smaller, and there may be many streams.
        self.span.shrink_to_fit();
        (self.begun, self.large) = (false, None);
        self.offset += span.len;
        if self.unsaved >= SAVE_EVERY {
            self.layer.save_map()?;
            self.unsaved = 0;
        }
        if self.layer.is_whole() {
            // Nothing is missing any more: the rest of the stream would bring nothing new.
            return Err(io::Error::other("done"));
        }
        Ok(())
    }

    fn progress(&mut self, blob_bytes: u64) {
        self.progress.advance(self.layer.diff_id(), blob_bytes, self.layer.index().blob_size());
    }
}
