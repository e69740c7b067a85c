//! Every span decodes to its slice of the whole, whatever wrote the blob; damaged blobs are refused.

use crate::common::make::{DEFAULT, FIXED, HUFFMAN_ONLY, archive, gzip, text, zstd};
use crate::common::{Keep, index_blob, prove, small_spans};
use lazyrun_index::{
    Compression, Digest, EntryKind, IndexError, LayerIndex, LayerSink, SpanInfo, StreamOptions,
    hydrate_layer, index_layer,
};

/// Indexes, proves, and compares the layer file with what was compressed.
fn round(blob: &[u8], tar: &[u8], compression: Compression) -> crate::common::Indexed {
    let indexed = index_blob(blob, &small_spans()).unwrap();
    assert_eq!(indexed.summary.compression, compression);
    assert!(indexed.layer == tar);
    prove(blob, &indexed);
    indexed
}

#[test]
fn gzip_of_every_level_and_strategy() {
    let tar = archive(60, 20_000, 1);
    for level in 0..=9 {
        let indexed = round(&gzip(&tar, level, DEFAULT), &tar, Compression::Gzip);
        // zlib-ng's level 1, which zlib-rs shares, puts everything into one deflate block: no border to restart at.
        if level != 1 {
            assert!(indexed.summary.spans > 3, "level {level}: {} spans", indexed.summary.spans);
            assert!(indexed.index.spans().all(|s| s.blob_len < 4096 + 70_000), "level {level}");
        }
        assert!(indexed.index.spans().all(|s| s.restartable), "level {level}");
        assert_eq!(indexed.summary.entries, 120);
    }
    for strategy in [FIXED, HUFFMAN_ONLY] {
        let indexed = round(&gzip(&tar, 6, strategy), &tar, Compression::Gzip);
        assert!(indexed.index.spans().all(|s| s.restartable));
    }
}

#[test]
fn gzip_of_many_members() {
    let tar = archive(60, 20_000, 2);
    for size in [1, 777, 50_000] {
        let tar = if size == 1 { &tar[..2048] } else { &tar[..] };
        let mut blob = Vec::new();
        let mut whole = Vec::new();
        // The archive as it is cut may end inside an entry, so cut only behind its end.
        let tar = if size == 1 { archive(1, 100, 3) } else { tar.to_vec() };
        for (i, piece) in tar.chunks(size).enumerate() {
            blob.extend(gzip(piece, (i % 10) as i32, DEFAULT));
            if i % 5 == 0 {
                blob.extend(gzip(b"", 6, DEFAULT));
            }
            whole.extend_from_slice(piece);
        }
        let indexed = round(&blob, &whole, Compression::Gzip);
        assert!(indexed.index.spans().all(|s| s.restartable));
    }
}

#[test]
fn garbage_after_the_last_member_is_hashed_and_ignored() {
    let tar = archive(5, 5000, 4);
    for garbage in [&b"\0\0\0\0\0\0\0\0\0"[..], b"garbage", b"\x1f", b"\x1f\x00"] {
        let mut blob = gzip(&tar, 6, DEFAULT);
        blob.extend_from_slice(garbage);
        round(&blob, &tar, Compression::Gzip);
    }
    let mut blob = gzip(&tar, 6, DEFAULT);
    blob.extend_from_slice(b"\x1f\x8b\x08");
    assert!(matches!(index_blob(&blob, &small_spans()), Err(IndexError::BlobTruncated { .. })));
}

#[test]
fn zstd_of_many_frames() {
    let tar = archive(60, 20_000, 5);
    for level in [1, 3, 19] {
        let mut blob = Vec::new();
        for (i, piece) in tar.chunks(30_000).enumerate() {
            blob.extend(zstd(piece, level));
            if i % 3 == 0 {
                blob.extend_from_slice(&[0x50 + (i % 16) as u8, 0x2a, 0x4d, 0x18, 5, 0, 0, 0, 1, 2, 3, 4, 5]);
            }
        }
        let indexed = round(&blob, &tar, Compression::Zstd);
        assert!(indexed.summary.spans > 3 && indexed.index.spans().all(|s| s.restartable));
        // A skippable frame in front, as some seekable writers put it.
        let mut skip = vec![0x5e, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9];
        skip.extend_from_slice(&blob);
        round(&skip, &tar, Compression::Zstd);
        assert!(matches!(
            index_blob(&blob[..blob.len() - 20], &small_spans()),
            Err(IndexError::BlobTruncated { .. })
        ));
        blob.extend_from_slice(b"garbage");
        assert!(matches!(index_blob(&blob, &small_spans()), Err(IndexError::BlobCorrupt { .. })));
    }
}

