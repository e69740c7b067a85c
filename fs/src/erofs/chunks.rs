//! Which chunk size a file gets and where each chunk lies.
//!
//! A chunk is one run of blocks on one device, or a hole. A file that is contiguous in its layer file is one
//! chunk; of a sparse one the size is chosen that costs least. A chunk that no single aligned run covers is
//! put together in the appendix.

use super::DeviceSpec;
use super::format::{BLOCK, CHUNK_INDEX, MAX_CHUNK_BITS};
use crate::view::{Inode, LayerExtent};

/// Where one chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Block of a layer file.
    Layer(u16, u32),
    /// To be copied to the appendix.
    Mixed,
}

/// A file's chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunking {
    /// Chunk size, in bits above the block size.
    pub(super) bits: u8,
    /// Number of chunks.
    pub(super) count: u64,
    /// Bytes that go to the appendix.
    pub(super) mixed: u64,
}

impl Chunking {
    /// Bytes of a chunk.
    pub(super) fn size(&self) -> u64 {
        BLOCK << self.bits
    }
}

/// Chooses for a file that is not empty.
pub(super) fn choose(inode: &Inode, devices: &[DeviceSpec]) -> Chunking {
    let blocks = inode.size.div_ceil(BLOCK);
    let whole = (u64::BITS - (blocks - 1).leading_zeros()).min(u32::from(MAX_CHUNK_BITS)) as u8;
    let best = consider(inode, devices, whole);
    if best.mixed == 0 && best.count == 1 {
        return best;
    }
    // An appendix byte is fetched from the layer before the view can be mounted, an index byte is not.
    let cost = |c: &Chunking| (c.mixed.saturating_mul(8)).saturating_add(c.count.saturating_mul(CHUNK_INDEX));
    (0..whole)
        .rev()
        .map(|bits| consider(inode, devices, bits))
        .fold(best, |best, next| if cost(&next) < cost(&best) { next } else { best })
}

fn consider(inode: &Inode, devices: &[DeviceSpec], bits: u8) -> Chunking {
    let size = BLOCK << bits;
    let mut mixed = 0u64;
    each(inode, devices, size, |first, count, place| {
        if place == Place::Mixed {
            let end = (first + count).saturating_mul(size).min(inode.size);
            mixed = mixed.saturating_add((end - first * size).next_multiple_of(BLOCK));
        }
    });
    Chunking { bits, count: inode.size.div_ceil(size), mixed }
}

/// Calls `each(first, count, place)` for all runs of chunks that are no holes, in order. Of a run in a layer,
/// the place is the first chunk's, and the others follow it.
pub(super) fn each(inode: &Inode, devices: &[DeviceSpec], size: u64, mut each: impl FnMut(u64, u64, Place)) {
    // First chunk not reported yet.
    let mut next = 0;
    for e in inode.extents.iter() {
        let first = e.file_offset / size;
        let end = (e.file_offset + e.len).div_ceil(size);
        if !aligned(e) {
            if end > next {
                each(first.max(next), end - first.max(next), Place::Mixed);
                next = end;
            }
            continue;
        }
        // Chunks that this extent covers alone, to their end or the file's.
        let mut full = e.file_offset.div_ceil(size)..(e.file_offset + e.len) / size;
        if e.file_offset + e.len == inode.size {
            full.end = end;
        }
        if !full.is_empty() && !on_device(e, full.end.saturating_mul(size).min(inode.size), devices) {
            full.end -= 1;
        }
        if first < full.start.min(end) && first >= next {
            each(first, 1, Place::Mixed);
            next = first + 1;
        }
        if full.start < full.end {
            let offset = e.layer_offset + (full.start * size - e.file_offset);
            // Device sizes were checked against 32-bit block numbers.
            each(full.start, full.end - full.start, Place::Layer(e.layer, (offset / BLOCK) as u32));
            next = full.end;
        }
        if next < end {
            let from = next.max(first);
            each(from, end - from, Place::Mixed);
            next = end;
        }
    }
}

