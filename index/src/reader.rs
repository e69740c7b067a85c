//! Reads an index: mapped into memory, validated once, then plain array access.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use zerocopy::FromBytes;

use crate::decode::Entrance;
use crate::format::{
    ENTRANCE_DEFLATE, ENTRANCE_GZIP_MEMBER, ENTRANCE_NONE, ENTRANCE_PLAIN, ENTRANCE_ZSTD_FRAME,
    ENTRY_SEGMENT, EntryRecord, ExtentRecord, FLAG_CONTENT, FLAG_SPARSE, HeaderRecord, SPAN_SEGMENT,
    SpanRecord, XattrRecord, digest_of, kind_of,
};
use crate::validate::{Checked, check};
use crate::{
    Compression, Digest, DigestOf, EntryKind, Extent, Hasher, IndexError, LayerId, Layout, SpanInfo,
    Timestamp,
};

/// The index of one layer: what the layer contains and where its bytes are in the blob.
///
/// Cheap to share between threads. The file behind an opened index must not be changed while it is open; the
/// store publishes indexes by rename and never writes into one.
pub struct LayerIndex {
    bytes: Bytes,
    checked: Checked,
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for LayerIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerIndex")
            .field("diff_id", &self.diff_id())
            .field("entries", &self.entry_count())
            .field("spans", &self.span_count())
            .finish_non_exhaustive()
    }
}

