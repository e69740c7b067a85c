//! A claimed index is proven by its layer, and every kind of lie in it is found.

use std::io::{self, Cursor};

use crate::common::make::{DEFAULT, gzip, zoo, zstd};
use crate::common::told::{Claim, Told};
use crate::common::{Keep, index_blob, small_spans};
use lazyrun_index::{
    Digest, DigestOf, EntryKind, Extent, IndexError, LayerIndex, LayerSink, Mismatch, NewEntrance, SpanInfo,
    StreamSummary, compare, hydrate_layer, prove_layer,
};

fn blobs() -> [Vec<u8>; 3] {
    let tar = zoo();
    let frames = tar.chunks(30_000).flat_map(|piece| zstd(piece, 3)).collect();
    [gzip(&tar, 6, DEFAULT), frames, tar]
}

fn prove_with(claim: &Claim, blob: &[u8], sink: &mut dyn LayerSink) -> Result<StreamSummary, IndexError> {
    let mut out = Cursor::new(Vec::new());
    let summary = prove_layer(&claim.index(), blob, sink, &mut out, &small_spans())?;
    // What comes out is the index that anybody would have built.
    let built = LayerIndex::from_bytes(out.into_inner()).unwrap();
    let own = index_blob(blob, &small_spans()).unwrap();
    assert!(built.spans().eq(own.index.spans()));
    assert!(built.entries().map(Told::of).eq(own.index.entries().map(Told::of)));
    assert_eq!(summary, own.summary);
    Ok(summary)
}

/// The lie found in a claim, by both ways of looking for it.
fn lie(claim: &Claim, blob: &[u8]) -> Mismatch {
    let own = index_blob(blob, &small_spans()).unwrap();
    let compared = compare(&claim.index(), &own.index).expect_err("the lie is in the entries");
    match prove_with(claim, blob, &mut Keep::default()) {
        Err(IndexError::Lie(mismatch)) => assert_eq!(mismatch, compared),
        other => panic!("{other:?} instead of {compared}"),
    }
    compared
}

#[test]
fn the_truth_is_proven() {
    for blob in blobs() {
        let own = index_blob(&blob, &small_spans()).unwrap();
        assert!(own.summary.spans > 3);
        for digest_of in [DigestOf::Decoded, DigestOf::Blob, DigestOf::Nothing] {
            let claim = match digest_of {
                DigestOf::Decoded => Claim::of(&own.index),
                other => Claim::of(&own.index).with_digests(other, &blob),
            };
            compare(&claim.index(), &own.index).unwrap();
            let mut keep = Keep::default();
            prove_with(&claim, &blob, &mut keep).unwrap();
            assert!(keep.data == own.layer);
            let told: Vec<_> = keep.spans.iter().map(|s| (s.offset, s.len, s.digest, s.digest_of)).collect();
            let want: Vec<_> =
                own.index.spans().map(|s| (s.offset, s.len, s.digest, DigestOf::Decoded)).collect();
            assert_eq!(told, want, "{digest_of:?}: every span with the digest of its decoded bytes");
            let mut keep = Keep::default();
            hydrate_layer(&claim.index(), &blob[..], &mut keep).unwrap();
            assert!(keep.data == own.layer && keep.spans.len() == want.len());
        }
        let mut keep = Keep::default();
        let table = Claim::table(&own.index);
        prove_with(&table, &blob, &mut keep).unwrap();
        assert!(
            keep.data == own.layer && keep.spans.is_empty(),
            "the tar passes, not the table's layer file"
        );
        assert_eq!(keep.progress, blob.len() as u64);
        let refused = hydrate_layer(&table.index(), &blob[..], &mut ());
        assert!(matches!(refused, Err(IndexError::TableLayout)));
    }
}

/// Notes how much of the layer file had passed when the first span was told.
#[derive(Default)]
struct First {
    passed: u64,
    first: Option<u64>,
}

impl LayerSink for First {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.passed = offset + bytes.len() as u64;
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        self.first.get_or_insert(self.passed);
        Ok(())
    }
}

