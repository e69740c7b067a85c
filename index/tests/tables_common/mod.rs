//! What the tests of foreign tables share: the real layers, a writer for made-up ones, and the proof by the tar.

use std::collections::{BTreeMap, HashMap};

use lazyrun_index::{
    Compression, Digest, EntryKind, EntryRef, LayerFacts, LayerIndex, Layout, StreamOptions, Table,
    TableError, Timestamp, TocPlace, chunked, estargz,
};
use serde::Deserialize;

use crate::common::make::{DEFAULT, gzip};
use crate::common::{content, index_blob};

/// A layer that a real tool made.
#[derive(Deserialize)]
pub(crate) struct Fixture {
    pub(crate) file: String,
    pub(crate) diff_id: Digest,
    pub(crate) annotations: HashMap<String, String>,
    /// The file with the table, if it lies outside of the layer.
    #[serde(default)]
    pub(crate) table: Option<String>,
    #[serde(skip)]
    pub(crate) blob: Vec<u8>,
    #[serde(skip)]
    external: Vec<u8>,
}

impl Fixture {
    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }

    pub(crate) fn facts(&self) -> LayerFacts {
        facts(&self.blob, self.diff_id)
    }

    /// The table's place, found the way that fits the format.
    pub(crate) fn place(&self) -> TocPlace {
        let size = self.blob.len() as u64;
        if let Some(place) = chunked::locate(|key| self.annotation(key), size).unwrap() {
            return place;
        }
        let digest = estargz::toc_digest(|key| self.annotation(key)).unwrap();
        assert!(digest.is_some());
        let tail = bytes(&self.blob, &estargz::tail_range(size));
        estargz::locate(tail, size, digest).unwrap().expect("a footer")
    }

    /// The packed table.
    pub(crate) fn packed(&self) -> &[u8] {
        let range = self.place().range();
        assert_eq!(range.is_none(), self.table.is_some(), "{}", self.file);
        range.map_or(&self.external, |range| bytes(&self.blob, &range))
    }
}

pub(crate) fn facts(blob: &[u8], diff_id: Digest) -> LayerFacts {
    LayerFacts {
        blob_digest: Digest::of(blob),
        blob_size: blob.len() as u64,
        diff_id,
        compression: Compression::detect(blob),
    }
}

/// All real layers.
pub(crate) fn fixtures() -> Vec<Fixture> {
    let dir = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tables");
    let list = std::fs::read(dir.join("tables.json")).unwrap();
    let mut fixtures: Vec<Fixture> = serde_json::from_slice(&list).unwrap();
    assert!(fixtures.len() >= 10);
    for fixture in &mut fixtures {
        fixture.blob = std::fs::read(dir.join(&fixture.file)).unwrap();
        if let Some(table) = &fixture.table {
            fixture.external = std::fs::read(dir.join(table)).unwrap();
        }
    }
    fixtures
}

pub(crate) fn fixture(file: &str) -> Fixture {
    fixtures().into_iter().find(|f| f.file == file).expect("the fixture")
}

pub(crate) fn bytes<'a>(blob: &'a [u8], range: &std::ops::Range<u64>) -> &'a [u8] {
    &blob[range.start as usize..range.end as usize]
}

/// The table as an index, by reading nothing but the table.
pub(crate) fn claim(place: &TocPlace, packed: &[u8], facts: &LayerFacts) -> Result<LayerIndex, TableError> {
    let Table { index, info } = place.index(packed, facts)?;
    let index = LayerIndex::from_bytes(index)?;
    assert_eq!(index.layout(), Layout::Table);
    assert_eq!((index.entry_count() as u64, index.span_count() as u64), (info.entries, info.spans));
    Ok(index)
}

