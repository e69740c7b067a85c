//! zTOCs become indexes that say what their layers are; hostile ones become clear errors.

use std::io::Cursor;

use crate::common::make::{DEFAULT, archive, gzip, zoo};
use crate::common::ztoc::{File, Ztoc, pack, pack_plain, points};
use crate::common::{Keep, index_blob, small_spans};
use lazyrun_index::soci::ztoc_to_index;
use lazyrun_index::{
    Compression, Digest, DigestOf, EntryKind, IndexError, LayerFacts, LayerIndex, Layout, Mismatch, compare,
    hydrate_layer, prove_layer,
};
use proptest::prelude::*;

fn facts(blob: &[u8], tar: &[u8]) -> LayerFacts {
    LayerFacts {
        blob_digest: Digest::of(blob),
        blob_size: blob.len() as u64,
        diff_id: Digest::of(tar),
        compression: Compression::detect(blob),
    }
}

fn convert(ztoc: &Ztoc, blob: &[u8], tar: &[u8]) -> Result<LayerIndex, IndexError> {
    ztoc_to_index(&ztoc.bytes(), &facts(blob, tar)).map(|bytes| LayerIndex::from_bytes(bytes).unwrap())
}

/// Checks a zTOC's index against the layer: entries, every span, and both passes over the blob.
fn check(ztoc: &Ztoc, blob: &[u8], tar: &[u8]) -> LayerIndex {
    check_bytes(&ztoc.bytes(), blob, tar)
}

fn check_bytes(ztoc: &[u8], blob: &[u8], tar: &[u8]) -> LayerIndex {
    let index = LayerIndex::from_bytes(ztoc_to_index(ztoc, &facts(blob, tar)).unwrap()).unwrap();
    assert_eq!(index.layout(), Layout::Tar);
    let own = index_blob(blob, &small_spans()).unwrap();
    compare(&index, &own.index).unwrap();
    let mut out = Vec::new();
    for (i, span) in index.spans().enumerate() {
        let compressed = &blob[span.blob_offset as usize..][..span.blob_len as usize];
        index.decode_span(i, compressed, &mut out).unwrap_or_else(|e| panic!("span {i}: {e}"));
        assert!(out == tar[span.offset as usize..][..span.len as usize], "span {i} differs");
        let mut damaged = compressed.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        assert!(matches!(index.decode_span(i, &damaged, &mut out), Err(IndexError::DigestMismatch { .. })));
    }
    let mut keep = Keep::default();
    prove_layer(&index, blob, &mut keep, Cursor::new(Vec::new()), &small_spans()).unwrap();
    assert!(keep.data == tar);
    assert_eq!(keep.spans.len(), index.span_count());
    if index.layer_size() == tar.len() as u64 {
        hydrate_layer(&index, blob, &mut Keep::default()).unwrap();
    }
    index
}

fn data(file: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file);
    std::fs::read(path).unwrap()
}

fn unpacked(blob: &[u8]) -> Vec<u8> {
    index_blob(blob, &small_spans()).unwrap().layer
}

#[test]
fn ztocs_of_the_real_tool() {
    for (ztoc, layer, spans) in [
        ("gzip-4m", "ztocs/layer.tar.gz", 1),
        ("gzip-40k", "ztocs/layer.tar.gz", 2),
        ("members-40k", "ztocs/members.tar.gz", 6),
        ("empty-first-100k", "ztocs/empty-first.tar.gz", 2),
        ("estargz-minchunk-60k", "tables/estargz-minchunk.tar.gz", 4),
    ] {
        let blob = data(layer);
        let index = check_bytes(&data(&format!("ztocs/{ztoc}.ztoc")), &blob, &unpacked(&blob));
        assert_eq!(index.span_count(), spans, "{ztoc}");
        assert!(index.entry_count() > 35 && index.spans().all(|s| s.digest_of == DigestOf::Blob));
    }
    let tar = unpacked(&data("ztocs/layer.tar.gz"));
    let index = check_bytes(&data("ztocs/plain-64k.ztoc"), &tar, &tar);
    assert_eq!(index.span_count(), tar.len().div_ceil(65536));
    // Names that are no UTF-8 are bytes there too.
    let blob = data("ztocs/bytes.tar.gz");
    let index = check_bytes(&data("ztocs/bytes.ztoc"), &blob, &unpacked(&blob));
    assert_eq!(index.entry(1).path(), b"caf\xe9");
}

