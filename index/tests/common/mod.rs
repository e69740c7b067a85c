//! What the integration tests and the fuzz targets share: indexing into memory, and the proof that an index is right.
#![allow(dead_code, reason = "each fuzz target uses its part")]

pub(crate) mod hostile;
pub(crate) mod listed;
pub(crate) mod make;
pub(crate) mod told;
pub(crate) mod ztoc;

use std::io::{self, Cursor};

use lazyrun_index::{
    Digest, IndexError, LayerIndex, LayerSink, SpanInfo, StreamOptions, StreamSummary, hydrate_layer,
    index_layer_along,
};

/// Keeps the layer file and the spans.
pub(crate) struct Keep {
    /// Bytes of the layer file after which the pass is broken off.
    pub(crate) limit: usize,
    pub(crate) data: Vec<u8>,
    pub(crate) spans: Vec<SpanInfo>,
    pub(crate) progress: u64,
}

impl Default for Keep {
    fn default() -> Self {
        Self { limit: usize::MAX, data: Vec::new(), spans: Vec::new(), progress: 0 }
    }
}

impl LayerSink for Keep {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(offset, self.data.len() as u64, "bytes come in order and without gaps");
        if bytes.len() > self.limit - self.data.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.data.extend_from_slice(bytes);
        Ok(())
    }

    fn span(&mut self, span: &SpanInfo) -> io::Result<()> {
        assert!(span.offset + span.len <= self.data.len() as u64, "a span is told after its bytes");
        assert_eq!(span.index as usize, self.spans.len());
        self.spans.push(*span);
        Ok(())
    }

    fn progress(&mut self, blob_bytes: u64) {
        assert!(blob_bytes >= self.progress);
        self.progress = blob_bytes;
    }
}

pub(crate) struct Indexed {
    pub(crate) index: LayerIndex,
    pub(crate) summary: StreamSummary,
    pub(crate) layer: Vec<u8>,
}

/// Indexes `blob` in memory.
pub(crate) fn index_blob(blob: &[u8], options: &StreamOptions) -> Result<Indexed, IndexError> {
    index_blob_within(usize::MAX, blob, options)
}

/// The same, broken off when the layer file is longer than `limit` bytes.
pub(crate) fn index_blob_within(
    limit: usize,
    blob: &[u8],
    options: &StreamOptions,
) -> Result<Indexed, IndexError> {
    index_blob_along(limit, blob, options, &[])
}

/// The same, with spans that follow runs of the layer file.
pub(crate) fn index_blob_along(
    limit: usize,
    blob: &[u8],
    options: &StreamOptions,
    touched: &[std::ops::Range<u64>],
) -> Result<Indexed, IndexError> {
    let mut keep = Keep { limit, ..Keep::default() };
    let mut out = Cursor::new(Vec::new());
    let summary = index_layer_along(blob, &mut keep, &mut out, options, touched)?;
    let index = LayerIndex::from_bytes(out.into_inner()).expect("an index just written opens");
    assert_eq!(index.spans().collect::<Vec<_>>(), keep.spans);
    assert_eq!(keep.progress, blob.len() as u64);
    Ok(Indexed { index, summary, layer: keep.data })
}

/// Small spans, so that small layers have many.
pub(crate) fn small_spans() -> StreamOptions {
    StreamOptions { span_size: 4096, span_len: 1 << 20, max_span_len: 2 << 20, ..StreamOptions::default() }
}

/// Checks digests, every span and hydration of an indexed blob.
pub(crate) fn prove(blob: &[u8], indexed: &Indexed) {
    let Indexed { index, summary, layer } = indexed;
    assert_eq!(summary.blob_digest, Digest::of(blob));
    assert_eq!(summary.blob_size, blob.len() as u64);
    assert_eq!(summary.diff_id, Digest::of(layer));
    assert_eq!(summary.layer_size, layer.len() as u64);
    assert_eq!(summary.index_size, index.index_size());
    assert_eq!((index.diff_id(), index.blob_digest()), (summary.diff_id, summary.blob_digest));
    assert_eq!((index.layer_size(), index.blob_size()), (summary.layer_size, summary.blob_size));
    assert_eq!(index.compression(), summary.compression);
    assert_eq!(index.entry_count() as u64, summary.entries);
    assert_eq!(index.span_count() as u32, summary.spans);
    let mut at = 0;
    let mut out = Vec::new();
    for (i, span) in index.spans().enumerate() {
        assert_eq!(span.offset, at);
        let want = &layer[at as usize..][..span.len as usize];
        let compressed = &blob[span.blob_offset as usize..][..span.blob_len as usize];
        if span.restartable {
            index.decode_span(i, compressed, &mut out).unwrap_or_else(|e| panic!("span {i}: {e}"));
            assert!(out == want, "span {i} differs");
        } else {
            let refused = index.decode_span(i, compressed, &mut out);
            assert!(matches!(refused, Err(IndexError::NotRestartable { .. })));
        }
        assert_eq!(span.digest, Digest::of(want));
        assert_eq!(index.spans_covering(at, 1), i..i + 1);
        assert_eq!(index.spans_covering(at + span.len - 1, 1), i..i + 1);
        at += span.len;
    }
    assert_eq!(at, index.layer_size());
    assert_eq!(index.spans_covering(0, u64::MAX), 0..index.span_count());
    assert_eq!(index.spans_covering(at, 1), 0..0);

    let mut keep = Keep::default();
    let again = hydrate_layer(index, blob, &mut keep).expect("the blob hydrates");
    assert!(keep.data == *layer);
    assert_eq!(keep.spans, index.spans().collect::<Vec<_>>());
    assert_eq!(again, *summary);

    for entry in index.entries() {
        let extents: Vec<_> = entry.extents().collect();
        if let Some(digest) = entry.content() {
            assert_eq!(digest, Digest::of(&content(layer, entry)), "{entry:?}");
        }
        assert!(extents.iter().all(|e| e.file_offset + e.len <= entry.size()));
    }
}

/// A file's bytes put together from its extents.
pub(crate) fn content(layer: &[u8], entry: lazyrun_index::EntryRef<'_>) -> Vec<u8> {
    let mut bytes = vec![0; entry.size() as usize];
    for e in entry.extents() {
        bytes[e.file_offset as usize..][..e.len as usize]
            .copy_from_slice(&layer[e.layer_offset as usize..][..e.len as usize]);
    }
    bytes
}
