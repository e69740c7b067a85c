//! Faults: reads that cannot be answered from the local layer file.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::Bytes;

use super::claims::{Ahead, PATIENCE};
use super::{Inner, blocking, hydrate, spans, twins};
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

/// First wait before a registry that did not answer is asked again; doubles each time, with jitter.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Longest such wait: a registry that is back shall be noticed soon.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Fetches what is missing, or waits for those who already do, then reads; at most as long as a fault may take, from
/// now on, whoever else waits since when.
pub(super) async fn read(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    offset: u64,
    len: usize,
) -> Result<Bytes, FetchError> {
    let limit = inner.options.fault_timeout;
    let wanted = offset..offset.saturating_add(len as u64);
    let timeout = |cause: Option<FetchError>| FetchError::FaultTimeout {
        diff_id: layer.diff_id(),
        offset: wanted.start,
        end: wanted.end,
        after: limit,
        cause: cause.map(|error| format!(": {error}")).unwrap_or_default(),
    };
    if inner.overdue.refuses(layer.id(), &wanted, Instant::now()) {
        return Err(timeout(None));
    }
    let mut cause = None;
    let work = patiently(inner, layer, offset, len, limit, &mut cause);
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => {
            inner.overdue.note(layer.id(), wanted.clone(), Instant::now());
            Err(timeout(cause))
        }
    }
}

/// As `read`, without its bound. A registry that does not answer is asked again and again; `cause` is why.
async fn patiently(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    offset: u64,
    len: usize,
    limit: Duration,
    cause: &mut Option<FetchError>,
) -> Result<Bytes, FetchError> {
    let state = inner.state(layer.id());
    let need = layer.index().spans_covering(offset, len as u64);
    let _wanted = layer.want(need.clone());
    if need.clone().any(|i| layer.lacks_span(i))
        && let Some(bytes) = twins::read(inner, layer, offset, len).await
    {
        return Ok(bytes);
    }
    let waits = ExponentialBuilder::default().with_min_delay(FIRST_WAIT).with_max_delay(LONGEST_WAIT);
    let mut waits = waits.without_max_times().with_jitter().build();
    let mut since = state.generation();
    let mut not_before: Option<Instant> = None;
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
        if let Some(at) = not_before.filter(|at| Instant::now() < *at) {
            // What others bring meanwhile is welcome.
            let _ = tokio::time::timeout_at(at.into(), changed).await;
            continue;
        }
        let ahead = Ahead { free: inner.scheduler.free_readahead(), max: inner.options.max_readahead };
        let plan = match state.plan_fault(layer, need.clone(), since, ahead) {
            Ok(plan) => plan,
            Err(error) if may_pass(&error, limit) => {
                since = state.generation();
                not_before = Some(Instant::now() + waits.next().unwrap_or(LONGEST_WAIT));
                *cause = Some(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        for run in plan.runs {
            inner.interest.note(layer, run.ranks.end);
            spans::start(inner, layer, run);
        }
        if plan.stream {
            hydrate::start_stream(inner, layer);
        }
        // Nobody tells when a request that others began hangs.
        let _ = tokio::time::timeout(PATIENCE, changed).await;
    }
}

/// Whether asking again within the bound makes sense.
fn may_pass(error: &FetchError, limit: Duration) -> bool {
    let asked = error.retry_after().unwrap_or_default();
    (error.is_transient() && asked <= limit) || matches!(error, FetchError::Interrupted { .. })
}
