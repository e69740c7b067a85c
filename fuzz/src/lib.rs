//! The properties that the fuzz targets try to break, one function a target. Inputs of each are described in
//! README.md; `examples/seeds.rs` makes the first ones.

#[path = "../../index/tests/common/mod.rs"]
mod common;
mod deflate;
#[cfg(fuzzing)]
mod oci;
mod pax;
mod tables;
mod zstd_frames;
mod ztoc;

use lazyrun_index::{LayerIndex, StreamOptions, prove_layer};

#[cfg(fuzzing)]
pub use oci::oci;
pub use tables::{chunked, estargz};
pub use ztoc::{soci, soci_seeds};

/// Two blocks of zeros: a whole archive, after which anything may follow.
pub const EMPTY_TAR: [u8; 1024] = [0; 1024];

/// Longest layer file that is looked at: bombs are broken off here, as their size is no finding.
const LAYER_MAX: usize = 4 << 20;

/// Indexes a blob; what is taken has to hydrate and each span to decode to the bytes that were streamed.
fn layer(blob: &[u8]) -> Option<Vec<u8>> {
    let options = StreamOptions { span_size: 4096, span_len: 1 << 16, max_span_len: 1 << 17, ..StreamOptions::default() };
    let indexed = common::index_blob_within(LAYER_MAX, blob, &options).ok()?;
    common::prove(blob, &indexed);
    common::hostile::visit(&indexed.index);
    let mut again = std::io::Cursor::new(Vec::new());
    prove_layer(&indexed.index, blob, &mut (), &mut again, &options).expect("an index proves itself");
    assert_eq!(again.into_inner().len() as u64, indexed.index.index_size(), "and is made again");
    Some(indexed.layer)
}

/// A plain tar, its headers' checksums put right; after a first byte of 0 the records of PAX headers.
pub fn archive(bytes: &[u8]) {
    let tar = match bytes {
        [0, records @ ..] => pax::archive(records),
        _ => pax::mended(bytes.to_vec()),
    };
    layer(&tar);
}

/// gzip members as they are, raw deflate put into members, or content that is compressed first.
pub fn gzip(bytes: &[u8]) {
    match bytes {
        [0, rest @ ..] => drop(layer(&deflate::members(rest))),
        [1, level, pieces, rest @ ..] => {
            let content = [&EMPTY_TAR, rest].concat();
            let layer = layer(&deflate::compressed(&content, *level, *pieces));
            assert!(layer.is_none_or(|layer| layer == content), "the content went through gzip unchanged");
        }
        _ => drop(layer(bytes)),
    }
}

/// zstd frames behind one with an empty tar, or content that is compressed first.
pub fn zstd(bytes: &[u8]) {
    match bytes {
        [0, rest @ ..] => drop(layer(&zstd_frames::behind_empty_tar(rest))),
        [1, level, pieces, rest @ ..] => {
            let content = [&EMPTY_TAR, rest].concat();
            let layer = layer(&zstd_frames::compressed(&content, *level, *pieces));
            assert_eq!(layer.as_ref(), Some(&content), "the content went through zstd unchanged");
        }
        _ => drop(layer(bytes)),
    }
}

/// An index with the checksums set right, so that the checks behind them are reached.
pub fn index(bytes: &[u8]) {
    let mut index = bytes.to_vec();
    common::hostile::admit(&mut index);
    if let Ok(index) = LayerIndex::from_bytes(index) {
        common::hostile::visit(&index);
    }
}