#[test]
fn a_real_ztoc_of_a_sparse_file_is_refused() {
    let blob = data("ztocs/sparse.tar.gz");
    let refused = ztoc_to_index(&data("ztocs/sparse.ztoc"), &facts(&blob, &unpacked(&blob))).unwrap_err();
    assert!(refused.to_string().contains("sparse"), "{refused}");
}

#[test]
fn gzip_layers() {
    for (tar, level) in [(zoo(), 6), (zoo(), 9), (archive(60, 20_000, 1), 4), (archive(3, 300, 1), 6)] {
        let blob = gzip(&tar, level, DEFAULT);
        let index = check(&Ztoc::gzip(&blob, &tar, 20_000, 2), &blob, &tar);
        assert!(index.span_count() > 3 || tar.len() < 20_000);
        assert!(index.spans().all(|s| s.restartable && s.digest_of == DigestOf::Blob));
        assert_eq!(index.span(0).blob_offset, 10);
        let old = check(&Ztoc::gzip(&blob, &tar, 20_000, 1), &blob, &tar);
        assert!(old.spans().eq(index.spans()), "both versions of checkpoints say the same");
    }
}

#[test]
fn gzip_layers_of_many_members() {
    let tar = zoo();
    let blob: Vec<u8> = tar.chunks(70_000).flat_map(|piece| gzip(piece, 6, DEFAULT)).collect();
    let index = check(&Ztoc::gzip(&blob, &tar, 20_000, 2), &blob, &tar);
    assert!(index.span_count() > 3);
}

#[test]
fn plain_layers() {
    let tar = zoo();
    for span in [4096, 100_000, 1 << 22] {
        let index = check(&Ztoc::plain(&tar, span), &tar, &tar);
        assert_eq!(index.span_count(), tar.len().div_ceil(span));
        assert!(index.spans().all(|s| s.digest_of == DigestOf::Decoded));
    }
}

/// What GNU tar fills up the last record with is in no zTOC.
#[test]
fn padding_behind_the_archive() {
    let mut tar = zoo();
    let archive_end = tar.len();
    tar.resize(tar.len() + 300_000, 0);
    let blob = gzip(&tar, 6, DEFAULT);
    let ztoc = Ztoc::gzip(&blob, &tar, 20_000, 2);
    assert_eq!(ztoc.size as usize, archive_end);
    let index = check(&ztoc, &blob, &tar);
    assert_eq!(index.layer_size() as usize, archive_end);
    assert!(index.span_count() <= ztoc.digests.len());
}

#[test]
fn entries_are_what_the_table_says() {
    let tar = zoo();
    let blob = gzip(&tar, 6, DEFAULT);
    let index = convert(&Ztoc::gzip(&blob, &tar, 20_000, 2), &blob, &tar).unwrap();
    let tool = index.entries().find(|e| e.path() == b"bin/tool").unwrap();
    assert_eq!((tool.kind(), tool.mode(), tool.uid(), tool.gid()), (EntryKind::File, 0o755, 5, 6));
    assert_eq!((tool.mtime().secs, tool.mtime().nanos), (1_600_000_000, 700_000_000));
    assert_eq!(tool.xattrs().collect::<Vec<_>>(), [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"2")]);
    assert_eq!((tool.size(), tool.content()), (90_000, None));
    assert_eq!(index.entry(0).path(), b"bin");
    let null = index.entries().find(|e| e.path() == b"null").unwrap();
    assert_eq!((null.kind(), null.rdev()), (EntryKind::CharDevice, (1, 3)));
}

#[test]
fn a_table_in_another_order_is_put_in_the_archives() {
    let tar = zoo();
    let blob = gzip(&tar, 6, DEFAULT);
    let mut ztoc = Ztoc::gzip(&blob, &tar, 20_000, 2);
    ztoc.files.reverse();
    check(&ztoc, &blob, &tar);
}

