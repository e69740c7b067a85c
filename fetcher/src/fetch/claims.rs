//! Which spans of a layer are being fetched, by whom, and what failed: single flight per span.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::scheduler::Class;
use super::window::Window;
use crate::error::FetchError;
use crate::store::Layer;

/// A fault waits for a background request that will reach the span within so many bytes; for one that is
/// further away it sends its own request and that span is then fetched twice.
const WORTH_WAITING: u64 = 1 << 20;

/// The fetches of one layer.
#[derive(Default)]
pub(super) struct LayerState {
    state: Mutex<State>,
    /// Told whenever a span came, a run ended or something failed.
    pub(super) changed: Notify,
}

#[derive(Default)]
struct State {
    claims: HashMap<usize, Claim>,
    next_run: u64,
    window: Window,
    /// Counts failures; a reader only minds those that came after it did.
    generation: u64,
    failed: HashMap<usize, (u64, FetchError)>,
    stream_failed: Option<(u64, FetchError)>,
    /// The server does not do ranges: only streams help.
    no_ranges: bool,
}

struct Claim {
    run: u64,
    class: Class,
    /// Byte of the blob up to which the request has come.
    position: Arc<AtomicU64>,
}

/// Neighbouring spans claimed for one request. Dropping it gives back what has not come.
pub(super) struct Run {
    state: Arc<LayerState>,
    id: u64,
    pub(super) spans: Range<usize>,
    pub(super) class: Class,
    pub(super) position: Arc<AtomicU64>,
}

/// What a fault has to start.
pub(super) struct Plan {
    pub(super) runs: Vec<Run>,
    /// Some missing span can only come by streaming.
    pub(super) stream: bool,
}

/// Bounds for reading ahead of a fault, in compressed bytes.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub(super) free: u64,
    pub(super) max: u64,
}

impl LayerState {
    pub(super) fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Whether ranges were found not to work for this layer's blob.
    pub(super) fn no_ranges(&self) -> bool {
        self.lock().no_ranges
    }

    pub(super) fn give_up_ranges(&self) {
        self.lock().no_ranges = true;
    }

    pub(super) fn fail_stream(&self, error: FetchError) {
        let mut state = self.lock();
        state.generation += 1;
        state.stream_failed = Some((state.generation, error));
        drop(state);
        self.changed.notify_waiters();
    }

    /// Claims what a reader of the spans `need` misses and nobody fetches, and something ahead.
    ///
    /// # Errors
    /// When fetching one of them failed after the reader came (`since`).
    pub(super) fn plan_fault(
        self: &Arc<Self>,
        layer: &Layer,
        need: Range<usize>,
        since: u64,
        ahead: Ahead,
    ) -> Result<Plan, FetchError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut plan = Plan { runs: Vec::new(), stream: false };
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut wanted = 0;
        for span in need.filter(|&i| layer.lacks_span(i)) {
            let info = layer.index().span(span);
            if state.no_ranges || !info.restartable {
                if let Some((at, error)) = &state.stream_failed
                    && *at > since
                {
                    return Err(error.clone());
                }
                plan.stream = true;
                continue;
            }
            if let Some((at, error)) = state.failed.get(&span)
                && *at > since
            {
                return Err(error.clone());
            }
            if state.claims.get(&span).is_some_and(|claim| !claim.yields(info.blob_offset)) {
                continue;
            }
            wanted += info.blob_len;
            match ranges.last_mut() {
                Some(last) if last.end == span => last.end += 1,
                _ => ranges.push(span..span + 1),
            }
        }
        if let Some(last) = ranges.last_mut() {
            let blob = layer.index().blob_size();
            let bytes = state.window.ahead(Instant::now(), last.start, wanted, blob, ahead.free, ahead.max);
            last.end = state.extend(layer, last.end, bytes);
            state.window.ended(last.end);
        }
        plan.runs = ranges.into_iter().map(|spans| state.claim(self, spans, Class::Fault)).collect();
        Ok(plan)
    }

    /// Claims the first missing run, of about `bytes`, that starts in `range` and that nobody fetches.
    pub(super) fn plan_background(
        self: &Arc<Self>,
        layer: &Layer,
        mut range: Range<usize>,
        bytes: u64,
    ) -> Option<Run> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.no_ranges {
            return None;
        }
        let first = range.find(|&i| state.is_free(layer, i))?;
        let first_len = layer.index().span(first).blob_len;
        let end = state.extend(layer, first + 1, bytes.saturating_sub(first_len));
        Some(state.claim(self, first..end, Class::Background))
    }

    /// Claims the first run of missing spans in `range` that nobody fetches.
    pub(super) fn plan_prefetch(self: &Arc<Self>, layer: &Layer, mut range: Range<usize>) -> Option<Run> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.no_ranges {
            return None;
        }
        let first = range.find(|&i| state.is_free(layer, i))?;
        let len = (first..range.end).take_while(|&i| state.is_free(layer, i)).count();
        Some(state.claim(self, first..first + len, Class::Background))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a span is missing, can be fetched by range and nobody does.
    fn is_free(&self, layer: &Layer, span: usize) -> bool {
        layer.lacks_span(span) && !self.claims.contains_key(&span) && layer.index().span(span).restartable
    }

    /// The end of the run of free spans from `span` on, of at most `bytes`.
    fn extend(&self, layer: &Layer, mut span: usize, mut bytes: u64) -> usize {
        let count = layer.index().span_count();
        while span < count && self.is_free(layer, span) {
            let len = layer.index().span(span).blob_len;
            if len > bytes {
                break;
            }
            bytes -= len;
            span += 1;
        }
        span
    }

    fn claim(&mut self, owner: &Arc<LayerState>, spans: Range<usize>, class: Class) -> Run {
        self.next_run += 1;
        let (id, position) = (self.next_run, Arc::new(AtomicU64::new(0)));
        for span in spans.clone() {
            self.claims.insert(span, Claim { run: id, class, position: Arc::clone(&position) });
        }
        Run { state: Arc::clone(owner), id, spans, class, position }
    }
}

impl Claim {
    /// Whether a fault for the span at `blob_offset` should not wait for this claim.
    fn yields(&self, blob_offset: u64) -> bool {
        self.class == Class::Background
            && blob_offset > self.position.load(Relaxed).saturating_add(WORTH_WAITING)
    }
}

impl Run {
    /// Whether the span is still this run's to deliver; a fault may have taken it over.
    pub(super) fn owns(&self, span: usize) -> bool {
        self.state.lock().claims.get(&span).is_some_and(|c| c.run == self.id)
    }

    /// The span is stored.
    pub(super) fn done(&self, span: usize) {
        let mut state = self.state.lock();
        state.failed.remove(&span);
        if state.claims.get(&span).is_some_and(|c| c.run == self.id) {
            state.claims.remove(&span);
        }
        drop(state);
        self.state.changed.notify_waiters();
    }

    /// What is left of the run will not come; its readers get the error.
    pub(super) fn fail(&self, error: &FetchError) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.generation += 1;
        for span in self.spans.clone() {
            if state.claims.get(&span).is_some_and(|c| c.run == self.id) {
                state.failed.insert(span, (state.generation, error.clone()));
            }
        }
    }

    pub(super) fn layer_state(&self) -> &Arc<LayerState> {
        &self.state
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        let id = self.id;
        for span in self.spans.clone() {
            if state.claims.get(&span).is_some_and(|c| c.run == id) {
                state.claims.remove(&span);
            }
        }
        drop(state);
        self.state.changed.notify_waiters();
    }
}
