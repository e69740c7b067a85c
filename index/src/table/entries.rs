//! Checks records as they come and gathers them: what the layer contains, and where the chunks of its files are.

use std::ops::Range;

use base64::Engine as _;

use super::TableError;
use super::json::Record;
use super::time;
use crate::tar::{FILE_MAX, TARGET_MAX, clean};
use crate::{Digest, EntryKind, Timestamp};

/// Files in the root that an eStargz writer adds for its readers.
const OWN_FILES: [&[u8]; 3] = [PREFETCH, b".no.prefetch.landmark", b"stargz.index.json"];
/// Stands behind the files to be fetched early.
pub(super) const PREFETCH: &[u8] = b".prefetch.landmark";

/// What Go's JSON encoder puts where a name is not UTF-8.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Names and values.
type Xattrs = Vec<(Box<[u8]>, Box<[u8]>)>;

/// An entry of the table.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Box<[u8]>,
    pub(super) kind: EntryKind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) size: u64,
    pub(super) link: Box<[u8]>,
    pub(super) rdev: (u32, u32),
    pub(super) xattrs: Xattrs,
    pub(super) content: Option<Digest>,
    /// Its chunks in [`Entries::chunks`].
    pub(super) chunks: Range<u32>,
    /// One of [`OWN_FILES`]: not part of the layer's tree.
    pub(super) own: bool,
}

/// A run of a file's bytes that lies in one piece in the blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) file_offset: u64,
    pub(super) len: u64,
    /// Where its gzip member or zstd frame starts.
    pub(super) blob_offset: u64,
    /// Where that ends, if the table says so; otherwise 0.
    pub(super) blob_end: u64,
    /// Decoded bytes of the member or frame in front of the chunk's.
    pub(super) skip: u64,
    pub(super) digest: Option<Digest>,
    /// All bytes are zero.
    pub(super) zeros: bool,
}

/// A file whose chunks are still coming.
#[derive(Debug)]
struct Open {
    /// Bytes that the chunks so far make up.
    next: u64,
    /// Where the last chunk ends in the blob, or 0.
    blob_end: u64,
}

/// All entries in the table's order.
#[derive(Debug, Default)]
pub(super) struct Entries {
    pub(super) entries: Vec<Entry>,
    pub(super) chunks: Vec<Chunk>,
    open: Option<Open>,
    /// Byte of the blob before which all contents lie.
    data_end: u64,
    /// The writer was an eStargz writer, whose own files are not part of the tree.
    own_files: bool,
}

impl Entries {
    pub(super) fn new(data_end: u64, own_files: bool) -> Self {
        Self { data_end, own_files, ..Self::default() }
    }

    /// The name of the file that has chunk `i`, for messages.
    pub(super) fn file_of(&self, i: u32) -> &[u8] {
        self.entries.iter().find(|e| e.chunks.contains(&i)).map_or(b"", |e| &e.path)
    }

