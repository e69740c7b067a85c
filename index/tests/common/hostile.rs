//! What tests and fuzz targets do with foreign indexes.

use lazyrun_index::LayerIndex;

/// Length of an index's header.
const HEADER: usize = 152;

/// Makes magic, version and checksums right, so that the checks behind them are reached.
pub(crate) fn admit(index: &mut [u8]) {
    if index.len() >= HEADER {
        let version: u32 = if index[8] == 1 { 1 } else { 2 };
        index[..8].copy_from_slice(b"LZRINDEX");
        index[8..12].copy_from_slice(&version.to_le_bytes());
        seal(index);
    }
}

/// Makes all checksums right. Panics on what is shorter than a header.
pub(crate) fn seal(index: &mut [u8]) {
    let mut body_len = [0; 8];
    body_len.copy_from_slice(&index[112..120]);
    let end = usize::try_from(u64::from_le_bytes(body_len)).ok().and_then(|len| len.checked_add(HEADER));
    if let Some(end) = end.filter(|end| *end <= index.len()) {
        let (body, directory) = (crc32c::crc32c(&index[HEADER..end]), crc32c::crc32c(&index[end..]));
        index[120..124].copy_from_slice(&body.to_le_bytes());
        index[124..128].copy_from_slice(&directory.to_le_bytes());
    }
    let header = crc32c::crc32c(&index[..148]);
    index[148..152].copy_from_slice(&header.to_le_bytes());
}

/// Calls every accessor and checks what an opened index promises.
pub(crate) fn visit(index: &LayerIndex) {
    for entry in index.entries() {
        let sum = entry.path().len()
            + entry.link().len()
            + entry.xattrs().map(|(n, v)| n.len() + v.len()).sum::<usize>();
        let mut at = 0;
        for extent in entry.extents() {
            assert!(extent.len > 0 && extent.file_offset >= at, "extents ascend");
            at = extent.file_offset + extent.len;
            assert!(at <= entry.size(), "an extent lies in its file");
            assert!(extent.layer_offset + extent.len <= index.layer_size(), "and in the layer file");
        }
        std::hint::black_box((sum, entry.kind(), entry.mode(), entry.mtime(), entry.rdev(), entry.content()));
    }
    let mut at = 0;
    for span in index.spans() {
        assert!(span.offset == at && span.len > 0, "spans follow each other without gaps");
        at += span.len;
        assert!(span.blob_offset + span.blob_len <= index.blob_size(), "a span lies in the blob");
        assert_eq!(index.spans_covering(span.offset, span.len).start, span.index as usize);
        // The right length, so that decoders get to see the wrong bytes.
        if span.blob_len < 1 << 20 && span.len < 1 << 22 {
            let zeros = vec![0x5a; span.blob_len as usize];
            let _ = index.decode_span(span.index as usize, &zeros, &mut Vec::new());
        }
    }
    assert_eq!(at, index.layer_size(), "spans are the whole layer file");
}
