//! Writes an index as the layer passes: everything goes out at once, only one segment of records of each kind
//! and the places of the segments stay in memory.

use std::io::{Cursor, Seek, SeekFrom, Write};

use zerocopy::IntoBytes;

use crate::builder::NewEntry;
use crate::decode::Entrance;
use crate::format::{
    ENTRY_SEGMENT, EntryRecord, ExtentRecord, FLAG_CONTENT, FLAG_SPARSE, HeaderRecord, MAGIC, SPAN_SEGMENT,
    SpanRecord, VERSION, XattrRecord, compression_code, digest_code, entrance_code, kind_code, layout_code,
};
use crate::{EntryKind, IndexError, Layout, SpanInfo, StreamSummary};

const BUFFER: usize = 128 * 1024;
/// Windows compress well at this level and cost little next to inflating.
const WINDOW_LEVEL: i32 = 6;
/// For indexes built from foreign tables: a start waits for them.
const FAST_LEVEL: i32 = 1;

pub(crate) struct IndexWriter<W> {
    out: W,
    layout: Layout,
    buffer: Vec<u8>,
    /// Bytes of the body handed to `out` or the buffer.
    body_len: u64,
    body_crc: u32,
    entries: Table,
    spans: Table,
    level: i32,
    compressor: Option<zstd::bulk::Compressor<'static>>,
}

/// Records of one kind, collected to segments.
struct Table {
    segment: Vec<u8>,
    segment_size: usize,
    segments: Vec<u64>,
    count: u64,
}

impl Table {
    fn new(segment_size: usize) -> Self {
        Self { segment: Vec::with_capacity(segment_size), segment_size, segments: Vec::new(), count: 0 }
    }

    /// Whether the segment is full now.
    fn push(&mut self, record: &[u8]) -> bool {
        self.segment.extend_from_slice(record);
        self.count += 1;
        self.segment.len() >= self.segment_size
    }
}

impl<W: Write + Seek> IndexWriter<W> {
    pub(crate) fn new(mut out: W, layout: Layout) -> Result<Self, IndexError> {
        out.seek(SeekFrom::Start(size_of::<HeaderRecord>() as u64)).map_err(IndexError::writing)?;
        Ok(Self::behind_header(out, layout))
    }

    /// A writer whose `out` stands behind the place for the header.
    fn behind_header(out: W, layout: Layout) -> Self {
        Self {
            out,
            layout,
            buffer: Vec::with_capacity(BUFFER),
            body_len: 0,
            body_crc: 0,
            entries: Table::new(ENTRY_SEGMENT * size_of::<EntryRecord>()),
            spans: Table::new(SPAN_SEGMENT * size_of::<SpanRecord>()),
            level: WINDOW_LEVEL,
            compressor: None,
        }
    }

    pub(crate) fn entry_count(&self) -> u64 {
        self.entries.count
    }

    pub(crate) fn span_count(&self) -> u64 {
        self.spans.count
    }

