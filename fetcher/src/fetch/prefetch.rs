//! Prefetch: spans that somebody foresees, between faults and hydration in order of service.

use std::ops::Range;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::claims::LayerState;
use super::{Inner, parts, spans, twins};
use crate::client::MAX_PARTS;
use crate::error::FetchError;
use crate::store::Layer;

/// Requests for many runs at once that may fail before it is done without.
const PARTS_TRIES: usize = 2;
/// Bytes of one request for many runs.
const MAX_BYTES: u64 = 32 << 20;
/// Where each run costs a request, spans that nobody foresees are fetched along if they cost no more than this many
/// compressed bytes in a row, or than a part of what the link carries during a round trip: about what a request costs.
const GAP: u64 = 128 << 10;
/// That part.
const GAP_SHARE: u64 = 8;

/// Fetches what is missing of ranges of spans, given in the order in which they are needed.
pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    wanted: &[Range<usize>],
) -> Result<(), FetchError> {
    let count = layer.index().span_count();
    let wanted: Vec<Range<usize>> = wanted.iter().map(|r| r.start.min(count)..r.end.min(count)).collect();
    for range in &wanted {
        layer.touch_spans(range.clone());
    }
    let (fillable, others) = twins::part(inner, layer, wanted).await;
    let filling = twins::fill(inner, layer, &fillable);
    let ((), asked) = tokio::join!(filling, ask(inner, layer, &others));
    asked?;
    // What could not be filled after all.
    ask(inner, layer, &fillable).await
}

/// Fetches what is missing of ranges of spans from the registry.
async fn ask(inner: &Arc<Inner>, layer: &Arc<Layer>, wanted: &[Range<usize>]) -> Result<(), FetchError> {
    let state = inner.state(layer.id());
    let wanted = ranks_of(layer, wanted);
    let mut tries = PARTS_TRIES;
    while tries > 0 && wanted.len() > 1 && parts::are_possible(inner, layer) {
        let slot = inner.scheduler.prefetch_request().await?;
        let mut runs = state.plan_prefetch(layer, &wanted, MAX_PARTS, MAX_BYTES);
        let result = match runs.len() {
            0 => return Ok(()),
            1 => spans::fetch(inner, layer, Arc::new(runs.swap_remove(0)), Some(slot)).await,
            _ => parts::fetch(inner, layer, runs, slot).await,
        };
        if let Err(error) = result {
            tracing::debug!(layer = %layer.id(), %error, "foreseen spans did not come at once");
            tries -= 1;
        }
    }
    one_by_one(inner, layer, &state, together(layer, wanted, gap(inner))).await
}

/// A request for each run, several at a time.
async fn one_by_one(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    state: &Arc<LayerState>,
    wanted: Vec<Range<usize>>,
) -> Result<(), FetchError> {
    // Dropping the set aborts what is in it, and the runs give their claims back.
    let mut requests: JoinSet<Result<(), FetchError>> = JoinSet::new();
    for range in wanted {
        loop {
            let slot = inner.scheduler.prefetch_request().await?;
            let claimed = state.plan_prefetch(layer, std::slice::from_ref(&range), 1, MAX_BYTES);
            let Some(run) = claimed.into_iter().next() else { break };
            let (inner, layer) = (Arc::clone(inner), Arc::clone(layer));
            requests.spawn(async move { spans::fetch(&inner, &layer, Arc::new(run), Some(slot)).await });
            while let Some(done) = requests.try_join_next() {
                outcome(done, state)?;
            }
        }
    }
    while let Some(done) = requests.join_next().await {
        outcome(done, state)?;
    }
    Ok(())
}

fn outcome(
    done: Result<Result<(), FetchError>, tokio::task::JoinError>,
    state: &LayerState,
) -> Result<(), FetchError> {
    match done.unwrap_or(Err(FetchError::Interrupted { what: "prefetching" })) {
        // Ranges turned out not to work here: what is left only comes by a stream.
        Err(_) if state.no_ranges() => Ok(()),
        result => result,
    }
}

/// The same spans by their place in the blob.
fn ranks_of(layer: &Layer, wanted: &[Range<usize>]) -> Vec<Range<usize>> {
    let count = layer.index().span_count();
    let mut ranks: Vec<Range<usize>> = Vec::new();
    for rank in wanted.iter().flat_map(|range| range.start..range.end.min(count)).map(|i| layer.rank_of(i)) {
        match ranks.last_mut() {
            Some(last) if last.end == rank => last.end += 1,
            _ => ranks.push(rank..rank + 1),
        }
    }
    ranks
}

fn gap(inner: &Inner) -> u64 {
    GAP.max(inner.scheduler.link.in_flight().unwrap_or(0) / GAP_SHARE)
}

/// Puts runs that lie near each other in the blob together, in the order of the first of each.
fn together(layer: &Layer, wanted: Vec<Range<usize>>, gap: u64) -> Vec<Range<usize>> {
    let mut places: Vec<(usize, Range<usize>)> = wanted.into_iter().enumerate().collect();
    places.sort_unstable_by_key(|(_, range)| range.start);
    let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
    for (need, range) in places {
        let near = |last: &Range<usize>| {
            (last.end..range.start).map(|rank| layer.span_at(rank).blob_len).sum::<u64>() <= gap
        };
        match runs.last_mut().filter(|(_, last)| near(last)) {
            Some((first, last)) => {
                last.end = last.end.max(range.end);
                *first = (*first).min(need);
            }
            None => runs.push((need, range)),
        }
    }
    runs.sort_unstable_by_key(|(first, _)| *first);
    runs.into_iter().map(|(_, range)| range).collect()
}
