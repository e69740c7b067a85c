//! Getting bytes of layers: streams, faults and hydration over one store.

mod arriving;
mod claims;
mod fault;
mod flight;
mod haste;
mod hydrate;
mod ingest;
mod interest;
mod link;
mod memory;
mod overdue;
mod parts;
mod polite;
mod prefetch;
mod progress;
mod prove;
mod pump;
mod scheduler;
mod sink;
mod spans;
mod table;
mod throttle;
mod twins;
mod verify;
mod window;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyrun_index::{Digest, LayerId, StreamOptions};
use tracing::{Instrument as _, debug_span, info_span};

use crate::bounds::layer_limit;
use crate::client::BlobSource;
use crate::error::FetchError;
use crate::manifest::LayerDescriptor;
use crate::observe::{FaultSeen, Watch};
use crate::stats::{FetchCounters, FetchStats, HistogramSnapshot};
use crate::store::{Layer, LayerStore};
use claims::LayerState;
use flight::Flights;
pub use haste::Haste;
use haste::Hastes;
use interest::Interest;
use memory::Memory;
use overdue::Overdue;
use scheduler::Scheduler;
use throttle::Throttle;

/// Hears how far a layer is. Called often and from any thread: must not block.
pub trait Progress: Send + Sync {
    /// `done` of `total` compressed bytes of the layer with this diffID have come (or were there).
    fn advance(&self, layer: Digest, done: u64, total: u64);
    /// Something that the user should know and that stops nothing, in one sentence.
    fn note(&self, text: &str) {
        let _ = text;
    }
    /// A layer's source does not answer at the moment, for this reason; `None` once it does again.
    fn waiting(&self, layer: Digest, reason: Option<&FetchError>) {
        let _ = (layer, reason);
    }
}

/// Progress that nobody wants to hear of.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _: Digest, _: u64, _: u64) {}
}

/// Bounds and tuning of a [`Fetcher`].
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// A read that takes longer is an error.
    pub fault_timeout: Duration,
    /// Requests for faults at a time.
    pub fault_requests: usize,
    /// Requests for what is foreseen at a time.
    pub prefetch_requests: usize,
    /// Requests for hydration at a time, over all layers.
    pub background_requests: usize,
    /// How long ranges of a layer are not tried again after they were found not to work.
    pub ranges_again: Duration,
    /// Most bytes per second that hydration may ask for, over all layers; `None` is no limit.
    pub background_limit: Option<u64>,
    /// Layers streamed at a time.
    pub streams: usize,
    /// Most compressed bytes read ahead of a fault.
    pub max_readahead: u64,
    /// How new layers are cut into spans.
    pub stream: StreamOptions,
    /// Who hears of faults and decoded spans.
    pub watch: Watch,
}

impl Default for FetchOptions {
    fn default() -> Self {
        FetchOptions {
            fault_timeout: Duration::from_secs(30),
            fault_requests: 8,
            prefetch_requests: 6,
            background_requests: 2,
            ranges_again: Duration::from_secs(300),
            background_limit: None,
            streams: 6,
            max_readahead: 8 << 20,
            stream: StreamOptions::default(),
            watch: Watch::default(),
        }
    }
}

impl FetchOptions {
    /// How a layer with a blob of `size` bytes is streamed.
    fn stream_of(&self, size: u64) -> StreamOptions {
        StreamOptions { max_layer_len: layer_limit(size).min(self.stream.max_layer_len), ..self.stream }
    }
}

/// Fetches layers into a [`LayerStore`]. Cheap to clone; needs a tokio runtime.
#[derive(Clone)]
pub struct Fetcher {
    inner: Arc<Inner>,
}

struct Inner {
    store: LayerStore,
    options: FetchOptions,
    counters: FetchCounters,
    scheduler: Scheduler,
    interest: Interest,
    throttle: Throttle,
    hastes: Hastes,
    overdue: Overdue,
    memory: Memory,
    sources: Mutex<HashMap<Digest, Vec<Source>>>,
    states: Mutex<HashMap<LayerId, Arc<LayerState>>>,
    ingests: Flights<Arc<Layer>>,
    hydrations: Flights<()>,
    streams: Flights<()>,
    /// Writing out one layer at a time is enough.
    sync_turn: tokio::sync::Mutex<()>,
}

struct Source {
    descriptor: LayerDescriptor,
    blobs: BlobSource,
}

impl Fetcher {
    /// A fetcher over `store`.
    pub fn new(store: LayerStore, options: FetchOptions) -> Fetcher {
        let fetcher = Fetcher {
            inner: Arc::new(Inner {
                scheduler: Scheduler::new(&options),
                interest: Interest::default(),
                throttle: Throttle::new(options.background_limit),
                hastes: Hastes::default(),
                overdue: Overdue::default(),
                memory: Memory::default(),
                store,
                options,
                counters: FetchCounters::default(),
                sources: Mutex::default(),
                states: Mutex::default(),
                ingests: Flights::default(),
                hydrations: Flights::default(),
                streams: Flights::default(),
                sync_turn: tokio::sync::Mutex::default(),
            }),
        };
        let inner = Arc::downgrade(&fetcher.inner);
        let known = move |layer: &Layer| inner.upgrade().is_some_and(|inner| inner.sources(layer).is_ok());
        fetcher.inner.store.set_refetch(known);
        fetcher
    }

