//! Blobs framed as the tools in the wild frame them.

use crate::common::make::{archive, gzip_flushed, gzip_member};
use crate::common::{index_blob, prove, small_spans};
use lazyrun_index::{Compression, Digest, IndexError, StreamOptions};
use libz_rs_sys as z;

fn round(blob: &[u8], tar: &[u8]) -> crate::common::Indexed {
    let indexed = index_blob(blob, &small_spans()).unwrap();
    assert!(indexed.layer == tar);
    assert!(indexed.summary.spans > 3 && indexed.index.spans().all(|s| s.restartable));
    prove(blob, &indexed);
    indexed
}

/// bgzip: members of at most 64 KiB whose extra field "BC" says how long they are, and an empty one at the end.
#[test]
fn bgzip() {
    let tar = archive(60, 20_000, 1);
    let mut blob = Vec::new();
    for piece in tar.chunks(0xff00).chain([&b""[..]]) {
        let deflated = gzip_member(piece, &[]).len();
        let len = (deflated + 8 - 1) as u16;
        let [low, high] = len.to_le_bytes();
        blob.extend(gzip_member(piece, &[b'B', b'C', 2, 0, low, high]));
    }
    let indexed = round(&blob, &tar);
    // Each span that is not cut inside a member starts at one's header.
    let at_members =
        indexed.index.spans().filter(|s| blob[s.blob_offset as usize..].starts_with(b"\x1f\x8b\x08\x04"));
    assert!(at_members.count() > 3);
}

/// mgzip: members whose extra field "SZ" says how long they are, each of many blocks.
#[test]
fn mgzip() {
    let tar = archive(60, 20_000, 2);
    let blob: Vec<u8> =
        tar.chunks(200_000).flat_map(|piece| gzip_member(piece, &[b'S', b'Z', 4, 0, 1, 2, 3, 4])).collect();
    round(&blob, &tar);
}

/// pigz: one member, with sync flushes between what its threads wrote; `--independent` makes them full flushes.
#[test]
fn pigz() {
    let tar = archive(60, 20_000, 3);
    for flush in [z::Z_SYNC_FLUSH, z::Z_FULL_FLUSH, z::Z_PARTIAL_FLUSH, z::Z_BLOCK] {
        for piece in [3000, 131_072] {
            round(&gzip_flushed(&tar, piece, flush), &tar);
        }
    }
}

fn long(data: &[u8], log: u32) -> Vec<u8> {
    use zstd::stream::raw::CParameter;
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_parameter(CParameter::WindowLog(log)).unwrap();
    encoder.set_parameter(CParameter::EnableLongDistanceMatching(true)).unwrap();
    std::io::Write::write_all(&mut encoder, data).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn long_windows_of_zstd() {
    let tar = archive(20, 20_000, 4);
    let indexed = index_blob(&long(&tar, 27), &small_spans()).unwrap();
    assert!(indexed.layer == tar);
    for log in [28, 31] {
        let refused = index_blob(&long(&tar, log), &small_spans()).map(|_| ()).unwrap_err();
        assert!(matches!(refused, IndexError::BlobCorrupt { format: "zstd", .. }), "{refused:?}");
        assert!(refused.to_string().contains("memory"), "{refused}");
    }
}

/// Zeros compress so well that a blob of some kilobytes is a layer of some hundred megabytes: spans and memory
/// stay bounded, and a sink that has had enough ends it at once.
#[test]
fn bombs() {
    struct Enough(u64);
    impl lazyrun_index::LayerSink for Enough {
        fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
            let end = offset + bytes.len() as u64;
            if end > self.0 { Err(std::io::Error::other("the layer is too large")) } else { Ok(()) }
        }

        fn span(&mut self, span: &lazyrun_index::SpanInfo) -> std::io::Result<()> {
            assert!(span.len <= 34 << 20);
            Ok(())
        }
    }
    let zeros = vec![0; 16 << 20];
    let (member, frame) = (gzip_member(&zeros, &[]), zstd::bulk::compress(&zeros, 1).unwrap());
    for piece in [member, frame] {
        let blob = piece.repeat(20);
        assert!(blob.len() < 400_000);
        let pass = |limit| {
            let mut out = std::io::Cursor::new(Vec::new());
            let options = StreamOptions::default();
            let passed = lazyrun_index::index_layer(&blob[..], &mut Enough(limit), &mut out, &options);
            (passed, out.into_inner().len())
        };
        let (passed, index) = pass(u64::MAX);
        let passed = passed.unwrap();
        assert_eq!((passed.layer_size, passed.blob_digest), (320 << 20, Digest::of(&blob)));
        assert_eq!((passed.entries, passed.compression), (0, Compression::detect(&blob)));
        assert!(index < 100_000, "{index}");
        let stopped = pass(1 << 20).0;
        assert!(matches!(stopped, Err(IndexError::Sink { offset, .. }) if offset <= 1 << 20), "{stopped:?}");
    }
}

/// Found by fuzzing: a span that ends while the last block of a frame is on its way out was one byte short.
#[test]
fn a_span_that_ends_inside_the_last_block_of_a_frame() {
    // Two blocks, each 128 KiB of one byte, behind a frame with an empty tar: what the decoder's buffer of 256 KiB has no
    // room for is 1024 bytes of the second.
    let frame = [40, 181, 47, 253, 2, 122, 0, 0, 2, 0, 16, 0, 3, 0, 16, 0];
    let mut blob = zstd::bulk::compress(&[0; 1024], 3).unwrap();
    blob.extend(frame);
    let (span_len, max_span_len) = (256 << 10, 256 << 10);
    let options = StreamOptions { span_size: 4096, span_len, max_span_len, ..StreamOptions::default() };
    let indexed = index_blob(&blob, &options).unwrap();
    assert_eq!(indexed.summary.spans, 2);
    prove(&blob, &indexed);
}
