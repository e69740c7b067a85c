//! Builds an index in memory from somebody else's table: SOCI's, eStargz's, zstd:chunked's.

use std::io::Cursor;

use crate::decode::Entrance;
use crate::error::Name;
use crate::format::SPAN_LEN_MAX;
use crate::inflate::WINDOW;
use crate::tar::{
    FILE_MAX, PIECES_MAX, TARGET_MAX, XATTR_NAME_MAX, XATTR_VALUE_MAX, XATTRS_MAX, check_device, clean,
};
use crate::writer::IndexWriter;
use crate::{
    Compression, Digest, DigestOf, EntryKind, EntryRef, Extent, IndexError, LayerIndex, Layout, SpanInfo,
    StreamSummary, Timestamp,
};

/// Longest index that is built in memory: far beyond any real layer's, and an end to what a hostile table can cost.
const INDEX_MAX: u64 = 1 << 30;

/// What is known of a layer before its index: from its manifest and the image configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerFacts {
    /// The layer's digest in the manifest.
    pub blob_digest: Digest,
    /// The blob's length in bytes.
    pub blob_size: u64,
    /// The layer's diffID in the image configuration.
    pub diff_id: Digest,
    /// How the blob is compressed.
    pub compression: Compression,
}

impl LayerFacts {
    /// What an index says of its layer.
    #[must_use]
    pub fn of(index: &LayerIndex) -> Self {
        Self {
            blob_digest: index.blob_digest(),
            blob_size: index.blob_size(),
            diff_id: index.diff_id(),
            compression: index.compression(),
        }
    }
}

/// An entry on its way into an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewEntry<'a> {
    /// The path as the table has it; `/` and `./` in front, `/` at the end and empty components are dropped.
    pub path: &'a [u8],
    /// What it is.
    pub kind: EntryKind,
    /// Permission, set-id and sticky bits: at most 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Length of a regular file in bytes, holes included; 0 for all else.
    pub size: u64,
    /// Target of a symbolic link, or of a hard link (cleaned like `path`); otherwise empty.
    pub link: &'a [u8],
    /// Major and minor number of a device; otherwise 0, 0.
    pub rdev: (u32, u32),
    /// Extended attributes: name with its namespace, value. Of several with one name the last counts.
    pub xattrs: &'a [(&'a [u8], &'a [u8])],
    /// Where the data lies in the layer file, in the file's order; what is left out is a hole.
    pub extents: &'a [Extent],
    /// sha256 of the content, where the table has it.
    pub content: Option<Digest>,
}

impl<'a> NewEntry<'a> {
    /// An entry of an index told again. Its attributes and extents have to be put somewhere first.
    #[must_use]
    pub fn of(entry: &EntryRef<'a>, xattrs: &'a [(&'a [u8], &'a [u8])], extents: &'a [Extent]) -> Self {
        Self {
            path: entry.path(),
            kind: entry.kind(),
            mode: entry.mode(),
            uid: entry.uid(),
            gid: entry.gid(),
            mtime: entry.mtime(),
            size: entry.size(),
            link: entry.link(),
            rdev: entry.rdev(),
            xattrs,
            extents,
            content: entry.content(),
        }
    }
}

/// How decoding of a new span starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewEntrance<'a> {
    /// It cannot: the bytes only come by streaming the blob.
    None,
    /// The blob's bytes are the layer file's bytes.
    Plain,
    /// At a gzip member's header.
    GzipMember {
        /// Decoded bytes to throw away first.
        skip: u64,
    },
    /// At a deflate block.
    Deflate {
        /// 0 to 7: that many upper bits of the first byte belong to the block.
        bits: u8,
        /// What was decoded just before, at most 32 KiB.
        window: &'a [u8],
    },
    /// At the start of a zstd frame.
    ZstdFrame {
        /// Decoded bytes to throw away first.
        skip: u64,
    },
}

/// A span on its way into an index. It starts in the layer file where the one before ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSpan<'a> {
    /// First byte of the blob that decoding needs.
    pub blob_offset: u64,
    /// Number of blob bytes that decoding needs.
    pub blob_len: u64,
    /// Length in the layer file, `pad` included, never 0.
    pub len: u64,
    /// Zero bytes at the end of `len` that the blob does not hold: below 512, only in table layer files.
    pub pad: u16,
    /// sha256 of what `digest_of` says; all zero for [`DigestOf::Nothing`].
    pub digest: Digest,
    /// What `digest` is of.
    pub digest_of: DigestOf,
    /// How decoding starts.
    pub entrance: NewEntrance<'a>,
}

impl<'a> NewSpan<'a> {
    /// A span of an index told again, entered as `entrance` says.
    #[must_use]
    pub fn of(span: &SpanInfo, entrance: NewEntrance<'a>) -> Self {
        Self {
            blob_offset: span.blob_offset,
            blob_len: span.blob_len,
            len: span.len,
            pad: span.pad,
            digest: span.digest,
            digest_of: span.digest_of,
            entrance,
        }
    }
}

/// Builds an index in memory. The bounds are those of the streaming reader; [`IndexBuilder::finish`] checks the
/// whole as [`LayerIndex::from_bytes`] does.
pub struct IndexBuilder {
    writer: IndexWriter<Cursor<Vec<u8>>>,
    facts: LayerFacts,
    layer_size: u64,
}

impl std::fmt::Debug for IndexBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IndexBuilder").field("facts", &self.facts).finish_non_exhaustive()
    }
}

impl IndexBuilder {
    /// An index without entries and spans.
    #[must_use]
    pub fn new(facts: &LayerFacts, layout: Layout) -> Self {
        Self { writer: IndexWriter::in_memory(layout), facts: *facts, layer_size: 0 }
    }

