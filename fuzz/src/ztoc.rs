//! SOCI's zTOC.

use lazyrun_index::soci::ztoc_to_index;
use lazyrun_index::{Compression, Digest, LayerFacts, LayerIndex, Layout, StreamOptions, prove_layer};

use crate::common::ztoc::Ztoc;
use crate::{EMPTY_TAR, LAYER_MAX, common};

/// A zTOC behind 8 bytes: the length of the blob that follows it, and if that is 0 the length of the blob it is of,
/// which is then not there.
pub fn soci(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<8>() else { return };
    let (here, there) = head.split_at(4);
    let number = |half: &[u8]| half.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    match (usize::try_from(number(here)), number(there)) {
        (Ok(0), size) => drop(convert(rest, size, b"", Digest::of(&EMPTY_TAR))),
        (Ok(len), _) if len <= rest.len() => {
            let (ztoc, blob) = rest.split_at(rest.len() - len);
            let Ok(indexed) = common::index_blob_within(LAYER_MAX, blob, &StreamOptions::default()) else {
                return;
            };
            let Some(claimed) = convert(ztoc, len as u64, blob, indexed.summary.diff_id) else { return };
            let mut keep = common::Keep::default();
            let mut out = std::io::Cursor::new(Vec::new());
            if prove_layer(&claimed, blob, &mut keep, &mut out, &StreamOptions::default()).is_err() {
                return;
            }
            assert!(keep.data == indexed.layer, "a proven layer came whole");
            let mut decoded = Vec::new();
            for span in claimed.spans().filter(|span| span.restartable) {
                let compressed = &blob[span.blob_offset as usize..][..span.blob_len as usize];
                if claimed.decode_span(span.index as usize, compressed, &mut decoded).is_ok() {
                    std::hint::black_box(decoded == keep.data[span.offset as usize..][..span.len as usize]);
                }
            }
        }
        _ => {}
    }
}

fn convert(ztoc: &[u8], blob_size: u64, blob: &[u8], diff_id: Digest) -> Option<LayerIndex> {
    let compression = if blob.is_empty() { Compression::Gzip } else { Compression::detect(blob) };
    let facts = LayerFacts { blob_digest: Digest::of(blob), blob_size, diff_id, compression };
    let index = ztoc_to_index(ztoc, &facts).ok()?;
    let index = LayerIndex::from_bytes(index).expect("an index just made opens");
    assert_eq!((index.layout(), index.diff_id(), index.blob_size()), (Layout::Tar, diff_id, blob_size));
    common::hostile::visit(&index);
    Some(index)
}

/// Inputs of [`soci`] with right tables, with and without their blobs.
pub fn soci_seeds() -> Vec<Vec<u8>> {
    let archive = common::make::archive(2, 300, 1);
    let gzip = common::make::gzip(&archive, 6, common::make::DEFAULT);
    let many = common::make::archive(12, 9000, 1);
    let many_gzip = common::make::gzip(&many, 6, common::make::DEFAULT);
    let tables = [
        (Ztoc::gzip(&gzip, &archive, 1 << 20, 1), &gzip),
        (Ztoc::gzip(&gzip, &archive, 1 << 20, 2), &gzip),
        (Ztoc::gzip(&many_gzip, &many, 30_000, 1), &many_gzip),
        (Ztoc::plain(&archive, 2000), &archive),
    ];
    let mut seeds = Vec::new();
    for (ztoc, blob) in tables {
        let ztoc = ztoc.bytes();
        let len = (blob.len() as u32).to_le_bytes();
        seeds.push([&len[..], &[0; 4], &ztoc, blob].concat());
        seeds.push([&[0; 4], &len[..], &ztoc].concat());
    }
    seeds
}
