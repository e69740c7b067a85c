//! Fetching what a profile foresees: in few large requests, what is needed first first.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use lazyrun_fetcher::{Fetcher, Layer};

use super::Profile;

/// Least compressed bytes of the first wave. What is needed at once comes in small requests, what is needed later in
/// large ones: each wave is twice as long as the one before.
const FIRST_WAVE: u64 = 4 << 20;
/// Compressed bytes of the longest wave.
const LONGEST_WAVE: u64 = 16 << 20;
/// Waves under way at a time: while one arrives the next is asked for.
const PIPELINE: usize = 2;

/// Fetches what a profile foresees, in its order.
pub async fn prefetch(fetcher: &Fetcher, layers: &[Arc<Layer>], profile: &Profile) {
    let first = FIRST_WAVE.max(fetcher.in_flight().unwrap_or(0));
    let fetches = waves(layers, profile, first).into_iter().map(|wave| async move {
        let fetches = wave.into_iter().map(|(layer, spans)| async move {
            if let Err(error) = fetcher.prefetch(&layer, &spans).await {
                tracing::debug!(layer = %layer.diff_id(), %error, "foreseen spans can't be prefetched");
            }
        });
        futures_util::future::join_all(fetches).await;
    });
    stream::iter(fetches).buffered(PIPELINE).for_each(|()| std::future::ready(())).await;
}

/// Spans of layers, in the order in which they are needed.
type Wave = Vec<(Arc<Layer>, Vec<Range<usize>>)>;

/// The spans that are missing, in waves of ascending length.
fn waves(layers: &[Arc<Layer>], profile: &Profile, first: u64) -> Vec<Wave> {
    let mut seen = HashSet::new();
    let (mut waves, mut wave) = (Vec::new(), HashMap::new());
    let (mut limit, mut len) = (first, 0);
    for touch in profile.touches() {
        let Some(layer) = layers.get(usize::from(touch.layer)) else { continue };
        let bytes = touch.bytes();
        for span in layer.index().spans_covering(bytes.start, bytes.end - bytes.start) {
            if !layer.lacks_span(span) || !seen.insert((touch.layer, span)) {
                continue;
            }
            add(wave.entry(touch.layer).or_default(), span);
            len += layer.index().span(span).blob_len;
            if len >= limit {
                waves.push(std::mem::take(&mut wave));
                (limit, len) = ((limit * 2).min(LONGEST_WAVE), 0);
            }
        }
    }
    waves.push(wave);
    let named = |wave: HashMap<u16, Vec<Range<usize>>>| {
        wave.into_iter()
            .filter_map(|(layer, spans)| Some((Arc::clone(layers.get(usize::from(layer))?), spans)))
    };
    waves.into_iter().map(|wave| named(wave).collect()).collect()
}

/// Adds a span to runs, to one that it goes on from if there is one.
fn add(runs: &mut Vec<Range<usize>>, span: usize) {
    match runs.iter_mut().find(|run| run.end == span || run.start == span + 1) {
        Some(run) if run.end == span => run.end += 1,
        Some(run) => run.start = span,
        None => runs.push(span..span + 1),
    }
}
