//! Any bytes as a blob with a table of contents: its place by the footer, and the table as JSON.
#![no_main]

use lazyrun_index::{Compression, Digest, LayerFacts, LayerIndex, chunked, estargz};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let size = bytes.len() as u64;
    for (found, compression) in [
        (estargz::locate(bytes, size, None), Compression::Gzip),
        (chunked::locate_tail(bytes, size, None), Compression::Zstd),
    ] {
        let Ok(Some(place)) = found else { continue };
        let packed = place.range().map_or(bytes, |range| &bytes[range.start as usize..range.end as usize]);
        table(&place, packed, size, compression);
    }
    // The text itself, past the packing.
    let blob_size = 1 << 20;
    let packed = zstd(bytes);
    let position = format!("{}:{}:{}:1", 1 << 16, packed.len(), bytes.len());
    if let Ok(Some(place)) =
        chunked::locate(|key| (key == chunked::POSITION[0]).then_some(position.as_str()), blob_size)
    {
        table(&place, &packed, blob_size, Compression::Zstd);
    }
});

/// What passes is an index.
fn table(place: &lazyrun_index::TocPlace, packed: &[u8], blob_size: u64, compression: Compression) {
    let zero = Digest::from_bytes([0; 32]);
    let facts = LayerFacts { blob_digest: zero, blob_size, diff_id: zero, compression };
    if let Ok(table) = place.index(packed, &facts) {
        assert!(LayerIndex::from_bytes(table.index).is_ok());
    }
}

/// A zstd frame of raw blocks: no compressor needed.
fn zstd(text: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x70];
    for block in text.chunks(1 << 16) {
        frame.extend(&((block.len() as u32) << 3).to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame.extend([1, 0, 0]);
    frame
}
