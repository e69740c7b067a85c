//! The writer: one pass over the view to lay out, one to write.

use std::collections::HashMap;
use std::io::{BufWriter, Seek, SeekFrom, Write};

use sha2::{Digest, Sha256};

use super::chunks::{self, Chunking, Place};
use super::dirs;
use super::error::ErofsError;
use super::format::{
    BLOCK, DEVICE_SLOT, HOLE, Layout, RawInode, SUPER_OFFSET, SUPER_SIZE, Super, chunk_format, chunk_index,
    device_slot,
};
use super::plan::{Placed, Plan, chunks_at, data_size, path_of};
use super::xattrs;
use super::{BUILDER_VERSION, DeviceSpec, ErofsSummary, LayerContent};
use crate::view::{Ino, Inode, Kind, View};

/// Device numbers have 16 bits, and the appendix needs one.
const MAX_DEVICES: usize = 65_000;
const APPENDIX_TAG: &[u8] = b"lazyrun appendix";
const COPY: u64 = 1 << 20;

/// Writes the image, and what it needs of the appendix. Device `k` + 1 of the image is layer `k` with
/// `devices[k]`; mount it with all of them, in order, and the appendix last if it is not empty. Nothing is
/// synced; `image` must be empty.
pub fn write<W: Write + Seek, A: Write>(
    view: &View,
    devices: &[DeviceSpec],
    content: &dyn LayerContent,
    image: W,
    appendix: A,
) -> Result<ErofsSummary, ErofsError> {
    if devices.len() > MAX_DEVICES {
        return Err(ErofsError::TooManyDevices(devices.len()));
    }
    for (i, device) in devices.iter().enumerate() {
        block_count(device.size, || format!("layer file of layer {}", i + 1))?;
    }
    let plan = Plan::of(view, devices)?;
    let mut appendix = Appendix {
        device: devices.len() as u16 + 1,
        content,
        out: Hashed::new(appendix, "appendix"),
        sparse: HashMap::new(),
    };
    for &(ino, chunking) in &plan.chunked {
        appendix.file(view, ino, chunking, devices)?;
    }
    let (appendix_size, appendix_digest) = (appendix.out.len, appendix.out.finish()?);

    let mut head = head(devices, appendix_size)?;
    let meta_block = head.len() as u64 / BLOCK;
    let data_block = meta_block + plan.meta_len / BLOCK;
    let blocks = data_block + plan.data_blocks;
    let root = plan.inodes.first().map_or(0, Placed::nid);
    let mut fields = Super {
        root: root as u16,
        inodes: view.len() as u64,
        blocks: block_count(blocks * BLOCK, || "image".to_owned())?,
        meta_block: meta_block as u32,
        devices: devices.len() as u16 + u16::from(appendix_size > 0),
        uuid: [0; 16],
    };
    let mut image = Hashed::new(image, "image");
    image.hash.update(BUILDER_VERSION.to_le_bytes());
    image.hash.update(appendix_digest);
    fields.encode(&mut head);
    image.write(&head)?;
    let mut writer =
        Writer { view, plan: &plan, devices, sparse: &appendix.sparse, data_block: data_block as u32 };
    writer.metadata(&mut image)?;
    writer.data(&mut image)?;

    let digest = image.finish()?;
    fields.uuid.copy_from_slice(&digest[..16]);
    // Version 8, "custom", of RFC 9562.
    fields.uuid[6] = fields.uuid[6] & 0x0f | 0x80;
    fields.uuid[8] = fields.uuid[8] & 0x3f | 0x80;
    fields.encode(&mut head);
    image.rewrite_start(&head)?;
    Ok(ErofsSummary {
        image_size: blocks * BLOCK,
        appendix_size,
        inodes: view.len() as u64,
        uuid: fields.uuid,
    })
}

/// Number of blocks, if 32 bits hold it and still leave the value for holes.
fn block_count(bytes: u64, what: impl FnOnce() -> String) -> Result<u32, ErofsError> {
    u32::try_from(bytes.div_ceil(BLOCK))
        .ok()
        .filter(|&b| b < HOLE)
        .ok_or_else(|| ErofsError::DeviceTooLarge(what()))
}