impl LayerIndex {
    /// Maps the index file at `path` and validates all of it.
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        let opening = |source| IndexError::IndexIo { what: "opening", source };
        let file = File::open(path).map_err(opening)?;
        if file.metadata().map_err(opening)?.len() < size_of::<HeaderRecord>() as u64 {
            return Err(IndexError::bad_index("the file is shorter than an index header"));
        }
        // SAFETY: index files are written once, published by rename and never changed or truncated afterwards;
        // that no one else does so is the caller's promise, documented on the type.
        let map = unsafe { memmap2::MmapOptions::new().populate().map(&file) }.map_err(opening)?;
        let index = Self::new(Bytes::Mapped(map))?;
        // All of it was read for the check.
        index.let_go();
        Ok(index)
    }

    /// Has the bytes of a mapped index not count as memory of the process: who reads them again gets them from the page
    /// cache. All of them, because the kernel maps much more than the page that is read, up to the whole of a large folio.
    pub fn let_go(&self) {
        let Bytes::Mapped(map) = &self.bytes else { return };
        // SAFETY: a shared mapping of a file that never changes, so the same bytes are read before and after.
        // Where it can't be done, more memory is used and nothing else happens.
        let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// An index that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, IndexError> {
        Self::new(Bytes::Owned(bytes))
    }

    /// The bytes of an index that is in memory; a mapped one is copied.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        match self.bytes {
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(map) => map.to_vec(),
        }
    }

    fn new(bytes: Bytes) -> Result<Self, IndexError> {
        let checked = check(&bytes)?;
        Ok(Self { bytes, checked })
    }

    /// How the layer file is laid out.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.checked.layout
    }

    /// The name of the layer file in stores.
    #[must_use]
    pub fn id(&self) -> LayerId {
        LayerId { diff_id: self.diff_id(), layout: self.layout() }
    }

    /// sha256 of the layer's uncompressed tar, which is the layer file of [`Layout::Tar`].
    #[must_use]
    pub fn diff_id(&self) -> Digest {
        Digest::from_bytes(self.checked.header.diff_id)
    }

    /// sha256 of the blob the index was built from.
    #[must_use]
    pub fn blob_digest(&self) -> Digest {
        Digest::from_bytes(self.checked.header.blob_digest)
    }

    /// Length of the blob in bytes.
    #[must_use]
    pub fn blob_size(&self) -> u64 {
        self.checked.header.blob_size.get()
    }

    /// Length of the layer file in bytes.
    #[must_use]
    pub fn layer_size(&self) -> u64 {
        self.checked.header.layer_size.get()
    }

    /// How the blob is compressed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.checked.compression
    }

    /// Length of the index itself in bytes.
    #[must_use]
    pub fn index_size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Number of entries.
    #[must_use]
    pub fn entry_count(&self) -> usize {
        self.checked.entries
    }

    /// Entry `i` in archive order. Panics if there is none, as slices do.
    #[must_use]
    pub fn entry(&self, i: usize) -> EntryRef<'_> {
        assert!(i < self.entry_count(), "entry {i} of {}", self.entry_count());
        let body = self.body();
        let at =
            self.checked.entry_segments[i / ENTRY_SEGMENT] + i % ENTRY_SEGMENT * size_of::<EntryRecord>();
        EntryRef { body, record: record(body, at) }
    }

    /// All entries in archive order.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = EntryRef<'_>> {
        (0..self.entry_count()).map(|i| self.entry(i))
    }

    /// Number of spans.
    #[must_use]
    pub fn span_count(&self) -> usize {
        self.checked.spans
    }

    /// Span `i`, in the order of the layer file. Panics if there is none, as slices do.
    #[must_use]
    pub fn span(&self, i: usize) -> SpanInfo {
        let record = self.span_record(i);
        SpanInfo {
            index: i as u32,
            blob_offset: record.blob_offset.get(),
            blob_len: record.blob_len.get(),
            offset: record.offset.get(),
            len: record.len.get(),
            pad: record.pad.get(),
            digest: Digest::from_bytes(record.digest),
            // `check` has refused other flags.
            digest_of: digest_of(record.flags).unwrap_or_default(),
            restartable: record.entrance != ENTRANCE_NONE,
        }
    }

    /// All spans in the order of the layer file: together they are the layer file, without gaps.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = SpanInfo> {
        (0..self.span_count()).map(|i| self.span(i))
    }

    /// The spans that hold any of the `len` bytes from `offset` of the layer file.
    #[must_use]
    pub fn spans_covering(&self, offset: u64, len: u64) -> Range<usize> {
        let end = offset.saturating_add(len).min(self.layer_size());
        if offset >= end {
            return 0..0;
        }
        // The span that starts at or before a byte: one less than the first that starts after it.
        let after = |byte: u64| self.partition(|span| span.offset.get() <= byte);
        after(offset).saturating_sub(1)..after(end - 1)
    }

    /// Decodes span `i` into `out`, replacing what is there, and checks the digest if there is one.
    ///
    /// `compressed` is exactly the blob's bytes from `blob_offset`, `blob_len` of them. `out` gets all `len` bytes,
    /// padding included. On an error `out` is empty.
    pub fn decode_span(&self, i: usize, compressed: &[u8], out: &mut Vec<u8>) -> Result<(), IndexError> {
        out.clear();
        if i >= self.span_count() {
            return Err(IndexError::NoSuchSpan { index: i, count: self.span_count() });
        }
        let span = self.span(i);
        if !span.restartable {
            return Err(IndexError::NotRestartable { index: i });
        }
        if compressed.len() as u64 != span.blob_len {
            return Err(IndexError::LengthMismatch {
                what: format!("the compressed data of span {i}"),
                expected: span.blob_len,
                actual: compressed.len() as u64,
            });
        }
        if span.digest_of == DigestOf::Blob {
            check_digest(&span, Digest::of(compressed))?;
        }
        let entrance = self.entrance(i)?;
        // `check` has bounded the length of restartable spans, and padding is shorter than its span.
        out.resize(span.len as usize, 0);
        let held = &mut out[..(span.len - u64::from(span.pad)) as usize];
        let decoded = crate::span::decode_span(&span, &entrance, compressed, held).and_then(|()| match span
            .digest_of
        {
            DigestOf::Decoded => check_digest(&span, Digest::of(held)),
            DigestOf::Blob | DigestOf::Nothing => Ok(()),
        });
        if decoded.is_err() {
            out.clear();
        }
        decoded
    }

    fn entrance(&self, i: usize) -> Result<Entrance, IndexError> {
        let record = self.span_record(i);
        Ok(match record.entrance {
            ENTRANCE_PLAIN => Entrance::Plain,
            ENTRANCE_GZIP_MEMBER => Entrance::GzipMember { skip: self.skip(record) },
            ENTRANCE_ZSTD_FRAME => Entrance::ZstdFrame { skip: self.skip(record) },
            ENTRANCE_DEFLATE => {
                let at = record.window.get() as usize;
                let packed = &self.body()[at..at + record.window_len.get() as usize];
                let size = record.window_size.get() as usize;
                let window = if packed.is_empty() {
                    Vec::new()
                } else {
                    let window = zstd::bulk::decompress(packed, size).map_err(|e| {
                        IndexError::bad_index(format!("the window of span {i} is damaged: {e}"))
                    })?;
                    self.let_go();
                    window
                };
                if window.len() != size {
                    return Err(IndexError::bad_index(format!("the window of span {i} has a wrong length")));
                }
                Entrance::Deflate { bits: record.bits, window }
            }
            _ => Entrance::None,
        })
    }

    /// Decoded bytes to throw away before a span that starts at a member or frame.
    fn skip(&self, record: &SpanRecord) -> u64 {
        // Version 1 left something else in this place.
        if self.checked.header.version.get() >= 2 { record.window.get() } else { 0 }
    }

    fn body(&self) -> &[u8] {
        &self.bytes[size_of::<HeaderRecord>()..][..self.checked.body_len]
    }

    fn span_record(&self, i: usize) -> &SpanRecord {
        assert!(i < self.span_count(), "span {i} of {}", self.span_count());
        let at = self.checked.span_segments[i / SPAN_SEGMENT] + i % SPAN_SEGMENT * size_of::<SpanRecord>();
        record(self.body(), at)
    }

    /// Number of spans at the start for which `low` holds.
    fn partition(&self, low: impl Fn(&SpanRecord) -> bool) -> usize {
        let (mut from, mut to) = (0, self.span_count());
        while from < to {
            let middle = from + (to - from) / 2;
            if low(self.span_record(middle)) { from = middle + 1 } else { to = middle }
        }
        from
    }
}

