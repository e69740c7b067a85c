//! A layer's files by content: a small table beside the index, for whoever looks for the same content in other layers.
//!
//! It has plain files of at least [`LEAST`] bytes whose sha256 the index knows, and only exists of layers that are
//! proven. A hit counts when the index says the same, so a damaged table hides files and does nothing worse.
//!
//! The file (little-endian): magic 8, version 4, zero 4, number of files 8; for each file the first 8 bytes of its
//! digest as a big-endian number, ascending; in the same order the numbers of their entries, 4 bytes each; then the
//! numbers of the entries in the order of the layer file. It is mapped: a lookup touches a few pages of it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::ops::Range;
use std::path::Path;

use lazyrun_index::{Digest, EntryKind, LayerIndex};

/// Name inside a layer's directory.
pub(super) const CONTENTS: &str = "contents";
const NEW: &str = "contents.new";
const MAGIC: [u8; 8] = *b"LZRCONTS";
const VERSION: u32 = 1;
const HEADER: usize = 24;
/// Smaller files are not worth their place: a page of the table for as many of them as it would save requests.
const LEAST: u64 = 4096;
/// Files of one layer; bounds what building takes.
const MOST: usize = 1 << 20;

/// A regular file whose bytes lie in one piece and whose digest is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlainFile {
    /// sha256 of its bytes.
    pub(crate) content: Digest,
    /// First byte in the layer file.
    pub(crate) offset: u64,
    /// Number of bytes.
    pub(crate) len: u64,
}

impl PlainFile {
    /// Entry `number`, if it is such a file.
    fn of(index: &LayerIndex, number: usize) -> Option<PlainFile> {
        let entry = (number < index.entry_count()).then(|| index.entry(number))?;
        if entry.kind() != EntryKind::File || entry.size() < LEAST {
            return None;
        }
        let mut extents = entry.extents();
        let (only, None) = (extents.next()?, extents.next()) else { return None };
        let whole = only.file_offset == 0 && only.len == entry.size();
        let content = entry.content().filter(|_| whole)?;
        Some(PlainFile { content, offset: only.layer_offset, len: only.len })
    }

    /// The byte behind its last one.
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// The table of one layer.
pub(super) struct Contents {
    map: memmap2::Mmap,
    count: usize,
}

impl Contents {
    /// Makes the table of a layer in its directory. Losing it costs no more than making it again, so nothing waits for
    /// the disk.
    pub(super) fn write(dir: &Path, index: &LayerIndex) -> io::Result<()> {
        let new = dir.join(NEW);
        let mut out = BufWriter::new(File::create(&new)?);
        let row = |number: usize| {
            let file = PlainFile::of(index, number)?;
            Some((key(&file.content), u32::try_from(number).ok()?, file.offset))
        };
        let mut rows: Vec<(u64, u32, u64)> = (0..index.entry_count()).filter_map(row).take(MOST).collect();
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&[0; 4])?;
        out.write_all(&(rows.len() as u64).to_le_bytes())?;
        rows.sort_unstable();
        rows.iter().try_for_each(|(key, ..)| out.write_all(&key.to_le_bytes()))?;
        rows.iter().try_for_each(|(_, number, _)| out.write_all(&number.to_le_bytes()))?;
        rows.sort_unstable_by_key(|(_, number, offset)| (*offset, *number));
        rows.iter().try_for_each(|(_, number, _)| out.write_all(&number.to_le_bytes()))?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?;
        fs::rename(new, dir.join(CONTENTS))
    }

    /// Maps a table; `None` when there is none, or none that can be used.
    pub(super) fn open(dir: &Path) -> Option<Contents> {
        let file = File::open(dir.join(CONTENTS)).ok()?;
        // SAFETY: tables are written once, published by rename and never changed or truncated afterwards; the store
        // belongs to this process (see `LayerStore`), so nobody else does it either.
        let map = unsafe { memmap2::Mmap::map(&file) }.ok()?;
        let head = map.get(..HEADER)?;
        let count = u64::from_le_bytes(head[16..].try_into().ok()?);
        let count = usize::try_from(count).ok().filter(|n| *n <= MOST)?;
        let fits =
            head[..8] == MAGIC && head[8..12] == VERSION.to_le_bytes() && map.len() == HEADER + count * 16;
        fits.then_some(Contents { map, count })
    }

    /// Entries of the layer that may have this content.
    fn entries_with(&self, content: &Digest) -> impl Iterator<Item = usize> {
        let wanted = key(content);
        let first = partition(0..self.count, |i| self.key(i) < wanted);
        let same = (first..self.count).take_while(move |i| self.key(*i) == wanted);
        same.map(|i| self.number(HEADER + self.count * 8 + i * 4))
    }

