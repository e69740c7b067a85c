//! Faults: reads that cannot be answered from the local layer file.

use std::sync::Arc;

use bytes::Bytes;

use super::claims::Ahead;
use super::{Inner, blocking, hydrate, spans};
use crate::error::FetchError;
use crate::store::Layer;

/// Reads what is local; `None` when something is missing.
pub(super) async fn read_local(
    layer: &Arc<Layer>,
    offset: u64,
    len: usize,
) -> Result<Option<Bytes>, FetchError> {
    let layer = Arc::clone(layer);
    blocking("reading a layer file", move || {
        let mut buffer = vec![0; len];
        let read = layer.read_local(offset, &mut buffer).map_err(|e| {
            layer.lie().unwrap_or_else(|| FetchError::store("reading", &layer.data_path(), e))
        })?;
        Ok(read.map(|n| {
            buffer.truncate(n);
            Bytes::from(buffer)
        }))
    })
    .await
}

/// Fetches what is missing, or waits for those who already do, then reads.
pub(super) async fn read(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    offset: u64,
    len: usize,
) -> Result<Bytes, FetchError> {
    let state = inner.state(layer.id());
    let need = layer.index().spans_covering(offset, len as u64);
    let since = state.generation();
    let _wanted = layer.want(need.clone());
    loop {
        let changed = state.changed.notified();
        if let Some(lie) = layer.lie() {
            return Err(lie);
        }
        // Spans that only wait to be verified after a reboot are neither missing nor usable: reading verifies.
        if !need.clone().any(|i| layer.lacks_span(i))
            && let Some(bytes) = read_local(layer, offset, len).await?
        {
            return Ok(bytes);
        }
        let ahead = Ahead { free: inner.scheduler.free_readahead(), max: inner.options.max_readahead };
        let plan = state.plan_fault(layer, need.clone(), since, ahead)?;
        for run in plan.runs {
            inner.interest.note(layer, run.ranks.end);
            spans::start(inner, layer, run);
        }
        if plan.stream {
            hydrate::start_stream(inner, layer);
        }
        changed.await;
    }
}
