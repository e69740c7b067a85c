//! Which spans of a layer are being fetched, by whom, and what failed: single flight per span.
//!
//! Spans are counted here by their *rank*, their place in the blob's order (see `Layer::span_at`), because a request
//! is a run of the blob.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lazyrun_index::SpanInfo;
use tokio::sync::Notify;

use super::progress::Progress;
use super::window::Window;
use crate::error::FetchError;
use crate::observe::Class;
use crate::store::{Layer, Need};

/// A fault waits for a background request that will reach the span within so many bytes, or within what the link
/// carries in a round trip; for one that is further away it sends its own request and that span is then fetched twice.
const WORTH_WAITING: u64 = 1 << 20;
/// Spans that lie so near each other in the blob are fetched by one request, with what is in between: about what a
/// request costs.
const NEAR: u64 = 64 << 10;
/// A fault does not wait for a background request that has brought nothing for so long: its registry may hang, or it
/// waits for a turn that a fault need not wait for.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

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
    /// Ranges were found not to work: until then only streams help.
    no_ranges_until: Option<Instant>,
    /// A reader waits for what only the stream brings.
    stream_wanted: bool,
}

struct Claim {
    run: u64,
    class: Class,
    /// Bytes that the request brings before the span, and until its end.
    bytes: Range<u64>,
    progress: Arc<Progress>,
}

/// Spans of neighbouring ranks claimed for one request. Dropping it gives back what has not come.
pub(super) struct Run {
    state: Arc<LayerState>,
    id: u64,
    pub(super) ranks: Range<usize>,
    pub(super) class: Class,
    /// How far the request has come, with this run and those before it in the same request.
    pub(super) progress: Arc<Progress>,
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
        self.lock().no_ranges()
    }

    /// Ranges do not work: they are not tried again for so long. The registry, or what stands before it, may be put right.
    pub(super) fn give_up_ranges(&self, rest: Duration) {
        self.lock().no_ranges_until = Some(Instant::now() + rest);
    }

    /// Whether some reader waits for what only the stream of the layer brings.
    pub(super) fn stream_wanted(&self) -> bool {
        self.lock().stream_wanted
    }

    /// For whom a stream writes.
    pub(super) fn stream_need(&self) -> Need {
        if self.stream_wanted() { Need::Reader } else { Need::Ahead }
    }

    pub(super) fn fail_stream(&self, error: FetchError) {
        let mut state = self.lock();
        state.generation += 1;
        state.stream_failed = Some((state.generation, error));
        state.stream_wanted = false;
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
        let now = Instant::now();
        let mut wanted = Vec::new();
        for number in need.filter(|&i| layer.lacks_span(i)) {
            let span = layer.index().span(number);
            if state.no_ranges() || !layer.can_fault(&span) {
                if let Some((at, error)) = &state.stream_failed
                    && *at > since
                {
                    return Err(error.clone());
                }
                plan.stream = true;
                continue;
            }
            let rank = layer.rank_of(number);
            if let Some((at, error)) = state.failed.get(&rank)
                && *at > since
            {
                return Err(error.clone());
            }
            if state.claims.get(&rank).is_none_or(|claim| claim.yields(ahead.free, now)) {
                wanted.push(rank);
            }
        }
        state.stream_wanted |= plan.stream;
        let mut runs = together(layer, wanted);
        if let Some(last) = runs.last_mut() {
            let blob = layer.index().blob_size();
            let bytes = state.window.ahead(now, last.ranks.start, last.bytes, blob, ahead.free, ahead.max);
            last.ranks.end = state.extend(layer, last.ranks.clone(), bytes);
            state.window.ended(last.ranks.end);
        }
        plan.runs = runs.into_iter().map(|run| state.claim(self, layer, run.ranks, Class::Fault)).collect();
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
        if state.no_ranges() {
            return None;
        }
        let first = range.find(|&i| state.is_free(layer, i))?;
        let first_len = layer.span_at(first).blob_len;
        let end = state.extend(layer, first..first + 1, bytes.saturating_sub(first_len));
        Some(state.claim(self, layer, first..end, Class::Hydrate))
    }

    /// Claims missing spans among these ranks that nobody fetches, for one request: the first `max_runs` runs, in the
    /// order given and of neighbours each, until they are of `max_bytes`.
    pub(super) fn plan_prefetch(
        self: &Arc<Self>,
        layer: &Layer,
        wanted: &[Range<usize>],
        max_runs: usize,
        max_bytes: u64,
    ) -> Vec<Run> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.no_ranges() {
            return Vec::new();
        }
        let (mut runs, mut before) = (Vec::new(), 0);
        let progress = Arc::new(Progress::new());
        for range in wanted {
            let free = range.clone().filter(|&rank| state.is_free(layer, rank)).collect();
            for run in together(layer, free) {
                if runs.len() >= max_runs || (before >= max_bytes && !runs.is_empty()) {
                    return runs;
                }
                runs.push(state.claim_behind(self, layer, run.ranks, Class::Prefetch, before, &progress));
                before += run.bytes;
            }
        }
        runs
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn no_ranges(&self) -> bool {
        self.no_ranges_until.is_some_and(|until| Instant::now() < until)
    }

    /// Whether a span is missing, can be fetched by range and nobody does.
    fn is_free(&self, layer: &Layer, rank: usize) -> bool {
        let span = layer.span_at(rank);
        layer.lacks_span(span.index as usize) && !self.claims.contains_key(&rank) && layer.can_fault(&span)
    }

    /// The end of a run when free spans behind it join in that make it longer by at most `bytes` of the blob.
    fn extend(&self, layer: &Layer, run: Range<usize>, bytes: u64) -> usize {
        let (count, mut next) = (layer.index().span_count(), run.end);
        let mut end = run.map(|i| blob_end(&layer.span_at(i))).max().unwrap_or(0);
        let limit = end.saturating_add(bytes);
        while next < count && self.is_free(layer, next) {
            let span = layer.span_at(next);
            if !is_near(&span, end) || blob_end(&span) > limit {
                break;
            }
            end = end.max(blob_end(&span));
            next += 1;
        }
        next
    }

    fn claim(&mut self, owner: &Arc<LayerState>, layer: &Layer, ranks: Range<usize>, class: Class) -> Run {
        self.claim_behind(owner, layer, ranks, class, 0, &Arc::new(Progress::new()))
    }

    /// Claims a run that comes after `before` bytes of a request.
    fn claim_behind(
        &mut self,
        owner: &Arc<LayerState>,
        layer: &Layer,
        ranks: Range<usize>,
        class: Class,
        before: u64,
        progress: &Arc<Progress>,
    ) -> Run {
        self.next_run += 1;
        let id = self.next_run;
        let begin = layer.span_at(ranks.start).blob_offset;
        for rank in ranks.clone() {
            let span = layer.span_at(rank);
            let start = before.saturating_add(span.blob_offset.saturating_sub(begin));
            let bytes = start..start.saturating_add(span.blob_len);
            self.claims.insert(rank, Claim { run: id, class, bytes, progress: Arc::clone(progress) });
        }
        Run { state: Arc::clone(owner), id, ranks, class, progress: Arc::clone(progress) }
    }
}

