//! eStargz layers, real and made up, become indexes by their table alone.

use crate::common::make::{DEFAULT, gzip, text};
use std::io::Cursor;

use crate::tables_common::{
    Times, claim, decode, facts, fixture, fixtures, footer, header, pack, padding, same_as_tar, stargz_footer,
};
use lazyrun_index::{
    Digest, DigestOf, IndexError, LayerIndex, StreamOptions, TableError, TocPlace, compare, estargz,
    prove_layer,
};

#[test]
fn real_layers_are_what_their_tar_says() {
    for fixture in fixtures() {
        let index = claim(&fixture.place(), fixture.packed(), &fixture.facts()).expect(&fixture.file);
        let times = if fixture.file.starts_with("estargz") { Times::Rounded } else { Times::Exact };
        same_as_tar(&index, &fixture.blob, times);
        assert!(index.entry_count() > 20 && index.span_count() > 10, "{}", fixture.file);
        assert!(index.spans().all(|s| s.restartable && s.digest_of == DigestOf::Decoded));
        for entry in index.entries() {
            assert!(entry.extents().all(|e| e.layer_offset % 512 == e.file_offset % 512), "{entry:?}");
        }
    }
}

#[test]
fn real_layers_are_proven_by_their_blob() {
    for fixture in fixtures() {
        let index = claim(&fixture.place(), fixture.packed(), &fixture.facts()).unwrap();
        let mut out = Cursor::new(Vec::new());
        let proven = prove_layer(&index, &fixture.blob[..], &mut (), &mut out, &StreamOptions::default());
        assert_eq!(proven.expect(&fixture.file).diff_id, fixture.diff_id);
        compare(&index, &LayerIndex::from_bytes(out.into_inner()).unwrap()).expect(&fixture.file);
    }
}

