//! What bytes of layers are: files and spans.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use lazyrun_fetcher::Layer;

use crate::daemon::profile::Sources;

/// Files by where their bytes lie in the layer files.
pub(super) struct Files<'a> {
    layers: &'a [Arc<Layer>],
    sources: HashMap<usize, Sources<'a>>,
}

impl<'a> Files<'a> {
    pub(super) fn of(layers: &'a [Arc<Layer>]) -> Self {
        Self { layers, sources: HashMap::new() }
    }

    /// The first file that has any of these bytes (`-` when none has), and how many others have.
    pub(super) fn at(&mut self, layer: usize, bytes: Range<u64>) -> (String, usize) {
        let nobody = || ("-".to_owned(), 0);
        let Some(file) = self.layers.get(layer) else { return nobody() };
        let source = self.sources.entry(layer).or_insert_with(|| Sources::of(file));
        let mut paths: Vec<&[u8]> = source.files_at(bytes).collect();
        // A file with holes has several extents.
        paths.dedup();
        match paths.split_first() {
            Some((first, others)) => (String::from_utf8_lossy(first).into_owned(), others.len()),
            None => nobody(),
        }
    }
}

/// Spans by where they lie in the blobs.
pub(super) struct Spans {
    /// For each layer, ascending: first byte of the blob, byte after the last, number of the span.
    by_blob: Vec<Vec<(u64, u64, usize)>>,
}

impl Spans {
    pub(super) fn of(layers: &[Arc<Layer>]) -> Self {
        let of_layer = |layer: &Arc<Layer>| {
            let spans = layer.index().spans().map(|span| {
                (span.blob_offset, span.blob_offset.saturating_add(span.blob_len), span.index as usize)
            });
            let mut spans: Vec<_> = spans.collect();
            spans.sort_unstable();
            spans
        };
        Self { by_blob: layers.iter().map(of_layer).collect() }
    }

    /// The least span that lies wholly in these bytes of the blob, and one more than the greatest.
    pub(super) fn within(&self, layer: usize, bytes: Range<u64>) -> Option<(usize, usize)> {
        let spans = self.by_blob.get(layer)?;
        let first = spans.partition_point(|(start, ..)| *start < bytes.start);
        let inside = spans.iter().skip(first).take_while(|(start, ..)| *start < bytes.end);
        let numbers = inside.filter(|(_, end, _)| *end <= bytes.end).map(|(.., number)| *number);
        numbers.fold(None, |found, number| match found {
            None => Some((number, number + 1)),
            Some((least, end)) => Some((least.min(number), end.max(number + 1))),
        })
    }
}
