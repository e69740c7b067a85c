//! zstd:chunked layers, real and made up, become indexes by their table alone.

use std::collections::HashMap;

use crate::common::make::{text, zstd};
use crate::tables_common::{Times, bytes, claim, facts, fixture, header, padding, same_as_tar, skippable};
use lazyrun_index::{Digest, DigestOf, LayerIndex, TableError, chunked, estargz};

#[test]
fn zeros_are_holes_where_they_are_long() {
    let fixture = fixture("chunked.tar.zst");
    let index = claim(&fixture.place(), fixture.packed(), &fixture.facts()).unwrap();
    let extents = |path: &str| -> Vec<(u64, u64)> {
        let entry = index.entries().find(|e| e.path() == path.as_bytes()).expect(path);
        entry.extents().map(|e| (e.file_offset, e.len)).collect()
    };
    // 5000 bytes, 200,000 zeros, 3100 bytes, 3000 zeros (too few), 700 bytes.
    assert_eq!(extents("sparse"), [(0, 8192), (204_800, 211_800 - 204_800)]);
    // 80,000 zeros and 4 bytes; 6 bytes and 80,000 zeros.
    assert_eq!(extents("zerostart"), [(77_824, 80_004 - 77_824)]);
    assert_eq!(extents("zeroend"), [(0, 4096)]);
    // One chunk only, of which the table does not say that it is zeros.
    assert_eq!(extents("zeros"), [(0, 70_000)]);
}

#[test]
fn real_times_have_fractions_and_zones() {
    let fixture = fixture("chunked.tar.zst");
    let index = claim(&fixture.place(), fixture.packed(), &fixture.facts()).unwrap();
    let mtime = |path: &str| index.entries().find(|e| e.path() == path.as_bytes()).unwrap().mtime();
    assert_eq!((mtime("bin/tool").secs, mtime("bin/tool").nanos), (1_611_111_111, 750_000_000));
    assert_eq!(mtime("etc/old").secs, -86_400);
    assert_eq!(mtime("etc/conf").secs, 0);
}

/// A made-up layer as today's writers make them: all of a file's data in frames of its own.
#[derive(Default)]
struct Layer {
    data: Vec<u8>,
    tar: Vec<u8>,
    json: String,
}