#[test]
fn a_table_that_lies_about_its_layer_is_found_out() {
    let a = text(5000, 1);
    let true_layer = layer(&[("a", &a), ("b", b"b"), ("none", b"")], &["a", "b"], 2048);
    let end = stargz_footer(true_layer.data.len());
    true_layer.proven(&end);
    let digest = Digest::of(b"b").to_string();
    for (path, from, to) in [
        ("a", r#""mode":420"#, r#""mode":2541"#),
        ("b", r#""name":"b","type":"reg","size":1,"#, r#""name":"b","type":"fifo","#),
        ("b", r#""name":"b","#, r#""name":"b","uid":1000,"#),
        ("none", r#""name":"none","#, r#""name":"none","modtime":"2020-01-01T00:00:00Z","#),
        ("b", r#""name":"b""#, r#""name":"c""#),
        ("b", &*format!(r#""chunkDigest":"{digest}""#), &*format!(r#""digest":"{}""#, Digest::of(b"c"))),
        ("none", r#",{"name":"none","type":"reg","mode":420}"#, ""),
    ] {
        let lie = Layer { data: true_layer.data.clone(), json: true_layer.json.replacen(from, to, 1) };
        assert_ne!(lie.json, true_layer.json, "{from}");
        let (place, packed, blob) = lie.with_footer(&end);
        let diff_id =
            crate::common::index_blob(&blob, &crate::common::small_spans()).unwrap().summary.diff_id;
        let index = claim(&place, &packed, &facts(&blob, diff_id)).unwrap();
        let out = Cursor::new(Vec::new());
        let found = prove_layer(&index, &blob[..], &mut (), out, &StreamOptions::default());
        let Err(IndexError::Lie(mismatch)) = found else { panic!("{to}: {found:?}") };
        assert_eq!(mismatch.path(), Some(path.as_bytes()), "{mismatch}");
    }
}

#[test]
fn real_layers_have_chunks_inside_of_members() {
    for (file, inside) in [
        ("estargz-default.tar.gz", false),
        ("estargz-minchunk.tar.gz", true),
        ("estargz-lossless.tar.gz", true),
    ] {
        let fixture = fixture(file);
        let index = claim(&fixture.place(), fixture.packed(), &fixture.facts()).unwrap();
        let starts: Vec<u64> = index.spans().map(|s| s.blob_offset).collect();
        let members: std::collections::BTreeSet<_> = starts.iter().collect();
        assert_eq!(members.len() < starts.len(), inside, "{file}");
    }
}

#[test]
fn real_layers_are_bound_and_say_what_to_prefetch() {
    for (file, first) in [
        ("estargz.tar.gz", None),
        ("estargz-prefetch.tar.gz", Some(3000_u64.next_multiple_of(512) + 11_000_u64.next_multiple_of(512))),
        ("estargz-zstd.tar.zst", Some(3000_u64.next_multiple_of(512))),
        ("chunked.tar.zst", None),
    ] {
        let fixture = fixture(file);
        let info = fixture.place().index(fixture.packed(), &fixture.facts()).unwrap().info;
        assert!(info.bound, "{file}");
        assert_eq!(info.undigested, 0);
        assert_eq!(info.prefetch, first.map(|end| 0..end), "{file}");
    }
}

#[test]
fn a_table_other_than_the_manifest_says_is_refused() {
    for fixture in fixtures() {
        let mut packed = fixture.packed().to_vec();
        let at = packed.len() / 2;
        packed[at] ^= 1;
        assert!(fixture.place().index(&packed, &fixture.facts()).is_err());
        packed.pop();
        let refused = fixture.place().index(&packed, &fixture.facts());
        assert!(refused.is_err(), "{}", fixture.file);
        if fixture.table.is_none() {
            assert!(matches!(refused, Err(TableError::Length { .. })), "{refused:?}");
        }
        let mut other = fixture.facts();
        other.blob_size = 100;
        assert!(matches!(fixture.place().index(fixture.packed(), &other), Err(TableError::Place { .. })));
    }
    let fixture = fixture("estargz.tar.gz");
    let size = fixture.blob.len() as u64;
    let wrong = estargz::locate(&fixture.blob, size, Some(Digest::of(b"other"))).unwrap().unwrap();
    let refused = wrong.index(fixture.packed(), &fixture.facts());
    assert!(matches!(refused, Err(TableError::Digest { .. })), "{refused:?}");
    let unbound = estargz::locate(&fixture.blob, size, None).unwrap().unwrap();
    assert!(!unbound.bound());
    assert!(!unbound.index(fixture.packed(), &fixture.facts()).unwrap().info.bound);
}

/// A made-up layer whose members hold what `cuts` says: a new one starts in front of the data of these files.
struct Layer {
    data: Vec<u8>,
    json: String,
}

fn layer(files: &[(&str, &[u8])], cuts: &[&str], chunk: usize) -> Layer {
    let mut layer = Layer { data: Vec::new(), json: String::new() };
    let mut member = Vec::new();
    for (name, content) in files {
        member.extend(header(name, content.len()));
        if content.is_empty() {
            layer.json += &format!(r#"{{"name":"{name}","type":"reg","mode":420}},"#);
        }
        for (i, part) in content.chunks(chunk).enumerate() {
            if cuts.contains(name) {
                layer.data.extend(gzip(&member, 6, DEFAULT));
                member.clear();
            }
            let (kind, size) = if i == 0 {
                ("reg", format!(r#""size":{},"#, content.len()))
            } else {
                ("chunk", String::new())
            };
            let chunk_size = if (i + 1) * chunk < content.len() { part.len() } else { 0 };
            layer.json += &format!(
                r#"{{"name":"{name}","type":"{kind}",{size}"offset":{},"innerOffset":{},"chunkOffset":{},
                "chunkSize":{chunk_size},"mode":420,"chunkDigest":"{}"}},"#,
                layer.data.len(),
                member.len(),
                i * chunk,
                Digest::of(part)
            );
            member.extend_from_slice(part);
        }
        member.extend(padding(content.len()));
    }
    member.extend([0; 1024]);
    layer.data.extend(gzip(&member, 6, DEFAULT));
    layer.json = format!(r#"{{"version":1,"entries":[{}]}}"#, layer.json.trim_end_matches(','));
    layer
}

impl Layer {
    /// Where the table is, the packed table, the blob.
    fn with_footer(&self, end: &[u8]) -> (TocPlace, Vec<u8>, Vec<u8>) {
        let (mut blob, packed) = (self.data.clone(), pack(&self.json));
        if !end.ends_with(&footer(b"SG\x11\0STARGZEXTERNALTOC")) {
            blob.extend(&packed);
        }
        blob.extend(end);
        let size = blob.len() as u64;
        let digest = Some(Digest::of(self.json.as_bytes()));
        let tail = crate::tables_common::bytes(&blob, &estargz::tail_range(size));
        let place = estargz::locate(tail, size, digest).unwrap().expect("a footer");
        (place, packed, blob)
    }

    /// The index, proven by the tar.
    fn proven(&self, end: &[u8]) -> LayerIndex {
        let (place, packed, blob) = self.with_footer(end);
        let tar = crate::common::index_blob(&blob, &crate::common::small_spans()).unwrap();
        let index = claim(&place, &packed, &facts(&blob, tar.summary.diff_id)).unwrap();
        same_as_tar(&index, &blob, Times::Rounded);
        index
    }
}

#[test]
fn several_chunks_in_one_member_are_found_by_their_inner_offset() {
    let (a, b, c) = (text(3000, 1), text(10_000, 2), text(700, 3));
    let files: [(&str, &[u8]); 4] = [("a", &a), ("b", &b), ("none", b""), ("c", &c)];
    for cuts in [&[][..], &["b"], &["a", "c"], &["a", "b", "c"]] {
        for chunk in [1 << 20, 4096, 1000] {
            let layer = layer(&files, cuts, chunk);
            let index = layer.proven(&stargz_footer(layer.data.len()));
            assert_eq!(
                index.span_count(),
                [&a, &b, &c].iter().map(|f| f.len().div_ceil(chunk)).sum::<usize>()
            );
        }
    }
}

#[test]
fn the_old_footer_and_the_one_for_external_tables_are_known() {
    let a = text(5000, 1);
    let layer = layer(&[("a", &a)], &["a"], 2048);
    layer.proven(&footer(format!("{:016x}STARGZ", layer.data.len()).as_bytes()));
    let external = footer(b"SG\x11\0STARGZEXTERNALTOC");
    layer.proven(&external);
    let (place, packed, _) = layer.with_footer(&external);
    assert_eq!(place.range(), None);
    assert!(place.max_len() > packed.len() as u64);
}

#[test]
fn ranges_end_where_the_next_member_starts() {
    let (a, b) = (text(3000, 1), text(3000, 2));
    let layer = layer(&[("a", &a), ("b", &b)], &["a", "b"], 1 << 20);
    let index = layer.proven(&stargz_footer(layer.data.len()));
    let [first, second] = [index.span(0), index.span(1)];
    assert_eq!(first.blob_offset + first.blob_len, second.blob_offset);
    assert_eq!(second.blob_offset + second.blob_len, layer.data.len() as u64);
    // However much comes after a chunk, no more than it can need is fetched.
    let far = pack(&format!(
        r#"{{"version":1,"entries":[{{"name":"a","type":"reg","size":3000,"offset":{}}}]}}"#,
        first.blob_offset
    ));
    let toc = 1 << 40;
    let size = toc + far.len() as u64 + 51;
    let place = estargz::locate(&stargz_footer(toc as usize), size, None).unwrap().unwrap();
    let facts = lazyrun_index::LayerFacts { blob_size: size, ..facts(&layer.data, Digest::of(b"")) };
    let index = claim(&place, &far, &facts).unwrap();
    assert!(index.span(0).blob_len < 1 << 20);
    assert_eq!(index.span(0).digest_of, DigestOf::Nothing);
    assert_eq!(place.index(&far, &facts).unwrap().info.undigested, 1);
}

#[test]
fn the_digest_of_a_file_serves_for_its_only_chunk() {
    let a = text(3000, 1);
    let mut layer = layer(&[("a", &a)], &["a"], 1 << 20);
    layer.json = layer.json.replace("chunkDigest", "digest");
    let index = layer.proven(&stargz_footer(layer.data.len()));
    assert_eq!(index.span(0).digest_of, DigestOf::Decoded);
    assert_eq!(index.entry(0).content(), Some(Digest::of(&a)));
}

#[test]
fn other_tails_are_no_footers() {
    let good = stargz_footer(100);
    assert!(estargz::locate(&good, 1000, None).unwrap().is_some());
    for len in 0..good.len() {
        assert_eq!(estargz::locate(&good[good.len() - len..], 1000, None).unwrap(), None, "{len}");
    }
    for at in (0..4).chain(10..good.len() - 13) {
        let mut other = good.clone();
        other[at] ^= 0x80;
        assert_eq!(estargz::locate(&other, 1000, None).unwrap(), None, "byte {at}");
    }
    for bad in ["-000000000000001", "+000000000000001", " 000000000000001", "000000000000001g"] {
        let footer = footer(format!("SG\x16\0{bad}STARGZ").as_bytes());
        assert_eq!(estargz::locate(&footer, 1000, None).unwrap(), None, "{bad}");
    }
    for (offset, size) in [(949, 1000), (1000, 1000), (usize::MAX, 1000), (0, 1 << 30)] {
        let refused = estargz::locate(&stargz_footer(offset), size, None);
        assert!(refused.is_err(), "{offset} {size} {refused:?}");
    }
    assert_eq!(estargz::locate(&good, 51, None).unwrap(), None);
    assert_eq!(estargz::tail_range(10), 0..10);
    let bad = |_: &str| Some("sha256:ABC");
    assert!(matches!(estargz::toc_digest(bad), Err(TableError::Place { .. })));
    assert_eq!(estargz::toc_digest(|_| None).unwrap(), None);
}

#[test]
fn an_empty_table_is_an_empty_layer() {
    for entries in ["null", "[]"] {
        let layer = Layer {
            data: gzip(&[0; 1024], 6, DEFAULT),
            json: format!(r#"{{"version":1,"entries":{entries}}}"#),
        };
        let index = layer.proven(&stargz_footer(layer.data.len()));
        assert_eq!((index.entry_count(), index.layer_size()), (0, 0));
        assert!(decode(&index, b"").is_empty());
    }
}
