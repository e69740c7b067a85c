//! What an index lists: entries and spans, page by page, since a layer may have a million of them.
//!
//! Names are bytes. Where they are no UTF-8, the readable form has U+FFFD in the place of what is not, and the same name in
//! base64 stands beside it.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use lazyrun_index::{DigestOf, EntryKind, EntryRef, Extent, SpanInfo};
use serde::{Deserialize, Serialize};

/// Rows of one page: with the longest names still far less than a frame.
pub const PAGE: usize = 1000;
/// Extents that are told of one entry; the rest is counted only.
const MAX_EXTENTS: usize = 64;

/// Some rows of one layer's list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// Where to go on; `None` when this was the last page.
    pub next: Option<usize>,
}

impl<T> Page<T> {
    /// No rows at all.
    pub fn empty() -> Page<T> {
        Page { rows: Vec::new(), next: None }
    }

    /// Rows from number `from` on, of `count` in all.
    pub fn of(from: usize, count: usize, row: impl Fn(usize) -> T) -> Page<T> {
        let end = from.saturating_add(PAGE).min(count);
        Page { rows: (from..end).map(row).collect(), next: Some(end).filter(|end| *end < count) }
    }
}

/// An entry of a layer, as in the tar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct EntryRow {
    /// Layer: digest of the blob.
    pub layer: String,
    /// Path relative to the root; empty is the root itself.
    pub path: String,
    /// The path's bytes, where they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
    /// `file`, `directory`, `symlink`, `hardlink`, `char`, `block` or `fifo`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Permission bits in octal.
    pub mode: String,
    /// Owner.
    #[serde(rename = "UID")]
    pub uid: u32,
    /// Group.
    #[serde(rename = "GID")]
    pub gid: u32,
    /// Bytes of a regular file.
    pub size: u64,
    /// Modification time in seconds since 1970, and the nanoseconds on top.
    pub mtime: (i64, u32),
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The same, where it is no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_base64: Option<String>,
    /// Major and minor number of a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<(u32, u32)>,
    /// Extended attributes: name (`base64:` and the bytes where it is no UTF-8), value in base64.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub xattrs: BTreeMap<String, String>,
    /// sha256 of a regular file's contents, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Byte in the file, byte in the layer file, length: the first 64.
    pub extents: Vec<(u64, u64, u64)>,
    /// How many there are.
    pub extent_count: usize,
}

/// A span of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SpanRow {
    /// Layer: digest of the blob.
    pub layer: String,
    /// Number of the span.
    pub number: u32,
    /// First byte of the blob that it needs.
    pub blob_offset: u64,
    /// Bytes of the blob that it needs.
    pub blob_size: u64,
    /// First byte of the layer file.
    pub offset: u64,
    /// Bytes of the layer file.
    pub size: u64,
    /// Whether it can be decoded without those before it.
    pub restartable: bool,
    /// Whether its bytes are on this machine.
    pub local: bool,
    /// sha256, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What the digest is of: `decoded`, `blob` or `nothing`.
    pub digest_of: String,
}

impl EntryRow {
    /// The row of an entry of the layer whose blob has the digest `layer`.
    pub fn new(layer: &str, entry: &EntryRef<'_>) -> EntryRow {
        let (path, path_base64) = readable(entry.path());
        let (link, link_base64) = readable(entry.link());
        let device = matches!(entry.kind(), EntryKind::CharDevice | EntryKind::BlockDevice);
        let extent = |e: Extent| (e.file_offset, e.layer_offset, e.len);
        EntryRow {
            layer: layer.to_owned(),
            path,
            path_base64,
            kind: kind_name(entry.kind()).to_owned(),
            mode: format!("{:04o}", entry.mode()),
            uid: entry.uid(),
            gid: entry.gid(),
            size: entry.size(),
            mtime: (entry.mtime().secs, entry.mtime().nanos),
            link: Some(link).filter(|link| !link.is_empty()),
            link_base64,
            device: device.then(|| entry.rdev()),
            xattrs: entry.xattrs().map(|(n, v)| (key(n), BASE64_STANDARD.encode(v))).collect(),
            content: entry.content().map(|digest| digest.to_string()),
            extents: entry.extents().take(MAX_EXTENTS).map(extent).collect(),
            extent_count: entry.extents().len(),
        }
    }
}

impl SpanRow {
    /// The row of a span of the layer whose blob has the digest `layer`.
    pub fn new(layer: &str, span: &SpanInfo, local: bool) -> SpanRow {
        let digest_of = match span.digest_of {
            DigestOf::Decoded => "decoded",
            DigestOf::Blob => "blob",
            DigestOf::Nothing => "nothing",
        };
        SpanRow {
            layer: layer.to_owned(),
            number: span.index,
            blob_offset: span.blob_offset,
            blob_size: span.blob_len,
            offset: span.offset,
            size: span.len,
            restartable: span.restartable,
            local,
            digest: (span.digest_of != DigestOf::Nothing).then(|| span.digest.to_string()),
            digest_of: digest_of.to_owned(),
        }
    }
}

fn kind_name(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::File => "file",
        EntryKind::Directory => "directory",
        EntryKind::Symlink => "symlink",
        EntryKind::Hardlink => "hardlink",
        EntryKind::CharDevice => "char",
        EntryKind::BlockDevice => "block",
        EntryKind::Fifo => "fifo",
    }
}

/// Bytes as text, and in base64 when the text is not all of them.
fn readable(bytes: &[u8]) -> (String, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), None),
        Err(_) => (String::from_utf8_lossy(bytes).into_owned(), Some(BASE64_STANDARD.encode(bytes))),
    }
}

/// A name that no other name gives.
fn key(name: &[u8]) -> String {
    match readable(name) {
        (_, Some(bytes)) => format!("base64:{bytes}"),
        (text, None) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_text_survive() {
        assert_eq!(readable("a/ü".as_bytes()), ("a/ü".to_owned(), None));
        let (shown, bytes) = readable(b"a\xff");
        assert_eq!(shown, "a\u{fffd}");
        assert_eq!(BASE64_STANDARD.decode(bytes.unwrap()).unwrap(), b"a\xff");
        assert_eq!((key(b"user.x").as_str(), key(b"user.\xff").as_str()), ("user.x", "base64:dXNlci7/"));
    }
}