impl Layer {
    /// Appends a file of `chunks`; a chunk of nothing but zeros is told as such.
    fn file(&mut self, name: &str, chunks: &[&[u8]]) {
        let content = chunks.concat();
        self.tar.extend(header(name, content.len()));
        self.data.extend(zstd(&self.tar, 3));
        self.tar.clear();
        let (mut at, first) = (0, self.json.len());
        if chunks.is_empty() {
            self.json += &format!(r#"{{"type":"reg","name":"{name}","mode":420}},"#);
        }
        for (i, chunk) in chunks.iter().enumerate() {
            let kind = if i == 0 { "reg" } else { "chunk" };
            self.json +=
                &format!(r#"{{"type":"{kind}","name":"{name}","mode":420,"offset":{}"#, self.data.len());
            if i == 0 {
                let digest = Digest::of(&content);
                self.json += &format!(r#","size":{},"digest":"{digest}","endOffset":END"#, content.len());
            }
            if chunks.len() > 1 {
                let zeros = if chunk.iter().all(|&b| b == 0) { r#","chunkType":"zeros""# } else { "" };
                let (len, digest) = (chunk.len(), Digest::of(chunk));
                self.json +=
                    &format!(r#","chunkOffset":{at},"chunkSize":{len},"chunkDigest":"{digest}"{zeros}"#);
            }
            self.json += "},";
            self.data.extend(zstd(chunk, 3));
            at += chunk.len();
        }
        let end = self.json.split_off(first).replace("END", &self.data.len().to_string());
        self.json += &end;
        self.tar.extend(padding(content.len()));
    }

    /// The blob with its annotations.
    fn finish(mut self) -> (Vec<u8>, HashMap<String, String>) {
        self.tar.extend([0; 1024]);
        self.data.extend(zstd(&self.tar, 3));
        let json = format!(
            r#"{{"version":1,"entries":[{}],"tarSplitDigest":"{}"}}"#,
            self.json.trim_end_matches(','),
            Digest::of(b"split")
        );
        let packed = zstd(json.as_bytes(), 3);
        let toc = self.data.len() as u64 + 8;
        let mut blob = self.data;
        blob.extend(skippable(&packed));
        let split = blob.len() as u64 + 8;
        blob.extend(skippable(b"split"));
        let position = [toc, packed.len() as u64, json.len() as u64, 1];
        let mut footer: Vec<u8> =
            position.into_iter().chain([split, 5, 5]).flat_map(u64::to_le_bytes).collect();
        footer.extend(b"GNUlInUx");
        blob.extend(skippable(&footer));
        let annotations = HashMap::from([
            (chunked::CHECKSUM[0].to_owned(), Digest::of(&packed).to_string()),
            (chunked::POSITION[0].to_owned(), position.map(|n| n.to_string()).join(":")),
        ]);
        (blob, annotations)
    }
}

fn proven((blob, annotations): &(Vec<u8>, HashMap<String, String>)) -> LayerIndex {
    let size = blob.len() as u64;
    let place = chunked::locate(|key| annotations.get(key).map(String::as_str), size).unwrap().unwrap();
    assert!(place.bound());
    let tar = crate::common::index_blob(blob, &crate::common::small_spans()).unwrap();
    let facts = facts(blob, tar.summary.diff_id);
    let index = claim(&place, bytes(blob, &place.range().unwrap()), &facts).unwrap();
    same_as_tar(&index, blob, Times::Exact);
    // The footer finds the same table, but nothing vouches for it.
    let tail = bytes(blob, &chunked::tail_range(size));
    let unbound = chunked::locate_tail(tail, size, None).unwrap().unwrap();
    assert_eq!((unbound.range(), unbound.bound()), (place.range(), false));
    index
}

#[test]
fn layers_of_todays_writers() {
    let (a, b, c) = (text(3000, 1), text(70_000, 2), text(900, 3));
    let zeros = vec![0; 300_001];
    let mut layer = Layer::default();
    layer.file("one", &[&a]);
    layer.file("empty", &[]);
    layer.file("more", &[&a, &b, &c]);
    layer.file("all zeros", &[&zeros[..102_400], &zeros[..200_000]]);
    layer.file("holes", &[&zeros[..100_000], &a, &zeros, &c, &zeros[..5000], &b, &zeros]);
    layer.file("last", &[&c]);
    let index = proven(&layer.finish());
    assert!(index.spans().all(|s| s.restartable && s.digest_of == DigestOf::Decoded));
    let entry = |path: &str| index.entries().find(|e| e.path() == path.as_bytes()).unwrap();
    assert_eq!(entry("all zeros").extents().len(), 0);
    assert_eq!(entry("holes").extents().len(), 2);
    // What is stored is what is not a hole, in blocks.
    assert!(index.layer_size() < 2 * (3000 + 70_000 + 900) + 5000 + 40_000, "{}", index.layer_size());
    for e in index.entries().flat_map(|e| e.extents()) {
        assert!(e.layer_offset % 512 == 0 && e.file_offset % 4096 == 0, "{e:?}");
    }
}

#[test]
fn a_table_that_nobody_vouches_for_is_found_by_the_footer() {
    for (file, annotation) in [("estargz-zstd.tar.zst", true), ("chunked.tar.zst", false)] {
        let fixture = fixture(file);
        let size = fixture.blob.len() as u64;
        let tail = bytes(&fixture.blob, &chunked::tail_range(size));
        let digest = estargz::toc_digest(|key| fixture.annotation(key)).unwrap();
        let place = chunked::locate_tail(tail, size, digest).unwrap().unwrap();
        assert_eq!(place.range(), fixture.place().range());
        assert_eq!(place.bound(), annotation);
        let index = claim(&place, fixture.packed(), &fixture.facts()).unwrap();
        same_as_tar(&index, &fixture.blob, if annotation { Times::Rounded } else { Times::Exact });
        for len in 0..48 {
            assert_eq!(chunked::locate_tail(&tail[tail.len() - len..], size, None).unwrap(), None, "{len}");
        }
        for at in tail.len() - 48..tail.len() {
            let mut other = tail.to_vec();
            other[at] ^= 0x80;
            if let Ok(Some(found)) = chunked::locate_tail(&other, size, None) {
                let packed = bytes(&fixture.blob, &found.range().unwrap());
                assert!(found.index(packed, &fixture.facts()).is_err(), "byte {at}");
            }
        }
    }
}

#[test]
fn impossible_annotations_are_refused() {
    let at = |position: &'static str, checksum: &'static str| {
        chunked::locate(
            move |key| match key {
                _ if key == chunked::POSITION[1] => Some(position),
                _ if key == chunked::CHECKSUM[1] && !checksum.is_empty() => Some(checksum),
                _ => None,
            },
            1000,
        )
    };
    assert_eq!(chunked::locate(|_| None, 1000).unwrap(), None);
    assert!(!at("100:200:300:1", "").unwrap().unwrap().bound());
    assert_eq!(at("100:200:300:1", "").unwrap().unwrap().range(), Some(100..300));
    for position in [
        "",
        "100",
        "100:200:300",
        "100:200:300:1:1",
        "100:200:300:2",
        "-1:200:300:1",
        "+1:2:3:1",
        "a:b:c:d",
        "100::300:1",
        "7:200:300:1",
        "100:901:300:1",
        "100:0:300:1",
        "18446744073709551615:2:3:1",
        "18446744073709551616:2:3:1",
        "100:200:268435457:1",
        "100:200:10000000000:1",
        " 100:200:300:1",
    ] {
        assert!(at(position, "").is_err(), "{position}");
    }
    for checksum in ["sha256:00", "sha512:00", "00"] {
        assert!(matches!(at("100:200:300:1", checksum), Err(TableError::Place { .. })), "{checksum}");
    }
    let big = chunked::locate(|key| (key == chunked::POSITION[0]).then_some("100:67108865:300:1"), 1 << 40);
    assert!(matches!(big, Err(TableError::TooLarge { .. })), "{big:?}");
}
