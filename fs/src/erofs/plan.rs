//! Where everything goes: decided before the first byte is written, because directories name the places of
//! inodes that come later.

use super::DeviceSpec;
use super::chunks::{self, Chunking};
use super::dirs;
use super::error::ErofsError;
use super::format::{BLOCK, CHUNK_INDEX, HOLE, INODE, Layout, MAX_CHUNK_BITS, SLOT, device_number};
use super::xattrs;
use crate::view::{Ino, Inode, Kind, View};

/// Metadata that the maps of sparse files may take beyond what their data accounts for.
const SPARSE_BUDGET: u64 = 1 << 30;

/// Where one inode goes and how its data is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// Byte offset in the metadata area.
    pub(super) at: u64,
    pub(super) xattr_len: u32,
    pub(super) layout: Layout,
    /// `i_u`: first data block counted from the data area, chunk bits, or a device number.
    pub(super) union: u32,
}

impl Placed {
    /// The inode's number in the image.
    pub(super) fn nid(&self) -> u64 {
        self.at / SLOT
    }
}

/// The layout of a whole image.
pub(super) struct Plan {
    pub(super) inodes: Vec<Placed>,
    /// Length of the metadata area, whole blocks.
    pub(super) meta_len: u64,
    /// Blocks of the data area behind it: directories and long symlinks.
    pub(super) data_blocks: u64,
    /// Chunks of the files that need more than one, or the appendix.
    pub(super) chunked: Vec<(Ino, Chunking)>,
}

/// Size of what [`Layout::Inline`] and [`Layout::Plain`] store in the image itself.
pub(super) fn data_size(view: &View, ino: Ino, inode: &Inode) -> u64 {
    match inode.kind {
        Kind::Directory => dirs::size(view, ino),
        Kind::Symlink => inode.size,
        _ => 0,
    }
}

impl Plan {
    /// Lays the image out. Inode numbers 0 and 1 stay free: user space takes 0 for "deleted".
    pub(super) fn of(view: &View, devices: &[DeviceSpec]) -> Result<Plan, ErofsError> {
        let mut plan = Plan {
            inodes: Vec::with_capacity(view.len()),
            meta_len: 2 * SLOT,
            data_blocks: 0,
            chunked: Vec::new(),
        };
        let mut sparse = 0u64;
        for (ino, inode) in view.inodes() {
            let xattr_len = xattrs::encoded_len(inode);
            if xattr_len > xattrs::MAX {
                return Err(ErofsError::XattrsTooLarge(path_of(view, ino)));
            }
            let placed = match inode.kind {
                Kind::Directory | Kind::Symlink => plan.place_data(data_size(view, ino, inode), xattr_len),
                Kind::File if inode.size > 0 => {
                    check_extents(view, ino, inode, devices)?;
                    let chunking = chunks::choose(inode, devices);
                    let data: u64 = inode.extents.iter().map(|e| e.len).sum();
                    sparse = sparse
                        .saturating_add(chunking.count.saturating_mul(CHUNK_INDEX))
                        .saturating_add(chunking.mixed.saturating_sub(data));
                    if sparse > SPARSE_BUDGET {
                        return Err(ErofsError::TooSparse(path_of(view, ino)));
                    }
                    plan.place_chunks(ino, chunking, xattr_len)
                }
                Kind::CharDevice | Kind::BlockDevice => {
                    let number = device_number(inode.rdev).ok_or_else(|| ErofsError::DeviceNumber {
                        path: path_of(view, ino),
                        major: inode.rdev.0,
                        minor: inode.rdev.1,
                    })?;
                    plan.place(INODE + xattr_len, xattr_len, Layout::Plain, number)
                }
                Kind::File | Kind::Fifo => plan.place(INODE + xattr_len, xattr_len, Layout::Plain, 0),
            };
            plan.inodes.push(placed);
        }
        plan.meta_len = plan.meta_len.next_multiple_of(BLOCK);
        Ok(plan)
    }

    fn place(&mut self, len: u64, xattr_len: u64, layout: Layout, union: u32) -> Placed {
        let at = self.meta_len.next_multiple_of(SLOT);
        self.meta_len = at + len;
        // Below 256 KiB: checked.
        Placed { at, xattr_len: xattr_len as u32, layout, union }
    }

    fn place_chunks(&mut self, ino: Ino, chunking: Chunking, xattr_len: u64) -> Placed {
        debug_assert!(chunking.bits <= MAX_CHUNK_BITS);
        if chunking.count != 1 || chunking.mixed != 0 {
            self.chunked.push((ino, chunking));
        }
        let indexes = chunks_at(xattr_len) + chunking.count * CHUNK_INDEX;
        self.place(indexes, xattr_len, Layout::Chunks, u32::from(chunking.bits))
    }

    /// Puts what does not fill a block behind the inode if it fits there without crossing a block.
    fn place_data(&mut self, size: u64, xattr_len: u64) -> Placed {
        let before = INODE + xattr_len;
        let tail = size % BLOCK;
        let mut at = self.meta_len.next_multiple_of(SLOT);
        let mut room = BLOCK - (at + before) % BLOCK;
        if tail > room {
            // Move on until the tail starts right at, or a little behind, a block's start.
            at += room.next_multiple_of(SLOT);
            room = BLOCK - (at + before) % BLOCK;
        }
        let block = self.data_blocks as u32;
        if tail > 0 && tail <= room {
            self.data_blocks += size / BLOCK;
            self.meta_len = at;
            let union = if size < BLOCK { HOLE } else { block };
            return self.place(before + tail, xattr_len, Layout::Inline, union);
        }
        self.data_blocks += size.div_ceil(BLOCK);
        self.place(before, xattr_len, Layout::Plain, block)
    }
}

/// Where the chunk indexes start, counted from the inode.
pub(super) fn chunks_at(xattr_len: u64) -> u64 {
    (INODE + xattr_len).next_multiple_of(CHUNK_INDEX)
}

fn check_extents(view: &View, ino: Ino, inode: &Inode, devices: &[DeviceSpec]) -> Result<(), ErofsError> {
    for e in inode.extents.iter() {
        let end = e.layer_offset.checked_add(e.len);
        let device = devices.get(usize::from(e.layer));
        if device.is_none_or(|d| end.is_none_or(|end| end > d.size)) {
            return Err(ErofsError::OutsideDevice {
                path: path_of(view, ino),
                layer: usize::from(e.layer) + 1,
                offset: e.layer_offset,
            });
        }
    }
    Ok(())
}

/// A path of an inode, for an error.
pub(super) fn path_of(view: &View, ino: Ino) -> String {
    let mut path = Vec::new();
    let mut of = ino;
    while of != 0 {
        let found = view.inodes().find_map(|(dir, _)| {
            let (name, _) = view.children(dir).find(|&(_, i)| i == of)?;
            Some((dir, name))
        });
        let Some((dir, name)) = found else { break };
        path.splice(0..0, [b"/", name].concat());
        of = dir;
    }
    if path.is_empty() { "/".to_owned() } else { path.escape_ascii().to_string() }
}