#[test]
fn one_large_zstd_frame_can_only_be_streamed() {
    let tar = archive(100, 100_000, 6);
    let indexed = round(&zstd(&tar, 3), &tar, Compression::Zstd);
    let restartable: Vec<bool> = indexed.index.spans().map(|s| s.restartable).collect();
    assert!(restartable[0] && restartable.len() > 2 && restartable[1..].iter().all(|r| !r));
}

#[test]
fn plain_tar() {
    let tar = archive(60, 20_000, 7);
    let indexed = round(&tar, &tar, Compression::None);
    assert!(indexed.index.spans().all(|s| s.restartable && s.len == s.blob_len && s.offset == s.blob_offset));
    round(b"", b"", Compression::None);
}

#[test]
fn well_compressed_data_has_bounded_spans() {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(40 << 20);
    tar.append_data(&mut header, "zeros", &vec![0; 40 << 20][..]).unwrap();
    let tar = tar.into_inner().unwrap();
    for blob in [gzip(&tar, 9, DEFAULT), zstd(&tar, 3)] {
        let indexed = index_blob(&blob, &small_spans()).unwrap();
        assert!(indexed.index.spans().all(|s| s.len <= (2 << 20) + (512 << 10)), "{:?}", indexed.index);
        prove(&blob, &indexed);
    }
}

#[test]
fn entries_are_what_was_written() {
    let tar = archive(30, 3000, 8);
    let indexed = index_blob(&gzip(&tar, 6, DEFAULT), &small_spans()).unwrap();
    for i in 0..30usize {
        let file = indexed.index.entry(i * 2);
        let name = format!("dir{}/{}file{i}", i % 10, "long-name-".repeat(i % 20));
        assert_eq!((file.path(), file.kind(), file.mode()), (name.as_bytes(), EntryKind::File, 0o644));
        assert_eq!(file.mtime().secs, 1_600_000_000 + i as i64);
        let data = text((i * 7919 + 13) % 3000, 8 + i as u64);
        assert_eq!((file.size(), file.content()), (data.len() as u64, Some(Digest::of(&data))));
        let link = indexed.index.entry(i * 2 + 1);
        assert_eq!((link.kind(), link.link()), (EntryKind::Symlink, name.as_bytes()));
        assert_eq!((link.content(), link.extents().len(), link.xattrs().count()), (None, 0, 0));
    }
}

#[test]
fn blobs_cut_anywhere_are_refused() {
    let tar = archive(4, 3000, 9);
    for blob in [gzip(&tar, 6, DEFAULT), zstd(&tar, 3)] {
        for cut in (1..blob.len()).step_by(37).chain(blob.len() - 10..blob.len()) {
            assert!(index_blob(&blob[..cut], &small_spans()).is_err(), "{cut} of {}", blob.len());
        }
    }
}

#[test]
fn damaged_gzip_is_refused() {
    let tar = archive(4, 3000, 10);
    let blob = gzip(&tar, 6, DEFAULT);
    for at in (10..blob.len()).step_by(53).chain(blob.len() - 8..blob.len()) {
        let mut damaged = blob.clone();
        damaged[at] ^= 0x10;
        assert!(index_blob(&damaged, &small_spans()).is_err(), "byte {at} of {}", blob.len());
    }
}