/// Everything before the metadata: room for a boot block, the superblock and the device table.
fn head(devices: &[DeviceSpec], appendix_size: u64) -> Result<Vec<u8>, ErofsError> {
    let mut head = vec![0; SUPER_OFFSET + SUPER_SIZE];
    head.reserve((devices.len() + 1) * DEVICE_SLOT);
    for device in devices {
        // Sizes were checked.
        head.extend_from_slice(&device_slot(&device.tag, device.size.div_ceil(BLOCK) as u32));
    }
    if appendix_size > 0 {
        let mut tag = [0; 64];
        tag[..APPENDIX_TAG.len()].copy_from_slice(APPENDIX_TAG);
        let blocks = block_count(appendix_size, || "appendix".to_owned())?;
        head.extend_from_slice(&device_slot(&tag, blocks));
    }
    head.resize(head.len().next_multiple_of(BLOCK as usize), 0);
    Ok(head)
}

/// A file that is written front to back and hashed as it passes.
struct Hashed<W: Write> {
    out: BufWriter<W>,
    hash: Sha256,
    len: u64,
    what: &'static str,
}

impl<W: Write> Hashed<W> {
    fn new(out: W, what: &'static str) -> Self {
        Hashed { out: BufWriter::with_capacity(1 << 18, out), hash: Sha256::new(), len: 0, what }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|source| ErofsError::Write { what: self.what, source })
    }

    fn finish(&mut self) -> Result<[u8; 32], ErofsError> {
        self.out.flush().map_err(|source| ErofsError::Write { what: self.what, source })?;
        Ok(self.hash.finalize_reset().into())
    }
}

impl<W: Write + Seek> Hashed<W> {
    fn rewrite_start(&mut self, head: &[u8]) -> Result<(), ErofsError> {
        self.out
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.out.write_all(head))
            .and_then(|()| self.out.flush())
            .map_err(|source| ErofsError::Write { what: self.what, source })
    }
}

/// Copies what has to be copied, and keeps the chunk indexes of the files concerned.
struct Appendix<'c, A: Write> {
    device: u16,
    content: &'c dyn LayerContent,
    out: Hashed<A>,
    sparse: HashMap<Ino, Vec<u8>>,
}

impl<A: Write> Appendix<'_, A> {
    fn file(
        &mut self,
        view: &View,
        ino: Ino,
        chunking: Chunking,
        devices: &[DeviceSpec],
    ) -> Result<(), ErofsError> {
        let inode = view.inode(ino);
        let size = chunking.size();
        let mut runs = Vec::new();
        chunks::each(inode, devices, size, |first, count, place| runs.push((first, count, place)));
        let mut indexes = Vec::with_capacity(chunking.count as usize * 8);
        let fill = |indexes: &mut Vec<u8>, until: u64| {
            while (indexes.len() as u64) < until * 8 {
                indexes.extend_from_slice(&chunk_index(0, HOLE));
            }
        };
        for (first, count, place) in runs {
            fill(&mut indexes, first);
            let (device, mut block) = match place {
                Place::Layer(layer, block) => (layer + 1, block),
                Place::Mixed => {
                    let end = (first + count).saturating_mul(size).min(inode.size);
                    (self.device, self.copy(view, ino, first * size, end)?)
                }
            };
            for _ in 0..count {
                indexes.extend_from_slice(&chunk_index(device, block));
                block = block.saturating_add((size / BLOCK).min(u64::from(HOLE)) as u32);
            }
        }
        fill(&mut indexes, chunking.count);
        self.sparse.insert(ino, indexes);
        Ok(())
    }

    /// Copies a range of a file, holes as zeros, and tells its first block.
    fn copy(&mut self, view: &View, ino: Ino, start: u64, end: u64) -> Result<u32, ErofsError> {
        let block = block_count(self.out.len, || "appendix".to_owned())?;
        let mut at = start;
        while at < end {
            let piece = (end - at).min(COPY);
            let mut buf = vec![0; piece.next_multiple_of(BLOCK) as usize];
            self.fill(view, ino, at, &mut buf[..piece as usize])?;
            self.out.write(&buf)?;
            at += piece;
        }
        block_count(self.out.len, || "appendix".to_owned())?;
        Ok(block)
    }

    fn fill(&self, view: &View, ino: Ino, at: u64, buf: &mut [u8]) -> Result<(), ErofsError> {
        let end = at + buf.len() as u64;
        let extents = &view.inode(ino).extents;
        let skip = extents.partition_point(|e| e.file_offset + e.len <= at);
        for e in extents[skip..].iter().take_while(|e| e.file_offset < end) {
            let from = e.file_offset.max(at);
            let to = (e.file_offset + e.len).min(end);
            let piece = &mut buf[(from - at) as usize..(to - at) as usize];
            let offset = e.layer_offset + (from - e.file_offset);
            self.content.read_at(e.layer, offset, piece).map_err(|source| ErofsError::Read {
                path: path_of(view, ino),
                layer: usize::from(e.layer) + 1,
                offset,
                len: piece.len(),
                source,
            })?;
        }
        Ok(())
    }
}

