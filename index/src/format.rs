//! The index on disk. docs/FORMAT.md describes it byte by byte; change both together.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::decode::Entrance;
use crate::{Compression, DigestOf, EntryKind, Layout};

/// First bytes of every index.
pub(crate) const MAGIC: [u8; 8] = *b"LZRINDEX";
/// Newest version this code reads, and the one it writes.
pub(crate) const VERSION: u32 = 2;
/// Entry records in a full segment.
pub(crate) const ENTRY_SEGMENT: usize = 4096;
/// Span records in a full segment.
pub(crate) const SPAN_SEGMENT: usize = 1024;
/// Longest a restartable span may be when decoded: bounds what a fault allocates.
pub(crate) const SPAN_LEN_MAX: u64 = 256 << 20;

/// The file's first bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct HeaderRecord {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    pub(crate) compression: u8,
    /// Zero in version 1, which only knows tar layer files.
    pub(crate) layout: u8,
    pub(crate) zero: [u8; 2],
    pub(crate) blob_digest: [u8; 32],
    pub(crate) diff_id: [u8; 32],
    pub(crate) blob_size: U64,
    pub(crate) layer_size: U64,
    pub(crate) entry_count: U64,
    pub(crate) span_count: U64,
    pub(crate) body_len: U64,
    pub(crate) body_crc: U32,
    pub(crate) directory_crc: U32,
    pub(crate) reserved: [u8; 20],
    pub(crate) header_crc: U32,
}

/// One entry. Offsets count from the start of the body.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct EntryRecord {
    /// Path, link, xattrs and extents lie here, one after the other.
    pub(crate) heap: U64,
    pub(crate) size: U64,
    /// Where the data starts in the layer file, if it is in one piece; device numbers of devices.
    pub(crate) data: U64,
    pub(crate) mtime: I64,
    pub(crate) nanos: U32,
    pub(crate) uid: U32,
    pub(crate) gid: U32,
    pub(crate) xattrs_len: U32,
    pub(crate) extents: U32,
    pub(crate) mode: U16,
    pub(crate) path_len: U16,
    pub(crate) link_len: U16,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) content: [u8; 32],
}

/// `EntryRecord::content` is set.
pub(crate) const FLAG_CONTENT: u8 = 1;
/// The extents are in the heap, not in `EntryRecord::data`.
pub(crate) const FLAG_SPARSE: u8 = 2;

/// One data piece of a sparse file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct ExtentRecord {
    pub(crate) file_offset: U64,
    pub(crate) layer_offset: U64,
    pub(crate) len: U64,
}

/// Precedes the name and value of an extended attribute.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct XattrRecord {
    pub(crate) name_len: U16,
    pub(crate) value_len: U32,
}

/// One span.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct SpanRecord {
    pub(crate) offset: U64,
    pub(crate) len: U64,
    pub(crate) blob_offset: U64,
    pub(crate) blob_len: U64,
    /// Deflate: where the compressed window lies in the body. Member and frame starts, from version 2 on: decoded
    /// bytes to throw away first.
    pub(crate) window: U64,
    pub(crate) window_len: U32,
    /// Length of the window once decompressed.
    pub(crate) window_size: U32,
    pub(crate) entrance: u8,
    pub(crate) bits: u8,
    /// Bits 0 and 1: what the digest is of.
    pub(crate) flags: u8,
    pub(crate) zero: u8,
    pub(crate) pad: U16,
    pub(crate) zeros: [u8; 2],
    pub(crate) digest: [u8; 32],
}

pub(crate) fn compression_code(compression: Compression) -> u8 {
    match compression {
        Compression::None => 0,
        Compression::Gzip => 1,
        Compression::Zstd => 2,
    }
}

pub(crate) fn compression_of(code: u8) -> Option<Compression> {
    Some(match code {
        0 => Compression::None,
        1 => Compression::Gzip,
        2 => Compression::Zstd,
        _ => return None,
    })
}

pub(crate) fn layout_code(layout: Layout) -> u8 {
    match layout {
        Layout::Tar => 0,
        Layout::Table => 1,
    }
}

pub(crate) fn layout_of(code: u8) -> Option<Layout> {
    Some(match code {
        0 => Layout::Tar,
        1 => Layout::Table,
        _ => return None,
    })
}

/// The span flags for what its digest is of.
pub(crate) fn digest_code(digest_of: DigestOf) -> u8 {
    match digest_of {
        DigestOf::Decoded => 0,
        DigestOf::Blob => 1,
        DigestOf::Nothing => 2,
    }
}

/// What the digest is of, out of a span's flags.
pub(crate) fn digest_of(flags: u8) -> Option<DigestOf> {
    Some(match flags {
        0 => DigestOf::Decoded,
        1 => DigestOf::Blob,
        2 => DigestOf::Nothing,
        _ => return None,
    })
}

pub(crate) fn kind_code(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::File => 0,
        EntryKind::Hardlink => 1,
        EntryKind::Symlink => 2,
        EntryKind::CharDevice => 3,
        EntryKind::BlockDevice => 4,
        EntryKind::Directory => 5,
        EntryKind::Fifo => 6,
    }
}

pub(crate) fn kind_of(code: u8) -> Option<EntryKind> {
    Some(match code {
        0 => EntryKind::File,
        1 => EntryKind::Hardlink,
        2 => EntryKind::Symlink,
        3 => EntryKind::CharDevice,
        4 => EntryKind::BlockDevice,
        5 => EntryKind::Directory,
        6 => EntryKind::Fifo,
        _ => return None,
    })
}

pub(crate) const ENTRANCE_NONE: u8 = 0;
pub(crate) const ENTRANCE_PLAIN: u8 = 1;
pub(crate) const ENTRANCE_GZIP_MEMBER: u8 = 2;
pub(crate) const ENTRANCE_DEFLATE: u8 = 3;
pub(crate) const ENTRANCE_ZSTD_FRAME: u8 = 4;

pub(crate) fn entrance_code(entrance: &Entrance) -> u8 {
    match entrance {
        Entrance::None => ENTRANCE_NONE,
        Entrance::Plain => ENTRANCE_PLAIN,
        Entrance::GzipMember { .. } => ENTRANCE_GZIP_MEMBER,
        Entrance::Deflate { .. } => ENTRANCE_DEFLATE,
        Entrance::ZstdFrame { .. } => ENTRANCE_ZSTD_FRAME,
    }
}

/// Whether a span with this entrance can occur in a blob with this compression.
pub(crate) fn entrance_fits(code: u8, compression: Compression) -> bool {
    match code {
        ENTRANCE_NONE => compression != Compression::None,
        ENTRANCE_PLAIN => compression == Compression::None,
        ENTRANCE_GZIP_MEMBER | ENTRANCE_DEFLATE => compression == Compression::Gzip,
        ENTRANCE_ZSTD_FRAME => compression == Compression::Zstd,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/FORMAT.md states these sizes.
    #[test]
    fn sizes() {
        assert_eq!(size_of::<HeaderRecord>(), 152);
        assert_eq!(size_of::<EntryRecord>(), 92);
        assert_eq!(size_of::<ExtentRecord>(), 24);
        assert_eq!(size_of::<XattrRecord>(), 6);
        assert_eq!(size_of::<SpanRecord>(), 88);
    }
}
