//! Tables that lie about themselves: each is refused with a sentence that names the entry, in bounded memory.

use crate::common::make::zstd;
use crate::tables_common::{bytes, fixtures, pack, stargz_footer};
use lazyrun_index::{Compression, Digest, LayerFacts, LayerIndex, TableError, TocPlace, chunked, estargz};
use proptest::prelude::*;

/// Where the made-up layers' contents end.
const DATA: u64 = 100_000;

/// The index of a layer whose table has these entries.
fn index(entries: &str) -> Result<LayerIndex, TableError> {
    table(&format!(r#"{{"version":1,"entries":[{entries}]}}"#))
}

fn table(json: &str) -> Result<LayerIndex, TableError> {
    let packed = pack(json);
    let blob_size = DATA + packed.len() as u64 + 51;
    let place = estargz::locate(&stargz_footer(DATA as usize), blob_size, None).unwrap().unwrap();
    claim(&place, &packed, blob_size, Compression::Gzip)
}

/// The same as a zstd:chunked layer.
fn chunked_index(entries: &str) -> Result<LayerIndex, TableError> {
    let json = format!(r#"{{"version":1,"entries":[{entries}]}}"#);
    let packed = zstd(json.as_bytes(), 3);
    frames(&packed, json.len() as u64)
}

/// The index of a zstd:chunked layer whose table is packed like this.
fn frames(packed: &[u8], json_len: u64) -> Result<LayerIndex, TableError> {
    let position = format!("{}:{}:{json_len}:1", DATA + 8, packed.len());
    let blob_size = DATA + 8 + packed.len() as u64;
    let annotation = |key: &str| (key == chunked::POSITION[0]).then_some(position.as_str());
    let place = chunked::locate(annotation, blob_size)?.expect("an annotation");
    claim(&place, packed, blob_size, Compression::Zstd)
}

fn claim(
    place: &TocPlace,
    packed: &[u8],
    blob_size: u64,
    compression: Compression,
) -> Result<LayerIndex, TableError> {
    let zero = Digest::from_bytes([0; 32]);
    crate::tables_common::claim(
        place,
        packed,
        &LayerFacts { blob_digest: zero, blob_size, diff_id: zero, compression },
    )
}

/// The refusal has all of `words`.
#[track_caller]
fn refused(result: Result<LayerIndex, TableError>, words: &[&str]) {
    let error = result.expect_err("the table must be refused").to_string();
    for word in words {
        assert!(error.contains(word), "{word:?} is missing: {error}");
    }
    assert!(error.len() < 600, "{error}");
}

const SHA: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn names_stay_inside_the_root() {
    for name in
        ["../x", "a/../x", "..", "/../x", "a\\u0000b", &"y".repeat(300), &"y/".repeat(3000), "caf\\ufffd"]
    {
        refused(index(&format!(r#"{{"name":"{name}","type":"dir"}}"#)), &["entry that cannot be taken"]);
    }
    refused(index(r#"{"type":"dir"}"#), &["no name"]);
    refused(index(r#"{"name":"","type":"dir"}"#), &["no name"]);
    // Go's readers would take this one; the table's own fields are case-sensitive.
    refused(index(r#"{"Name":"a","type":"dir"}"#), &["no name"]);
    refused(index(r#"{"name":"./","type":"symlink","linkName":"x"}"#), &["root is no directory"]);
    let index = index(r#"{"name":"./","type":"dir"},{"name":"//a/./b/","type":"dir"}"#).unwrap();
    assert_eq!(index.entries().map(|e| e.path()).collect::<Vec<_>>(), [&b""[..], b"a/b"]);
}

#[test]
fn names_are_not_said_twice() {
    for pair in ["a|/a/", "x/y|x//y", "|/"] {
        let (one, two) = pair.split_once('|').unwrap();
        let one = if one.is_empty() { "/" } else { one };
        let entries = format!(r#"{{"name":"{one}","type":"dir"}},{{"name":"{two}","type":"dir"}}"#);
        refused(index(&entries), &["two entries with this name"]);
    }
}

#[test]
fn only_directories_have_something_in_them() {
    for kind in [r#""reg""#, r#""fifo""#, r#""symlink","linkName":"/etc""#, r#""hardlink","linkName":"f""#] {
        let file = format!(
            r#"{{"name":"f","type":"reg"}},{{"name":"a","type":{kind}}},{{"name":"a-b","type":"dir"}}"#
        );
        assert!(index(&file).is_ok());
        let under = format!(r#"{file},{{"name":"a/b/c","type":"reg"}}"#);
        refused(index(&under), &["\"a/b/c\"", "\"a\", which is no directory"]);
    }
}

#[test]
fn hard_links_have_a_target() {
    let link = |target: &str| format!(r#"{{"name":"l","type":"hardlink","linkName":"{target}"}}"#);
    for target in ["", "/", ".", "../x", "a\\ufffd"] {
        refused(index(&link(target)), &["\"l\"", "hard link"]);
    }
    for target in ["x", "l"] {
        refused(index(&link(target)), &["\"l\"", "no entry before it has"]);
    }
    refused(index(&(link("f") + r#",{"name":"f","type":"reg"}"#)), &["\"l\"", "\"f\""]);
    refused(index(&(r#"{"name":"d","type":"dir"},"#.to_owned() + &link("d"))), &["\"l\"", "directory"]);
    let own = r#"{"name":".no.prefetch.landmark","type":"reg","size":1,"offset":9},"#.to_owned();
    refused(index(&(own + &link(".no.prefetch.landmark"))), &["\"l\"", "own"]);
    assert!(index(&(r#"{"name":"/f","type":"reg"},"#.to_owned() + &link("./f"))).is_ok());
    for target in ["", "\\u0000", &"x".repeat(5000), "\\ufffd"] {
        let entry = format!(r#"{{"name":"s","type":"symlink","linkName":"{target}"}}"#);
        refused(index(&entry), &["\"s\"", "symbolic link target"]);
    }
}

#[test]
fn numbers_are_in_range() {
    for field in ["size", "offset", "innerOffset", "chunkOffset", "chunkSize", "mode", "uid", "gid"] {
        for value in ["-1", "-9223372036854775808"] {
            let entry = format!(r#"{{"name":"f","type":"reg","size":1,"offset":9,"{field}":{value}}}"#);
            let entry =
                entry.replace(&format!(r#""{field}":1,"#), "").replace(&format!(r#""{field}":9,"#), "");
            refused(index(&entry), &["\"f\"", field, value]);
        }
    }
    for value in ["9223372036854775808", "1.5", "\"1\"", "1e3", "[]"] {
        refused(index(&format!(r#"{{"name":"f","type":"reg","size":{value}}}"#)), &["malformed", "line"]);
    }
    for field in ["uid", "gid"] {
        refused(index(&format!(r#"{{"name":"d","type":"dir","{field}":4294967295}}"#)), &["\"d\"", field]);
    }
    for (major, minor) in [(4096, 0), (0, 1 << 20), (1_i64 << 40, 0), (-1, 0)] {
        let entry = format!(r#"{{"name":"c","type":"char","devMajor":{major},"devMinor":{minor}}}"#);
        refused(index(&entry), &["\"c\""]);
    }
    let huge = format!(r#"{{"name":"f","type":"reg","size":{},"offset":9}}"#, i64::MAX);
    refused(index(&huge), &["\"f\"", "size"]);
    let long = format!(r#"{{"name":"f","type":"reg","size":{},"offset":9}}"#, 1_u64 << 30);
    refused(index(&long), &["\"f\"", "decoded"]);
    let far = format!(r#"{{"name":"f","type":"reg","size":1,"offset":9,"innerOffset":{}}}"#, i64::MAX);
    refused(index(&far), &["\"f\"", "decoded"]);
}

#[test]
fn other_fields_make_sense() {
    for kind in ["", "file", "REG", "socket"] {
        refused(index(&format!(r#"{{"name":"f","type":"{kind}"}}"#)), &["\"f\"", "type"]);
    }
    refused(index(r#"{"name":"f"}"#), &["\"f\"", "type"]);
    for time in ["yesterday", "2020-01-01", "2020-01-01T00:00:00", "99999-01-01T00:00:00Z"] {
        let entry = format!(r#"{{"name":"f","type":"dir","modtime":"{time}"}}"#);
        refused(index(&entry), &["\"f\"", "modtime", time]);
    }
    for value in ["%%%", "YQ", "YQ=", "Y Q=="] {
        let entry = format!(r#"{{"name":"f","type":"dir","xattrs":{{"user.a":"{value}"}}}}"#);
        refused(index(&entry), &["\"f\"", "user.a", "base64"]);
    }
    refused(index(r#"{"name":"f","type":"dir","xattrs":{"":""}}"#), &["\"f\"", "attribute"]);
    let many: Vec<String> = (0..1025).map(|i| format!(r#""user.{i}":"""#)).collect();
    refused(
        index(&format!(r#"{{"name":"f","type":"dir","xattrs":{{{}}}}}"#, many.join(","))),
        &["\"f\"", "attributes"],
    );
    for null in ["name", "type"] {
        let entry = r#"{"name":"f","type":"dir"}"#
            .replace(&format!(r#""{null}":"#), &format!(r#""{null}":null,"x":"#));
        assert!(index(&entry).is_err(), "{entry}");
    }
    assert!(
        index(r#"{"name":"f","type":"dir","size":null,"xattrs":null,"modtime":null,"NumLink":0}"#).is_ok()
    );
}

#[test]
fn digests_are_sha256() {
    let upper = SHA.to_uppercase().replace("SHA256", "sha256");
    for digest in
        ["sha256:", &SHA[..70], &upper, &SHA.replace("sha256", "sha512"), &SHA[7..], &format!("{SHA}0")]
    {
        for field in ["digest", "chunkDigest"] {
            let entry = format!(r#"{{"name":"f","type":"reg","size":1,"offset":9,"{field}":"{digest}"}}"#);
            refused(index(&entry), &["\"f\"", field, "64 lower-case"]);
        }
    }
    let other = SHA.replace('e', "f");
    let both = format!(
        r#"{{"name":"f","type":"reg","size":1,"offset":9,"digest":"{SHA}","chunkDigest":"{other}"}}"#
    );
    refused(index(&both), &["\"f\"", "only chunk"]);
    refused(index(&format!(r#"{{"name":"f","type":"reg","digest":"{other}"}}"#)), &["\"f\"", "empty"]);
    refused(index(r#"{"name":"f","type":"reg","chunkSize":5}"#), &["\"f\"", "empty"]);
}

#[test]
fn contents_lie_in_the_blob_and_once() {
    let file = |name: &str, rest: &str| format!(r#"{{"name":"{name}","type":"reg","size":100{rest}}}"#);
    refused(index(&file("f", "")), &["\"f\"", "where in the blob"]);
    for offset in [DATA, DATA + 1, i64::MAX as u64] {
        refused(index(&file("f", &format!(r#","offset":{offset}"#))), &["\"f\"", &offset.to_string()]);
    }
    let two = |a: &str, b: &str| format!("{},{}", file("f", a), file("g", b));
    let at = r#","offset":9"#;
    refused(index(&two(at, at)), &["\"f\"", "overlap"]);
    for inner in [1, 99] {
        refused(index(&two(at, &format!(r#"{at},"innerOffset":{inner}"#))), &["\"f\"", "overlap"]);
    }
    refused(index(&two(r#","offset":9,"innerOffset":50"#, at)), &["\"g\"", "overlap"]);
    assert!(index(&two(at, r#","offset":9,"innerOffset":100"#)).is_ok());
    assert!(index(&two(r#","offset":500"#, at)).is_ok());

    for end in ["8", "9", &(DATA + 1).to_string(), "-3"] {
        refused(chunked_index(&file("f", &format!(r#"{at},"endOffset":{end}"#))), &["\"f\"", end]);
    }
    let overlapping = two(r#","offset":9,"endOffset":51"#, r#","offset":50,"endOffset":60"#);
    refused(chunked_index(&overlapping), &["\"f\"", "51", "50"]);
    let good = two(r#","offset":9,"endOffset":50"#, r#","offset":50,"endOffset":60"#);
    let ends: Vec<_> = chunked_index(&good).unwrap().spans().map(|s| s.blob_offset + s.blob_len).collect();
    assert_eq!(ends, [50, 60]);
}

#[test]
fn chunks_make_up_their_file() {
    let file =
        |rest: &str| format!(r#"{{"name":"f","type":"reg","size":100,"offset":9,"chunkSize":60}}{rest}"#);
    let chunk = |rest: &str| format!(r#",{{"name":"f","type":"chunk","offset":50{rest}}}"#);
    refused(index(&file("")), &["\"f\"", "60 of its 100"]);
    refused(index(&file(r#",{"name":"g","type":"dir"}"#)), &["\"f\"", "60 of its 100"]);
    for (rest, word) in [
        (r#","chunkOffset":60,"chunkSize":39"#, "99 of its 100"),
        (r#","chunkOffset":60,"chunkSize":41"#, "beyond its 100"),
        (r#","chunkOffset":60,"chunkSize":9223372036854775807"#, "beyond its 100"),
        (r#","chunkOffset":61"#, "61 instead of 60"),
        (r#","chunkOffset":59"#, "59 instead of 60"),
        (r#","chunkOffset":9223372036854775807"#, "instead of 60"),
        ("", "0 instead of 60"),
        (r#","chunkOffset":60,"chunkType":"ones""#, "ones"),
    ] {
        refused(index(&file(&chunk(rest))), &["\"f\"", word]);
    }
    let whole = r#","chunkOffset":60"#;
    assert!(index(&file(&chunk(whole))).is_ok());
    let third = r#",{"name":"f","type":"chunk","offset":70,"chunkOffset":100}"#;
    refused(index(&(file(&chunk(whole)) + third)), &["\"f\"", "beyond its 100"]);
    refused(index(&file(&chunk(whole).replace("\"f\"", "\"g\""))), &["\"g\"", "\"f\""]);
    assert!(index(&file(&chunk(whole).replace("\"name\":\"f\",", ""))).is_ok());
    refused(index(&chunk(whole)[1..]), &["\"f\"", "follows no file"]);
    refused(index(&(r#"{"name":"f","type":"reg"}"#.to_owned() + &chunk(""))), &["\"f\"", "follows no file"]);
    refused(index(&file("").replace("60", "101")), &["\"f\"", "beyond its 100"]);
}

#[test]
fn the_text_is_one_table() {
    for (json, word) in [
        ("", "EOF"),
        ("[]", "version and entries"),
        ("{}", "entries"),
        (r#"{"version":1}"#, "entries"),
        (r#"{"entries":[]}"#, "version"),
        (r#"{"version":1,"entries":{}}"#, "array"),
        (r#"{"version":1,"entries":[1]}"#, "malformed"),
        (r#"{"version":1,"entries":[]} x"#, "trailing"),
        (r#"{"version":1,"entries":[]}{}"#, "trailing"),
        (r#"{"version":1,"version":1,"entries":[]}"#, "duplicate"),
        (r#"{"version":1,"entries":[],"entries":[]}"#, "duplicate"),
        (r#"{"version":1,"entries":[{"name":"a","name":"b","type":"dir"}]}"#, "duplicate"),
        (r#"{"version":1,"entries":[{"name":"a","type":"dir"}"#, "EOF"),
        (r#"{"version":2,"entries":[]}"#, "version 2"),
    ] {
        refused(table(json), &[word]);
    }
    // Fields that nobody knows may be as deep as they like.
    let deep = format!(r#"{{"version":1,"x":{}{},"entries":[]}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert!(table(&deep).is_ok());
    let deep = format!(r#"{{"version":1,"entries":[{{"xattrs":{}"#, "[".repeat(100_000));
    refused(table(&deep), &["malformed"]);
    assert!(table(" {\"later\":[{}],\"entries\":[],\"version\":1}\n").is_ok());
}

#[test]
fn damaged_packing_is_refused() {
    let json = r#"{"version":1,"entries":[]}"#;
    for packed in [&b""[..], b"x", &pack(json)[..40]] {
        let size = DATA + 1000;
        let mut place = estargz::locate(&stargz_footer(DATA as usize), size, None).unwrap().unwrap();
        assert!(claim(&place, packed, size, Compression::Gzip).is_err());
        // An external table has no length to compare with.
        let external = crate::tables_common::footer(b"SG\x11\0STARGZEXTERNALTOC");
        place = estargz::locate(&external, size, None).unwrap().unwrap();
        refused(claim(&place, packed, size, Compression::Gzip), &["cannot be unpacked"]);
    }
    let external = crate::tables_common::footer(b"SG\x11\0STARGZEXTERNALTOC");
    let place = estargz::locate(&external, 1000, None).unwrap().unwrap();
    let other = crate::common::make::gzip(&crate::tables_common::header("other.json", 10), 6, 0);
    refused(claim(&place, &other, 1000, Compression::Gzip), &["stargz.index.json"]);
    let short = crate::common::make::gzip(&crate::tables_common::header("stargz.index.json", 10), 6, 0);
    refused(claim(&place, &short, 1000, Compression::Gzip), &["EOF"]);
    refused(frames(b"not zstd at all", 10), &["cannot be unpacked"]);
    refused(frames(&zstd(json.as_bytes(), 3), 27), &["26 bytes instead of 27"]);
}

#[test]
fn bombs_stop_early() {
    // 10 GiB of JSON in half a megabyte.
    let spaces = zstd(&vec![b' '; 1 << 20], 3);
    let mut packed = zstd(b"{\"version\":1,", 3);
    for _ in 0..10_240 {
        packed.extend(&spaces);
    }
    refused(frames(&packed, 1 << 20), &["too large", "entry"]);
    // The same between entries, of which none is too long.
    let spaced = zstd(&[br#"{"name":"a","type":"dir"},"#.to_vec(), vec![b' '; 1 << 20]].concat(), 3);
    let mut packed = zstd(b"{\"version\":1,\"entries\":[", 3);
    for _ in 0..10_240 {
        packed.extend(&spaced);
    }
    refused(frames(&packed, 1 << 20), &["too large", "length in bytes is over 268435456"]);
    // Messages stay short.
    let entry = format!(r#"{{"name":"{}","type":"dir"}},"#, "0".repeat(7 << 20));
    refused(frames(&[&zstd(b"{\"entries\":[", 3)[..], &zstd(entry.as_bytes(), 3)].concat(), 1), &["cut"]);
    // A thousand million entries. Their names are the same, but who counts them all would need 100 GB for them.
    let some = zstd(r#"{"name":"a","type":"dir"},"#.repeat(40_000).as_bytes(), 3);
    let mut packed = zstd(b"{\"version\":1,\"entries\":[", 3);
    for _ in 0..25_000 {
        packed.extend(&some);
    }
    assert!(packed.len() < 64 << 20);
    refused(frames(&packed, 1 << 20), &["too large", "number of entries"]);
    // One name without end.
    let mut packed = zstd(b"{\"entries\":[{\"name\":\"", 3);
    let letters = zstd(&vec![b'a'; 1 << 20], 3);
    for _ in 0..1024 {
        packed.extend(&letters);
    }
    refused(frames(&packed, 1 << 20), &["too large", "one entry"]);
    // A length in the tar header that nobody has to read to refuse it.
    let place = estargz::locate(&crate::tables_common::footer(b"SG\x11\0STARGZEXTERNALTOC"), 1000, None);
    let header =
        crate::common::make::gzip(&crate::tables_common::header("stargz.index.json", 8_000_000_000), 6, 0);
    refused(claim(&place.unwrap().unwrap(), &header, 1000, Compression::Gzip), &["too large", "268435456"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to a real table: no panic, and what passes is an index whose spans lie in the blob.
    #[test]
    fn mutated_tables_do_not_panic(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..8),
    ) {
        thread_local!(static TEXTS: Vec<Vec<u8>> = texts());
        let mut text = TEXTS.with(|texts| texts[which.index(texts.len())].clone());
        for (at, byte, digit) in edits {
            let at = at.index(text.len());
            // Digits change numbers and digests without breaking the JSON.
            if digit {
                let from = text[at..].iter().position(u8::is_ascii_digit).map_or(at, |i| at + i);
                text[from] = b'0' + byte % 10;
            } else {
                text[at] = byte;
            }
        }
        let packed = zstd(&text, 1);
        if let Ok(index) = frames(&packed, text.len() as u64) {
            for span in index.spans() {
                prop_assert!(span.blob_offset + span.blob_len <= DATA);
                let garbage = vec![0x5a; span.blob_len as usize];
                let _ = index.decode_span(span.index as usize, &garbage, &mut Vec::new());
            }
        }
    }

    #[test]
    fn mutated_footers_do_not_panic(edits in prop::collection::vec((0usize..72, any::<u8>()), 0..6)) {
        let mut tail = vec![0; 21];
        tail.extend(stargz_footer(100));
        for (at, byte) in edits {
            tail[at] = byte;
        }
        for found in [estargz::locate(&tail, 1000, None), chunked::locate_tail(&tail, 1000, None)] {
            if let Ok(Some(place)) = found {
                prop_assert!(place.range().is_none_or(|r| r.start < r.end && r.end <= 1000));
            }
        }
    }
}

/// The JSON texts of the real tables.
fn texts() -> Vec<Vec<u8>> {
    fixtures()
        .iter()
        .filter(|f| f.file.ends_with(".zst"))
        .map(|f| ::zstd::decode_all(bytes(&f.blob, &f.place().range().unwrap())).unwrap())
        .collect()
}
