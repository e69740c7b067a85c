//! The requests, one by one.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, INodeNo, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};

use super::UnionFs;
use super::answers::{GENERATION, answer, caller};
use super::convert::{attr, entry, errno, kind, name, nothing, set_time};
use crate::union::{New, SetAttr};

thread_local! {
    /// What READ is answered from.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for UnionFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.configure(config);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, file: &OsStr, reply: ReplyEntry) {
        let found = self.node(parent).and_then(|p| self.union.lookup(&p, &name(file)?));
        match found {
            Ok(None) => reply.entry(&self.ttl, &nothing(), GENERATION),
            Ok(Some((_, a))) => self.answer_entry(Ok(a), reply),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, count: u64) {
        self.union.forget([(ino.0, count)]);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino).and_then(|n| self.union.attr(&n)) {
            Ok(a) => reply.attr(&entry(&a, self.ttl).1, &attr(&a)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, mtime) = (atime.map(set_time), mtime.map(set_time));
        let set = SetAttr { mode, uid, gid, size, atime, mtime };
        let done = self.node(ino).and_then(|node| {
            let file = fh.and_then(|fh| self.files.get(fh.0).ok());
            self.union.set_attr(&node, &set, file.as_deref(), caller(req))
        });
        match done {
            Ok(a) => reply.attr(&entry(&a, self.ttl).1, &attr(&a)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.node(ino).and_then(|n| self.union.read_link(&n)) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        file: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let new = New::Special(mode & libc::S_IFMT, u64::from(rdev));
        self.make(req, parent, file, new, (mode & 0o7777, umask), reply);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, file: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.make(req, parent, file, New::Directory, (mode & 0o7777, umask), reply);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, file: &OsStr, reply: ReplyEmpty) {
        answer(self.node(parent).and_then(|p| self.union.unlink(&p, &name(file)?)), reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, file: &OsStr, reply: ReplyEmpty) {
        answer(self.node(parent).and_then(|p| self.union.rmdir(&p, &name(file)?)), reply);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, file: &OsStr, target: &Path, reply: ReplyEntry) {
        match name(target.as_os_str()) {
            Ok(target) => self.make(req, parent, file, New::Symlink(&target), (0o777, 0), reply),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        file: &OsStr,
        new_parent: INodeNo,
        new_file: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = self.node(parent).and_then(|from| {
            let to = self.node(new_parent)?;
            self.union.rename((&from, &name(file)?), (&to, &name(new_file)?), flags.bits())
        });
        answer(done, reply);
    }

    fn link(&self, _req: &Request, ino: INodeNo, parent: INodeNo, file: &OsStr, reply: ReplyEntry) {
        let done = self.node(ino).and_then(|n| self.union.link(&n, &self.node(parent)?, &name(file)?));
        self.answer_entry(done, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(errno(e)),
        };
        match self.union.open_file(&node, flags.0, caller(req)) {
            Err(e) => reply.error(errno(e)),
            Ok(file) => {
                let wanted = || {
                    let mode = self.union.attr(&node).map_or(0o6000, |a| a.stat.st_mode);
                    Self::wants_passthrough(&file, mode)
                };
                let backing = file.fd().map_err(io::Error::from);
                let backing = self.passthrough.open(ino.0, wanted, || reply.open_backing(backing?));
                let fh = FileHandle(self.files.insert(file));
                match backing {
                    Some(id) => reply.opened_passthrough(fh, FopenFlags::empty(), &id),
                    None => reply.opened(fh, FopenFlags::FOPEN_KEEP_CACHE),
                }
            }
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        file: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.node(parent).and_then(|parent| {
            self.open_or_create(&parent, &name(file)?, (mode & 0o7777, umask), flags, caller(req))
        });
        match made {
            Err(e) => reply.error(errno(e)),
            Ok((node, a, open)) => {
                let (out, ttl) = entry(&a, self.ttl);
                let wanted = || Self::wants_passthrough(&open, a.stat.st_mode);
                let backing = open.fd().map_err(io::Error::from);
                let backing = self.passthrough.open(node.id(), wanted, || reply.open_backing(backing?));
                let fh = FileHandle(self.files.insert(open));
                match backing {
                    Some(id) => {
                        reply.created_passthrough(&ttl, &out, GENERATION, fh, FopenFlags::empty(), &id);
                    }
                    None => reply.created(&ttl, &out, GENERATION, fh, FopenFlags::FOPEN_KEEP_CACHE),
                }
            }
        }
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let file = match self.files.get(fh.0) {
            Ok(file) => file,
            Err(e) => return reply.error(errno(e)),
        };
        BUFFER.with_borrow_mut(|buf| {
            let size = size.min(super::super::MAX_READ) as usize;
            if buf.len() < size {
                buf.resize(size, 0);
            }
            match file.read(&mut buf[..size], offset) {
                Ok(n) => reply.data(&buf[..n]),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID).then(|| caller(req));
        match self.files.get(fh.0).and_then(|file| file.write(data, offset, kill)) {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock: LockOwner, reply: ReplyEmpty) {
        // Nothing is held back: the kernel need not ask again.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.passthrough.close(ino.0);
        drop(self.files.remove(fh.0));
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        answer(self.files.get(fh.0).and_then(|file| self.union.sync_file(&file, data_only)), reply);
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.node(ino) {
            Ok(node) => {
                let fh = FileHandle(self.dirs.insert(self.union.open_dir(node)));
                reply.opened(fh, FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readdir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = self.dirs.get(fh.0).and_then(|dir| dir.entries(&self.union, offset));
        let list = match list {
            Ok(list) => list,
            Err(e) => return reply.error(errno(e)),
        };
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, e) in list.iter().enumerate().skip(first) {
            let file = OsStr::from_bytes(e.name.to_bytes());
            if reply.add(INodeNo(e.ino), i as u64 + 1, kind(e.kind), file) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let dir = match self.dirs.get(fh.0) {
            Ok(dir) => dir,
            Err(e) => return reply.error(errno(e)),
        };
        let list = match dir.entries(&self.union, offset) {
            Ok(list) => list,
            Err(e) => return reply.error(errno(e)),
        };
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, e) in list.iter().enumerate().skip(first) {
            let file = OsStr::from_bytes(e.name.to_bytes());
            let next = i as u64 + 1;
            if i < 2 {
                // The kernel takes nothing but number and name of these two.
                let mut dot = nothing();
                (dot.ino, dot.kind) = (INodeNo(e.ino), kind(e.kind));
                if reply.add(INodeNo(e.ino), next, file, &self.ttl, &dot, GENERATION) {
                    break;
                }
                continue;
            }
            match self.union.lookup_entry(&dir.node, e) {
                // Removed meanwhile: the kernel will find that out.
                Ok(None) => {}
                Ok(Some((node, a))) => {
                    let (out, ttl) = entry(&a, self.ttl);
                    if reply.add(INodeNo(a.stat.st_ino), next, file, &ttl, &out, GENERATION) {
                        self.union.forget([(node.id(), 1)]);
                        break;
                    }
                }
                Err(e) => return reply.error(errno(e)),
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        drop(self.dirs.remove(fh.0));
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _data: bool, reply: ReplyEmpty) {
        answer(self.node(ino).and_then(|node| self.union.sync_dir(&node)), reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.union.statfs() {
            Ok(s) => reply.statfs(
                s.blocks(),
                s.blocks_free(),
                s.blocks_available(),
                s.files(),
                s.files_free(),
                u32::try_from(s.block_size()).unwrap_or(4096),
                u32::try_from(s.name_max()).unwrap_or(255),
                u32::try_from(s.fragment_size()).unwrap_or(4096),
            ),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        key: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let set = |node| self.union.set_xattr(&node, &name(key)?, value, flags);
        answer(self.node(ino).and_then(set), reply);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, key: &OsStr, size: u32, reply: ReplyXattr) {
        let mut value = vec![0u8; (size as usize).min(64 << 10)];
        match self.node(ino).and_then(|node| self.union.get_xattr(&node, &name(key)?, &mut value)) {
            Ok(n) if size == 0 => reply.size(n as u32),
            Ok(n) => reply.data(&value[..n]),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.node(ino).and_then(|node| self.union.list_xattr(&node)) {
            Ok(list) if size == 0 => reply.size(list.len() as u32),
            Ok(list) if list.len() <= size as usize => reply.data(&list),
            Ok(_) => reply.error(fuser::Errno::ERANGE),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, key: &OsStr, reply: ReplyEmpty) {
        answer(self.node(ino).and_then(|node| self.union.remove_xattr(&node, &name(key)?)), reply);
    }

    fn ioctl(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        match self.node(ino).and_then(|node| self.control(&node, cmd, in_data, caller(req))) {
            // The kernel takes no more than it has room for.
            Ok(out) => reply.ioctl(0, &out[..out.len().min(out_size as usize)]),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(self.files.get(fh.0).and_then(|file| file.allocate(mode, offset, length)), reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.files.get(fh.0).and_then(|file| file.seek(offset, whence)) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let copied = self.files.get(fh_in.0).and_then(|from| {
            let to = self.files.get(fh_out.0)?;
            from.copy_to(offset_in, &to, offset_out, len)
        });
        match copied {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(errno(e)),
        }
    }
}
