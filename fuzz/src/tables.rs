//! Foreign tables of contents: eStargz and zstd:chunked.

use lazyrun_index::{
    Compression, Digest, LayerFacts, LayerIndex, Layout, StreamOptions, TocPlace, chunked, estargz,
    prove_layer,
};

use crate::{LAYER_MAX, common, deflate, pax};

/// Bytes of the made-up blobs in front of their tables.
const DATA: u64 = 1 << 32;

/// Footer and table of contents. The first byte tells what the rest is: `j`son, a `p`acked table, a `t`ail with the
/// blob's length in its first 8 bytes, or a whole `b`lob.
pub fn estargz(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind {
        b'j' => gzip_table(&deflate::stored(&pax::file("stargz.index.json", rest))),
        b'p' => gzip_table(rest),
        b't' => {
            let (size, tail) = rest.split_first_chunk().unwrap_or((&[0; 8], &[]));
            let size = u64::from_le_bytes(*size);
            let tail = &tail[tail.len() - tail.len().min(usize::try_from(size).unwrap_or(usize::MAX))..];
            if let Ok(Some(place)) = estargz::locate(tail, size, None) {
                assert!(place.range().is_none_or(|range| range.start < range.end && range.end <= size));
            }
        }
        b'b' => whole(rest, |tail, size| estargz::locate(tail, size, None)),
        _ => {}
    }
}

/// Annotations, footer and table. The first byte tells what the rest is: `j`son, a `p`acked table, the `a`nnotation with
/// the table's place, a `t`ail with the blob's length in its first 8 bytes, or a whole `b`lob.
pub fn chunked(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind {
        b'j' => {
            let packed = zstd::bulk::compress(rest, 1).expect("zstd takes anything");
            zstd_table(&packed, rest.len() as u64);
        }
        b'p' => {
            // Its first bytes say how long the table is.
            let (len, packed) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
            zstd_table(packed, u32::from_le_bytes(*len).into());
        }
        b'a' => {
            let text = String::from_utf8_lossy(rest);
            let place =
                |size| chunked::locate(|key| chunked::POSITION.contains(&key).then_some(&*text), size);
            for size in [DATA, u64::MAX] {
                if let Ok(Some(range)) = place(size).map(|place| place.and_then(|place| place.range())) {
                    assert!(range.start < range.end && range.end <= size);
                }
            }
        }
        b't' => {
            let (size, tail) = rest.split_first_chunk().unwrap_or((&[0; 8], &[]));
            let size = u64::from_le_bytes(*size);
            if let Ok(Some(place)) = chunked::locate_tail(tail, size, None) {
                assert!(place.range().is_none_or(|range| range.start < range.end && range.end <= size));
            }
        }
        b'b' => whole(rest, |tail, size| chunked::locate_tail(tail, size, None)),
        _ => {}
    }
}

fn gzip_table(packed: &[u8]) {
    let field = format!("SG\x16\0{DATA:016x}STARGZ");
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0];
    footer.extend_from_slice(field.as_bytes());
    footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let size = DATA + packed.len() as u64 + footer.len() as u64;
    // Nothing is between them if the table is empty.
    let Ok(place) = estargz::locate(&footer, size, None) else { return };
    table(&place.expect("a footer"), packed, size, Compression::Gzip);
}

fn zstd_table(packed: &[u8], json_len: u64) {
    let position = format!("{DATA}:{}:{json_len}:1", packed.len());
    let size = DATA + packed.len() as u64 + 100;
    let place = chunked::locate(|key| (key == chunked::POSITION[0]).then_some(&*position), size);
    let Ok(Some(place)) = place else { return };
    table(&place, packed, size, Compression::Zstd);
}

fn table(place: &TocPlace, packed: &[u8], blob_size: u64, compression: Compression) {
    let facts = LayerFacts {
        blob_digest: Digest::of(b"blob"),
        blob_size,
        diff_id: Digest::of(b"layer"),
        compression,
    };
    let Ok(table) = place.index(packed, &facts) else { return };
    let index = LayerIndex::from_bytes(table.index).expect("an index just made opens");
    check(&index, &facts);
    assert_eq!(
        (index.entry_count() as u64, index.span_count() as u64),
        (table.info.entries, table.info.spans)
    );
}

fn check(index: &LayerIndex, facts: &LayerFacts) {
    assert_eq!((index.layout(), index.diff_id()), (Layout::Table, facts.diff_id));
    assert_eq!((index.blob_digest(), index.blob_size()), (facts.blob_digest, facts.blob_size));
    common::hostile::visit(index);
    for entry in index.entries() {
        assert!(entry.extents().all(|extent| extent.layer_offset % 512 == extent.file_offset % 512));
    }
}

/// Makes an index of the table that a blob has and lets the blob prove it.
fn whole(blob: &[u8], locate: impl Fn(&[u8], u64) -> Result<Option<TocPlace>, lazyrun_index::TableError>) {
    let size = blob.len() as u64;
    let Ok(Some(place)) = locate(blob, size) else { return };
    let Some(range) = place.range() else { return };
    let packed = &blob[range.start as usize..range.end as usize];
    let indexed = common::index_blob_within(LAYER_MAX, blob, &StreamOptions::default()).ok();
    let facts = LayerFacts {
        blob_digest: Digest::of(blob),
        blob_size: size,
        diff_id: indexed.as_ref().map_or(Digest::of(b"layer"), |indexed| indexed.summary.diff_id),
        compression: Compression::detect(blob),
    };
    let Ok(table) = place.index(packed, &facts) else { return };
    let claimed = LayerIndex::from_bytes(table.index).expect("an index just made opens");
    check(&claimed, &facts);
    let Some(indexed) = indexed else { return };
    let mut out = std::io::Cursor::new(Vec::new());
    if prove_layer(&claimed, blob, &mut (), &mut out, &StreamOptions::default()).is_ok() {
        let proven = LayerIndex::from_bytes(out.into_inner()).expect("an index just written opens");
        assert_eq!(proven.diff_id(), indexed.summary.diff_id);
        assert_eq!(proven.entry_count(), indexed.index.entry_count());
    }
}
