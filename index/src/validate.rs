//! The one check of an index at its opening. What passes cannot make an accessor panic or leave the file.

use std::ops::Range;

use zerocopy::FromBytes;

use crate::format::{
    ENTRANCE_DEFLATE, ENTRANCE_GZIP_MEMBER, ENTRANCE_NONE, ENTRANCE_ZSTD_FRAME, ENTRY_SEGMENT, EntryRecord,
    ExtentRecord, FLAG_CONTENT, FLAG_SPARSE, HeaderRecord, MAGIC, SPAN_LEN_MAX, SPAN_SEGMENT, SpanRecord,
    VERSION, XattrRecord, compression_of, digest_of, entrance_fits, kind_of, layout_of,
};
use crate::inflate::WINDOW;
use crate::reader::record;
use crate::tar::{BLOCK, check_clean};
use crate::{Compression, DigestOf, EntryKind, IndexError, Layout};

/// What the check found, in native types.
pub(crate) struct Checked {
    pub(crate) header: HeaderRecord,
    pub(crate) compression: Compression,
    pub(crate) layout: Layout,
    pub(crate) body_len: usize,
    pub(crate) entries: usize,
    pub(crate) spans: usize,
    pub(crate) entry_segments: Vec<usize>,
    pub(crate) span_segments: Vec<usize>,
}

type Fault = String;

/// Checks a whole index.
pub(crate) fn check(bytes: &[u8]) -> Result<Checked, IndexError> {
    fn bad(reason: impl Into<String>) -> IndexError {
        IndexError::bad_index(reason)
    }
    let (header, rest) =
        HeaderRecord::ref_from_prefix(bytes).map_err(|_| bad("it is shorter than an index header"))?;
    if header.magic != MAGIC {
        return Err(bad("it does not start with the magic bytes of an index"));
    }
    if header.version.get() > VERSION {
        return Err(IndexError::UnknownVersion { found: header.version.get(), known: VERSION });
    }
    let head_len = bytes.len() - rest.len();
    if crc32c::crc32c(&bytes[..head_len - 4]) != header.header_crc.get() {
        return Err(bad("the checksum of its header is wrong"));
    }
    if header.version.get() == 0 {
        return Err(bad(format!("there is no format version {}", header.version)));
    }
    let compression =
        compression_of(header.compression).ok_or_else(|| bad("its compression is not known"))?;
    let layout = layout_of(header.layout).ok_or_else(|| bad("its layout is not known"))?;
    if header.version.get() == 1 && layout != Layout::Tar {
        return Err(bad("format version 1 only has tar layouts"));
    }
    let body_len = usize::try_from(header.body_len.get()).ok().filter(|n| *n <= rest.len());
    let body_len = body_len.ok_or_else(|| bad("it is cut off"))?;
    let (body, directory) = rest.split_at(body_len);
    if crc32c::crc32c(directory) != header.directory_crc.get() {
        return Err(bad("the checksum of its directory is wrong"));
    }
    let mut checked = Checked {
        header: *header,
        compression,
        layout,
        body_len,
        entries: 0,
        spans: 0,
        entry_segments: Vec::new(),
        span_segments: Vec::new(),
    };
    directory_of(&mut checked, body, directory).map_err(IndexError::bad_index)?;
    let (sum, found) = entries(&checked, body);
    // A fault in a damaged index is best called damage.
    if sum != header.body_crc.get() {
        return Err(bad("the checksum of its body is wrong"));
    }
    let found = found.and_then(|()| spans(&checked, body));
    found.map_err(IndexError::bad_index)?;
    Ok(checked)
}