/// Spans with digests of the blob's ranges are told as they pass, also when the first one starts behind the gzip
/// header as SOCI's do; those without digests only at the end.
#[test]
fn spans_are_told_as_soon_as_they_are_proven() {
    let mut tar = zoo();
    tar.truncate(tar.len() - 1024);
    let more: Vec<u8> = (0..20).flat_map(|_| tar.clone()).collect();
    let blob = gzip(&more, 6, DEFAULT);
    let own = index_blob(&blob, &small_spans()).unwrap();
    let early = |claim: &Claim| {
        let mut first = First::default();
        prove_with(claim, &blob, &mut first).unwrap();
        assert_eq!(first.passed, own.layer.len() as u64);
        first.first.unwrap() < first.passed
    };
    let mut claim = Claim::of(&own.index);
    assert!(early(&claim));
    claim.spans[0].blob_offset += 10;
    claim.spans[0].blob_len -= 10;
    let claim = claim.with_digests(DigestOf::Blob, &blob);
    assert!(early(&claim));
    assert!(!early(&claim.clone().with_digests(DigestOf::Nothing, &blob)));
    // A gap that is not just the header: nothing before the end says where the data really starts.
    let mut gap = claim;
    gap.spans[0].blob_offset += 5;
    gap.spans[0].blob_len -= 5;
    assert!(!early(&gap.with_digests(DigestOf::Blob, &blob)));
}

