//! Indexes built from somebody else's table: what is given comes out, every span decodes, nonsense is refused.

use crate::common::hostile::seal;
use crate::common::make::{DEFAULT, archive, gzip, text, zstd};
use lazyrun_index::{
    Compression, Digest, DigestOf, EntryKind, Extent, IndexBuilder, IndexError, LayerFacts, LayerId,
    LayerIndex, Layout, NewEntrance, NewEntry, NewSpan, Timestamp,
};

fn facts(blob: &[u8], compression: Compression) -> LayerFacts {
    LayerFacts {
        blob_digest: Digest::of(blob),
        blob_size: blob.len() as u64,
        diff_id: Digest::of(b"the tar"),
        compression,
    }
}

fn file<'a>(path: &'a [u8], size: u64, extents: &'a [Extent]) -> NewEntry<'a> {
    NewEntry {
        path,
        kind: EntryKind::File,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime: Timestamp { secs: -5, nanos: 7 },
        size,
        link: b"",
        rdev: (0, 0),
        xattrs: &[],
        extents,
        content: None,
    }
}

fn plain(len: u64) -> NewSpan<'static> {
    NewSpan {
        blob_offset: 0,
        blob_len: len,
        len,
        pad: 0,
        digest: Digest::from_bytes([0; 32]),
        digest_of: DigestOf::Nothing,
        entrance: NewEntrance::Plain,
    }
}

/// A table layer of two compressed chunks per member, the second one behind the first in the same member.
fn table(blob: &[u8], chunks: [&[u8]; 2], compression: Compression) -> LayerIndex {
    let mut builder = IndexBuilder::new(&facts(blob, compression), Layout::Table);
    let mut skip = 0;
    let mut starts = Vec::new();
    for chunk in chunks {
        starts.push(builder.layer_size());
        let pad = (512 - chunk.len() % 512) % 512;
        builder
            .span(&NewSpan {
                blob_offset: 0,
                blob_len: blob.len() as u64,
                len: (chunk.len() + pad) as u64,
                pad: pad as u16,
                digest: Digest::of(chunk),
                digest_of: DigestOf::Decoded,
                entrance: match compression {
                    Compression::Zstd => NewEntrance::ZstdFrame { skip },
                    _ => NewEntrance::GzipMember { skip },
                },
            })
            .unwrap();
        skip += chunk.len() as u64;
    }
    for (name, (chunk, start)) in [b"./b/two", b"/b//one"].iter().zip(chunks.iter().zip(starts).rev()) {
        let len = chunk.len() as u64;
        builder.entry(&file(*name, len, &[Extent { file_offset: 0, layer_offset: start, len }])).unwrap();
    }
    LayerIndex::from_bytes(builder.finish().unwrap()).unwrap()
}

#[test]
fn table_layers_with_padding_and_inner_offsets() {
    let (one, two) = (text(100_000, 1), text(70_001, 2));
    let whole = [&one[..], &two].concat();
    for (blob, compression) in
        [(gzip(&whole, 6, DEFAULT), Compression::Gzip), (zstd(&whole, 3), Compression::Zstd)]
    {
        let index = table(&blob, [&one, &two], compression);
        assert_eq!((index.layout(), index.id()), (Layout::Table, LayerId::table(Digest::of(b"the tar"))));
        assert_eq!(index.layer_size() % 512, 0);
        let mut layer = Vec::new();
        for i in 0..2 {
            let mut out = Vec::new();
            index.decode_span(i, &blob, &mut out).unwrap();
            assert_eq!(out.len() as u64, index.span(i).len);
            layer.extend(out);
        }
        assert_eq!(layer.len() as u64, index.layer_size());
        assert_eq!(index.entry(0).path(), b"b/two");
        assert_eq!(index.entry(1).path(), b"b/one");
        assert!(crate::common::content(&layer, index.entry(0)) == two);
        assert!(crate::common::content(&layer, index.entry(1)) == one);
        assert_eq!(index.span(1).offset, 100_352);
        assert!(layer[100_000..100_352].iter().all(|&b| b == 0));
        assert_eq!(index.entry(0).mtime(), Timestamp { secs: -5, nanos: 7 });
        let mut damaged = blob.clone();
        *damaged.last_mut().unwrap() ^= 1;
        damaged[blob.len() / 4] ^= 1;
        let mut out = vec![1];
        assert!(index.decode_span(1, &damaged, &mut out).is_err());
        assert!(out.is_empty());
    }
}