/// Reads the places of the segments and checks that they lie in the body.
fn directory_of(checked: &mut Checked, body: &[u8], directory: &[u8]) -> Result<(), Fault> {
    let count = |n: u64, size: usize| -> Result<usize, Fault> {
        // Records lie in the body, so there cannot be more than fit there.
        usize::try_from(n)
            .ok()
            .filter(|n| *n <= body.len() / size)
            .ok_or_else(|| "it counts too many records".into())
    };
    checked.entries = count(checked.header.entry_count.get(), size_of::<EntryRecord>())?;
    checked.spans = count(checked.header.span_count.get(), size_of::<SpanRecord>())?;
    if u32::try_from(checked.spans).is_err() {
        return Err("it counts too many spans".into());
    }
    let segments = checked.entries.div_ceil(ENTRY_SEGMENT) + checked.spans.div_ceil(SPAN_SEGMENT);
    if directory.len() != segments * 8 {
        return Err("its directory has the wrong length".into());
    }
    let mut places = directory.chunks_exact(8).map(|c| {
        let mut place = [0; 8];
        place.copy_from_slice(c);
        u64::from_le_bytes(place)
    });
    let tables = [
        (&mut checked.entry_segments, checked.entries, ENTRY_SEGMENT, size_of::<EntryRecord>()),
        (&mut checked.span_segments, checked.spans, SPAN_SEGMENT, size_of::<SpanRecord>()),
    ];
    for (segments, mut left, per_segment, size) in tables {
        while left > 0 {
            let n = left.min(per_segment);
            left -= n;
            let place = places.next().ok_or("its directory is too short")?;
            segments.push(range(place, (n * size) as u64, body.len() as u64)? as usize);
        }
    }
    Ok(())
}

/// `place`, if `len` bytes from there lie below `end`.
fn range(place: u64, len: u64, end: u64) -> Result<u64, Fault> {
    match place.checked_add(len) {
        Some(stop) if stop <= end => Ok(place),
        _ => Err("it points outside itself".into()),
    }
}

fn spans(checked: &Checked, body: &[u8]) -> Result<(), Fault> {
    let mut offset = 0u64;
    let mut blob = 0u64;
    for i in 0..checked.spans {
        let at = checked.span_segments[i / SPAN_SEGMENT] + i % SPAN_SEGMENT * size_of::<SpanRecord>();
        let span: &SpanRecord = record(body, at);
        let len = span.len.get();
        if span.offset.get() != offset || len == 0 {
            return Err(format!("span {i} does not start where the one before ends"));
        }
        offset = offset.checked_add(len).ok_or("the spans are too long")?;
        let start = range(span.blob_offset.get(), span.blob_len.get(), checked.header.blob_size.get())
            .map_err(|_| format!("span {i} points outside the blob"))?;
        if checked.layout == Layout::Tar {
            // A byte that a deflate block starts inside of belongs to both spans.
            if start.saturating_add(1) < blob {
                return Err(format!("span {i} overlaps its predecessor in the blob"));
            }
            blob = blob.max(start + span.blob_len.get());
        }
        span_fields(checked, body, span).map_err(|fault| format!("span {i}: {fault}"))?;
    }
    if offset != checked.header.layer_size.get() {
        return Err("its spans do not make up the layer file".into());
    }
    Ok(())
}

/// The checks of a span that need no neighbour.
fn span_fields(checked: &Checked, body: &[u8], span: &SpanRecord) -> Result<(), Fault> {
    let len = span.len.get();
    if !entrance_fits(span.entrance, checked.compression) || span.bits > 7 {
        return Err("its entrance is not known".into());
    }
    let restartable = span.entrance != ENTRANCE_NONE;
    if restartable && (len > SPAN_LEN_MAX || usize::try_from(span.blob_len.get()).is_err()) {
        return Err("it is too long".into());
    }
    if span.entrance == ENTRANCE_DEFLATE {
        range(span.window.get(), span.window_len.get().into(), body.len() as u64)?;
        if span.window_size.get() as usize > WINDOW {
            return Err("its window is too long".into());
        }
    }
    if checked.header.version.get() == 1 {
        let zero = span.flags == 0 && span.pad.get() == 0;
        return if zero { Ok(()) } else { Err("it has flags that its format version does not know".into()) };
    }
    let skips = matches!(span.entrance, ENTRANCE_GZIP_MEMBER | ENTRANCE_ZSTD_FRAME);
    if skips && span.window.get().checked_add(len).is_none_or(|end| end > SPAN_LEN_MAX) {
        return Err("too much has to be decoded before it".into());
    }
    let pad = u64::from(span.pad.get());
    if pad != 0 && (checked.layout == Layout::Tar || pad >= len || pad >= BLOCK as u64) {
        return Err("its padding is impossible".into());
    }
    match digest_of(span.flags) {
        None => Err("what its digest is of is not known".into()),
        Some(DigestOf::Nothing) if span.digest != [0; 32] => {
            Err("it has a digest that is said to be of nothing".into())
        }
        Some(_) => Ok(()),
    }
}