    /// Appends an entry whose values were checked already.
    pub(crate) fn entry(&mut self, entry: &NewEntry<'_>) -> Result<(), IndexError> {
        let heap = self.body_len;
        self.append(entry.path)?;
        self.append(entry.link)?;
        let xattrs = self.body_len;
        for (name, value) in entry.xattrs {
            let head = XattrRecord {
                name_len: narrow::<u16>(name.len())?.into(),
                value_len: narrow::<u32>(value.len())?.into(),
            };
            self.append(head.as_bytes())?;
            self.append(name)?;
            self.append(value)?;
        }
        let xattrs_len = self.body_len - xattrs;
        let whole = matches!(entry.extents, [one] if one.file_offset == 0 && one.len == entry.size);
        let sparse = !whole && (entry.size > 0 || !entry.extents.is_empty());
        if sparse {
            for extent in entry.extents {
                let record = ExtentRecord {
                    file_offset: extent.file_offset.into(),
                    layer_offset: extent.layer_offset.into(),
                    len: extent.len.into(),
                };
                self.append(record.as_bytes())?;
            }
        }
        let data = match entry.kind {
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                u64::from(entry.rdev.0) << 32 | u64::from(entry.rdev.1)
            }
            _ if whole => entry.extents.first().map_or(0, |e| e.layer_offset),
            _ => 0,
        };
        let mut flags = if sparse { FLAG_SPARSE } else { 0 };
        if entry.content.is_some() {
            flags |= FLAG_CONTENT;
        }
        let record = EntryRecord {
            heap: heap.into(),
            size: entry.size.into(),
            data: data.into(),
            mtime: entry.mtime.secs.into(),
            nanos: entry.mtime.nanos.into(),
            uid: entry.uid.into(),
            gid: entry.gid.into(),
            xattrs_len: narrow::<u32>(xattrs_len as usize)?.into(),
            extents: if sparse { narrow::<u32>(entry.extents.len())?.into() } else { 0.into() },
            // Checked or parsed to be at most 07777.
            mode: (entry.mode as u16).into(),
            path_len: narrow::<u16>(entry.path.len())?.into(),
            link_len: narrow::<u16>(entry.link.len())?.into(),
            kind: kind_code(entry.kind),
            flags,
            content: entry.content.map_or([0; 32], |d| *d.as_bytes()),
        };
        if self.entries.push(record.as_bytes()) { self.flush_entries() } else { Ok(()) }
    }

    pub(crate) fn span(&mut self, span: &SpanInfo, entrance: &Entrance) -> Result<(), IndexError> {
        let (bits, window) = match entrance {
            Entrance::Deflate { bits, window } => (*bits, &window[..]),
            _ => (0, &[][..]),
        };
        let at = match entrance {
            Entrance::GzipMember { skip } | Entrance::ZstdFrame { skip } => *skip,
            Entrance::Deflate { .. } => self.body_len,
            Entrance::Plain | Entrance::None => 0,
        };
        let mut window_len = 0;
        if !window.is_empty() {
            let packed = self.pack(window).map_err(IndexError::writing)?;
            window_len = narrow::<u32>(packed.len())?;
            self.append(&packed)?;
        }
        let record = SpanRecord {
            offset: span.offset.into(),
            len: span.len.into(),
            blob_offset: span.blob_offset.into(),
            blob_len: span.blob_len.into(),
            window: at.into(),
            window_len: window_len.into(),
            window_size: narrow::<u32>(window.len())?.into(),
            entrance: entrance_code(entrance),
            bits,
            flags: digest_code(span.digest_of),
            zero: 0,
            pad: span.pad.into(),
            zeros: [0; 2],
            digest: *span.digest.as_bytes(),
        };
        if self.spans.push(record.as_bytes()) { self.flush_spans() } else { Ok(()) }
    }

    /// Bytes of the body so far, without the segments that are being collected.
    pub(crate) fn body_len(&self) -> u64 {
        self.body_len
    }

    /// Writes what is left and the header, and gives `out` back. `summary.index_size` is set here.
    pub(crate) fn finish(mut self, summary: &mut StreamSummary) -> Result<W, IndexError> {
        if !self.entries.segment.is_empty() {
            self.flush_entries()?;
        }
        if !self.spans.segment.is_empty() {
            self.flush_spans()?;
        }
        let (body_len, body_crc) = (self.body_len, self.body_crc_now());
        let directory: Vec<u8> = self
            .entries
            .segments
            .iter()
            .chain(&self.spans.segments)
            .flat_map(|at| at.to_le_bytes())
            .collect();
        self.append(&directory)?;
        self.flush()?;
        let mut header = HeaderRecord {
            magic: MAGIC,
            version: VERSION.into(),
            compression: compression_code(summary.compression),
            layout: layout_code(self.layout),
            zero: [0; 2],
            blob_digest: *summary.blob_digest.as_bytes(),
            diff_id: *summary.diff_id.as_bytes(),
            blob_size: summary.blob_size.into(),
            layer_size: summary.layer_size.into(),
            entry_count: self.entries.count.into(),
            span_count: self.spans.count.into(),
            body_len: body_len.into(),
            body_crc: body_crc.into(),
            directory_crc: crc32c::crc32c(&directory).into(),
            reserved: [0; 20],
            header_crc: 0.into(),
        };
        let bytes = header.as_bytes();
        header.header_crc = crc32c::crc32c(&bytes[..bytes.len() - 4]).into();
        self.out.seek(SeekFrom::Start(0)).map_err(IndexError::writing)?;
        self.out.write_all(header.as_bytes()).map_err(IndexError::writing)?;
        self.out.flush().map_err(IndexError::writing)?;
        summary.index_size = (size_of::<HeaderRecord>() + directory.len()) as u64 + body_len;
        Ok(self.out)
    }

    /// A window as it is stored.
    fn pack(&mut self, window: &[u8]) -> std::io::Result<Vec<u8>> {
        if let Some(compressor) = &mut self.compressor {
            return compressor.compress(window);
        }
        self.compressor.insert(zstd::bulk::Compressor::new(self.level)?).compress(window)
    }

    fn flush_entries(&mut self) -> Result<(), IndexError> {
        self.entries.segments.push(self.body_len);
        let mut segment = std::mem::take(&mut self.entries.segment);
        self.append(&segment)?;
        segment.clear();
        self.entries.segment = segment;
        Ok(())
    }

    fn flush_spans(&mut self) -> Result<(), IndexError> {
        self.spans.segments.push(self.body_len);
        let mut segment = std::mem::take(&mut self.spans.segment);
        self.append(&segment)?;
        segment.clear();
        self.spans.segment = segment;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.buffer.extend_from_slice(bytes);
        self.body_len += bytes.len() as u64;
        if self.buffer.len() >= BUFFER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), IndexError> {
        self.body_crc = self.body_crc_now();
        self.out.write_all(&self.buffer).map_err(IndexError::writing)?;
        self.buffer.clear();
        Ok(())
    }

    fn body_crc_now(&self) -> u32 {
        crc32c::crc32c_append(self.body_crc, &self.buffer)
    }
}

impl IndexWriter<Cursor<Vec<u8>>> {
    /// A writer into memory.
    pub(crate) fn in_memory(layout: Layout) -> Self {
        let mut out = Cursor::new(vec![0; size_of::<HeaderRecord>()]);
        out.set_position(size_of::<HeaderRecord>() as u64);
        Self { level: FAST_LEVEL, ..Self::behind_header(out, layout) }
    }
}

/// The parser's limits keep all lengths far below these types' ends.
fn narrow<T: TryFrom<usize>>(n: usize) -> Result<T, IndexError> {
    T::try_from(n).map_err(|_| IndexError::bad_index(format!("a length of {n} does not fit the format")))
}
