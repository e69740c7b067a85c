//! zstd blobs from the fuzzer's bytes.

use crate::EMPTY_TAR;

/// The bytes behind a frame that holds an empty tar.
pub(crate) fn behind_empty_tar(bytes: &[u8]) -> Vec<u8> {
    let mut blob = zstd::bulk::compress(&EMPTY_TAR, 1).expect("zstd takes anything");
    blob.extend_from_slice(bytes);
    blob
}

/// Compresses content at any level, in frames of a length that `pieces` says, with skippable ones between them.
pub(crate) fn compressed(content: &[u8], level: u8, pieces: u8) -> Vec<u8> {
    let mut blob = Vec::new();
    let each = if pieces & 1 == 0 { content.len() } else { 700 + usize::from(pieces >> 2) * 97 };
    for frame in content.chunks(each) {
        if pieces & 2 != 0 {
            let junk = [level; 5];
            blob.extend_from_slice(&[0x50 + level % 16, 0x2a, 0x4d, 0x18, 5, 0, 0, 0]);
            blob.extend_from_slice(&junk);
        }
        blob.extend(zstd::bulk::compress(frame, i32::from(level % 12) - 3).expect("zstd takes anything"));
    }
    blob
}
