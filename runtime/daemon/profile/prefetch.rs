//! Fetching what a profile foresees: in few large requests, what is needed first first.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use lazyrun_fetcher::{Fetcher, Layer};

use super::Profile;

/// Least compressed bytes of the first wave. What is needed at once comes in small requests, what is needed later in
/// large ones: each wave is twice as long as the one before.
const FIRST_WAVE: u64 = 1 << 20;
/// Compressed bytes of the longest wave.
const LONGEST_WAVE: u64 = 16 << 20;
/// Spans that nobody foresees are fetched along if they cost no more than this many compressed bytes in a row, or than a
/// part of what the link carries during a round trip: about what a request costs.
const GAP: u64 = 128 << 10;
/// That part.
const GAP_SHARE: u64 = 8;
/// Requests that wait for their turn at the fetcher, beside those it does.
const PIPELINE: usize = 8;

/// Fetches what a profile foresees, in its order.
pub async fn prefetch(fetcher: &Fetcher, layers: &[Arc<Layer>], profile: &Profile) {
    let in_flight = fetcher.in_flight().unwrap_or(0);
    let bounds = Bounds { first_wave: FIRST_WAVE.max(in_flight), gap: GAP.max(in_flight / GAP_SHARE) };
    let fetches = waves(layers, profile, &bounds).into_iter().flatten().filter_map(|(layer, spans)| {
        let (fetcher, layer) = (fetcher.clone(), Arc::clone(layers.get(usize::from(layer))?));
        Some(async move {
            if let Err(error) = fetcher.prefetch(&layer, spans).await {
                tracing::debug!(layer = %layer.diff_id(), %error, "foreseen spans can't be prefetched");
            }
        })
    });
    stream::iter(fetches).buffered(PIPELINE).for_each(|()| std::future::ready(())).await;
}

/// Compressed bytes that make sense on a link.
struct Bounds {
    first_wave: u64,
    gap: u64,
}

/// Spans of a layer that one request gets.
type Run = (u16, Range<usize>);

/// The spans that are missing, in waves of ascending length, neighbours within a wave together.
fn waves(layers: &[Arc<Layer>], profile: &Profile, bounds: &Bounds) -> Vec<Vec<Run>> {
    let mut seen = HashSet::new();
    let (mut waves, mut wave) = (Vec::new(), Vec::new());
    let (mut limit, mut len) = (bounds.first_wave, 0);
    for touch in profile.touches() {
        let Some(layer) = layers.get(usize::from(touch.layer)) else { continue };
        let bytes = touch.bytes();
        for span in layer.index().spans_covering(bytes.start, bytes.end - bytes.start) {
            if !layer.lacks_span(span) || !seen.insert((touch.layer, span)) {
                continue;
            }
            wave.push((touch.layer, span));
            len += layer.index().span(span).blob_len;
            if len >= limit {
                waves.push(together(layers, &std::mem::take(&mut wave), bounds.gap));
                (limit, len) = ((limit * 2).min(LONGEST_WAVE), 0);
            }
        }
    }
    waves.push(together(layers, &wave, bounds.gap));
    waves
}

/// Puts spans that lie near each other in the blob together, in the order of the first of each run.
fn together(layers: &[Arc<Layer>], spans: &[(u16, usize)], gap: u64) -> Vec<Run> {
    let place = |i: usize| spans.get(i).copied();
    let mut order: Vec<usize> = (0..spans.len()).collect();
    order.sort_unstable_by_key(|&i| place(i));
    // The first in need of each run, and the run.
    let mut runs: Vec<(usize, Run)> = Vec::new();
    for i in order {
        let Some((number, span)) = place(i) else { continue };
        let near = |run: &Run| {
            let between = layers
                .get(usize::from(number))
                .map_or(u64::MAX, |layer| (run.1.end..span).map(|i| layer.index().span(i).blob_len).sum());
            run.0 == number && between <= gap
        };
        match runs.last_mut() {
            Some((first, run)) if near(run) => {
                run.1.end = span + 1;
                *first = (*first).min(i);
            }
            _ => runs.push((i, (number, span..span + 1))),
        }
    }
    runs.sort_unstable_by_key(|(first, _)| *first);
    runs.into_iter().map(|(_, run)| run).collect()
}
