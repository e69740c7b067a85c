//! The flat server: one read-only directory of layer files, for the whole node.
//!
//! EROFS views name these files as their devices, so after a view is mounted only READ arrives here.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyXattr, Request,
};

use super::content::LayerFiles;
use super::join::Exact;
use super::session::{Server, configure};
use super::stats::{Requests, count};
use super::{FOREVER, MAX_READ};

const ROOT: u64 = 1;

/// What the server asks for: reads in parallel, no open or opendir upcalls, requests resent on takeover.
pub(super) const FLAGS: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_EXPLICIT_INVAL_DATA)
    .union(InitFlags::FUSE_HAS_RESEND);

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

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        if ino == ROOT {
            return Some(attr(ino, FileType::Directory, 0));
        }
        self.files.size(ino).map(|size| attr(ino, FileType::RegularFile, size))
    }
}

impl<L: LayerFiles> Server for Flat<L> {
    fn requests(&self) -> Arc<Requests> {
        Arc::clone(&self.requests)
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

impl<L: LayerFiles> Filesystem for Flat<L> {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        configure(config, FLAGS);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        count(&self.requests.lookup);
        let found = if parent.0 == ROOT { self.files.by_name(name.as_bytes()) } else { None };
        match found.filter(|&ino| ino > ROOT).and_then(|ino| self.attr(ino)) {
            Some(attr) => reply.entry(&FOREVER, &attr, Generation(0)),
            // An error is not remembered, so a layer that appears later is found.
            None => reply.error(Errno::ENOENT),
        }
    }

    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {}

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        count(&self.requests.getattr);
        match self.attr(ino.0) {
            Some(attr) => reply.attr(&FOREVER, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        count(&self.requests.open);
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        count(&self.requests.open);
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock: Option<LockOwner>,
        reply: ReplyData,
    ) {
        count(&self.requests.read);
        let Some(file_size) = self.files.size(ino.0) else { return reply.error(Errno::EIO) };
        // The kernel reads whole pages; what lies past the end is not the layer's business.
        let len = u64::from(size).min(file_size.saturating_sub(offset));
        match u32::try_from(len) {
            Ok(len) if len > 0 => self.files.read(ino.0, offset, len, Box::new(Exact { len, reply })),
            _ => reply.data(&[]),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        count(&self.requests.readdir);
        // Layer files are opened by name; the directory does not list them.
        for (i, name) in [".", ".."].iter().enumerate().skip(usize::try_from(offset).unwrap_or(2)) {
            if reply.add(INodeNo(ROOT), i as u64 + 1, FileType::Directory, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        count(&self.requests.other);
        reply.statfs(0, 0, 0, 0, 0, 512, 255, 512);
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock: LockOwner, reply: ReplyEmpty) {
        count(&self.requests.other);
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        count(&self.requests.xattr);
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        count(&self.requests.xattr);
        reply.error(Errno::ENOSYS);
    }
}