/// Whether chunk borders, multiples of the block size, fall on block borders of the layer file.
fn aligned(e: &LayerExtent) -> bool {
    e.file_offset % BLOCK == e.layer_offset % BLOCK
}

/// Whether the block that holds the extent's byte before file offset `end` is whole on its device: a layer
/// file may end in the middle of a block.
fn on_device(e: &LayerExtent, end: u64, devices: &[DeviceSpec]) -> bool {
    let last = e.layer_offset + (end - e.file_offset);
    devices
        .get(usize::from(e.layer))
        .is_some_and(|d| last.checked_next_multiple_of(BLOCK).is_some_and(|l| l <= d.size / BLOCK * BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64, extents: &[(u64, u64, u64)]) -> Inode {
        let extents: Vec<_> = extents
            .iter()
            .map(|&(file_offset, layer_offset, len)| LayerExtent { layer: 0, file_offset, layer_offset, len })
            .collect();
        Inode::for_test(size, &extents)
    }

    fn device(size: u64) -> [DeviceSpec; 1] {
        [DeviceSpec { size, tag: [0; 64] }]
    }

    fn runs(inode: &Inode, devices: &[DeviceSpec], c: &Chunking) -> Vec<(u64, u64, Place)> {
        let mut out = Vec::new();
        each(inode, devices, c.size(), |first, count, place| out.push((first, count, place)));
        out
    }

    #[test]
    fn contiguous_files_have_one_chunk() {
        for size in [1, 511, 512, 513, 4096, 5_000_000_000] {
            let f = file(size, &[(0, 1024, size)]);
            let d = device(1 << 40);
            let c = choose(&f, &d);
            assert_eq!((c.count, c.mixed), (1, 0), "size {size}");
            assert!(c.size() >= size && c.size() < 2 * size.max(BLOCK));
            assert_eq!(runs(&f, &d, &c), [(0, 1, Place::Layer(0, 2))]);
        }
    }

    #[test]
    fn holes_cost_nothing() {
        let f = file(9 << 30, &[]);
        let c = choose(&f, &device(0));
        assert_eq!((c.count, c.mixed), (1, 0));
        assert!(runs(&f, &device(0), &c).is_empty());
    }

    #[test]
    fn sparse_pieces_at_block_borders_need_no_appendix() {
        let f = file(1 << 20, &[(0, 512, 4096), (1 << 19, 512 + 4096, 4096)]);
        let d = device(1 << 20);
        let c = choose(&f, &d);
        assert_eq!(c.mixed, 0);
        assert_eq!(c.size(), 4096);
        assert_eq!(runs(&f, &d, &c), [(0, 1, Place::Layer(0, 1)), (128, 1, Place::Layer(0, 9))]);
    }

    #[test]
    fn unaligned_data_is_mixed() {
        let f = file(1000, &[(0, 100, 1000)]);
        let d = device(1 << 20);
        let c = choose(&f, &d);
        assert_eq!((c.count, c.mixed), (1, 1024));
        assert_eq!(runs(&f, &d, &c), [(0, 1, Place::Mixed)]);
    }

    #[test]
    fn a_layer_file_that_ends_within_a_block() {
        // 1000 bytes at 512 in a layer file of 1512 bytes: the last block is not whole.
        let f = file(1000, &[(0, 512, 1000)]);
        let d = device(1512);
        let c = choose(&f, &d);
        assert_eq!((c.bits, c.count, c.mixed), (0, 2, 512));
        assert_eq!(runs(&f, &d, &c), [(0, 1, Place::Layer(0, 1)), (1, 1, Place::Mixed)]);
    }

    #[test]
    fn two_extents_in_one_block() {
        let f = file(512, &[(0, 512, 100), (200, 1024 + 200, 312)]);
        let d = device(1 << 20);
        let c = choose(&f, &d);
        assert_eq!((c.count, c.mixed), (1, 512));
        assert_eq!(runs(&f, &d, &c), [(0, 1, Place::Mixed)]);
    }
}