    /// The store that is filled.
    pub fn store(&self) -> &LayerStore {
        &self.inner.store
    }

    /// Counters since the fetcher was made.
    pub fn stats(&self) -> FetchStats {
        self.inner.counters.snapshot()
    }

    /// How long faults have waited since the fetcher was made.
    pub fn fault_latency(&self) -> HistogramSnapshot {
        self.inner.counters.fault_latency.snapshot()
    }

    /// Says where a layer's blob can be got from. The newest source is asked first; one for the same blob in the
    /// same repository replaces the older.
    pub fn add_source(&self, diff_id: Digest, descriptor: LayerDescriptor, blobs: BlobSource) {
        let mut sources = self.inner.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let list = sources.entry(diff_id).or_default();
        list.retain(|s| s.descriptor.digest != descriptor.digest || s.blobs.name() != blobs.name());
        list.insert(0, Source { descriptor, blobs });
    }

    /// Streams a layer of which no index is here yet, or joins the stream that is under way: verifies digest and
    /// diffID, publishes layer and index. A layer that is in the store already is returned as it is (perhaps not
    /// hydrated). When every caller has gone the stream stops and leaves nothing behind.
    ///
    /// # Errors
    /// When the blob cannot be had, is not what its digests say, or cannot be stored.
    pub async fn ingest(
        &self,
        descriptor: &LayerDescriptor,
        blobs: BlobSource,
        progress: Arc<dyn Progress>,
    ) -> Result<Arc<Layer>, FetchError> {
        self.add_source(descriptor.diff_id, descriptor.clone(), blobs.clone());
        let (inner, descriptor) = (Arc::clone(&self.inner), descriptor.clone());
        let flight = self.inner.ingests.join(LayerId::tar(descriptor.diff_id), || async move {
            let span = info_span!("stream", layer = %descriptor.diff_id, image = blobs.name());
            ingest::run(&inner, &descriptor, &blobs, &progress).instrument(span).await
        });
        flight.wait("streaming a layer").await
    }

    /// Streams a layer anew, whether it is here or not, with spans that follow the runs `touched` of its layer file
    /// (ascending, apart), and puts it in the place of the one that is here. Handles of that one keep working.
    ///
    /// # Errors
    /// As [`Fetcher::ingest`]; what was here is still here then.
    pub async fn ingest_along(
        &self,
        descriptor: &LayerDescriptor,
        blobs: BlobSource,
        touched: Vec<Range<u64>>,
        progress: Arc<dyn Progress>,
    ) -> Result<Arc<Layer>, FetchError> {
        self.add_source(descriptor.diff_id, descriptor.clone(), blobs.clone());
        ingest::again(&self.inner, descriptor, &blobs, &progress, touched).await
    }

    /// Reads bytes of a layer file: what is local at once, otherwise the missing spans are fetched, verified and
    /// stored first. Shorter than `len` only at the end of the layer file. While the registry does not answer, the read
    /// waits for it as long as the fault timeout allows.
    ///
    /// # Errors
    /// When the bytes cannot be had within the fault timeout, or never.
    pub async fn read(&self, layer: &Arc<Layer>, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let left = layer.index().layer_size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        if let Some(bytes) = fault::read_local(layer, offset, len).await? {
            return Ok(bytes);
        }
        let began = Instant::now();
        let _first = self.inner.scheduler.fault();
        let span = debug_span!("fault", layer = %layer.id(), image = self.inner.image_of(layer), offset, len);
        let result = fault::read(&self.inner, layer, offset, len).instrument(span).await;
        let (waited, ok) = (began.elapsed(), result.is_ok());
        self.inner.counters.fault_done(waited, ok);
        let fault = FaultSeen { layer: layer.id(), offset, len: len as u64, began, waited, ok };
        self.inner.options.watch.fault(&fault);
        result
    }

    /// Fetches what is missing of ranges of spans ahead of whoever will want them, in this order and with few requests:
    /// before hydration, after faults, and without reading further ahead. Spans that only a stream can bring are left
    /// out.
    ///
    /// # Errors
    /// When something cannot be had after retries; what came stays.
    pub async fn prefetch(&self, layer: &Arc<Layer>, spans: &[Range<usize>]) -> Result<(), FetchError> {
        prefetch::run(&self.inner, layer, spans).await
    }

    /// Waits until no read had to wait for its bytes for as long as `quiet`, counted from now, but at most as long as
    /// `most`: a program that starts has what it needs then.
    pub async fn settled(&self, quiet: Duration, most: Duration) {
        self.inner.scheduler.settled(quiet, most).await;
    }

    /// Compressed bytes that the link to the registries carries during one round trip, as far as the traffic so far
    /// tells.
    pub fn in_flight(&self) -> Option<u64> {
        self.inner.scheduler.link.in_flight()
    }

