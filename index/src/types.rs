//! The plain values that go in and out of the crate.

use std::io;

use crate::Digest;

/// How a layer blob is compressed, told by its first bytes and never by its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip (RFC 1952), one or many members.
    Gzip,
    /// zstd (RFC 8878), one or many frames, skippable frames included.
    Zstd,
}

impl Compression {
    /// Tells the compression from a blob's first bytes (four are enough).
    #[must_use]
    pub fn detect(start: &[u8]) -> Self {
        match *start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// How the layer file is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layout {
    /// The uncompressed tar; its sha256 is the diffID.
    #[default]
    Tar,
    /// Contents of regular files in the order of a foreign table (eStargz, zstd:chunked), each file's start at a
    /// multiple of 512 bytes. No tar headers: the diffID names the layer but is not this file's digest.
    Table,
}

/// What a span's digest is the sha256 of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DigestOf {
    /// The decoded bytes without padding.
    #[default]
    Decoded,
    /// The compressed bytes `blob_offset..blob_offset + blob_len` (SOCI).
    Blob,
    /// Nothing is known; the digest is all zero.
    Nothing,
}

/// What an entry of a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Regular file (tar types `0`, NUL, `7`, and GNU sparse `S`).
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// A further name for another entry of the same image.
    Hardlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

/// A moment: `secs` since 1970 (negative before) plus `nanos` (always added, below 1,000,000,000).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Whole seconds, rounded towards the past.
    pub secs: i64,
    /// Nanoseconds on top.
    pub nanos: u32,
}

/// A run of a file's bytes and where it lies in the layer file; between extents there are holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Byte in the file.
    pub file_offset: u64,
    /// Byte in the layer file.
    pub layer_offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
}

/// A span: a run of the blob that is decoded and verified as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanInfo {
    /// Number of the span, counted from 0.
    pub index: u32,
    /// First byte of the blob that decoding needs. Neighbouring gzip spans of a tar layer file may share one byte;
    /// in a table layer file blob ranges may overlap and be in any order.
    pub blob_offset: u64,
    /// Number of blob bytes that decoding needs.
    pub blob_len: u64,
    /// First byte in the layer file.
    pub offset: u64,
    /// Number of bytes in the layer file, never 0.
    pub len: u64,
    /// Zero bytes at the end of `len` that the blob does not hold and the digest does not cover (table layer
    /// files only: up to the next multiple of 512).
    pub pad: u16,
    /// sha256 of what `digest_of` says.
    pub digest: Digest,
    /// What `digest` is of.
    pub digest_of: DigestOf,
    /// Whether the span can be decoded on its own. Otherwise its bytes only come by streaming.
    pub restartable: bool,
}

/// Takes what a pass over a layer yields. Called from one thread, in order.
pub trait LayerSink: Send {
    /// Bytes of the layer file: in order, without gaps, starting at 0. Not verified yet.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// All bytes of `span` were handed over and, where an index was known before, match its digest.
    fn span(&mut self, span: &SpanInfo) -> io::Result<()>;
    /// `blob_bytes` bytes of the blob have been consumed so far.
    fn progress(&mut self, blob_bytes: u64) {
        let _ = blob_bytes;
    }
}

/// A sink for those who only want the index.
impl LayerSink for () {
    fn data(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        Ok(())
    }
}

/// How a layer is cut into spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// Compressed bytes after which the next possible checkpoint is taken.
    pub span_size: u64,
    /// Decoded bytes after which a checkpoint is taken even if the blob bytes are few (well-compressed data).
    pub span_len: u64,
    /// Decoded bytes after which a span ends even if nothing can be restarted there.
    pub max_span_len: u64,
    /// Decoded bytes at which a layer is refused: a few kilobytes may unpack to any number of zeros.
    pub max_layer_len: u64,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { span_size: 512 << 10, span_len: 16 << 20, max_span_len: 16 << 20, max_layer_len: 1 << 40 }
    }
}

impl StreamOptions {
    /// Values that cannot work (0, or an end before the start) are raised to the least that can.
    pub(crate) fn sane(self) -> Self {
        let span_len = self.span_len.max(4096);
        let max_span_len = self.max_span_len.max(span_len);
        Self { span_size: self.span_size.max(4096), span_len, max_span_len, ..self }
    }
}

/// What a pass over a layer found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamSummary {
    /// sha256 of the blob: the layer's digest in the manifest.
    pub blob_digest: Digest,
    /// Length of the blob in bytes.
    pub blob_size: u64,
    /// sha256 of the layer file: the layer's `diff_id` in the image configuration.
    pub diff_id: Digest,
    /// Length of the layer file in bytes.
    pub layer_size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// Number of entries.
    pub entries: u64,
    /// Number of spans.
    pub spans: u32,
    /// Length of the index in bytes.
    pub index_size: u64,
}
