//! The checkpoints of a zTOC: where its spans start in the blob and in the tar.
//!
//! For gzip a packed, little-endian list, as soci-snapshotter writes it: number of checkpoints (4 bytes), span size
//! (8), and for each checkpoint the blob offset of its first whole byte (8), its tar offset (8), the number of bits
//! that it takes from the byte before (1), and the 32 KiB that were decoded before it. Version 1 of that list leaves
//! the first checkpoint out, which then is behind a gzip header of 10 bytes; which version it is shows by its length.
//! For a plain tar it is a FlatBuffer that says the span size.

use super::flat::Table;
use crate::inflate::WINDOW;

const HEADER: usize = 4 + 8;
const CHECKPOINT: usize = 8 + 8 + 1 + WINDOW;
/// Length of a gzip header without any optional fields.
const GZIP_HEADER: u64 = 10;

/// Where a span starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checkpoint<'a> {
    /// First byte of the blob that belongs to it.
    pub(super) blob: u64,
    /// One past the last byte of the blob that the span before needs.
    pub(super) blob_before: u64,
    /// Its byte of the tar.
    pub(super) tar: u64,
    /// Upper bits of the first byte that belong to it.
    pub(super) bits: u8,
    /// What was decoded before.
    pub(super) window: &'a [u8],
}

/// The checkpoints of a gzip blob; there are exactly `count`. Several may lie at the tar's first byte: the tool sets
/// one at each block in front of which nothing was decoded, as behind an empty member.
pub(super) fn gzip(packed: &[u8], count: usize) -> Result<Vec<Checkpoint<'_>>, String> {
    let (said, rest) = packed.split_first_chunk().ok_or("its checkpoints are cut off")?;
    let said = u32::from_le_bytes(*said) as usize;
    if said != count || count == 0 {
        return Err(format!("it has {said} checkpoints for {count} spans"));
    }
    let rest = rest.get(HEADER - 4..).ok_or("its checkpoints are cut off")?;
    let stored = rest.len() / CHECKPOINT;
    let first_left_out = stored.checked_add(1) == Some(count);
    if !rest.len().is_multiple_of(CHECKPOINT) || (stored != count && !first_left_out) {
        return Err(format!(
            "its checkpoints have {} bytes, which do not make up {count} of them",
            rest.len()
        ));
    }
    let mut checkpoints = Vec::with_capacity(count);
    if first_left_out {
        let blob = GZIP_HEADER;
        checkpoints.push(Checkpoint { blob, blob_before: blob, tar: 0, bits: 0, window: &[] });
    }
    for (i, packed) in rest.chunks_exact(CHECKPOINT).enumerate() {
        let bad = || format!("checkpoint {i} is impossible");
        checkpoints.push(unpack(packed).ok_or_else(bad)?);
    }
    if checkpoints.first().is_some_and(|first| first.tar != 0) {
        return Err("its first span does not start with the tar".into());
    }
    if !checkpoints.is_sorted_by(|a, b| (a.tar < b.tar || b.tar == 0) && a.blob_before <= b.blob_before) {
        return Err("its spans are not in order".into());
    }
    Ok(checkpoints)
}

fn unpack(packed: &[u8]) -> Option<Checkpoint<'_>> {
    let (blob, rest) = packed.split_first_chunk()?;
    let (tar, rest) = rest.split_first_chunk()?;
    let (&bits, window) = rest.split_first()?;
    let signed = |bytes: &[u8; 8]| u64::try_from(i64::from_le_bytes(*bytes)).ok();
    let (blob_before, tar) = (signed(blob)?, signed(tar)?);
    if bits > 7 {
        return None;
    }
    let blob = blob_before.checked_sub(u64::from(bits > 0))?;
    // Nothing was decoded before the tar's first byte.
    let used = usize::try_from(tar).map_or(WINDOW, |tar| tar.min(WINDOW));
    let window = window.get(WINDOW.checked_sub(used)?..)?;
    Some(Checkpoint { blob, blob_before, tar, bits, window })
}

/// The span size of a plain tar of `size` bytes with `count` spans.
pub(super) fn plain(packed: &[u8], size: u64, count: usize) -> Result<u64, String> {
    let info = Table::root(packed).map_err(|fault| format!("its span size cannot be read: {fault}"))?;
    let number = |slot| info.i64(slot).map_err(|fault| format!("its span size cannot be read: {fault}"));
    let (span_size, said) = (number(1)?, number(2)?);
    if u64::try_from(said) != Ok(size) {
        return Err(format!("its spans are of {said} bytes, the layer has {size}"));
    }
    match u64::try_from(span_size) {
        Ok(span_size) if span_size > 0 && size.div_ceil(span_size) == count as u64 => Ok(span_size),
        _ => Err(format!("a span size of {span_size} does not make {count} spans")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(points: &[(i64, i64, u8)], said: u32) -> Vec<u8> {
        let mut out = said.to_le_bytes().to_vec();
        out.extend([0; 8]);
        for (blob, tar, bits) in points {
            out.extend(blob.to_le_bytes());
            out.extend(tar.to_le_bytes());
            out.push(*bits);
            out.extend((0..WINDOW).map(|i| i as u8));
        }
        out
    }

    #[test]
    fn both_versions() {
        let two = packed(&[(18, 0, 0), (100, 40_000, 3)], 2);
        let points = gzip(&two, 2).unwrap();
        assert_eq!((points[0].blob, points[0].window), (18, &[][..]));
        assert_eq!((points[1].blob, points[1].blob_before, points[1].bits), (99, 100, 3));
        assert_eq!(points[1].window.len(), WINDOW);
        let one = packed(&[(100, 5, 0)], 2);
        let points = gzip(&one, 2).unwrap();
        assert_eq!((points[0].blob, points[0].tar), (10, 0));
        assert_eq!((points[1].blob, points[1].window), (100, &[251, 252, 253, 254, 255][..]));
    }

    #[test]
    fn impossible_ones_are_refused() {
        let good = packed(&[(18, 0, 0), (100, 4000, 3)], 2);
        assert!(gzip(&good, 2).is_ok());
        for (what, bytes, count) in [
            ("empty", vec![], 0),
            ("no checkpoints", packed(&[], 0), 0),
            ("255 without data", packed(&[], 255), 255),
            ("2^32 - 1", packed(&[], u32::MAX), 2),
            ("another number of spans", good.clone(), 3),
            ("cut", good[..good.len() - 1].to_vec(), 2),
            ("longer", [&good[..], &[0]].concat(), 2),
            ("not from the start", packed(&[(18, 1, 0), (100, 4000, 3)], 2), 2),
            ("unsorted", packed(&[(18, 0, 0), (100, 4000, 0), (200, 3999, 0)], 3), 3),
            ("two at one byte inside", packed(&[(18, 0, 0), (100, 4000, 0), (200, 4000, 0)], 3), 3),
            ("backwards in the blob", packed(&[(18, 0, 0), (17, 4000, 0)], 2), 2),
            ("negative", packed(&[(18, 0, 0), (-1, 4000, 0)], 2), 2),
            ("negative in the tar", packed(&[(18, 0, 0), (100, -4000, 0)], 2), 2),
            ("bits of nothing", packed(&[(0, 0, 1)], 1), 1),
            ("eight bits", packed(&[(18, 0, 8)], 1), 1),
        ] {
            assert!(gzip(&bytes, count).is_err(), "{what}");
        }
    }
}
