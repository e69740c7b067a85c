//! The first stream of a layer: one pass that fills the layer file, builds the index and proves both digests.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use lazyrun_index::{Digest, IndexError, LayerId, StreamSummary, index_layer_along};

use super::pump::{Failure, Pace, PumpReader, pump};
use super::sink::{FileSink, sink_error};
use super::{Inner, Progress, blocking};
use crate::client::{BlobReader, BlobSource};
use crate::error::FetchError;
use crate::manifest::LayerDescriptor;
use crate::observe::Class;
use crate::store::{Layer, Staging};

/// Tries when what comes is not what its digests say: bytes may break on the way.
const TRIES: usize = 2;

pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &LayerDescriptor,
    blobs: &BlobSource,
    progress: &Arc<dyn Progress>,
) -> Result<Arc<Layer>, FetchError> {
    let (store, diff_id) = (inner.store.clone(), layer.diff_id);
    if let Some(found) = blocking("opening a layer", move || store.get(diff_id)).await? {
        let local = found.is_hydrated() || (found.is_proven() && found.has_suspects());
        if local || inner.sources(&found).is_ok() {
            return Ok(found);
        }
        // The same tar was streamed from another blob, which nobody offers any more: its index leads nowhere.
        let store = inner.store.clone();
        let id = found.id();
        drop(found);
        blocking("removing a layer", move || store.remove(id)).await?;
    }
    with_retry(inner, layer, blobs, progress, &Arc::new(Plan::default())).await
}

/// Streams a layer that may be here already and puts what comes in its place.
pub(super) async fn again(
    inner: &Arc<Inner>,
    layer: &LayerDescriptor,
    blobs: &BlobSource,
    progress: &Arc<dyn Progress>,
    touched: Vec<Range<u64>>,
) -> Result<Arc<Layer>, FetchError> {
    let plan = Arc::new(Plan { touched, replace: true });
    let layer = with_retry(inner, layer, blobs, progress, &plan).await?;
    // What is under way is about the spans of the index that was here before.
    inner.forget_state(layer.id());
    Ok(layer)
}

/// How a layer is streamed.
#[derive(Default)]
struct Plan {
    /// Runs of the layer file that spans follow.
    touched: Vec<Range<u64>>,
    /// Whether it takes the place of one that is in the store.
    replace: bool,
}

async fn with_retry(
    inner: &Arc<Inner>,
    layer: &LayerDescriptor,
    blobs: &BlobSource,
    progress: &Arc<dyn Progress>,
    plan: &Arc<Plan>,
) -> Result<Arc<Layer>, FetchError> {
    let _slot = inner.scheduler.stream().await?;
    let mut tries = 1;
    loop {
        let blob = blobs.reader(layer.digest, 0..layer.size, Some(layer.size)).for_class(Class::Stream);
        let witness = blob.witness();
        match stream(inner, layer, blob, blobs.name(), progress, plan).await {
            // What a mirror has spoilt is no try of the registry.
            Err(error) if is_damage(&error) && witness.disown() => {
                tracing::warn!(%error, "layer is streamed again, from another host");
            }
            Err(error) if tries < TRIES && is_damage(&error) => {
                tracing::warn!(%error, source = blobs.name(), "layer is streamed again");
                tries += 1;
            }
            Err(error) => return Err(error),
            Ok(layer) => {
                inner.counters.streams.fetch_add(1, Relaxed);
                inner.sync_later(&layer);
                return Ok(layer);
            }
        }
    }
}

/// Whether another try may bring other bytes.
pub(super) fn is_damage(error: &FetchError) -> bool {
    match error {
        FetchError::WrongDigest { .. } | FetchError::WrongSize { .. } | FetchError::WrongDiffId { .. } => {
            true
        }
        FetchError::Layer { source, .. } => {
            !matches!(**source, IndexError::Entry { .. } | IndexError::TooLong { .. })
        }
        _ => false,
    }
}

