//! The smallest EROFS image that exercises what views need: one file whose contents are on a device.

/// Block size, as in every view: tar's.
const BLOCK: u64 = 512;
const SUPERBLOCK: usize = 1024;
/// The device table: one slot of 128 bytes behind the superblock.
const DEVICE_SLOT: usize = 1152;
const META_BLOCK: usize = 3;
const ROOT_NID: usize = 1;
const FILE_NID: usize = 4;
/// Image size in bytes: metadata fits in the first page.
const SIZE: usize = 4096;
/// log2 of blocks per chunk: a single chunk of 512 MiB covers any device used here.
const CHUNK_BITS: u16 = 20;
const CHUNK_INDEXES: u16 = 0x20;

/// The name of the image's only file, whose contents are those of device 1.
pub(super) const FILE: &str = "probe";

/// An image whose file has `size` bytes (a multiple of 512, at most 512 MiB).
pub(super) fn image(size: u32) -> Vec<u8> {
    let mut image = vec![0u8; SIZE];
    let blocks = (u64::from(size) / BLOCK) as u32;
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);

    put(SUPERBLOCK, &0xE0F5_E1E2_u32.to_le_bytes());
    put(SUPERBLOCK + 12, &[9]);
    put(SUPERBLOCK + 14, &(ROOT_NID as u16).to_le_bytes());
    put(SUPERBLOCK + 16, &2u64.to_le_bytes());
    put(SUPERBLOCK + 36, &((SIZE as u64 / BLOCK) as u32).to_le_bytes());
    put(SUPERBLOCK + 40, &(META_BLOCK as u32).to_le_bytes());
    // Incompatible features: chunk-based files (4) and a device table (8).
    put(SUPERBLOCK + 80, &0xc_u32.to_le_bytes());
    put(SUPERBLOCK + 86, &1u16.to_le_bytes());
    put(SUPERBLOCK + 88, &((DEVICE_SLOT / 128) as u16).to_le_bytes());
    put(DEVICE_SLOT + 64, &blocks.to_le_bytes());

    // The root: a compact inode (layout 2, inline) with its entries right behind it.
    let root = nid_offset(ROOT_NID);
    let entries = directory();
    put(root, &(2u16 << 1).to_le_bytes());
    put(root + 4, &0o40755_u16.to_le_bytes());
    put(root + 6, &2u16.to_le_bytes());
    put(root + 8, &(entries.len() as u32).to_le_bytes());
    put(root + 20, &1u32.to_le_bytes());
    put(root + 32, &entries);

    // The file: layout 4 (chunks), one chunk index: startblk_hi, device_id, startblk_lo.
    let file = nid_offset(FILE_NID);
    put(file, &(4u16 << 1).to_le_bytes());
    put(file + 4, &0o100_444_u16.to_le_bytes());
    put(file + 6, &1u16.to_le_bytes());
    put(file + 8, &size.to_le_bytes());
    put(file + 16, &(CHUNK_BITS | CHUNK_INDEXES).to_le_bytes());
    put(file + 20, &2u32.to_le_bytes());
    put(file + 34, &1u16.to_le_bytes());
    image
}

fn nid_offset(nid: usize) -> usize {
    META_BLOCK * BLOCK as usize + nid * 32
}

/// Entries of 12 bytes (nid, name offset, type, reserved), then the names.
fn directory() -> Vec<u8> {
    let entries = [(ROOT_NID, ".", 2u8), (ROOT_NID, "..", 2), (FILE_NID, FILE, 1)];
    let mut name_offset = entries.len() * 12;
    let mut out = Vec::new();
    for (nid, name, kind) in entries {
        out.extend((nid as u64).to_le_bytes());
        out.extend((name_offset as u16).to_le_bytes());
        out.extend([kind, 0]);
        name_offset += name.len();
    }
    for (_, name, _) in entries {
        out.extend(name.as_bytes());
    }
    out
}