    /// Takes the next record.
    pub(super) fn push(&mut self, record: &Record) -> Result<(), TableError> {
        let name = record.name.as_deref().unwrap_or_default();
        let fail = |reason: String| TableError::entry(name.as_bytes(), reason);
        if record.r#type.as_deref() == Some("chunk") {
            return self.further_chunk(record).map_err(fail);
        }
        self.close()?;
        let entry = self.entry(record).map_err(fail)?;
        let (file, size) = (entry.kind == EntryKind::File, entry.size);
        self.entries.push(entry);
        if file && size > 0 {
            let end = number("endOffset", record.end_offset, u64::MAX).map_err(fail)?;
            self.open = Some(Open { next: 0, blob_end: end });
            self.chunk(record, size).map_err(fail)?;
        }
        Ok(())
    }

    /// There are no more records.
    pub(super) fn finish(&mut self) -> Result<(), TableError> {
        self.close()
    }

    fn entry(&self, record: &Record) -> Result<Entry, String> {
        let kind = kind(record.r#type.as_deref().unwrap_or_default())?;
        let name = record.name.as_deref().filter(|n| !n.is_empty()).ok_or("it has no name")?;
        let path = clean(text("name", name)?.as_bytes())?.into_boxed_slice();
        if path.is_empty() && kind != EntryKind::Directory {
            return Err("the root is no directory".into());
        }
        let (size, content) = if kind == EntryKind::File { content(record)? } else { (0, None) };
        let at = self.chunks.len() as u32;
        Ok(Entry {
            own: self.own_files && kind == EntryKind::File && OWN_FILES.contains(&&path[..]),
            path,
            kind,
            // Some writers leave the type's bits in.
            mode: (number("mode", record.mode, u64::MAX)? & 0o7777) as u32,
            uid: id("uid", record.uid)?,
            gid: id("gid", record.gid)?,
            mtime: mtime(record)?,
            size,
            link: link(record, kind)?,
            rdev: rdev(record, kind)?,
            xattrs: xattrs(record)?,
            content,
            chunks: at..at,
        })
    }

    /// A record that continues the file before it.
    fn further_chunk(&mut self, record: &Record) -> Result<(), String> {
        let (Some(_), Some(file)) = (&self.open, self.entries.last()) else {
            return Err("it is a chunk but follows no file that has contents".into());
        };
        let name = record.name.as_deref().unwrap_or_default();
        if !name.is_empty() && clean(name.as_bytes())? != *file.path {
            return Err(format!("it is a chunk but follows the file \"{}\"", file.path.escape_ascii()));
        }
        let size = file.size;
        self.chunk(record, size)
    }

    /// The chunk that `record` describes, of the last file, which has `size` bytes.
    fn chunk(&mut self, record: &Record, size: u64) -> Result<(), String> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let file_offset = number("chunkOffset", record.chunk_offset, u64::MAX)?;
        if file_offset != open.next {
            return Err(format!(
                "its chunks leave a gap or overlap: one starts at byte {file_offset} instead of {}",
                open.next
            ));
        }
        // 0 means: up to the end of the file.
        let len = match number("chunkSize", record.chunk_size, u64::MAX)? {
            0 => size - file_offset,
            len => len,
        };
        if len == 0 || len > size - file_offset {
            return Err(format!("its chunks go beyond its {size} bytes"));
        }
        let blob_offset = number("offset", record.offset, u64::MAX)?;
        let skip = number("innerOffset", record.inner_offset, u64::MAX)?;
        if blob_offset == 0 && skip == 0 {
            return Err("it does not say where in the blob its contents are".into());
        }
        if blob_offset >= self.data_end {
            return Err(format!(
                "its contents are said to start at byte {blob_offset} of the blob, whose data ends at {}",
                self.data_end
            ));
        }
        let zeros = match record.chunk_type.as_deref().unwrap_or_default() {
            "" => false,
            "zeros" => true,
            other => return Err(format!("a chunk is of the unknown type \"{}\"", other.escape_debug())),
        };
        open.next += len;
        self.chunks.push(Chunk {
            file_offset,
            len,
            blob_offset,
            blob_end: 0,
            skip,
            digest: digest("chunkDigest", record.chunk_digest.as_deref())?,
            zeros,
        });
        if let Some(file) = self.entries.last_mut() {
            file.chunks.end += 1;
        }
        Ok(())
    }

    /// The last file has all its chunks.
    fn close(&mut self) -> Result<(), TableError> {
        let (Some(open), Some(file)) = (self.open.take(), self.entries.last()) else { return Ok(()) };
        let fail = |reason: String| Err(TableError::entry(&file.path, reason));
        if open.next != file.size {
            return fail(format!("its chunks make up {} of its {} bytes", open.next, file.size));
        }
        let range = file.chunks.start as usize..file.chunks.end as usize;
        if let [only] = &mut self.chunks[range.clone()] {
            match (only.digest, file.content) {
                (Some(chunk), Some(whole)) if chunk != whole => {
                    return fail(format!("its only chunk has digest {chunk}, the file {whole}"));
                }
                (None, whole) => only.digest = whole,
                _ => {}
            }
        }
        let Some(last) = self.chunks[range].last_mut() else { return Ok(()) };
        if open.blob_end != 0 && (open.blob_end <= last.blob_offset || open.blob_end > self.data_end) {
            return fail(format!(
                "its contents are said to end at byte {} of the blob, but its last chunk starts at {} and all data \
                 ends at {}",
                open.blob_end, last.blob_offset, self.data_end
            ));
        }
        last.blob_end = open.blob_end;
        Ok(())
    }
}