    /// The files of the layer that have this content.
    pub(super) fn files_with(
        &self,
        index: &LayerIndex,
        wanted: &PlainFile,
    ) -> impl Iterator<Item = PlainFile> {
        let files = self.entries_with(&wanted.content).filter_map(|number| PlainFile::of(index, number));
        files.filter(|file| file.content == wanted.content && file.len == wanted.len)
    }

    /// Whether the layer may have a file with this content.
    pub(super) fn may_have(&self, content: &Digest) -> bool {
        self.entries_with(content).next().is_some()
    }

    /// The files of the layer in the order of the layer file, from the first one that ends behind `offset` on.
    pub(super) fn files_from(&self, index: &LayerIndex, offset: u64) -> impl Iterator<Item = PlainFile> {
        let at = move |i| PlainFile::of(index, self.number(HEADER + self.count * 12 + i * 4));
        let first = partition(0..self.count, |i| at(i).is_some_and(|file| file.end() <= offset));
        (first..self.count).map_while(at)
    }

    fn key(&self, i: usize) -> u64 {
        let at = HEADER + i * 8;
        self.map[at..at + 8].try_into().map_or(u64::MAX, u64::from_le_bytes)
    }

    fn number(&self, at: usize) -> usize {
        self.map[at..at + 4].try_into().map_or(usize::MAX, |bytes| u32::from_le_bytes(bytes) as usize)
    }
}

/// What files are sorted by.
fn key(content: &Digest) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&content.as_bytes()[..8]);
    u64::from_be_bytes(first)
}

/// The first of `range` for which `low` does not hold, if all before it do.
fn partition(range: Range<usize>, low: impl Fn(usize) -> bool) -> usize {
    let (mut from, mut to) = (range.start, range.end);
    while from < to {
        let middle = from + (to - from) / 2;
        if low(middle) { from = middle + 1 } else { to = middle }
    }
    from
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazyrun_index::{StreamOptions, index_layer};

    /// The index of a tar with files of these contents.
    fn index_of(files: &[Vec<u8>]) -> LayerIndex {
        let mut builder = tar::Builder::new(Vec::new());
        for (i, content) in files.iter().enumerate() {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, format!("file-{i}"), content.as_slice()).unwrap();
        }
        let mut out = io::Cursor::new(Vec::new());
        let tar = builder.into_inner().unwrap();
        index_layer(&tar[..], &mut (), &mut out, &StreamOptions::default()).unwrap();
        LayerIndex::from_bytes(out.into_inner()).unwrap()
    }

    #[test]
    fn files_are_found_by_content_and_by_place() {
        let contents: Vec<Vec<u8>> =
            [5000usize, 100, 4096, 0, 9000, 5000].iter().map(|len| vec![*len as u8; *len]).collect();
        let index = index_of(&contents);
        let dir = tempfile::tempdir().unwrap();
        assert!(Contents::open(dir.path()).is_none());
        Contents::write(dir.path(), &index).unwrap();
        let table = Contents::open(dir.path()).unwrap();
        // Two have the same content, and the small ones are left out.
        let file = |i| PlainFile::of(&index, i).unwrap();
        assert_eq!(table.files_with(&index, &file(0)).collect::<Vec<_>>(), [file(0), file(5)]);
        assert_eq!(table.files_with(&index, &file(4)).collect::<Vec<_>>(), [file(4)]);
        assert!(!table.may_have(&Digest::of(&contents[1])) && table.may_have(&Digest::of(&contents[2])));
        let all = [file(0), file(2), file(4), file(5)];
        assert_eq!(table.files_from(&index, 0).collect::<Vec<_>>(), all);
        assert_eq!(table.files_from(&index, file(0).end() - 1).collect::<Vec<_>>(), all);
        assert_eq!(table.files_from(&index, file(0).end()).collect::<Vec<_>>(), all[1..]);
        assert_eq!(table.files_from(&index, u64::MAX).count(), 0);
    }

    #[test]
    fn nonsense_is_no_table_and_a_table_of_another_layer_finds_nothing() {
        let (index, other) = (index_of(&[vec![1; 5000], vec![2; 5000]]), index_of(&[vec![3; 6000]]));
        let dir = tempfile::tempdir().unwrap();
        Contents::write(dir.path(), &index).unwrap();
        let table = Contents::open(dir.path()).unwrap();
        let wanted = PlainFile::of(&index, 1).unwrap();
        assert_eq!(table.files_with(&other, &wanted).count(), 0);
        assert!(table.files_from(&other, 0).count() <= 1);
        let path = dir.path().join(CONTENTS);
        let good = fs::read(&path).unwrap();
        let mut newer = good.clone();
        newer[8] = 9;
        for bad in [&good[..good.len() - 1], &good[..10], b"", &newer[..]] {
            fs::remove_file(&path).unwrap();
            fs::write(&path, bad).unwrap();
            assert!(Contents::open(dir.path()).is_none());
        }
    }
}