/// Segments of entries that are worth a thread of their own: starting one takes as long as checking a few hundred.
const SEGMENTS_PER_THREAD: usize = 4;
/// More threads wait for memory, not for each other.
const MAX_THREADS: usize = 4;

/// The checksum of the body, and whether all entries are right.
///
/// Both at once, because memory is what the opening of an index waits for; and a large one on several threads, since
/// a start waits for it.
fn entries(checked: &Checked, body: &[u8]) -> (u32, Result<(), Fault>) {
    let segments = checked.entry_segments.len();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (segments / SEGMENTS_PER_THREAD).clamp(1, cores.min(MAX_THREADS));
    let parts = parts(checked, body.len(), threads);
    let check = |part: &Part| part.check(checked, body);
    let found: Vec<_> = match parts.as_slice() {
        [] => Vec::new(),
        [first, others @ ..] => std::thread::scope(|scope| {
            let others: Vec<_> = others
                .iter()
                .map(|part| (part, std::thread::Builder::new().spawn_scoped(scope, || check(part))))
                .collect();
            let first = check(first);
            // What no thread could be had for, or what one left undone, is done here.
            let joined = others.into_iter().map(|(part, thread)| {
                thread.ok().and_then(|thread| thread.join().ok()).unwrap_or_else(|| check(part))
            });
            std::iter::once(first).chain(joined).collect()
        }),
    };
    let lengths = parts.iter().map(|part| part.bytes.len());
    let mut all = (0, Ok(()));
    for ((crc, result), len) in found.into_iter().zip(lengths) {
        all = (crc32c::crc32c_combine(all.0, crc, len), all.1.and(result));
    }
    all
}

/// A run of segments of entries, and a run of the body. Where a writer put the segments in order, as ours do, the
/// one lies in the other.
struct Part {
    segments: Range<usize>,
    bytes: Range<usize>,
}

/// Cuts segments and body into runs that make up all of both.
fn parts(checked: &Checked, body_len: usize, count: usize) -> Vec<Part> {
    let segments = checked.entry_segments.len();
    let mut parts: Vec<Part> = Vec::with_capacity(count);
    for i in 0..count {
        let run = segments * i / count..segments * (i + 1) / count;
        let from = parts.last().map_or(0, |part| part.bytes.end);
        let to = if i + 1 == count { body_len } else { segment_end(checked, run.end).clamp(from, body_len) };
        parts.push(Part { segments: run, bytes: from..to });
    }
    parts
}

/// The end of the records of the segment before `segment`.
fn segment_end(checked: &Checked, segment: usize) -> usize {
    let Some(last) = segment.checked_sub(1) else { return 0 };
    let records = (checked.entries - last * ENTRY_SEGMENT).min(ENTRY_SEGMENT);
    checked.entry_segments[last] + records * size_of::<EntryRecord>()
}

impl Part {
    /// Writers put the names right before the records, so both are in the cache when the records are checked.
    fn check(&self, checked: &Checked, body: &[u8]) -> (u32, Result<(), Fault>) {
        let (mut crc, mut done) = (0, self.bytes.start);
        let mut advance = |to: usize| {
            if let Some(piece) = body.get(done..to.min(self.bytes.end)) {
                crc = crc32c::crc32c_append(crc, piece);
                done += piece.len();
            }
        };
        let mut result = Ok(());
        for segment in self.segments.clone() {
            advance(segment_end(checked, segment + 1));
            result = result.and_then(|()| segment_entries(checked, body, segment));
        }
        advance(self.bytes.end);
        (crc, result)
    }
}