#[test]
fn digests_of_compressed_bytes_and_of_nothing() {
    let data = text(50_000, 3);
    let blob = gzip(&data, 6, DEFAULT);
    let span = |digest_of, digest| NewSpan {
        blob_offset: 0,
        blob_len: blob.len() as u64,
        len: data.len() as u64,
        pad: 0,
        digest,
        digest_of,
        entrance: NewEntrance::GzipMember { skip: 0 },
    };
    let build = |span: &NewSpan<'_>| {
        let mut builder = IndexBuilder::new(&facts(&blob, Compression::Gzip), Layout::Tar);
        builder.span(span).unwrap();
        builder.finish().map(|bytes| LayerIndex::from_bytes(bytes).unwrap())
    };
    let zero = Digest::from_bytes([0; 32]);
    let mut out = Vec::new();
    for (digest_of, digest) in [
        (DigestOf::Blob, Digest::of(&blob)),
        (DigestOf::Nothing, zero),
        (DigestOf::Decoded, Digest::of(&data)),
    ] {
        let index = build(&span(digest_of, digest)).unwrap();
        assert_eq!((index.span(0).digest_of, index.span(0).digest), (digest_of, digest));
        index.decode_span(0, &blob, &mut out).unwrap();
        assert!(out == data);
        // A byte of the gzip header that decoding ignores: only a digest of the compressed bytes tells.
        let mut other = blob.clone();
        other[9] ^= 1;
        let got = index.decode_span(0, &other, &mut out);
        assert_eq!(got.is_err(), digest_of == DigestOf::Blob, "{digest_of:?}");
    }
    assert!(build(&span(DigestOf::Nothing, Digest::of(b""))).is_err());
}

#[test]
fn impossible_spans_are_refused() {
    let blob = vec![7; 4096];
    let build = |layout, spans: &[NewSpan<'_>]| -> Result<LayerIndex, IndexError> {
        let mut builder = IndexBuilder::new(&facts(&blob, Compression::None), layout);
        for span in spans {
            builder.span(span)?;
        }
        builder.finish().and_then(LayerIndex::from_bytes)
    };
    let at = |blob_offset, len| NewSpan { blob_offset, ..plain(len) };
    build(Layout::Tar, &[at(0, 4096)]).unwrap();
    build(Layout::Tar, &[at(0, 1000), at(1000, 3096)]).unwrap();
    // A table may go anywhere in the blob, a tar's spans follow each other.
    let backwards = [at(1000, 3096), at(0, 1000)];
    build(Layout::Table, &backwards).unwrap();
    assert!(build(Layout::Tar, &backwards).is_err());
    assert!(build(Layout::Tar, &[at(0, 1000), at(998, 1000)]).is_err());
    assert!(build(Layout::Table, &[NewSpan { pad: 511, ..at(0, 1000) }]).is_ok());
    for (what, layout, span) in [
        ("empty", Layout::Table, at(0, 0)),
        ("outside the blob", Layout::Table, at(4000, 97)),
        ("at an impossible place", Layout::Table, at(u64::MAX, 97)),
        ("padding in a tar", Layout::Tar, NewSpan { pad: 1, ..at(0, 1000) }),
        ("a block of padding", Layout::Table, NewSpan { pad: 512, ..at(0, 1000) }),
        ("only padding", Layout::Table, NewSpan { pad: 100, ..at(0, 100) }),
        (
            "for another compression",
            Layout::Tar,
            NewSpan { entrance: NewEntrance::GzipMember { skip: 0 }, ..at(0, 100) },
        ),
        ("too long", Layout::Table, NewSpan { len: 257 << 20, ..at(0, 100) }),
    ] {
        assert!(build(layout, &[span]).is_err(), "{what}");
    }
    assert!(build(Layout::Table, &[plain(64), NewSpan { len: u64::MAX, ..plain(64) }]).is_err());
    let mut builder = IndexBuilder::new(&facts(&blob, Compression::Gzip), Layout::Table);
    let skip = NewSpan { entrance: NewEntrance::GzipMember { skip: u64::MAX }, ..plain(64) };
    builder.span(&skip).unwrap();
    assert!(builder.finish().is_err(), "a skip that never ends");
    let mut builder = IndexBuilder::new(&facts(&blob, Compression::Gzip), Layout::Table);
    let window = &vec![0; 32769][..];
    let long = NewSpan { entrance: NewEntrance::Deflate { bits: 0, window }, ..plain(64) };
    assert!(builder.span(&long).is_err(), "a window that is too long");
    let bits = NewSpan { entrance: NewEntrance::Deflate { bits: 8, window: &[] }, ..plain(64) };
    builder.span(&bits).unwrap();
    assert!(builder.finish().is_err(), "eight bits of a byte");
}