/// Compares the digest of what a span's digest is of with it.
pub(crate) fn check_digest(span: &SpanInfo, actual: Digest) -> Result<(), IndexError> {
    if actual == span.digest {
        return Ok(());
    }
    Err(IndexError::DigestMismatch { what: format!("span {}", span.index), expected: span.digest, actual })
}

/// The record at `at`, which `check` has found to lie inside the body.
pub(crate) fn record<T>(body: &[u8], at: usize) -> &T
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    match T::ref_from_prefix(&body[at..]) {
        Ok((record, _)) => record,
        Err(_) => unreachable!("records were checked to lie inside the body"),
    }
}

/// One entry of a layer.
#[derive(Clone, Copy)]
pub struct EntryRef<'a> {
    pub(crate) body: &'a [u8],
    pub(crate) record: &'a EntryRecord,
}

impl std::fmt::Debug for EntryRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} \"{}\"", self.kind(), self.path().escape_ascii())
    }
}

impl<'a> EntryRef<'a> {
    /// The path relative to the root: clean, without `/` or `./` in front or `/` at the end; "" is the root.
    #[must_use]
    pub fn path(&self) -> &'a [u8] {
        &self.body[self.heap()..][..self.path_len()]
    }

    /// What the entry is.
    #[must_use]
    pub fn kind(&self) -> EntryKind {
        // `check` has refused other codes.
        kind_of(self.record.kind).unwrap_or(EntryKind::File)
    }

    /// Permission, set-id and sticky bits: at most 07777.
    #[must_use]
    pub fn mode(&self) -> u32 {
        self.record.mode.get().into()
    }

    /// Owner.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.record.uid.get()
    }

    /// Group.
    #[must_use]
    pub fn gid(&self) -> u32 {
        self.record.gid.get()
    }

    /// Time of last modification.
    #[must_use]
    pub fn mtime(&self) -> Timestamp {
        Timestamp { secs: self.record.mtime.get(), nanos: self.record.nanos.get() }
    }

    /// Length of a regular file in bytes, holes included; 0 for all else.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.record.size.get()
    }

    /// Target of a symbolic link as it is, or of a hard link as a clean path; otherwise empty.
    #[must_use]
    pub fn link(&self) -> &'a [u8] {
        &self.body[self.heap() + self.path_len()..][..self.link_len()]
    }

    /// Major and minor number of a device; otherwise 0, 0.
    #[must_use]
    pub fn rdev(&self) -> (u32, u32) {
        match self.kind() {
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                let data = self.record.data.get();
                ((data >> 32) as u32, data as u32)
            }
            _ => (0, 0),
        }
    }

    /// Extended attributes: name with its namespace (`user.x`), value.
    pub fn xattrs(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let start = self.heap() + self.path_len() + self.link_len();
        let mut rest = &self.body[start..][..self.record.xattrs_len.get() as usize];
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let head: &XattrRecord = record(rest, 0);
            let (name_len, value_len) = (head.name_len.get() as usize, head.value_len.get() as usize);
            let (name, tail) = rest[size_of::<XattrRecord>()..].split_at(name_len);
            let (value, tail) = tail.split_at(value_len);
            rest = tail;
            Some((name, value))
        })
    }

    /// Where a regular file's data lies in the layer file, in the file's order; between extents there are holes.
    pub fn extents(&self) -> impl ExactSizeIterator<Item = Extent> + use<'a> {
        let this = *self;
        let sparse = this.record.flags & FLAG_SPARSE != 0;
        let data = !sparse && this.kind() == EntryKind::File && this.size() > 0;
        let count = if sparse { this.record.extents.get() as usize } else { usize::from(data) };
        let start = this.heap() + this.path_len() + this.link_len() + this.record.xattrs_len.get() as usize;
        (0..count).map(move |i| {
            if !sparse {
                return Extent { file_offset: 0, layer_offset: this.record.data.get(), len: this.size() };
            }
            let record: &ExtentRecord = record(this.body, start + i * size_of::<ExtentRecord>());
            Extent {
                file_offset: record.file_offset.get(),
                layer_offset: record.layer_offset.get(),
                len: record.len.get(),
            }
        })
    }

    /// sha256 of a regular file's content, holes read as zeros. `None` for all else, and for files with more
    /// than 64 MiB of holes, or of layers with very many, which nobody hashes.
    #[must_use]
    pub fn content(&self) -> Option<Digest> {
        (self.record.flags & FLAG_CONTENT != 0).then(|| Digest::from_bytes(self.record.content))
    }

    fn heap(&self) -> usize {
        self.record.heap.get() as usize
    }

    fn path_len(&self) -> usize {
        self.record.path_len.get().into()
    }

    fn link_len(&self) -> usize {
        self.record.link_len.get().into()
    }
}

/// Hashes spans whose ends are known, as their bytes pass.
pub(crate) struct SpanHasher {
    hasher: Hasher,
}

impl SpanHasher {
    pub(crate) fn new() -> Self {
        Self { hasher: Hasher::new() }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// The digest of the span that ends here; the next starts.
    pub(crate) fn take(&mut self) -> Digest {
        std::mem::take(&mut self.hasher).finish()
    }
}