#[test]
fn times_that_the_text_cannot_say_come_from_pax() {
    let tar = zoo();
    let blob = gzip(&tar, 6, DEFAULT);
    let mut ztoc = Ztoc::gzip(&blob, &tar, 20_000, 2);
    ztoc.files[1].mtime.clear();
    check(&ztoc, &blob, &tar);
    ztoc.files[2].mtime.clear();
    assert!(convert(&ztoc, &blob, &tar).unwrap_err().to_string().contains("\"bin/alias\": its time"));
}

#[test]
fn lies_are_found() {
    let tar = zoo();
    let blob = gzip(&tar, 6, DEFAULT);
    let honest = Ztoc::gzip(&blob, &tar, 20_000, 2);
    let lies: [fn(&mut Ztoc); 7] = [
        |z| z.files[1].mode = 0o4755,
        |z| z.files[1].mtime = "2020-09-13T12:26:40Z".into(),
        |z| z.files[1].pax.clear(),
        |z| z.files[1].offset += 1,
        |z| z.files[1].size -= 1,
        |z| {
            z.files.pop();
        },
        |z| {
            let offset = z.files.last().unwrap().offset + 512;
            z.files.push(File { name: b"more".into(), offset, ..z.files[0].clone() });
        },
    ];
    let prove = |ztoc: &Ztoc| {
        let index = convert(ztoc, &blob, &tar).unwrap();
        prove_layer(&index, &blob[..], &mut Keep::default(), Cursor::new(Vec::new()), &small_spans())
    };
    prove(&honest).unwrap();
    for (i, tell) in lies.iter().enumerate() {
        let mut ztoc = honest.clone();
        tell(&mut ztoc);
        let found = prove(&ztoc);
        assert!(matches!(found, Err(IndexError::Lie(_))), "lie {i}: {found:?}");
    }
    let mut ztoc = honest;
    ztoc.digests.swap(0, 1);
    assert!(matches!(prove(&ztoc), Err(IndexError::Lie(Mismatch::Span { index: 0, .. }))));
}

