//! The on-disk structures, little-endian, as Linux' `fs/erofs/erofs_fs.h` documents them.

/// Block size: that of tar, so that contents can stay where they are.
pub(super) const BLOCK: u64 = 512;
pub(super) const BLOCK_BITS: u8 = 9;
/// Where the superblock is.
pub(super) const SUPER_OFFSET: usize = 1024;
pub(super) const SUPER_SIZE: usize = 128;
pub(super) const DEVICE_SLOT: usize = 128;
/// Inodes are numbered by slots of 32 bytes.
pub(super) const SLOT: u64 = 32;
/// Size of an extended inode.
pub(super) const INODE: u64 = 64;
pub(super) const DIRENT: usize = 12;
/// Size of one chunk index.
pub(super) const CHUNK_INDEX: u64 = 8;
/// Largest chunk, in bits above the block size: what five bits hold.
pub(super) const MAX_CHUNK_BITS: u8 = 31;
/// Block address that stands for a hole.
pub(super) const HOLE: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED: u32 = 0x4;
const INCOMPAT_DEVICES: u32 = 0x8;
const CHUNK_INDEXES: u32 = 0x20;

/// How an inode's data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Whole blocks.
    Plain = 0,
    /// Whole blocks, the rest behind the inode.
    Inline = 2,
    /// Chunk indexes behind the inode.
    Chunks = 4,
}

/// The superblock's variable fields.
pub(super) struct Super {
    pub(super) root: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) devices: u16,
    pub(super) uuid: [u8; 16],
}

fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Super {
    /// Writes itself and its checksum into the head of the image: everything before the first metadata block,
    /// device table included.
    pub(super) fn encode(&self, head: &mut [u8]) {
        let incompat = INCOMPAT_CHUNKED | if self.devices > 0 { INCOMPAT_DEVICES } else { 0 };
        let sb = &mut head[SUPER_OFFSET..];
        put(sb, 0, &MAGIC.to_le_bytes());
        put(sb, 4, &[0; 4]);
        put(sb, 8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        sb[12] = BLOCK_BITS;
        put(sb, 14, &self.root.to_le_bytes());
        put(sb, 16, &self.inodes.to_le_bytes());
        put(sb, 36, &self.blocks.to_le_bytes());
        put(sb, 40, &self.meta_block.to_le_bytes());
        put(sb, 48, &self.uuid);
        put(sb, 80, &incompat.to_le_bytes());
        put(sb, 86, &self.devices.to_le_bytes());
        put(sb, 88, &(((SUPER_OFFSET + SUPER_SIZE) / DEVICE_SLOT) as u16).to_le_bytes());
        // The kernel's crc32c starts from all ones like everybody's, but leaves out the final inversion.
        let checksum = !crc32c::crc32c(&sb[..BLOCK as usize]);
        put(sb, 4, &checksum.to_le_bytes());
    }
}

/// One slot of the device table.
pub(super) fn device_slot(tag: &[u8; 64], blocks: u32) -> [u8; DEVICE_SLOT] {
    let mut slot = [0; DEVICE_SLOT];
    put(&mut slot, 0, tag);
    put(&mut slot, 64, &blocks.to_le_bytes());
    slot
}

/// An extended inode.
pub(super) struct RawInode {
    pub(super) layout: Layout,
    pub(super) xattr_len: u64,
    pub(super) mode: u16,
    pub(super) size: u64,
    /// Block address, device number or chunk format.
    pub(super) union: u32,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) secs: i64,
    pub(super) nanos: u32,
    pub(super) nlink: u32,
}

impl RawInode {
    pub(super) fn encode(&self) -> [u8; INODE as usize] {
        let mut raw = [0; INODE as usize];
        let format = 1 | ((self.layout as u16) << 1);
        put(&mut raw, 0, &format.to_le_bytes());
        put(&mut raw, 2, &xattr_count(self.xattr_len).to_le_bytes());
        put(&mut raw, 4, &self.mode.to_le_bytes());
        put(&mut raw, 8, &self.size.to_le_bytes());
        put(&mut raw, 16, &self.union.to_le_bytes());
        put(&mut raw, 20, &self.number.to_le_bytes());
        put(&mut raw, 24, &self.uid.to_le_bytes());
        put(&mut raw, 28, &self.gid.to_le_bytes());
        put(&mut raw, 32, &self.secs.to_le_bytes());
        put(&mut raw, 40, &self.nanos.to_le_bytes());
        put(&mut raw, 44, &self.nlink.to_le_bytes());
        raw
    }
}

/// `i_xattr_icount`: the length in words of four bytes, where the header of 12 bytes counts as one.
fn xattr_count(len: u64) -> u16 {
    if len == 0 { 0 } else { ((len - 12) / 4 + 1) as u16 }
}

/// `i_u` of a chunk-based inode.
pub(super) fn chunk_format(bits: u8) -> u32 {
    CHUNK_INDEXES | u32::from(bits)
}

/// A chunk index. Device 0 is the image itself, which holds no contents.
pub(super) fn chunk_index(device: u16, block: u32) -> [u8; CHUNK_INDEX as usize] {
    let mut raw = [0; CHUNK_INDEX as usize];
    put(&mut raw, 2, &device.to_le_bytes());
    put(&mut raw, 4, &block.to_le_bytes());
    raw
}

/// A directory entry, without its name.
pub(super) fn dirent(nid: u64, name_offset: u16, file_type: u8) -> [u8; DIRENT] {
    let mut raw = [0; DIRENT];
    put(&mut raw, 0, &nid.to_le_bytes());
    put(&mut raw, 8, &name_offset.to_le_bytes());
    raw[10] = file_type;
    raw
}

/// The kernel's `new_encode_dev`; `None` if the numbers are too large for it.
pub(super) fn device_number((major, minor): (u32, u32)) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_as_the_kernel_encodes_them() {
        assert_eq!(device_number((1, 3)), Some(0x0103));
        assert_eq!(device_number((0xabc, 0x1_2345)), Some(0x123a_bc45));
        assert_eq!(device_number((4096, 0)), None);
        assert_eq!(device_number((0, 1 << 20)), None);
    }

    #[test]
    fn xattr_words() {
        assert_eq!([xattr_count(0), xattr_count(12), xattr_count(12 + 8)], [0, 1, 3]);
    }
}
