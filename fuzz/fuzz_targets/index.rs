//! Any bytes as an index, with the checksums set right so that the checks behind them are reached.
#![no_main]

use lazyrun_index::LayerIndex;
use libfuzzer_sys::fuzz_target;

const HEADER: usize = 152;

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() < HEADER {
        return;
    }
    let mut index = bytes.to_vec();
    index[..12].copy_from_slice(if bytes[8] == 1 { b"LZRINDEX\x01\0\0\0" } else { b"LZRINDEX\x02\0\0\0" });
    let mut body_len = [0; 8];
    body_len.copy_from_slice(&index[112..120]);
    let end = usize::try_from(u64::from_le_bytes(body_len)).ok().and_then(|len| len.checked_add(HEADER));
    if let Some((body, directory)) =
        end.filter(|end| *end <= index.len()).map(|end| (HEADER..end, end..index.len()))
    {
        let (body, directory) = (crc32c::crc32c(&index[body]), crc32c::crc32c(&index[directory]));
        index[120..124].copy_from_slice(&body.to_le_bytes());
        index[124..128].copy_from_slice(&directory.to_le_bytes());
    }
    let header = crc32c::crc32c(&index[..148]);
    index[148..152].copy_from_slice(&header.to_le_bytes());
    let Ok(index) = LayerIndex::from_bytes(index) else { return };
    for entry in index.entries() {
        let sum = entry.path().len()
            + entry.link().len()
            + entry.xattrs().map(|(n, v)| n.len() + v.len()).sum::<usize>();
        let end = entry.extents().map(|e| e.layer_offset + e.len).max().unwrap_or(0);
        assert!(end <= index.layer_size());
        std::hint::black_box((sum, entry.kind(), entry.mtime(), entry.rdev(), entry.content()));
    }
    for span in index.spans().filter(|s| s.blob_len < 1 << 16 && s.len < 1 << 20) {
        let zeros = vec![0x5a; span.blob_len as usize];
        let _ = index.decode_span(span.index as usize, &zeros, &mut Vec::new());
    }
});
