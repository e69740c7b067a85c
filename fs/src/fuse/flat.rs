//! The flat server: one read-only directory of layer files, for the whole node.
//!
//! EROFS views name these files as their devices, so after a view is mounted only READ arrives here.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use fuser::{Errno, FileAttr, FileType, INodeNo};

use super::MAX_READ;
use super::content::{Answer, LayerFiles, ReadReply};
use super::join::Exact;
use super::readonly::Server;
use super::stats::Requests;

const ROOT: u64 = 1;

/// The flat server over a set of layer files.
pub struct Flat<L> {
    files: Arc<L>,
    requests: Arc<Requests>,
}

impl<L: LayerFiles> Flat<L> {
    /// A server of these files; files that appear later are found too.
    pub fn new(files: Arc<L>) -> Self {
        Self { files, requests: Arc::default() }
    }
}

impl<L: LayerFiles> Server for Flat<L> {
    fn requests(&self) -> &Arc<Requests> {
        &self.requests
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        if ino == ROOT {
            return Some(attr(ino, FileType::Directory, 0));
        }
        self.files.size(ino).map(|size| attr(ino, FileType::RegularFile, size))
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<FileAttr, Errno> {
        let found = if dir == ROOT { self.files.by_name(name) } else { None };
        // An error is not remembered, so a layer that appears later is found.
        found.filter(|&ino| ino > ROOT).and_then(|ino| self.attr(ino)).ok_or(Errno::ENOENT)
    }

    // Layer files are opened by name; the directory does not list them.
    fn entry(&self, _dir: u64, i: usize) -> Option<(&[u8], u64, FileType)> {
        let names: [&[u8]; 2] = [b".", b".."];
        Some((names.get(i)?, ROOT, FileType::Directory))
    }

    fn read(&self, ino: u64, offset: u64, size: u32, reply: Answer) {
        let Some(file_size) = self.files.size(ino) else { return Box::new(reply).error(libc::EIO) };
        // The kernel reads whole pages; what lies past the end is not the layer's business.
        let len = u64::from(size).min(file_size.saturating_sub(offset));
        match u32::try_from(len) {
            Ok(len) if len > 0 => self.files.read(ino, offset, len, Box::new(Exact { len, reply })),
            _ => Box::new(reply).data(&[]),
        }
    }
}

fn attr(ino: u64, kind: FileType, size: u64) -> FileAttr {
    let (perm, nlink) = if kind == FileType::Directory { (0o500, 2) } else { (0o400, 1) };
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: MAX_READ,
        flags: 0,
    }
}