#[test]
fn a_damaged_blob_does_not_hydrate() {
    let tar = archive(60, 20_000, 11);
    let indexed = round(&tar, &tar, Compression::None);
    let mut damaged = tar.clone();
    damaged[tar.len() / 2] ^= 1;
    let mut keep = Keep::default();
    let refused = hydrate_layer(&indexed.index, &damaged[..], &mut keep);
    assert!(matches!(refused, Err(IndexError::DigestMismatch { .. })));
    assert!(keep.spans.iter().all(|s| s.offset + s.len <= tar.len() as u64 / 2), "no span is told too early");
    let refused = hydrate_layer(&indexed.index, &tar[..tar.len() - 512], &mut ());
    assert!(matches!(refused, Err(IndexError::LengthMismatch { .. })));
    let refused = hydrate_layer(&indexed.index, &[&tar[..], &[0]].concat()[..], &mut ());
    assert!(matches!(refused, Err(IndexError::LengthMismatch { .. })));
    let span = indexed.index.span(1);
    let mut bytes = tar[span.blob_offset as usize..][..span.blob_len as usize].to_vec();
    let mut out = Vec::new();
    assert!(matches!(
        indexed.index.decode_span(1, &bytes[1..], &mut out),
        Err(IndexError::LengthMismatch { .. })
    ));
    bytes[5] ^= 1;
    assert!(matches!(indexed.index.decode_span(1, &bytes, &mut out), Err(IndexError::DigestMismatch { .. })));
    assert!(out.is_empty());
    assert!(matches!(indexed.index.decode_span(9999, &bytes, &mut out), Err(IndexError::NoSuchSpan { .. })));
}

/// A blob that fails halfway.
struct Failing<'a>(&'a [u8]);

impl std::io::Read for Failing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.0.is_empty() {
            return Err(std::io::Error::other("connection lost"));
        }
        self.0.read(buffer)
    }
}

/// A sink on a full disk.
struct Full(u64);

impl LayerSink for Full {
    fn data(&mut self, offset: u64, _: &[u8]) -> std::io::Result<()> {
        if offset >= self.0 { Err(std::io::Error::other("disk full")) } else { Ok(()) }
    }

    fn span(&mut self, _: &SpanInfo) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn errors_of_reader_and_sink_come_out() {
    let tar = archive(100, 100_000, 12);
    let blob = gzip(&tar, 1, DEFAULT);
    let out = std::io::Cursor::new(Vec::new());
    let options = StreamOptions::default();
    let lost = index_layer(Failing(&blob[..blob.len() / 2]), &mut (), out.clone(), &options);
    assert!(matches!(lost, Err(IndexError::Read { .. })), "{lost:?}");
    let lost = index_layer(Failing(b""), &mut (), out.clone(), &options);
    assert!(matches!(lost, Err(IndexError::Read { offset: 0, .. })), "{lost:?}");
    let full = index_layer(&blob[..], &mut Full(1 << 20), out, &options);
    assert!(matches!(full, Err(IndexError::Sink { .. })), "{full:?}");
}

/// What of a file that is mapped counts as memory of this process, in KiB.
fn resident(path: &std::path::Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (_, map) = maps.split_once(path.to_str().unwrap()).expect("it is mapped");
    let line = map.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn windows_that_were_used_are_not_kept_in_memory() {
    let blob = gzip(&archive(600, 60_000, 21), 6, DEFAULT);
    let (dir, mut bytes) = (tempfile::tempdir().unwrap(), std::io::Cursor::new(Vec::new()));
    index_layer(&blob[..], &mut (), &mut bytes, &small_spans()).unwrap();
    let (path, size) = (dir.path().join("index"), bytes.get_ref().len() >> 10);
    std::fs::write(&path, bytes.get_ref()).unwrap();
    let index = LayerIndex::open(&path).unwrap();
    assert!(size > 512 && resident(&path) < size / 4, "{} KiB of {size}", resident(&path));
    let mut decoded = Vec::new();
    for (i, span) in index.spans().enumerate() {
        let compressed = &blob[span.blob_offset as usize..][..span.blob_len as usize];
        index.decode_span(i, compressed, &mut decoded).unwrap();
    }
    assert!(resident(&path) < size / 2, "{} KiB of {size}", resident(&path));
}