struct Writer<'v> {
    view: &'v View,
    plan: &'v Plan,
    devices: &'v [DeviceSpec],
    sparse: &'v HashMap<Ino, Vec<u8>>,
    data_block: u32,
}

impl Writer<'_> {
    fn metadata<W: Write>(&mut self, image: &mut Hashed<W>) -> Result<(), ErofsError> {
        let mut at = 0;
        let mut buf = Vec::new();
        for ((ino, inode), placed) in self.view.inodes().zip(&self.plan.inodes) {
            buf.clear();
            buf.resize((placed.at - at) as usize, 0);
            self.inode(ino, inode, placed, &mut buf);
            image.write(&buf)?;
            at += buf.len() as u64;
        }
        image.write(&vec![0; (self.plan.meta_len - at) as usize])
    }

    fn inode(&self, ino: Ino, inode: &Inode, placed: &Placed, out: &mut Vec<u8>) {
        let start = out.len();
        let data = data_size(self.view, ino, inode);
        let raw = RawInode {
            layout: placed.layout,
            xattr_len: u64::from(placed.xattr_len),
            mode: inode.mode | inode.kind.mode_bits() as u16,
            size: if inode.kind == Kind::File { inode.size } else { data },
            union: match (placed.layout, inode.kind) {
                (Layout::Chunks, _) => chunk_format(placed.union as u8),
                (_, Kind::Directory | Kind::Symlink) if placed.union != HOLE => {
                    self.data_block + placed.union
                }
                _ => placed.union,
            },
            number: ino.wrapping_add(1),
            uid: inode.uid,
            gid: inode.gid,
            secs: inode.mtime.secs,
            nanos: inode.mtime.nanos,
            nlink: inode.nlink,
        };
        out.extend_from_slice(&raw.encode());
        xattrs::encode(inode, out);
        match placed.layout {
            Layout::Plain => {}
            Layout::Inline => {
                let data = self.contents(ino, inode);
                out.extend_from_slice(&data[data.len() / BLOCK as usize * BLOCK as usize..]);
            }
            Layout::Chunks => {
                out.resize(start + chunks_at(u64::from(placed.xattr_len)) as usize, 0);
                match self.sparse.get(&ino) {
                    Some(indexes) => out.extend_from_slice(indexes),
                    None => out.extend_from_slice(&self.only_chunk(inode, placed.union as u8)),
                }
            }
        }
    }

    /// The index of a file that is one run in its layer, or one hole.
    fn only_chunk(&self, inode: &Inode, bits: u8) -> [u8; 8] {
        let mut index = chunk_index(0, HOLE);
        chunks::each(inode, self.devices, BLOCK << bits, |_, _, place| {
            if let Place::Layer(layer, block) = place {
                index = chunk_index(layer + 1, block);
            }
        });
        index
    }

    /// The data that the image itself holds: a directory's entries or a symlink's target.
    fn contents(&self, ino: Ino, inode: &Inode) -> Vec<u8> {
        if inode.kind == Kind::Symlink {
            return inode.target.to_vec();
        }
        let mut data = Vec::new();
        dirs::encode(self.view, ino, |i| self.plan.inodes[i as usize].nid(), &mut data);
        data
    }

    /// The data area: whole blocks of directories and symlinks, in the order of their inodes.
    fn data<W: Write>(&mut self, image: &mut Hashed<W>) -> Result<(), ErofsError> {
        for ((ino, inode), placed) in self.view.inodes().zip(&self.plan.inodes) {
            if !matches!(inode.kind, Kind::Directory | Kind::Symlink) || placed.union == HOLE {
                continue;
            }
            let mut data = self.contents(ino, inode);
            match placed.layout {
                Layout::Inline => data.truncate(data.len() / BLOCK as usize * BLOCK as usize),
                _ => data.resize(data.len().next_multiple_of(BLOCK as usize), 0),
            }
            image.write(&data)?;
        }
        Ok(())
    }
}
