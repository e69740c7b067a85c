//! Prefetch: spans that somebody foresees, between faults and hydration in order of service.

use std::ops::Range;
use std::sync::Arc;

use super::{Inner, spans};
use crate::error::FetchError;
use crate::store::Layer;

/// Fetches what is missing of a range of spans, each run of neighbours by one request.
pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    range: Range<usize>,
) -> Result<(), FetchError> {
    let state = inner.state(layer.id());
    let count = layer.index().span_count();
    let mut ranks: Vec<usize> = range.take_while(|&i| i < count).map(|i| layer.rank_of(i)).collect();
    ranks.sort_unstable();
    while !ranks.is_empty() {
        let slot = inner.scheduler.prefetch_request().await?;
        let Some(run) = state.plan_prefetch(layer, &ranks) else { break };
        ranks.retain(|&rank| rank >= run.ranks.end);
        match spans::fetch(inner, layer, Arc::new(run), Some(slot)).await {
            // Ranges turned out not to work here: what is left only comes by a stream.
            Err(_) if state.no_ranges() => break,
            result => result?,
        }
    }
    Ok(())
}
