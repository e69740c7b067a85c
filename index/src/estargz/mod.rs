//! eStargz (containerd/stargz-snapshotter, docs/estargz.md): gzip layers whose files are gzip members of their own,
//! with a table of contents at the end of the blob or in an image of its own, and a footer that says where.
//!
//! In steps: get the blob's last bytes ([`tail_range`]), find the table ([`locate`]), get it
//! ([`TocPlace::range`]), make an index of it ([`TocPlace::index`]).

use std::ops::Range;

use crate::Digest;
use crate::table::{Packing, TocPlace, annotated_digest, toc_range};

pub use crate::table::TableError;

/// Annotation of a layer in the manifest: sha256 of the table's JSON text.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Annotation of a layer of a *table image*: digest of the layer that its table is of.
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/stargz/layer.digest";
/// Put behind the image's tag, this is the tag of its table image.
pub const TABLE_IMAGE_SUFFIX: &str = "-esgztoc";

const FOOTER: u64 = 51;
const LEGACY_FOOTER: u64 = 47;
const EXTERNAL_FOOTER: u64 = 46;

/// The bytes of the blob that [`locate`] needs at least. More bytes in front of them do no harm and may already hold
/// the table.
#[must_use]
pub fn tail_range(blob_size: u64) -> Range<u64> {
    blob_size.saturating_sub(FOOTER)..blob_size
}

/// The digest that a layer's annotations give of its table: a sign that the layer is eStargz.
pub fn toc_digest<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Result<Option<Digest>, TableError> {
    annotated_digest(TOC_DIGEST, annotation(TOC_DIGEST))
}

/// Finds the table by the blob's last bytes; `None` if they are no eStargz footer.
///
/// `toc_digest` is what the manifest says of the table ([`toc_digest`]).
pub fn locate(
    tail: &[u8],
    blob_size: u64,
    toc_digest: Option<Digest>,
) -> Result<Option<TocPlace>, TableError> {
    let place = |range, data_end| TocPlace {
        packing: Packing::GzipTar,
        range,
        data_end,
        packed: None,
        json: toc_digest,
        json_len: None,
        own_files: true,
    };
    let extra = |footer: u64| extra(tail, footer).filter(|_| blob_size > footer);
    let (footer, offset) = if let Some(extra) = extra(FOOTER) {
        (FOOTER, extra.strip_prefix(b"SG\x16\0").and_then(hex))
    } else if let Some(extra) = extra(LEGACY_FOOTER) {
        (LEGACY_FOOTER, hex(extra))
    } else if extra(EXTERNAL_FOOTER).is_some_and(|e| e == b"SG\x11\0STARGZEXTERNALTOC") {
        return Ok(Some(place(None, blob_size - EXTERNAL_FOOTER)));
    } else {
        return Ok(None);
    };
    let Some(offset) = offset else { return Ok(None) };
    let end = blob_size - footer;
    Ok(Some(place(Some(toc_range(offset, end, end)?), offset)))
}

/// The extra field of the empty gzip member that the last `footer` bytes of `tail` are.
fn extra(tail: &[u8], footer: u64) -> Option<&[u8]> {
    let footer = tail.get(tail.len().checked_sub(footer as usize)?..)?;
    let (head, rest) = footer.split_at_checked(12)?;
    // Behind the header and its extra field come an empty deflate block (5 bytes), checksum and length (8).
    let (extra, _) = rest.split_at_checked(rest.len().checked_sub(13)?)?;
    let [0x1f, 0x8b, 8, 4, .., low, high] = *head else { return None };
    (usize::from(u16::from_le_bytes([low, high])) == extra.len()).then_some(extra)
}

/// The table's place, written as 16 hexadecimal digits in front of a magic word.
fn hex(field: &[u8]) -> Option<u64> {
    let digits = field.strip_suffix(b"STARGZ").filter(|d| d.len() == 16)?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}