async fn stream(
    inner: &Arc<Inner>,
    layer: &LayerDescriptor,
    blob: BlobReader,
    host: String,
    progress: &Arc<dyn Progress>,
    plan: &Arc<Plan>,
) -> Result<Arc<Layer>, FetchError> {
    let failure = Failure::default();
    let (feeder, reader) = pump(failure.clone());
    let job = Job {
        inner: Arc::clone(inner),
        layer: layer.clone(),
        host,
        failure,
        progress: Arc::clone(progress),
        plan: Arc::clone(plan),
    };
    let worker = blocking("streaming a layer", move || job.work(reader));
    let feed = feeder.run(blob, Pace::full(), |n| {
        inner.counters.stream_bytes.fetch_add(n, Relaxed);
        inner.scheduler.link.arrived(n, Instant::now());
    });
    let ((), result) = tokio::join!(feed, worker);
    result
}

/// The blocking side.
struct Job {
    inner: Arc<Inner>,
    layer: LayerDescriptor,
    host: String,
    failure: Failure,
    progress: Arc<dyn Progress>,
    plan: Arc<Plan>,
}

impl Job {
    /// On any error, and when the feeding task is dropped, the staging directory goes with this call.
    fn work(self, reader: PumpReader) -> Result<Arc<Layer>, FetchError> {
        let store = &self.inner.store;
        let staging = store.stage(LayerId::tar(self.layer.diff_id))?;
        let (summary, stored) = self.index(&staging, reader)?;
        self.check(&summary)?;
        let layer = match stored {
            None => store.publish(staging, summary.spans as usize, self.plan.replace)?,
            Some(stored) => store.publish_start(staging, stored, self.plan.replace)?,
        };
        store.room().settle();
        self.progress.advance(self.layer.diff_id, self.layer.size, self.layer.size);
        Ok(layer)
    }

    /// Also says how much of the layer is stored, if not all of it.
    fn index(
        &self,
        staging: &Staging,
        reader: PumpReader,
    ) -> Result<(StreamSummary, Option<u64>), FetchError> {
        let data_path = staging.data_path();
        let failed = |e| sink_error(self.layer.digest, &data_path, e);
        let data = staging.create(&data_path)?;
        let out = staging.create(&staging.index_path())?;
        let progress = |done| self.progress.advance(self.layer.diff_id, done, self.layer.size);
        let mut sink = FileSink::new(&data, self.inner.store.room(), &progress).may_end_early();
        let options = self.inner.options.stream_of(self.layer.size);
        let summary = index_layer_along(reader, &mut sink, out, &options, &self.plan.touched)
            .map_err(|error| layer_error(self.layer.digest, error, &self.failure, &data_path))?;
        sink.flush().map_err(failed)?;
        let stored = sink.ended_early().map_err(failed)?;
        data.set_len(summary.layer_size).map_err(failed)?;
        Ok((summary, stored))
    }

    fn check(&self, summary: &StreamSummary) -> Result<(), FetchError> {
        let layer = &self.layer;
        if summary.blob_size != layer.size {
            return Err(FetchError::WrongSize {
                digest: layer.digest,
                want: layer.size,
                got: summary.blob_size,
            });
        }
        if summary.blob_digest != layer.digest {
            return Err(FetchError::WrongDigest {
                host: self.host.clone(),
                what: "layer blob",
                want: layer.digest,
                got: summary.blob_digest,
            });
        }
        if summary.diff_id != layer.diff_id {
            return Err(FetchError::WrongDiffId {
                blob: layer.digest,
                want: layer.diff_id,
                got: summary.diff_id,
            });
        }
        Ok(())
    }
}

/// Finds the cause behind what the decoder says: the network, the disk or the layer itself.
pub(super) fn layer_error(digest: Digest, error: IndexError, network: &Failure, data: &Path) -> FetchError {
    match (network.take(), error) {
        (Some(cause), _) => cause,
        (None, IndexError::Sink { source, .. } | IndexError::IndexIo { source, .. }) => {
            sink_error(digest, data, source)
        }
        (None, error) => FetchError::Layer { digest, source: Arc::new(error) },
    }
}