type Lie = (&'static str, fn(&mut Claim));

/// Lies that tell in every layout, and what the error has to name.
const LIES: [Lie; 17] = [
    ("\"bin/tool\": the index says mode 4755", |c| c.entry("bin/tool").mode = 0o4755),
    ("uid 0", |c| c.entry("bin/tool").uid = 0),
    ("gid 0", |c| c.entry("bin").gid = 0),
    ("size 8999", |c| {
        let entry = c.entry("lib/7");
        entry.size -= 1;
        entry.extents[0].len -= 1;
    }),
    ("mtime", |c| c.entry("pipe").mtime.secs += 1),
    ("mtime", |c| c.entry("bin/tool").mtime.nanos += 1),
    ("extended attribute \"user.a\"=\"2\"", |c| c.entry("bin/tool").xattrs[0].1 = b"2".to_vec()),
    ("extended attribute no other", |c| {
        c.entry("bin/tool").xattrs.pop();
    }),
    ("extended attribute \"security.capability\"", |c| {
        c.entry("lib/3").xattrs.push((b"security.capability".to_vec(), b"x".to_vec()));
    }),
    ("link target \"/etc\"", |c| c.entry("bin/alias").link = b"/etc".to_vec()),
    ("link target \"lib/1\"", |c| c.entry("bin/second").link = b"lib/1".to_vec()),
    ("device number 1:5", |c| c.entry("null").rdev = (1, 5)),
    ("kind", |c| c.entry("null").kind = EntryKind::BlockDevice),
    ("content", |c| c.entry("lib/9").content = Some(Digest::of(b"another"))),
    ("the index lists it", |c| {
        let mut more = c.entry("empty").clone();
        more.path = b"zzz".to_vec();
        c.entries.push(more);
    }),
    ("\"empty\": the layer has it, the index leaves it out", |c| {
        c.entries.pop();
    }),
    ("", |c| c.entry("lib/4").path = b"lib/four".to_vec()),
];

#[test]
fn every_lie_about_an_entry_is_found() {
    let blob = gzip(&zoo(), 6, DEFAULT);
    let own = index_blob(&blob, &small_spans()).unwrap();
    for (what, tell) in LIES {
        for truth in [Claim::of(&own.index), Claim::table(&own.index)] {
            let mut claim = truth;
            tell(&mut claim);
            let found = lie(&claim, &blob);
            assert!(found.to_string().contains(what), "{what}: {found}");
            assert!(found.path().is_some());
        }
    }
    // A digest that is left out is no lie.
    let mut claim = Claim::of(&own.index);
    claim.entries.iter_mut().for_each(|e| e.content = None);
    prove_with(&claim, &blob, &mut Keep::default()).unwrap();
}

#[test]
fn extents_and_order_of_a_tar_are_compared() {
    let blob = gzip(&zoo(), 6, DEFAULT);
    let own = index_blob(&blob, &small_spans()).unwrap();
    let lies: [fn(&mut Claim); 4] = [
        // The right digest, but another file's bytes.
        |c| c.entry("lib/1").extents[0].layer_offset = c.entry("lib/2").extents[0].layer_offset,
        |c| c.entry("lib/1").extents.clear(),
        |c| {
            let Extent { layer_offset, .. } = c.entry("lib/1").extents[0];
            c.entry("lib/1").extents = vec![
                Extent { file_offset: 0, layer_offset, len: 4000 },
                Extent { file_offset: 4500, layer_offset: layer_offset + 4500, len: 4500 },
            ];
        },
        |c| c.entries.swap(10, 11),
    ];
    for tell in lies {
        let mut claim = Claim::of(&own.index);
        tell(&mut claim);
        lie(&claim, &blob);
        claim.layout = lazyrun_index::Layout::Table;
        prove_with(&claim, &blob, &mut Keep::default()).expect("a table has its own order and extents");
    }
    // Whole seconds where the tar has a fraction: a table may round, a tar's index knows better.
    for (secs, fine) in [(1_600_000_000, true), (1_600_000_001, true), (1_600_000_002, false)] {
        let mut claim = Claim::table(&own.index);
        claim.entry("bin/tool").mtime = lazyrun_index::Timestamp { secs, nanos: 0 };
        assert_eq!(compare(&claim.index(), &own.index).is_ok(), fine, "{secs}");
        claim.layout = lazyrun_index::Layout::Tar;
        lie(&claim, &blob);
    }
}

#[test]
fn lies_about_spans_are_found_and_not_told() {
    for blob in blobs() {
        let own = index_blob(&blob, &small_spans()).unwrap();
        for digest_of in [DigestOf::Decoded, DigestOf::Blob] {
            let mut claim = Claim::of(&own.index);
            if digest_of == DigestOf::Blob {
                claim = claim.with_digests(digest_of, &blob);
            }
            let wrong = claim.spans.len() / 2;
            claim.spans[wrong].digest = Digest::of(b"another");
            let mut keep = Reports::default();
            match prove_with(&claim, &blob, &mut keep) {
                Err(IndexError::Lie(Mismatch::Span { index, .. })) => assert_eq!(index as usize, wrong),
                other => panic!("{other:?}"),
            }
            assert!(!keep.0.contains(&(wrong as u32)));
            let refused = hydrate_layer(&claim.index(), &blob[..], &mut Reports::default());
            assert!(matches!(refused, Err(IndexError::DigestMismatch { .. })), "{refused:?}");
        }
    }
}

/// The numbers of the spans that were told.
#[derive(Default)]
struct Reports(Vec<u32>);

impl LayerSink for Reports {
    fn data(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn span(&mut self, span: &SpanInfo) -> io::Result<()> {
        self.0.push(span.index);
        Ok(())
    }
}

/// SOCI's tables do not know of padding behind the archive.
#[test]
fn the_length_of_the_layer_file() {
    let mut tar = zoo();
    tar.resize(tar.len() + 9000, 0);
    let own = index_blob(&tar, &small_spans()).unwrap();
    let mut claim = Claim::of(&own.index).with_digests(DigestOf::Blob, &tar);
    let last = claim.spans.last_mut().unwrap();
    last.len -= 1;
    last.blob_len -= 1;
    last.entrance = NewEntrance::Plain;
    let short = claim.clone().with_digests(DigestOf::Blob, &tar);
    let mut keep = Keep::default();
    prove_with(&short, &tar, &mut keep).unwrap();
    assert!(keep.data == tar);
    let mut decoded = short;
    for span in &mut decoded.spans {
        span.digest_of = DigestOf::Decoded;
    }
    let found = prove_with(&decoded, &tar, &mut Keep::default());
    assert!(matches!(found, Err(IndexError::Lie(Mismatch::LayerSize { .. }))), "{found:?}");
    // Longer than it is: the span that does not exist cannot be proven either.
    let blob = gzip(&tar, 6, DEFAULT);
    let own = index_blob(&blob, &small_spans()).unwrap();
    let mut claim = Claim::of(&own.index).with_digests(DigestOf::Nothing, &blob);
    claim.spans.last_mut().unwrap().len += 1;
    let found = prove_with(&claim, &blob, &mut Reports::default());
    assert!(matches!(found, Err(IndexError::Lie(Mismatch::LayerSize { .. }))), "{found:?}");
}

/// A damaged blob is not a lie, whether the claim is true or not.
#[test]
fn a_damaged_blob_is_told_apart_from_a_lie() {
    for blob in blobs() {
        let own = index_blob(&blob, &small_spans()).unwrap();
        let truth = Claim::of(&own.index);
        let mut lying = truth.clone();
        lying.entry("bin/tool").mode = 0o4755;
        let mut wrong_span = truth.clone().with_digests(DigestOf::Blob, &blob);
        wrong_span.spans[1].digest = Digest::of(b"another");
        for claim in [&truth, &lying, &wrong_span, &Claim::table(&own.index)] {
            for at in [9, blob.len() / 2, blob.len() - 3] {
                let mut damaged = blob.clone();
                damaged[at] ^= 0x10;
                let mut reports = Reports::default();
                let out = Cursor::new(Vec::new());
                let found =
                    prove_layer(&claim.index(), &damaged[..], &mut reports, out, &small_spans()).unwrap_err();
                assert!(!matches!(found, IndexError::Lie(_)), "byte {at}: {found}");
            }
            let out = Cursor::new(Vec::new());
            let cut = prove_layer(&claim.index(), &blob[..blob.len() - 1], &mut (), out, &small_spans());
            assert!(!matches!(cut, Err(IndexError::Lie(_)) | Ok(_)), "{cut:?}");
        }
        // Another layer's blob, sound in itself.
        let other = gzip(&crate::common::make::archive(3, 100, 1), 6, DEFAULT);
        let out = Cursor::new(Vec::new());
        let found = prove_layer(&truth.index(), &other[..], &mut Reports::default(), out, &small_spans());
        assert!(matches!(found, Err(IndexError::DigestMismatch { .. })), "{found:?}");
        // The image says another diffID than its blob has: neither damage nor a lie of the index.
        let mut image = truth;
        image.facts.diff_id = Digest::of(b"another");
        let found = prove_with(&image, &blob, &mut Keep::default());
        assert!(matches!(found, Err(IndexError::DigestMismatch { .. })), "{found:?}");
    }
}

/// Makes a plain tar of empty entries: a name that ends with `/` is a directory, `a -> b` a hard link.
fn sketch(entries: &[&str]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        if let Some((name, target)) = entry.split_once(" -> ") {
            header.set_entry_type(tar::EntryType::Link);
            tar.append_link(&mut header, name, target).unwrap();
            continue;
        }
        let kind = if entry.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular };
        header.set_entry_type(kind);
        tar.append_data(&mut header, entry, &b""[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn tables_in_any_order_as_long_as_it_does_not_matter() {
    let verdict = |layer: &[&str], table: &[&str]| {
        let layer = index_blob(&sketch(layer), &small_spans()).unwrap();
        let mut claim = Claim::table(&index_blob(&sketch(table), &small_spans()).unwrap().index);
        claim.facts.blob_digest = layer.summary.blob_digest;
        compare(&claim.index(), &layer.index)
    };
    for (layer, table) in [
        (&["a/", "a/b", "c"][..], &["c", "a/b", "a/"][..]),
        (&["a", "a", "b"], &["b", "a"]),
        (&["a", "b"], &["b", "a", "a"]),
        (&["a", "stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"], &["a"]),
        (&["a", ".no.prefetch.landmark"], &[".no.prefetch.landmark", "a"]),
        (&["a", "b -> a", "c"], &["c", "a", "b -> a"]),
        (&["b -> earlier"], &["b -> earlier"]),
    ] {
        verdict(layer, table).unwrap_or_else(|e| panic!("{layer:?} {table:?}: {e}"));
    }
    for (layer, table) in [
        // What looks like a table's file, but is none.
        (&["a", "d/stargz.index.json"][..], &["a"][..]),
        (&["a", ".prefetch.landmark/"], &["a"]),
        (&["a"], &["a", ".prefetch.landmark"]),
        // A directory that the tar does not name would hide an earlier layer's owner and mode.
        (&["a/b"], &["a/", "a/b"]),
        (&["a/b"], &["a/b", "a/"]),
        // A directory that was replaced.
        (&["a/", "a/b", "a"], &["a", "a/b"]),
        (&["a/b", "a"], &["a", "a/b"]),
        (&["a/", "a/b", "a", "a/"], &["a/", "a/b"]),
        // Links to a file that is replaced, or comes later.
        (&["a", "b -> a", "a"], &["a", "b -> a"]),
        (&["b -> a", "a"], &["a", "b -> a"]),
        (&["a", "b -> a"], &["b -> a", "a"]),
    ] {
        let found = verdict(layer, table);
        assert!(found.is_err(), "{layer:?} {table:?}");
        assert!(found.unwrap_err().path().is_some());
    }
}

/// Looking up each parent of each path took minutes for tables of deep paths.
#[test]
fn deep_paths_are_compared_at_once() {
    let names: Vec<String> = (0..3000).map(|i| format!("{}{i}", "a/".repeat(2000))).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let layer = index_blob(&sketch(&names), &small_spans()).unwrap();
    let claim = Claim::table(&layer.index).index();
    let began = std::time::Instant::now();
    compare(&claim, &layer.index).unwrap();
    let took = began.elapsed();
    assert!(took < std::time::Duration::from_secs(3), "{took:?} for 3000 entries");
}