    /// Fetches everything of a layer that is not local, at lower priority than faults, or joins the hydration
    /// under way. An adopted index is proven by that: the whole blob is read once, and a lie in the index is the
    /// error [`FetchError::Lie`], after which the layer is of no use any more. Can be dropped at any time; what came stays. Once it returns, the layer is hydrated, and soon
    /// after so durably that a power cut costs nothing.
    ///
    /// # Errors
    /// When something cannot be had after retries; what came stays.
    pub async fn hydrate(&self, layer: &Arc<Layer>, progress: Arc<dyn Progress>) -> Result<(), FetchError> {
        self.hydrate_as(layer, Haste::Unlimited, progress).await
    }

    /// As [`Fetcher::hydrate`], with another urgency. In the background the limit holds, and a stream waits as long as
    /// it takes for a registry that does not answer.
    ///
    /// # Errors
    /// As [`Fetcher::hydrate`].
    pub async fn hydrate_as(
        &self,
        layer: &Arc<Layer>,
        haste: Haste,
        progress: Arc<dyn Progress>,
    ) -> Result<(), FetchError> {
        let id = layer.id();
        let _haste = self.inner.hastes.enter(id, haste);
        let (inner, layer) = (Arc::clone(&self.inner), Arc::clone(layer));
        let flight = self.inner.hydrations.join(id, || async move {
            let span = info_span!("hydrate", layer = %layer.id(), image = inner.image_of(&layer));
            hydrate::run(&inner, &layer, &progress).instrument(span).await
        });
        flight.wait("hydrating a layer").await
    }

    /// The limit of hydration in bytes per second, over all layers.
    pub fn background_limit(&self) -> Option<u64> {
        self.inner.throttle.rate()
    }

    /// Limits hydration from now on. Faults and prefetch are never limited.
    pub fn limit_background(&self, bytes_per_second: Option<u64>) {
        self.inner.throttle.set(bytes_per_second);
    }

    /// Waits until background work that is no hydration may read on: faults go first, and the limit of hydration holds
    /// for both together. `bytes` have come since the last call.
    pub async fn background_turn(&self, bytes: u64) {
        self.inner.throttle.charge(bytes);
        self.inner.throttle.ready().await;
        self.inner.scheduler.quiet().await;
    }

    /// Ends what is under way for a whole layer: hydration and streams, also those that faults have started. Who waits
    /// for one gets an error. Says whether there was something; what it was just writing may yet be written.
    pub fn cancel(&self, id: LayerId) -> bool {
        let hydrates = self.inner.hydrations.cancel(&id);
        self.inner.streams.cancel(&id) || hydrates
    }

    /// Compares a layer's index with the blob, entry by entry, by one stream that stores nothing.
    ///
    /// # Errors
    /// When the blob cannot be had, or the index says something else than the blob. An adopted index that does is
    /// never used again.
    pub async fn verify(&self, layer: &Arc<Layer>, progress: Arc<dyn Progress>) -> Result<(), FetchError> {
        let _haste = self.inner.hastes.enter(layer.id(), Haste::Unlimited);
        verify::run(&self.inner, layer, &progress).await
    }
}

impl Inner {
    /// Where the blob that the layer's index describes can be had; the same tar compressed differently does not
    /// help, spans are places in one blob.
    fn sources(&self, layer: &Layer) -> Result<Vec<BlobSource>, FetchError> {
        let blob = layer.index().blob_digest();
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let found: Vec<BlobSource> = sources
            .get(&layer.diff_id())
            .into_iter()
            .flatten()
            .filter(|s| s.descriptor.digest == blob)
            .map(|s| s.blobs.clone())
            .collect();
        if found.is_empty() { Err(FetchError::NoSource { diff_id: layer.diff_id() }) } else { Ok(found) }
    }

    /// Registry and repository that a layer comes from, as far as known: for the log.
    fn image_of(&self, layer: &Layer) -> Option<String> {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.get(&layer.diff_id())?.first().map(|source| source.blobs.name())
    }

    fn state(&self, id: LayerId) -> Arc<LayerState> {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(states.entry(id).or_default())
    }

    fn forget_state(&self, id: LayerId) {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Writes a complete layer out and marks it so durably, without anybody waiting for it.
    fn sync_later(self: &Arc<Self>, layer: &Arc<Layer>) {
        let (inner, layer) = (Arc::clone(self), Arc::clone(layer));
        tokio::spawn(async move {
            let _turn = inner.sync_turn.lock().await;
            let id = layer.id();
            match tokio::task::spawn_blocking(move || layer.sync()).await {
                Ok(Ok(())) => tracing::debug!(layer = %id, "layer is whole and durable"),
                Ok(Err(error)) => tracing::warn!(layer = %id, %error, "layer could not be written out"),
                Err(error) => tracing::warn!(layer = %id, %error, "writing a layer out was interrupted"),
            }
        });
    }
}

/// Runs blocking work off the async threads.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    let span = tracing::Span::current();
    let work = move || span.in_scope(work);
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(FetchError::Interrupted { what }))
}