fn kind(name: &str) -> Result<EntryKind, String> {
    Ok(match name {
        "reg" => EntryKind::File,
        "dir" => EntryKind::Directory,
        "symlink" => EntryKind::Symlink,
        "hardlink" => EntryKind::Hardlink,
        "char" => EntryKind::CharDevice,
        "block" => EntryKind::BlockDevice,
        "fifo" => EntryKind::Fifo,
        other => {
            let shown: String = other.chars().take(40).collect();
            return Err(format!("it is of the unknown type \"{}\"", shown.escape_debug()));
        }
    })
}

/// A number that is absent (0) or at most `max`.
fn number(what: &str, value: Option<i64>, max: u64) -> Result<u64, String> {
    let value = value.unwrap_or(0);
    match u64::try_from(value) {
        Ok(n) if n <= max => Ok(n),
        _ => Err(format!("its {what} {value} is out of range")),
    }
}

fn id(what: &str, value: Option<i64>) -> Result<u32, String> {
    // The highest number means "no id" to the kernel.
    number(what, value, u64::from(u32::MAX) - 1).map(|n| n as u32)
}

/// Refuses what the table's writer could not spell.
fn text<'a>(what: &str, text: &'a str) -> Result<&'a str, String> {
    if text.contains(REPLACEMENT) {
        return Err(format!("its {what} was not UTF-8, which the table cannot express"));
    }
    Ok(text)
}

/// A digest that may be absent.
fn digest(what: &str, text: Option<&str>) -> Result<Option<Digest>, String> {
    match text {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|e| format!("bad {what}: {e}")),
    }
}

/// Size and digest of a regular file.
fn content(record: &Record) -> Result<(u64, Option<Digest>), String> {
    let size = number("size", record.size, FILE_MAX.unsigned_abs())?;
    let content = digest("digest", record.digest.as_deref())?;
    if size > 0 {
        return Ok((size, content));
    }
    let empty = Digest::of(b"");
    if content.is_some_and(|d| d != empty) || record.chunk_size.unwrap_or(0) != 0 {
        return Err("it is empty but has the digest or the chunk of something".into());
    }
    Ok((0, Some(empty)))
}

fn mtime(record: &Record) -> Result<Timestamp, String> {
    match record.modtime.as_deref() {
        None | Some("") => Ok(Timestamp::default()),
        Some(text) => time::parse(text).ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            format!("its modtime \"{}\" is no time", shown.escape_debug())
        }),
    }
}

fn link(record: &Record, kind: EntryKind) -> Result<Box<[u8]>, String> {
    let link = record.link_name.as_deref().unwrap_or_default();
    match kind {
        EntryKind::Hardlink => {
            let target = clean(text("hard link target", link)?.as_bytes())
                .map_err(|e| format!("bad hard link target: {e}"))?;
            if target.is_empty() { Err("it is a hard link to nothing".into()) } else { Ok(target.into()) }
        }
        EntryKind::Symlink => {
            if link.is_empty() || link.len() > TARGET_MAX || link.contains('\0') {
                return Err(format!("its symbolic link target has {} bytes or a NUL", link.len()));
            }
            Ok(text("symbolic link target", link)?.as_bytes().into())
        }
        _ => Ok(Box::default()),
    }
}

fn rdev(record: &Record, kind: EntryKind) -> Result<(u32, u32), String> {
    match kind {
        EntryKind::CharDevice | EntryKind::BlockDevice => {
            let part = |what, value| number(what, value, u32::MAX.into()).map(|n| n as u32);
            Ok((part("devMajor", record.dev_major)?, part("devMinor", record.dev_minor)?))
        }
        _ => Ok((0, 0)),
    }
}

fn xattrs(record: &Record) -> Result<Xattrs, String> {
    let pairs = record.xattrs.as_ref().map_or(&[][..], |pairs| &pairs.0);
    let mut out = Vec::with_capacity(pairs.len());
    for (name, value) in pairs {
        let value = base64::engine::general_purpose::STANDARD
            .decode(value)
            .map_err(|e| format!("the value of its extended attribute {name:?} is not base64: {e}"))?;
        out.push((text("extended attribute's name", name)?.as_bytes().into(), value.into_boxed_slice()));
    }
    Ok(out)
}
