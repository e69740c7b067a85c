//! From a checked table to an index: which blob bytes each chunk needs, and where it lies in the layer file.

use std::collections::HashMap;

use super::entries::{Chunk, Entries, Entry, PREFETCH};
use super::{TableError, TocInfo};
use crate::builder::{IndexBuilder, LayerFacts, NewEntrance, NewEntry, NewSpan};
use crate::format::SPAN_LEN_MAX;
use crate::tar::BLOCK;
use crate::{Compression, Digest, DigestOf, EntryKind, Extent, IndexError, Layout};

/// Shortest run of zeros that becomes a hole; shorter ones are fetched like data, which costs less than the pieces
/// that a file with many holes falls into.
const HOLE_MIN: u64 = 64 << 10;
/// Holes start and end at multiples of this in their file, so that a view can map what is between them by blocks.
const HOLE_ALIGN: u64 = 4096;

/// Refuses entries that contradict each other.
pub(super) fn check(table: &Entries) -> Result<(), TableError> {
    let mut known: HashMap<&[u8], &Entry> = HashMap::with_capacity(table.entries.len());
    for entry in &table.entries {
        let fail = |reason: String| Err(TableError::entry(&entry.path, reason));
        if entry.kind == EntryKind::Hardlink {
            let target = entry.link.escape_ascii();
            match known.get(&*entry.link) {
                None => {
                    return fail(format!("it is a hard link to \"{target}\", which no entry before it has"));
                }
                Some(e) if e.kind == EntryKind::Directory => {
                    return fail(format!("it is a hard link to the directory \"{target}\""));
                }
                Some(e) if e.own => {
                    return fail(format!("it is a hard link to the table's own \"{target}\""));
                }
                Some(_) => {}
            }
        }
        if known.insert(&entry.path, entry).is_some() {
            return fail("the table has two entries with this name".into());
        }
    }
    only_directories_have_children(table)
}

/// Looking up the parents of every entry would take long for deep paths; this looks for children instead.
fn only_directories_have_children(table: &Entries) -> Result<(), TableError> {
    let mut sorted: Vec<&[u8]> = table.entries.iter().map(|e| &*e.path).collect();
    sorted.sort_unstable();
    let mut inside = Vec::new();
    for entry in table.entries.iter().filter(|e| e.kind != EntryKind::Directory) {
        inside.clear();
        inside.extend_from_slice(&entry.path);
        inside.push(b'/');
        let first = sorted.partition_point(|path| *path < &inside[..]);
        if let Some(child) = sorted.get(first).filter(|path| path.starts_with(&inside)) {
            let parent = entry.path.escape_ascii();
            return Err(TableError::entry(child, format!("it lies in \"{parent}\", which is no directory")));
        }
    }
    Ok(())
}

/// Which bytes of the blob each chunk needs: its start is in the chunk, this is the length.
pub(super) fn blob_lens(table: &Entries, data_end: u64) -> Result<Vec<u64>, TableError> {
    let chunks = &table.chunks;
    let mut order: Vec<u32> = (0..chunks.len() as u32).collect();
    order.sort_unstable_by_key(|&i| (chunks[i as usize].blob_offset, chunks[i as usize].skip));
    let mut lens = vec![0; chunks.len()];
    // Backwards, because members and frames end where the next one starts.
    let (mut end, mut after) = (data_end, None::<&Chunk>);
    for &i in order.iter().rev() {
        let chunk = &chunks[i as usize];
        let fail = |reason: String| TableError::entry(table.file_of(i), reason);
        if let Some(after) = after {
            if after.blob_offset != chunk.blob_offset {
                end = after.blob_offset;
            } else if chunk.skip.checked_add(chunk.len).is_none_or(|stop| stop > after.skip) {
                return Err(fail(format!(
                    "its contents at byte {} of the blob overlap those of another chunk",
                    chunk.blob_offset
                )));
            }
        }
        if chunk.blob_end > end {
            return Err(fail(format!(
                "its contents are said to end at byte {} of the blob, where the next start at {end}",
                chunk.blob_end
            )));
        }
        let end = if chunk.blob_end > 0 { chunk.blob_end } else { end };
        // Zeros that become a hole are not decoded, however many there are.
        let len = if chunk.zeros { chunk.len.min(HOLE_MIN + 2 * HOLE_ALIGN) } else { chunk.len };
        let decoded = chunk.skip.checked_add(len.next_multiple_of(BLOCK as u64));
        let decoded = decoded.filter(|n| *n <= SPAN_LEN_MAX).ok_or_else(|| {
            fail(format!(
                "a chunk of {} bytes after {} is more than can be decoded for one read ({SPAN_LEN_MAX} bytes)",
                chunk.len, chunk.skip
            ))
        })?;
        lens[i as usize] = (end - chunk.blob_offset).min(most(decoded));
        after = Some(chunk);
    }
    Ok(lens)
}