    /// Appends an entry.
    pub fn entry(&mut self, entry: &NewEntry<'_>) -> Result<(), IndexError> {
        let fail = |reason: String| IndexError::Entry { name: Name::new(entry.path), reason };
        let path = clean(entry.path).map_err(fail)?;
        let link = match entry.kind {
            EntryKind::Hardlink => {
                clean(entry.link).map_err(|e| fail(format!("bad hard link target: {e}")))?
            }
            _ => entry.link.to_vec(),
        };
        let xattrs = last_wins(entry.xattrs);
        let cleaned = NewEntry { path: &path, link: &link, xattrs: &xattrs, ..*entry };
        check(&cleaned).map_err(fail)?;
        self.bounded()?;
        self.writer.entry(&cleaned)
    }

    /// Appends a span.
    pub fn span(&mut self, span: &NewSpan<'_>) -> Result<(), IndexError> {
        let index = u32::try_from(self.writer.span_count())
            .map_err(|_| IndexError::bad_index("it counts too many spans"))?;
        let fail = |reason: &str| IndexError::bad_index(format!("span {index} {reason}"));
        let entrance = match span.entrance {
            NewEntrance::None => Entrance::None,
            NewEntrance::Plain => Entrance::Plain,
            NewEntrance::GzipMember { skip } => Entrance::GzipMember { skip },
            NewEntrance::ZstdFrame { skip } => Entrance::ZstdFrame { skip },
            NewEntrance::Deflate { bits, window } => {
                if window.len() > WINDOW {
                    return Err(fail("has a window that is too long"));
                }
                Entrance::Deflate { bits, window: window.to_vec() }
            }
        };
        if span.len > SPAN_LEN_MAX && entrance != Entrance::None {
            return Err(fail("is too long"));
        }
        self.bounded()?;
        let offset = self.layer_size;
        self.layer_size =
            offset.checked_add(span.len).ok_or_else(|| fail("makes the layer file too long"))?;
        let info = SpanInfo {
            index,
            blob_offset: span.blob_offset,
            blob_len: span.blob_len,
            offset,
            len: span.len,
            pad: span.pad,
            digest: span.digest,
            digest_of: span.digest_of,
            restartable: entrance != Entrance::None,
        };
        self.writer.span(&info, &entrance)
    }

    /// Bytes of the layer file so far: where the next span starts.
    #[must_use]
    pub fn layer_size(&self) -> u64 {
        self.layer_size
    }

    /// The finished index, checked as a whole.
    pub fn finish(self) -> Result<Vec<u8>, IndexError> {
        let Self { writer, facts, layer_size } = self;
        let mut summary = StreamSummary {
            blob_digest: facts.blob_digest,
            blob_size: facts.blob_size,
            diff_id: facts.diff_id,
            layer_size,
            compression: facts.compression,
            entries: writer.entry_count(),
            // Counted with u32 in `span`.
            spans: writer.span_count() as u32,
            index_size: 0,
        };
        let bytes = writer.finish(&mut summary)?.into_inner();
        Ok(LayerIndex::from_bytes(bytes)?.into_bytes())
    }

    fn bounded(&self) -> Result<(), IndexError> {
        if self.writer.body_len() <= INDEX_MAX {
            return Ok(());
        }
        Err(IndexError::bad_index(format!("it would be longer than {INDEX_MAX} bytes")))
    }
}

fn last_wins<'a>(xattrs: &[(&'a [u8], &'a [u8])]) -> Vec<(&'a [u8], &'a [u8])> {
    // More than the bound is refused later; looking through them all first would be quadratic.
    let mut kept: Vec<(&[u8], &[u8])> = Vec::new();
    for &(name, value) in xattrs.iter().take(XATTRS_MAX + 1) {
        match kept.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => kept.push((name, value)),
        }
    }
    if xattrs.len() > XATTRS_MAX { xattrs.to_vec() } else { kept }
}

/// The streaming reader's bounds that the check of a finished index does not know.
fn check(entry: &NewEntry<'_>) -> Result<(), String> {
    if entry.mode > 0o7777 {
        return Err(format!("the mode {:o} has more than permission bits", entry.mode));
    }
    if entry.uid == u32::MAX || entry.gid == u32::MAX {
        return Err("the owner is out of range".into());
    }
    if entry.size > FILE_MAX.unsigned_abs() {
        return Err(format!("the size {} is out of range", entry.size));
    }
    if entry.extents.len() > PIECES_MAX {
        return Err(format!("it has more than {PIECES_MAX} pieces"));
    }
    if entry.link.len() > TARGET_MAX {
        return Err(format!("its link target has {} bytes", entry.link.len()));
    }
    if entry.kind != EntryKind::File && (entry.content.is_some() || !entry.extents.is_empty()) {
        return Err("it is no file but has data".into());
    }
    match entry.kind {
        EntryKind::CharDevice | EntryKind::BlockDevice => check_device(entry.rdev)?,
        _ if entry.rdev != (0, 0) => return Err("it is no device but has device numbers".into()),
        _ => {}
    }
    if entry.xattrs.len() > XATTRS_MAX {
        return Err(format!("it has more than {XATTRS_MAX} extended attributes"));
    }
    for (name, value) in entry.xattrs {
        if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains(&0) {
            return Err("the name of an extended attribute is empty, too long or has a NUL".into());
        }
        if value.len() > XATTR_VALUE_MAX {
            return Err(format!("an extended attribute has {} bytes", value.len()));
        }
    }
    Ok(())
}