/// A run in the making.
struct Wanted {
    ranks: Range<usize>,
    /// Bytes of the blob that it takes.
    bytes: u64,
}

/// Puts ranks that follow each other, and whose bytes are near each other, together.
fn together(layer: &Layer, mut ranks: Vec<usize>) -> Vec<Wanted> {
    ranks.sort_unstable();
    let mut runs: Vec<Wanted> = Vec::new();
    let mut end = 0;
    for rank in ranks {
        let span = layer.span_at(rank);
        match runs.last_mut() {
            Some(last) if last.ranks.end == rank && is_near(&span, end) => {
                last.ranks.end += 1;
                last.bytes += blob_end(&span).saturating_sub(end);
                end = end.max(blob_end(&span));
            }
            _ => {
                runs.push(Wanted { ranks: rank..rank + 1, bytes: span.blob_len });
                end = blob_end(&span);
            }
        }
    }
    runs
}

fn blob_end(span: &SpanInfo) -> u64 {
    span.blob_offset.saturating_add(span.blob_len)
}

/// Whether a span starts in front of, at, or little behind a byte of the blob.
fn is_near(span: &SpanInfo, end: u64) -> bool {
    span.blob_offset <= end.saturating_add(NEAR)
}

impl Claim {
    /// Whether a fault for the span should not wait for this claim, on a link that carries `in_flight` bytes in a
    /// round trip.
    fn yields(&self, in_flight: u64, now: Instant) -> bool {
        let came = self.progress.bytes();
        let far = self.bytes.start > came.saturating_add(WORTH_WAITING.max(in_flight));
        let stuck = self.bytes.end > came && self.progress.idle(now) > PATIENCE;
        self.class != Class::Fault && (far || stuck)
    }
}

impl Run {
    /// Whether the span is still this run's to deliver; a fault may have taken it over.
    pub(super) fn owns(&self, rank: usize) -> bool {
        self.state.lock().claims.get(&rank).is_some_and(|c| c.run == self.id)
    }

    /// The span is stored.
    pub(super) fn done(&self, rank: usize) {
        let mut state = self.state.lock();
        state.failed.remove(&rank);
        if state.claims.get(&rank).is_some_and(|c| c.run == self.id) {
            state.claims.remove(&rank);
        }
        drop(state);
        self.state.changed.notify_waiters();
    }

    /// What is left of the run will not come; its readers get the error.
    pub(super) fn fail(&self, error: &FetchError) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.generation += 1;
        for rank in self.ranks.clone() {
            if state.claims.get(&rank).is_some_and(|c| c.run == self.id) {
                state.failed.insert(rank, (state.generation, error.clone()));
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
        for rank in self.ranks.clone() {
            if state.claims.get(&rank).is_some_and(|c| c.run == id) {
                state.claims.remove(&rank);
            }
        }
        drop(state);
        self.state.changed.notify_waiters();
    }
}