fn segment_entries(checked: &Checked, body: &[u8], segment: usize) -> Result<(), Fault> {
    let (start, first) = (checked.entry_segments[segment], segment * ENTRY_SEGMENT);
    for i in 0..(checked.entries - first).min(ENTRY_SEGMENT) {
        entry(record(body, start + i * size_of::<EntryRecord>()), body, checked.header.layer_size.get())
            .map_err(|fault| format!("entry {}: {fault}", first + i))?;
    }
    Ok(())
}

fn entry(entry: &EntryRecord, body: &[u8], layer_size: u64) -> Result<(), Fault> {
    let kind = kind_of(entry.kind).ok_or("its kind is not known")?;
    if entry.mode.get() > 0o7777 || entry.nanos.get() >= 1_000_000_000 {
        return Err("its mode or time is out of range".into());
    }
    if entry.flags & !(FLAG_CONTENT | FLAG_SPARSE) != 0 {
        return Err("it has unknown flags".into());
    }
    let path_len = usize::from(entry.path_len.get());
    let link_len = usize::from(entry.link_len.get());
    let xattrs_len = entry.xattrs_len.get() as usize;
    let extents = entry.extents.get() as usize;
    let total =
        (path_len + link_len) as u64 + xattrs_len as u64 + extents as u64 * size_of::<ExtentRecord>() as u64;
    let heap = range(entry.heap.get(), total, body.len() as u64)? as usize;
    let (path, rest) = body[heap..].split_at(path_len);
    let (link, rest) = rest.split_at(link_len);
    let (attributes, rest) = rest.split_at(xattrs_len);
    check_clean(path)?;
    match kind {
        EntryKind::Hardlink if link.is_empty() => return Err("it is a hard link to nothing".into()),
        EntryKind::Hardlink => check_clean(link)?,
        EntryKind::Symlink if link.is_empty() || link.contains(&0) => {
            return Err("it is a symbolic link with an impossible target".into());
        }
        EntryKind::Symlink => {}
        _ if !link.is_empty() => return Err("it is no link but has a target".into()),
        _ => {}
    }
    if path.is_empty() && kind != EntryKind::Directory {
        return Err("the root is no directory".into());
    }
    xattrs(attributes)?;
    if kind != EntryKind::File {
        let plain = entry.size.get() == 0 && entry.flags == 0 && extents == 0;
        return if plain { Ok(()) } else { Err("it is no file but has data".into()) };
    }
    if entry.flags & FLAG_SPARSE == 0 {
        if extents != 0 {
            return Err("it is not sparse but has a map".into());
        }
        return range(entry.data.get(), entry.size.get(), layer_size).map(|_| ());
    }
    let mut end = 0u64;
    for i in 0..extents {
        let extent: &ExtentRecord = record(rest, i * size_of::<ExtentRecord>());
        let (start, len) = (extent.file_offset.get(), extent.len.get());
        range(extent.layer_offset.get(), len, layer_size)?;
        range(start, len, entry.size.get())?;
        if start < end || len == 0 {
            return Err("its extents overlap".into());
        }
        end = start + len;
    }
    Ok(())
}

fn xattrs(mut rest: &[u8]) -> Result<(), Fault> {
    while !rest.is_empty() {
        let (head, tail) = XattrRecord::ref_from_prefix(rest).map_err(|_| "its attributes are cut off")?;
        let len = u64::from(head.name_len.get()) + u64::from(head.value_len.get());
        rest =
            usize::try_from(len).ok().and_then(|len| tail.get(len..)).ok_or("its attributes are cut off")?;
    }
    Ok(())
}
