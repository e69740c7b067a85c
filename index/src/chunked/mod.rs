//! zstd:chunked (containers/storage, pkg/chunked): zstd layers whose files are frames of their own, with a table of
//! contents in a skippable frame near the end of the blob. Annotations in the manifest say where.
//!
//! In steps: find the table ([`locate`]), get it ([`TocPlace::range`]), make an index of it ([`TocPlace::index`]).

use std::ops::Range;

use crate::Digest;
use crate::estargz::TOC_DIGEST;
use crate::table::{Packing, TocPlace, annotated_digest, check_json_len, toc_range};

pub use crate::table::TableError;

/// Annotation of a layer in the manifest: sha256 of the packed table. Older writers left `github` out.
pub const CHECKSUM: [&str; 2] =
    ["io.github.containers.zstd-chunked.manifest-checksum", "io.containers.zstd-chunked.manifest-checksum"];
/// Annotation of a layer in the manifest: `OFFSET:LENGTH:UNPACKED LENGTH:TYPE` of the table, in the order of
/// [`CHECKSUM`].
pub const POSITION: [&str; 2] =
    ["io.github.containers.zstd-chunked.manifest-position", "io.containers.zstd-chunked.manifest-position"];

/// Magic number and length in front of what a skippable frame holds.
const FRAME_HEADER: u64 = 8;
const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// Payloads of the footer frame: the newest first, which also places a tar-split.
const FOOTERS: [(usize, &[u8; 8]); 2] = [(64, b"GNUlInUx"), (40, b"GnUlInUx")];
/// The only type of table there is.
const TYPE: u64 = 1;

/// Finds the table by the layer's annotations; `None` if they name none.
pub fn locate<'a>(
    annotation: impl Fn(&str) -> Option<&'a str>,
    blob_size: u64,
) -> Result<Option<TocPlace>, TableError> {
    for (checksum, position) in CHECKSUM.into_iter().zip(POSITION) {
        let Some(text) = annotation(position) else { continue };
        let numbers = numbers(text).ok_or_else(|| {
            let shown: String = text.chars().take(100).collect();
            TableError::place(format!("annotation {position} is \"{}\"", shown.escape_debug()))
        })?;
        let mut place = place(numbers, blob_size)?;
        place.packed = annotated_digest(checksum, annotation(checksum))?;
        place.json = annotated_digest(TOC_DIGEST, annotation(TOC_DIGEST))?;
        place.own_files = place.json.is_some();
        return Ok(Some(place));
    }
    Ok(None)
}

/// The bytes of the blob that [`locate_tail`] needs.
#[must_use]
pub fn tail_range(blob_size: u64) -> Range<u64> {
    blob_size.saturating_sub(FRAME_HEADER + 64)..blob_size
}

/// Finds the table by the blob's last bytes, for layers whose annotations were lost or that an eStargz writer made;
/// `None` if they are no footer. `toc_digest` is what eStargz's annotation says of the table.
pub fn locate_tail(
    tail: &[u8],
    blob_size: u64,
    toc_digest: Option<Digest>,
) -> Result<Option<TocPlace>, TableError> {
    for (len, magic) in FOOTERS {
        let Some(start) = tail.len().checked_sub(len + FRAME_HEADER as usize) else { continue };
        let (head, footer) = tail[start..].split_at(FRAME_HEADER as usize);
        if head[..4] != SKIPPABLE || head[4..] != (len as u32).to_le_bytes() || !footer.ends_with(magic) {
            continue;
        }
        let number = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&footer[i * 8..][..8]);
            u64::from_le_bytes(bytes)
        };
        let mut place = place([number(0), number(1), number(2), number(3)], blob_size)?;
        place.json = toc_digest;
        place.own_files = toc_digest.is_some();
        return Ok(Some(place));
    }
    Ok(None)
}

/// Checks offset, length, unpacked length and type.
fn place([offset, len, json_len, kind]: [u64; 4], blob_size: u64) -> Result<TocPlace, TableError> {
    if kind != TYPE {
        return Err(TableError::place(format!("it is of type {kind}; only type {TYPE} is known")));
    }
    let data_end =
        offset.checked_sub(FRAME_HEADER).ok_or_else(|| TableError::place("it has no room for a frame"))?;
    let end = offset.checked_add(len).ok_or_else(|| TableError::place("it is too long"))?;
    Ok(TocPlace {
        packing: Packing::Zstd,
        range: Some(toc_range(offset, end, blob_size)?),
        data_end,
        packed: None,
        json: None,
        json_len: Some(check_json_len(json_len)?),
        own_files: false,
    })
}

/// Four decimal numbers between colons.
fn numbers(text: &str) -> Option<[u64; 4]> {
    let mut out = [0; 4];
    let mut fields = text.split(':');
    for number in &mut out {
        let field = fields.next().filter(|f| !f.is_empty() && f.bytes().all(|c| c.is_ascii_digit()))?;
        *number = field.parse().ok()?;
    }
    fields.next().is_none().then_some(out)
}