#[test]
fn impossible_entries_are_refused() {
    let refused = |entry: &NewEntry<'_>| {
        let mut builder = IndexBuilder::new(&facts(&[0; 4096], Compression::None), Layout::Tar);
        builder.span(&plain(4096)).unwrap();
        builder.entry(entry).and_then(|()| builder.finish()).is_err()
    };
    let extent = |file_offset, layer_offset, len| Extent { file_offset, layer_offset, len };
    let good = [extent(0, 0, 100)];
    let ok = file(b"a/b", 100, &good);
    assert!(!refused(&ok));
    let long_name = [b'x'; 256];
    let many: Vec<(Vec<u8>, &[u8])> =
        (0..1025).map(|i| (format!("user.{i}").into_bytes(), &b""[..])).collect();
    let many: Vec<(&[u8], &[u8])> = many.iter().map(|(n, v)| (&n[..], *v)).collect();
    let long_value = vec![0; (64 << 10) + 1];
    let kind = |kind| NewEntry { kind, size: 0, extents: &[], ..ok };
    for (what, entry) in [
        ("climbs", NewEntry { path: b"a/../b", ..ok }),
        ("long name", NewEntry { path: &long_name, ..ok }),
        ("NUL", NewEntry { path: b"a\0b", ..ok }),
        ("root", NewEntry { path: b"./", ..ok }),
        ("mode", NewEntry { mode: 0o10_000, ..ok }),
        ("uid", NewEntry { uid: u32::MAX, ..ok }),
        ("gid", NewEntry { gid: u32::MAX, ..ok }),
        ("nanos", NewEntry { mtime: Timestamp { secs: 0, nanos: 1_000_000_000 }, ..ok }),
        ("size", NewEntry { size: 1 << 45, ..ok }),
        ("outside", NewEntry { extents: &[extent(0, 4000, 100)], ..ok }),
        ("overflow", NewEntry { extents: &[extent(0, u64::MAX, 100)], ..ok }),
        ("beyond its end", NewEntry { extents: &[extent(1, 0, 100)], ..ok }),
        ("overlap", NewEntry { extents: &[extent(0, 0, 50), extent(49, 50, 50)], ..ok }),
        ("backwards", NewEntry { extents: &[extent(50, 0, 50), extent(0, 50, 50)], ..ok }),
        ("empty extent", NewEntry { extents: &[extent(0, 0, 0)], ..ok }),
        ("link of a file", NewEntry { link: b"x", ..ok }),
        ("numbers of a file", NewEntry { rdev: (1, 1), ..ok }),
        ("many attributes", NewEntry { xattrs: &many, ..ok }),
        ("empty attribute name", NewEntry { xattrs: &[(b"", b"")], ..ok }),
        ("long attribute name", NewEntry { xattrs: &[(&long_name, b"")], ..ok }),
        ("long attribute value", NewEntry { xattrs: &[(b"user.x", &long_value)], ..ok }),
        ("directory with data", NewEntry { kind: EntryKind::Directory, ..ok }),
        ("link to nothing", kind(EntryKind::Symlink)),
        ("hard link to nothing", kind(EntryKind::Hardlink)),
        ("hard link that climbs", NewEntry { link: b"../x", ..kind(EntryKind::Hardlink) }),
        ("long target", NewEntry { link: &[b'x'; 4096], ..kind(EntryKind::Symlink) }),
        ("device major", NewEntry { rdev: (4096, 0), ..kind(EntryKind::CharDevice) }),
        ("device minor", NewEntry { rdev: (0, 1 << 20), ..kind(EntryKind::BlockDevice) }),
        ("digest of a fifo", NewEntry { content: Some(Digest::of(b"")), ..kind(EntryKind::Fifo) }),
    ] {
        assert!(refused(&entry), "{what}");
    }
}

