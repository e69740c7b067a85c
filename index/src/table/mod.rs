//! Tables of contents that other tools put into layers: eStargz and zstd:chunked.
//!
//! Nothing here does I/O: [`estargz`](crate::estargz) and [`chunked`](crate::chunked) say where the table is, the
//! caller gets those bytes, and [`TocPlace::index`] makes a layer index of them without reading anything else of
//! the blob. The index claims what the table claims; whether that is what the layer's tar says is proven later.

mod entries;
mod error;
mod json;
mod plan;
mod time;
mod unpack;

use std::ops::Range;

pub use error::TableError;

use crate::builder::LayerFacts;
use crate::{Compression, Digest};

/// Most packed bytes that a table may have.
const PACKED_MAX: u64 = 64 << 20;

/// How a table is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// A gzip member that is a tar with one JSON file (eStargz).
    GzipTar,
    /// JSON in zstd (zstd:chunked, and eStargz with zstd).
    Zstd,
}

/// Where a layer's table of contents is, and what is known of it before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TocPlace {
    pub(crate) packing: Packing,
    /// `None`: the whole of another blob.
    pub(crate) range: Option<Range<u64>>,
    /// Byte of the layer's blob before which all contents lie.
    pub(crate) data_end: u64,
    /// sha256 of the packed table.
    pub(crate) packed: Option<Digest>,
    /// sha256 of the JSON text.
    pub(crate) json: Option<Digest>,
    /// Length of the JSON text.
    pub(crate) json_len: Option<u64>,
    /// The writer adds files for its readers to the layer.
    pub(crate) own_files: bool,
}

/// A layer index made from a table.
#[derive(Debug)]
pub struct Table {
    /// The index, in table layout.
    pub index: Vec<u8>,
    /// What else the table told.
    pub info: TocInfo,
}

/// What a table tells besides the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TocInfo {
    /// The table was checked against a digest in the manifest, so it is as trustworthy as the manifest.
    pub bound: bool,
    /// Number of entries in the index.
    pub entries: u64,
    /// Number of spans in the index.
    pub spans: u64,
    /// Spans without a digest: their bytes can't be verified before the whole layer is.
    pub undigested: u64,
    /// Bytes of the layer file that the image's builder wants fetched before the start (eStargz's
    /// `.prefetch.landmark`); `None` if it names none.
    pub prefetch: Option<Range<u64>>,
}

impl TocPlace {
    /// Bytes of the layer's blob that hold the packed table. `None` if it is all of another blob (eStargz with an
    /// external table).
    #[must_use]
    pub fn range(&self) -> Option<Range<u64>> {
        self.range.clone()
    }

    /// Whether the manifest says the table's digest. Without that anybody who can write to the repository can make
    /// the table say anything.
    #[must_use]
    pub fn bound(&self) -> bool {
        self.packed.is_some() || self.json.is_some()
    }

    /// Most packed bytes that are ever taken, for callers who fetch an external table.
    #[must_use]
    pub fn max_len(&self) -> u64 {
        self.range.as_ref().map_or(PACKED_MAX, |range| range.end - range.start)
    }

    /// Makes the layer index out of the packed table: the bytes of [`range`](Self::range).
    ///
    /// `facts` are those of the layer, also if the table lies elsewhere.
    pub fn index(&self, packed: &[u8], facts: &LayerFacts) -> Result<Table, TableError> {
        let wanted = match self.packing {
            Packing::GzipTar => Compression::Gzip,
            Packing::Zstd => Compression::Zstd,
        };
        if facts.compression != wanted || self.data_end > facts.blob_size {
            return Err(TableError::place("it belongs to another layer"));
        }
        self.check_packed(packed)?;
        let mut table = entries::Entries::new(self.data_end, self.own_files);
        let (digest, len) = unpack::json(self.packing, packed, &mut |record| table.push(&record))?;
        if let Some(expected) = self.json_len.filter(|expected| *expected != len) {
            return Err(TableError::Length { what: "the unpacked table of contents", expected, actual: len });
        }
        if let Some(expected) = self.json.filter(|expected| *expected != digest) {
            let what = "the layer's table of contents";
            return Err(TableError::Digest { what, expected, actual: digest });
        }
        table.finish()?;
        plan::check(&table)?;
        let lens = plan::blob_lens(&table, self.data_end)?;
        let mut info = TocInfo { bound: self.bound(), ..TocInfo::default() };
        let index = plan::build(&table, &lens, facts, &mut info)?;
        Ok(Table { index, info })
    }

    fn check_packed(&self, packed: &[u8]) -> Result<(), TableError> {
        let actual = packed.len() as u64;
        if let Some(expected) = self.range.as_ref().map(|r| r.end - r.start).filter(|n| *n != actual) {
            return Err(TableError::Length { what: "the packed table of contents", expected, actual });
        }
        if actual > PACKED_MAX {
            return Err(TableError::TooLarge { what: "its packed length in bytes", limit: PACKED_MAX });
        }
        let Some(expected) = self.packed else { return Ok(()) };
        let actual = Digest::of(packed);
        if actual == expected {
            return Ok(());
        }
        Err(TableError::Digest { what: "the layer's packed table of contents", expected, actual })
    }
}

/// `start..end`, if a packed table can lie there in a blob whose part before the footer has `limit` bytes.
pub(crate) fn toc_range(start: u64, end: u64, limit: u64) -> Result<Range<u64>, TableError> {
    if start >= end || end > limit {
        return Err(TableError::place(format!(
            "it is said to reach from byte {start} to {end} of the blob, where at most {limit} can be"
        )));
    }
    if end - start > PACKED_MAX {
        return Err(TableError::TooLarge { what: "its packed length in bytes", limit: PACKED_MAX });
    }
    Ok(start..end)
}

/// The digest in an annotation.
pub(crate) fn annotated_digest(key: &str, value: Option<&str>) -> Result<Option<Digest>, TableError> {
    value
        .map(|text| text.parse().map_err(|e| TableError::place(format!("annotation {key}: {e}"))))
        .transpose()
}

/// Refuses JSON texts that are announced longer than any is read.
pub(crate) fn check_json_len(len: u64) -> Result<u64, TableError> {
    if len > json::JSON_MAX {
        return Err(TableError::TooLarge { what: "its length in bytes", limit: json::JSON_MAX });
    }
    Ok(len)
}
