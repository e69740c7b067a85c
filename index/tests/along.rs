//! Spans that follow what is read together.

use std::ops::Range;

use crate::common::make::{archive, gzip, gzip_flushed};
use crate::common::{Indexed, index_blob, index_blob_along, prove, small_spans};
use lazyrun_index::StreamOptions;
use proptest::prelude::*;

fn along(blob: &[u8], options: &StreamOptions, touched: &[Range<u64>]) -> Indexed {
    index_blob_along(usize::MAX, blob, options, touched).unwrap()
}

/// Bytes of the blob that have to be fetched for these runs of the layer file.
fn fetched(indexed: &Indexed, touched: &[Range<u64>]) -> u64 {
    let covering = |run: &Range<u64>| indexed.index.spans_covering(run.start, run.end - run.start);
    let spans: std::collections::BTreeSet<usize> = touched.iter().flat_map(covering).collect();
    spans.into_iter().map(|i| indexed.index.span(i).blob_len).sum()
}

/// A few runs of some KiB in a layer of some MiB.
fn scattered(layer: u64) -> Vec<Range<u64>> {
    (0..layer / (700 << 10)).map(|i| i * (700 << 10) + 300_123..i * (700 << 10) + 309_000).collect()
}

#[test]
fn less_is_fetched_for_what_is_read_together() {
    let tar = archive(200, 40_000, 7);
    let blob = gzip(&tar, 6, 0);
    let touched = scattered(tar.len() as u64);
    assert!(touched.len() > 4);
    let (plain, cut) = (
        index_blob(&blob, &StreamOptions::default()).unwrap(),
        along(&blob, &StreamOptions::default(), &touched),
    );
    prove(&blob, &cut);
    let (before, after) = (fetched(&plain, &touched), fetched(&cut, &touched));
    assert!(after * 2 < before, "{after} bytes instead of {before}");
    // For nothing else there is a span more.
    assert!(
        cut.summary.spans < plain.summary.spans + 5 * touched.len() as u32,
        "{} spans",
        cut.summary.spans
    );
}

#[test]
fn where_any_byte_is_a_border_spans_are_what_is_read() {
    let tar = archive(100, 40_000, 8);
    let touched = scattered(tar.len() as u64);
    let cut = along(&tar, &StreamOptions::default(), &touched);
    prove(&tar, &cut);
    assert_eq!(fetched(&cut, &touched), touched.iter().map(|run| run.end - run.start).sum::<u64>());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the runs, the index is right, also when they are not in the layer at all.
    #[test]
    fn any_runs_will_do(
        mut places in prop::collection::vec(0u64..900_000, 0..40),
        kind in 0..3,
    ) {
        places.sort_unstable();
        places.dedup();
        let touched: Vec<Range<u64>> = places.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let tar = archive(30, 20_000, 9);
        let blob = match kind {
            0 => gzip(&tar, 9, 0),
            1 => gzip_flushed(&tar, 5000, libz_rs_sys::Z_FULL_FLUSH),
            _ => tar.clone(),
        };
        let cut = along(&blob, &small_spans(), &touched);
        prop_assert!(cut.layer == tar);
        prove(&blob, &cut);
    }
}