#[test]
fn entries_come_out_as_given() {
    let mut builder = IndexBuilder::new(&facts(&[0; 4096], Compression::None), Layout::Tar);
    builder.span(&plain(4096)).unwrap();
    let xattrs: &[(&[u8], &[u8])] = &[(b"user.a", b"1"), (b"user.b", b"2"), (b"user.a", b"3")];
    let extents = [
        Extent { file_offset: 10, layer_offset: 600, len: 5 },
        Extent { file_offset: 20, layer_offset: 512, len: 30 },
    ];
    let content = Some(Digest::of(b"x"));
    builder.entry(&NewEntry { xattrs, content, ..file(b"sparse", 50, &extents) }).unwrap();
    builder
        .entry(&NewEntry { kind: EntryKind::CharDevice, size: 0, rdev: (4095, 3), ..file(b"dev/", 0, &[]) })
        .unwrap();
    builder
        .entry(&NewEntry { kind: EntryKind::Hardlink, link: b"./sparse", ..file(b"hard", 0, &[]) })
        .unwrap();
    let index = LayerIndex::from_bytes(builder.finish().unwrap()).unwrap();
    let sparse = index.entry(0);
    assert_eq!(sparse.xattrs().collect::<Vec<_>>(), [(&b"user.a"[..], &b"3"[..]), (b"user.b", b"2")]);
    assert_eq!(sparse.extents().collect::<Vec<_>>(), extents);
    assert_eq!((sparse.size(), sparse.content()), (50, content));
    assert_eq!((index.entry(1).path(), index.entry(1).rdev()), (&b"dev"[..], (4095, 3)));
    assert_eq!(index.entry(2).link(), b"sparse");
}

#[test]
fn version_one_is_read() {
    let tar = archive(60, 20_000, 1);
    let blob = gzip(&tar, 6, DEFAULT);
    let mut out = std::io::Cursor::new(Vec::new());
    lazyrun_index::index_layer(&blob[..], &mut (), &mut out, &crate::common::small_spans()).unwrap();
    let mut bytes = out.into_inner();
    let opened = LayerIndex::from_bytes(bytes.clone()).unwrap();
    assert!(opened.span_count() > 1 && opened.span_count() < 1024);
    bytes[8] = 1;
    // Version 1 left a place of no meaning where member starts now have what to skip.
    let directory = bytes.len() - 8;
    let segment = u64::from_le_bytes(bytes[directory..].try_into().unwrap()) as usize + 152;
    assert_eq!(bytes[segment + 48], 2, "the first span starts at the member's header");
    bytes[segment + 32..][..8].copy_from_slice(&1234u64.to_le_bytes());
    seal(&mut bytes);
    let old = LayerIndex::from_bytes(bytes.clone()).unwrap();
    assert_eq!((old.layout(), old.id()), (Layout::Tar, LayerId::tar(Digest::of(&tar))));
    assert!(old.spans().eq(opened.spans()));
    let span = old.span(0);
    assert_eq!((span.digest_of, span.pad), (DigestOf::Decoded, 0));
    let mut data = Vec::new();
    old.decode_span(0, &blob[..span.blob_len as usize], &mut data).unwrap();
    assert!(data == tar[..span.len as usize]);
    for (at, what) in [(13, "layout"), (segment + 50, "flags"), (segment + 52, "padding")] {
        let mut newer = bytes.clone();
        newer[at] = 1;
        seal(&mut newer);
        assert!(LayerIndex::from_bytes(newer).is_err(), "{what}");
    }
}