/// The layer file, each span decoded on its own from nothing but its range of the blob.
pub(crate) fn decode(index: &LayerIndex, blob: &[u8]) -> Vec<u8> {
    let mut layer = Vec::new();
    let mut out = Vec::new();
    for (i, span) in index.spans().enumerate() {
        let range = span.blob_offset..span.blob_offset + span.blob_len;
        index.decode_span(i, bytes(blob, &range), &mut out).unwrap_or_else(|e| panic!("span {i}: {e}"));
        assert_eq!(layer.len() as u64, span.offset);
        assert_eq!(out.len() as u64, span.len);
        layer.extend_from_slice(&out);
    }
    assert_eq!(layer.len() as u64, index.layer_size());
    layer
}

/// Where the table's times come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Times {
    Exact,
    /// eStargz rounds to the nearest second.
    Rounded,
}

/// Compares the claim with what the blob's tar says.
pub(crate) fn same_as_tar(index: &LayerIndex, blob: &[u8], times: Times) {
    let claimed = decode(index, blob);
    let tar = index_blob(blob, &StreamOptions::default()).unwrap();
    assert_eq!(index.blob_digest(), tar.index.blob_digest());
    assert_eq!(index.diff_id(), tar.index.diff_id());
    let tree = |index: &LayerIndex, layer: &[u8], round: bool| -> BTreeMap<Vec<u8>, String> {
        index.entries().map(|e| (e.path().to_vec(), describe(e, layer, round))).collect()
    };
    let mut proven = tree(&tar.index, &tar.layer, times == Times::Rounded);
    for own in ["stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"] {
        proven.remove(own.as_bytes());
    }
    let claimed = tree(index, &claimed, false);
    assert_eq!(claimed.keys().collect::<Vec<_>>(), proven.keys().collect::<Vec<_>>());
    for (path, entry) in &claimed {
        assert_eq!(entry, &proven[path], "{}", path.escape_ascii());
    }
}

/// Everything of an entry but where its bytes are.
fn describe(e: EntryRef<'_>, layer: &[u8], round: bool) -> String {
    let mut mtime = e.mtime();
    if round {
        mtime = Timestamp { secs: mtime.secs + i64::from(mtime.nanos >= 500_000_000), nanos: 0 };
    }
    let mut xattrs: Vec<_> = e.xattrs().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
    xattrs.sort();
    let bytes = (e.kind() == EntryKind::File).then(|| Digest::of(&content(layer, e)));
    if let Some(claimed) = e.content() {
        assert_eq!(Some(claimed), bytes, "{e:?}");
    }
    format!(
        "{:?} {:o} {} {} {mtime:?} {} {} {:?} {xattrs:?} {bytes:?}",
        e.kind(),
        e.mode(),
        e.uid(),
        e.gid(),
        e.size(),
        e.link().escape_ascii(),
        e.rdev()
    )
}

/// A tar header; its data has to follow.
pub(crate) fn header(name: &str, size: usize) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).unwrap();
    header.set_size(size as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// Zeros up to the next block.
pub(crate) fn padding(size: usize) -> Vec<u8> {
    vec![0; size.next_multiple_of(512) - size]
}

/// A table as eStargz packs it.
pub(crate) fn pack(json: &str) -> Vec<u8> {
    let mut tar = header("stargz.index.json", json.len());
    tar.extend_from_slice(json.as_bytes());
    tar.extend(padding(json.len()));
    tar.extend([0; 1024]);
    gzip(&tar, 6, DEFAULT)
}

/// An empty gzip member with `extra` in its extra field: eStargz's footers.
pub(crate) fn footer(extra: &[u8]) -> Vec<u8> {
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255];
    footer.extend((extra.len() as u16).to_le_bytes());
    footer.extend(extra);
    footer.extend([1, 0, 0, 0xff, 0xff]);
    footer.extend([0; 8]);
    footer
}

pub(crate) fn stargz_footer(toc: usize) -> Vec<u8> {
    footer(format!("SG\x16\0{toc:016x}STARGZ").as_bytes())
}

/// A skippable zstd frame.
pub(crate) fn skippable(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x50, 0x2a, 0x4d, 0x18];
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(payload);
    frame
}
