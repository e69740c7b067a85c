//! Many runs of spans by one request, in the order in which they are needed. An attempt: what does not come is left to
//! requests for one run each, which have patience with what can go wrong.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::arriving::{Arriving, Reader};
use super::claims::Run;
use super::polite::Polite;
use super::{Inner, spans};
use crate::client::BlobSource;
use crate::error::FetchError;
use crate::observe::Class;
use crate::store::Layer;

/// Whether it is worth trying for a layer.
pub(super) fn are_possible(inner: &Inner, layer: &Layer) -> bool {
    inner.sources(layer).is_ok_and(|sources| sources.first().is_some_and(BlobSource::may_do_parts))
}

/// Fetches runs that were claimed together.
///
/// # Errors
/// When some of it has not come; that is free again then.
pub(super) async fn fetch(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    runs: Vec<Run>,
    slot: OwnedSemaphorePermit,
) -> Result<(), FetchError> {
    let result = read(inner, layer, runs).await;
    drop(slot);
    spans::settle(layer, &result).await;
    if layer.is_whole() {
        inner.sync_later(layer);
    }
    result
}

async fn read(inner: &Arc<Inner>, layer: &Arc<Layer>, runs: Vec<Run>) -> Result<(), FetchError> {
    let source = inner.sources(layer)?.swap_remove(0);
    let Some(progress) = runs.first().map(|run| Arc::clone(&run.progress)) else { return Ok(()) };
    let ranges: Vec<Range<u64>> =
        runs.iter().map(|run| spans::blob_range(layer, run.ranks.clone())).collect();
    inner.counters.background_requests.fetch_add(1, Relaxed);
    let digest = layer.index().blob_digest();
    let Some(reader) = source.parts(digest, &ranges).await? else {
        return Err(FetchError::RangeIgnored { host: source.name(), digest });
    };
    inner.scheduler.link.answered(reader.first_byte());
    let witness = reader.witness().clone();
    let arriving = Arriving::new(inner, Class::Prefetch, &progress, Reader::Parts(reader));
    // Spans are decoded on all cores while others arrive.
    let mut decoding = JoinSet::new();
    let received = receive(inner, layer, runs, arriving, &mut decoding).await;
    // Whatever went wrong: as long as a decode goes on, its run's claims are not free for whoever comes next.
    let mut decoded = Ok(());
    while let Some(done) = decoding.join_next().await {
        decoded = decoded.and(spans::decoded(done));
    }
    let result = received.and(decoded);
    if matches!(result, Err(FetchError::Corrupt { .. })) {
        witness.disown();
    }
    result
}

/// Takes in what comes and has it decoded.
async fn receive(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    runs: Vec<Run>,
    mut arriving: Arriving<'_>,
    decoding: &mut JoinSet<Result<(), FetchError>>,
) -> Result<(), FetchError> {
    for run in runs.into_iter().map(Arc::new) {
        for rank in run.ranks.clone() {
            let span = layer.span_at(rank);
            let next = if rank + 1 < run.ranks.end { layer.span_at(rank + 1).blob_offset } else { u64::MAX };
            let room = inner.memory.span(&span).await?;
            let compressed = arriving.span(&span, next).await?;
            while let Some(done) = decoding.try_join_next() {
                spans::decoded(done)?;
            }
            if layer.has_span(span.index as usize) || !run.owns(rank) {
                continue;
            }
            let permit = inner.scheduler.decode().await?;
            let (inner, layer, run) = (Arc::clone(inner), Arc::clone(layer), Arc::clone(&run));
            decoding.spawn_blocking(move || {
                let _polite = Polite::for_class(run.class);
                let result = spans::store(&inner, &layer, &run, rank, &span, &compressed);
                drop((permit, compressed, room));
                result
            });
        }
    }
    Ok(())
}