#[test]
fn impossible_ones_are_refused() {
    let tar = zoo();
    let blob = gzip(&tar, 6, DEFAULT);
    let honest = Ztoc::gzip(&blob, &tar, 20_000, 2);
    let with = |edit: &dyn Fn(&mut Ztoc)| {
        let mut ztoc = honest.clone();
        edit(&mut ztoc);
        convert(&ztoc, &blob, &tar).map(drop)
    };
    with(&|_| ()).unwrap();
    let checkpoints = |edit: fn(&mut Vec<crate::common::ztoc::Point>)| {
        let mut points = points(&blob, 20_000);
        edit(&mut points);
        with(&|z| z.checkpoints = pack(&points, 2)).map(drop)
    };
    let cases: [(&str, Result<(), IndexError>); 25] = [
        ("version \"2.0\"", with(&|z| z.version = "2.0".into())),
        ("a blob of", with(&|z| z.blob_size += 1)),
        ("out of range", with(&|z| z.size = -1)),
        ("outside itself", with(&|z| z.size = 512)),
        ("compression 3", with(&|z| z.algorithm = 3)),
        ("another compression", with(&|z| z.algorithm = 2)),
        ("last span is number -1", with(&|z| z.last_span = -1)),
        ("last span is number 2147483647", with(&|z| z.last_span = i32::MAX)),
        ("digests of 0", with(&|z| z.digests.clear())),
        ("is no sha256", with(&|z| z.digests[1] = z.digests[1].to_uppercase())),
        ("is no sha256", with(&|z| z.digests[1] = "sha512:00".into())),
        ("do not make up", with(&|z| z.checkpoints.truncate(100))),
        ("are cut off", with(&|z| z.checkpoints.truncate(3))),
        (
            "has 1000000000 checkpoints",
            with(&|z| z.checkpoints[..4].copy_from_slice(&1_000_000_000u32.to_le_bytes())),
        ),
        ("not in order", checkpoints(|p| p.swap(1, 2))),
        ("checkpoint 1 is impossible", checkpoints(|p| p[1].bits = 9)),
        ("checkpoint 1 is impossible", checkpoints(|p| p[1].tar = -5)),
        ("outside the blob", checkpoints(|p| p.last_mut().unwrap().blob = i64::MAX)),
        ("type \"socket\"", with(&|z| z.files[1].kind = "socket".into())),
        ("overlaps the one before", with(&|z| z.files[2].offset = z.files[1].offset)),
        ("overlaps the one before", with(&|z| z.files[1].size += 512)),
        ("entry \"bin/tool\"", with(&|z| z.files[1].size = -1)),
        ("is no time", with(&|z| z.files[1].mtime = "yesterday".into())),
        ("sparse", with(&|z| z.files[1].pax.push((b"GNU.sparse.major".into(), b"1".into())))),
        ("\"../../etc/passwd\"", with(&|z| z.files[1].name = b"../../etc/passwd".into())),
    ];
    for (what, refused) in cases {
        let error = refused.err().unwrap_or_else(|| panic!("{what} is taken"));
        assert!(matches!(error, IndexError::BadTable { .. }), "{error:?}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
    let mut plain = Ztoc::plain(&tar, 4096);
    for (span, size) in [(0, tar.len()), (-4096, tar.len()), (4096, 1), (1, tar.len()), (i64::MAX, tar.len())]
    {
        plain.checkpoints = pack_plain(span, size as i64);
        assert!(convert(&plain, &tar, &tar).is_err(), "{span} {size}");
    }
}

/// Ten to the ninth entries that are all the same bytes, or of which there are only the first few.
#[test]
fn counts_that_lie_cost_nothing() {
    let tar = archive(3, 300, 1);
    let blob = gzip(&tar, 6, DEFAULT);
    let ztoc = Ztoc::gzip(&blob, &tar, 20_000, 2);
    let bytes = ztoc.bytes();
    let files = (ztoc.files.len() as u32).to_le_bytes();
    let mut tried = 0;
    for at in (0..bytes.len() - 4).step_by(4).filter(|&at| bytes[at..at + 4] == files) {
        let mut more = bytes.clone();
        more[at..at + 4].copy_from_slice(&1_000_000_000u32.to_le_bytes());
        let _ = ztoc_to_index(&more, &facts(&blob, &tar));
        tried += 1;
    }
    assert!(tried > 0);
    // Many entries with the same large attribute.
    let mut shared = ztoc;
    let mut first = shared.files[0].clone();
    first.pax = vec![(b"SCHILY.xattr.user.x".to_vec(), vec![b'x'; 60_000])];
    shared.files = (0..4000).map(|i| File { offset: 512 * (i + 1), size: 0, ..first.clone() }).collect();
    shared.share = true;
    let refused = ztoc_to_index(&shared.bytes(), &facts(&blob, &tar)).unwrap_err();
    assert!(refused.to_string().contains("again and again"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_ones_do_not_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        plain in any::<bool>(),
    ) {
        thread_local!(static ZTOCS: [(Vec<u8>, LayerFacts); 2] = {
            let tar = zoo();
            let blob = gzip(&tar, 6, DEFAULT);
            // No windows: they would take nearly all of the edits.
            let mut gzip = Ztoc::gzip(&blob, &tar, 1 << 30, 1);
            gzip.files.truncate(20);
            [(gzip.bytes(), facts(&blob, &tar)), (Ztoc::plain(&tar, 100_000).bytes(), facts(&tar, &tar))]
        });
        let (mut bytes, facts) = ZTOCS.with(|all| all[usize::from(plain)].clone());
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(index) = ztoc_to_index(&bytes, &facts) {
            let index = LayerIndex::from_bytes(index).unwrap();
            prop_assert!(index.entries().all(|e| e.path().len() < 4097));
        }
        let cut = bytes.len() / 3;
        prop_assert!(ztoc_to_index(&bytes[..cut], &facts).is_err());
    }
}