/// The most compressed bytes that `decoded` bytes can need, generously: incompressible data grows by far less, and
/// after a chunk there may be the headers of any number of entries before the next one starts.
fn most(decoded: u64) -> u64 {
    decoded + decoded / 4 + (256 << 10)
}

/// Builds the index.
pub(super) fn build(
    table: &Entries,
    lens: &[u64],
    facts: &LayerFacts,
    info: &mut TocInfo,
) -> Result<Vec<u8>, TableError> {
    let mut builder = IndexBuilder::new(facts, Layout::Table);
    let zstd = facts.compression == Compression::Zstd;
    for entry in &table.entries {
        if entry.own {
            if *entry.path == *PREFETCH && builder.layer_size() > 0 {
                info.prefetch = Some(0..builder.layer_size());
            }
            continue;
        }
        let range = entry.chunks.start as usize..entry.chunks.end as usize;
        let mut file =
            File { base: builder.layer_size(), len: 0, zstd, extents: Vec::new(), spans: Vec::new() };
        for (chunk, &blob_len) in table.chunks[range.clone()].iter().zip(&lens[range]) {
            file.chunk(chunk, blob_len, entry.size);
        }
        file.pad();
        for span in &file.spans {
            info.undigested += u64::from(span.digest_of == DigestOf::Nothing);
            builder.span(span)?;
        }
        let xattrs: Vec<_> = entry.xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        let new = NewEntry {
            path: &entry.path,
            kind: entry.kind,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            size: entry.size,
            link: &entry.link,
            rdev: entry.rdev,
            xattrs: &xattrs,
            extents: &file.extents,
            content: entry.content,
        };
        builder.entry(&new).map_err(|e| match e {
            IndexError::Entry { name, reason } => TableError::Entry { name, reason },
            other => TableError::Index(other),
        })?;
        info.entries += 1;
        info.spans += file.spans.len() as u64;
    }
    Ok(builder.finish()?)
}

/// One file on its way into the layer file.
struct File {
    /// Where it starts there: a multiple of 512.
    base: u64,
    /// Its bytes there so far.
    len: u64,
    zstd: bool,
    extents: Vec<Extent>,
    spans: Vec<NewSpan<'static>>,
}

impl File {
    fn chunk(&mut self, chunk: &Chunk, blob_len: u64, size: u64) {
        let end = chunk.file_offset + chunk.len;
        if let Some((from, to)) = hole(chunk, size) {
            // What the hole leaves at its sides are zeros too: any of those that the frame starts with will do.
            self.zeros(chunk, blob_len, chunk.file_offset, from);
            self.zeros(chunk, blob_len, to, end);
            return;
        }
        self.push(
            chunk.file_offset,
            NewSpan {
                blob_offset: chunk.blob_offset,
                blob_len,
                len: chunk.len,
                pad: 0,
                digest: chunk.digest.unwrap_or(Digest::from_bytes([0; 32])),
                digest_of: if chunk.digest.is_some() { DigestOf::Decoded } else { DigestOf::Nothing },
                entrance: self.entrance(chunk.skip),
            },
        );
    }

    fn zeros(&mut self, chunk: &Chunk, blob_len: u64, from: u64, to: u64) {
        if from == to {
            return;
        }
        self.push(
            from,
            NewSpan {
                blob_offset: chunk.blob_offset,
                blob_len,
                len: to - from,
                pad: 0,
                digest: Digest::of(&[0; HOLE_ALIGN as usize][..(to - from) as usize]),
                digest_of: DigestOf::Decoded,
                entrance: self.entrance(chunk.skip),
            },
        );
    }

    fn entrance(&self, skip: u64) -> NewEntrance<'static> {
        if self.zstd { NewEntrance::ZstdFrame { skip } } else { NewEntrance::GzipMember { skip } }
    }

    fn push(&mut self, file_offset: u64, span: NewSpan<'static>) {
        let layer_offset = self.base + self.len;
        match self.extents.last_mut() {
            Some(last) if last.file_offset + last.len == file_offset => last.len += span.len,
            _ => self.extents.push(Extent { file_offset, layer_offset, len: span.len }),
        }
        self.len += span.len;
        self.spans.push(span);
    }

    /// Fills the last block, so that the next file starts at a block of its own.
    fn pad(&mut self) {
        let pad = self.len.next_multiple_of(BLOCK as u64) - self.len;
        if let Some(last) = self.spans.last_mut() {
            last.len += pad;
            last.pad = pad as u16;
        }
    }
}

/// The part of a chunk of zeros, in bytes of its file of `size` bytes, that is not stored at all.
fn hole(chunk: &Chunk, size: u64) -> Option<(u64, u64)> {
    let end = chunk.file_offset + chunk.len;
    let from = chunk.file_offset.next_multiple_of(HOLE_ALIGN);
    let to = if end == size { end } else { end / HOLE_ALIGN * HOLE_ALIGN };
    (chunk.zeros && to.saturating_sub(from) >= HOLE_MIN).then_some((from, to))
}
