//! Sparse files: GNU's old type `S`, and PAX `GNU.sparse` 0.0, 0.1 and 1.0 (GNU tar manual, "Sparse Formats").

use super::BLOCK;
use super::header::number;
use super::pax::decimal;
use crate::{Digest, Extent, Hasher};

/// Most pieces a sparse file may have: bounds memory against hostile maps.
pub(crate) const PIECES_MAX: usize = 1 << 18;
/// Longest holes of one file that are hashed: a header of a few bytes could keep the hasher busy for years.
const HASHED_HOLES_MAX: u64 = 64 << 20;
/// Bytes of holes that are hashed in any archive; after these no more than the archive itself has bytes.
const HASHED_HOLES_FREE: u64 = 256 << 20;

/// Counts the holes that were hashed: thousands of headers could keep the hasher busy for years, too.
#[derive(Debug, Default)]
pub(super) struct HoleBudget {
    spent: u64,
}

impl HoleBudget {
    /// Whether holes of `len` bytes may be hashed for a file whose data starts at byte `offset` of the archive.
    fn spend(&mut self, len: u64, offset: u64) -> bool {
        let spent = self.spent.saturating_add(len);
        let may = len <= HASHED_HOLES_MAX && spent <= HASHED_HOLES_FREE.saturating_add(offset);
        if may {
            self.spent = spent;
        }
        may
    }
}

/// Data pieces as (offset in the file, length).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Map(Vec<(u64, u64)>);

impl Map {
    fn push(&mut self, offset: i64, len: i64) -> Result<(), String> {
        let (Ok(offset), Ok(len)) = (u64::try_from(offset), u64::try_from(len)) else {
            return Err("the sparse map has a negative number".into());
        };
        if self.0.len() >= PIECES_MAX {
            return Err(format!("the sparse map has more than {PIECES_MAX} pieces"));
        }
        // An empty piece only marks the end of the file.
        if len > 0 {
            self.0.push((offset, len));
        }
        Ok(())
    }

    /// From offsets and lengths in turn (PAX 0.0 and 0.1).
    pub(super) fn from_numbers(numbers: &[i64]) -> Result<Self, String> {
        if !numbers.len().is_multiple_of(2) {
            return Err("the sparse map ends inside a pair".into());
        }
        let mut map = Self::default();
        for pair in numbers.chunks_exact(2) {
            map.push(pair[0], pair[1])?;
        }
        Ok(map)
    }

    /// Adds the pieces of an old GNU header (4 from byte 386) or extension block (21 from byte 0); whether an
    /// extension block follows.
    pub(super) fn add_old(&mut self, block: &[u8; BLOCK], in_header: bool) -> Result<bool, String> {
        let (start, pieces, more) = if in_header { (386, 4, 482) } else { (0, 21, 504) };
        for piece in block[start..start + pieces * 24].chunks_exact(24) {
            if piece[0] == 0 && piece[12] == 0 {
                break;
            }
            self.push(number(&piece[..12], "sparse offset")?, number(&piece[12..], "sparse length")?)?;
        }
        Ok(block[more] != 0)
    }

    /// The file's true size in an old GNU header.
    pub(super) fn old_size(block: &[u8; BLOCK]) -> Result<i64, String> {
        number(&block[483..495], "sparse size")
    }

    /// Where the pieces lie in the layer file, if the map fits a file of `size` bytes with `stored` of them kept.
    pub(super) fn extents(&self, size: u64, stored: u64, mut layer: u64) -> Result<Vec<Extent>, String> {
        let (mut end, mut sum) = (0u64, 0u64);
        let mut extents = Vec::with_capacity(self.0.len());
        for &(file_offset, len) in &self.0 {
            let piece_end = file_offset.checked_add(len).filter(|e| *e <= size);
            if file_offset < end || piece_end.is_none() {
                return Err("the sparse map overlaps itself or the end of the file".into());
            }
            end = file_offset + len;
            sum += len;
            extents.push(Extent { file_offset, layer_offset: layer, len });
            layer = layer.checked_add(len).ok_or("the sparse map is too long")?;
        }
        if sum != stored {
            return Err(format!("the sparse map names {sum} bytes, the entry has {stored}"));
        }
        Ok(extents)
    }
}

/// Collects the map that PAX 1.0 puts before the data: a count and pairs of decimal numbers, a newline after
/// each, padded to a block.
#[derive(Debug, Default)]
pub(super) struct MapReader {
    digits: Vec<u8>,
    count: Option<usize>,
    offset: Option<i64>,
    map: Map,
}

impl MapReader {
    /// Takes the next block; the map when it is complete.
    pub(super) fn block(&mut self, block: &[u8; BLOCK]) -> Result<Option<Map>, String> {
        for &c in block {
            if c != b'\n' {
                if self.digits.len() >= 20 {
                    return Err("the sparse map has a number that is too long".into());
                }
                self.digits.push(c);
                continue;
            }
            let value = decimal(&self.digits).ok_or("the sparse map has something that is no number")?;
            self.digits.clear();
            let left = match self.count {
                None => usize::try_from(value).unwrap_or(usize::MAX),
                Some(left) => match self.offset.take() {
                    None => {
                        self.offset = Some(value);
                        continue;
                    }
                    Some(offset) => {
                        self.map.push(offset, value)?;
                        left - 1
                    }
                },
            };
            if left > PIECES_MAX {
                return Err(format!("the sparse map has more than {PIECES_MAX} pieces"));
            }
            self.count = Some(left);
            if left == 0 {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}

/// Hashes a file's content, holes as zeros.
#[derive(Debug)]
pub(super) struct Content {
    /// `None`: too much of it is holes.
    hasher: Option<Hasher>,
    /// Pieces of a sparse file, last first; empty for files without holes.
    pieces: Vec<Extent>,
    at: u64,
    size: u64,
    sparse: bool,
}

impl Content {
    /// The content of a file of `size` bytes whose data is `extents` and starts at byte `offset` of the archive.
    pub(super) fn new(
        size: u64,
        extents: &[Extent],
        sparse: bool,
        offset: u64,
        holes: &mut HoleBudget,
    ) -> Self {
        let data: u64 = extents.iter().map(|e| e.len).sum();
        let hasher = holes.spend(size - data.min(size), offset).then(Hasher::new);
        let mut pieces = if sparse { extents.to_vec() } else { Vec::new() };
        pieces.reverse();
        Self { hasher, pieces, at: 0, size, sparse }
    }

    /// The next stored bytes.
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        let Some(hasher) = &mut self.hasher else { return };
        if !self.sparse {
            hasher.update(bytes);
            return;
        }
        while let (false, Some(piece)) = (bytes.is_empty(), self.pieces.last_mut()) {
            zeros(hasher, piece.file_offset - self.at);
            let n = piece.len.min(bytes.len() as u64);
            hasher.update(&bytes[..n as usize]);
            bytes = &bytes[n as usize..];
            self.at = piece.file_offset + n;
            piece.file_offset += n;
            piece.len -= n;
            if piece.len == 0 {
                self.pieces.pop();
            }
        }
    }

    /// The digest, after the last stored byte.
    pub(super) fn finish(self) -> Option<Digest> {
        let mut hasher = self.hasher?;
        if self.sparse {
            zeros(&mut hasher, self.size - self.at);
        }
        Some(hasher.finish())
    }
}

fn zeros(hasher: &mut Hasher, mut n: u64) {
    const ZEROS: [u8; 4096] = [0; 4096];
    while n > 0 {
        let len = n.min(4096);
        hasher.update(&ZEROS[..len as usize]);
        n -= len;
    }
}
