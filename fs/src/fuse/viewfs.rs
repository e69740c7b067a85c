//! The view server: all names, attributes and contents of one view in one FUSE mount.
//!
//! A view never changes, so every answer may be kept for ever, also that there is no such name.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, InitFlags};
use lazyrun_index::Timestamp;

use super::content::{Answer, LayerFiles, ReadReply};
use super::join::{Exact, Join};
use super::readonly::Server;
use super::stats::Requests;
use crate::view::{Ino, Inode, Kind, LayerExtent, View, escaped};

const FLAGS: InitFlags = InitFlags::FUSE_DO_READDIRPLUS
    .union(InitFlags::FUSE_READDIRPLUS_AUTO)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_ALLOW_IDMAP);

/// The server of one view. Inode numbers are the view's plus one, so they survive its restart.
pub struct ViewFs<L> {
    view: Arc<View>,
    files: Arc<L>,
    /// Of each layer of the view, the inode number that `files` has for its layer file.
    layers: Vec<u64>,
    /// Whether any file has an attribute, and whether one is an ACL. A kernel that is told once that there
    /// are none never asks again.
    has_xattrs: bool,
    has_acls: bool,
    requests: Arc<Requests>,
}

impl<L: LayerFiles> ViewFs<L> {
    /// A server of `view`, whose layers, the bottom one first, are the files numbered `layers` in `files`.
    pub fn new(view: Arc<View>, files: Arc<L>, layers: Vec<u64>) -> Self {
        let mut names = view.inodes().flat_map(|(_, inode)| inode.xattrs.iter().map(|x| &x.name)).peekable();
        let has_xattrs = names.peek().is_some();
        let has_acls = names.any(|name| name.starts_with(b"system.posix_acl_"));
        drop(names);
        Self { view, files, layers, has_xattrs, has_acls, requests: Arc::default() }
    }

    /// Counts its requests there, together with those of other servers.
    pub fn counting_in(mut self, requests: Arc<Requests>) -> Self {
        self.requests = requests;
        self
    }

    fn inode(&self, ino: u64) -> Option<(Ino, &Inode)> {
        let number = Ino::try_from(ino.checked_sub(1)?).ok()?;
        Some((number, self.view.get(number)?))
    }

    /// An inode whose attributes are asked for; a tree without any says so once.
    fn xattrs_of(&self, ino: u64) -> Result<&Inode, Errno> {
        if !self.has_xattrs {
            return Err(Errno::ENOSYS);
        }
        self.inode(ino).map(|(_, inode)| inode).ok_or(Errno::ENOENT)
    }

    fn read_file(&self, inode: &Inode, offset: u64, size: u32, reply: Answer) {
        let len = u64::from(size).min(inode.size.saturating_sub(offset));
        let pieces = pieces(&inode.extents, offset, len);
        let Some(pieces) = pieces.into_iter().map(|p| self.locate(p)).collect::<Option<Vec<_>>>() else {
            return Box::new(reply).error(libc::EIO);
        };
        if let [(ino, piece)] = pieces[..]
            && u64::from(piece.len) == len
        {
            let reply = Box::new(Exact { len: piece.len, reply });
            return self.files.read(ino, piece.layer_offset, piece.len, reply);
        }
        let places: Vec<_> = pieces.iter().map(|(_, p)| (p.at as usize, p.len as usize)).collect();
        let replies = Join::split(reply, len as usize, &places);
        for ((ino, piece), reply) in pieces.into_iter().zip(replies) {
            self.files.read(ino, piece.layer_offset, piece.len, reply);
        }
    }

    fn locate(&self, piece: Piece) -> Option<(u64, Piece)> {
        Some((*self.layers.get(usize::from(piece.layer))?, piece))
    }
}

/// A part of one read: `len` bytes of a layer, to be put `at` bytes into the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    layer: u16,
    layer_offset: u64,
    at: u32,
    len: u32,
}

/// What of the extents lies within `len` bytes (those of one READ) at `offset`.
fn pieces(extents: &[LayerExtent], offset: u64, len: u64) -> Vec<Piece> {
    let end = offset.saturating_add(len);
    let first = extents.partition_point(|e| e.file_offset.saturating_add(e.len) <= offset);
    let within = extents[first..].iter().take_while(|e| e.file_offset < end);
    within
        .filter_map(|e| {
            let start = e.file_offset.max(offset);
            let stop = e.file_offset.saturating_add(e.len).min(end);
            Some(Piece {
                layer: e.layer,
                layer_offset: e.layer_offset.checked_add(start - e.file_offset)?,
                at: u32::try_from(start - offset).ok()?,
                len: u32::try_from(stop.checked_sub(start)?).ok()?,
            })
        })
        .collect()
}

fn attr(number: Ino, inode: &Inode) -> FileAttr {
    let mtime = system_time(inode.mtime);
    let size = if inode.kind == Kind::Directory { 4096 } else { inode.size };
    let blocks = inode.extents.iter().map(|e| e.len.div_ceil(512)).sum();
    FileAttr {
        ino: INodeNo(u64::from(number) + 1),
        size,
        blocks,
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: file_type(inode.kind),
        perm: inode.mode,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: encode_device(inode.rdev),
        blksize: 4096,
        flags: 0,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Fifo => FileType::NamedPipe,
    }
}

/// The kernel's `new_encode_dev`: 12 bits of major between the low 8 and the high 12 bits of minor.
fn encode_device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.secs.unsigned_abs());
    let whole = if time.secs < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    let exact = whole.and_then(|t| t.checked_add(Duration::from_nanos(u64::from(time.nanos))));
    exact.unwrap_or(UNIX_EPOCH)
}

impl<L: LayerFiles> Server for ViewFs<L> {
    fn requests(&self) -> &Arc<Requests> {
        &self.requests
    }

    fn flags(&self) -> InitFlags {
        // With the flag the kernel enforces ACLs, and asks for each inode's: only if there are any.
        let acl = if self.has_acls { InitFlags::FUSE_POSIX_ACL } else { InitFlags::empty() };
        FLAGS.union(acl)
    }

    fn block_size(&self) -> u32 {
        4096
    }

    fn inodes(&self) -> u64 {
        self.view.len() as u64
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        self.inode(ino).map(|(number, inode)| attr(number, inode))
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<FileAttr, Errno> {
        let (dir, inode) = self.inode(dir).ok_or(Errno::ENOENT)?;
        if inode.kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        Ok(match self.view.lookup(dir, name) {
            Some(child) => attr(child, self.view.inode(child)),
            // There is none, and that may be remembered.
            None => FileAttr { ino: INodeNo(0), ..attr(dir, inode) },
        })
    }

    fn entry(&self, dir: u64, i: usize) -> Option<(&[u8], u64, FileType)> {
        let (dir, _) = self.inode(dir)?;
        let (name, child): (&[u8], Ino) = match i {
            0 => (b".", dir),
            1 => (b"..", self.view.parent(dir)),
            _ => self.view.children(dir).get(i - 2)?,
        };
        Some((name, u64::from(child) + 1, file_type(self.view.inode(child).kind)))
    }

    fn target(&self, ino: u64) -> Option<&[u8]> {
        let (_, inode) = self.inode(ino)?;
        (inode.kind == Kind::Symlink).then_some(&inode.target)
    }

    fn xattr(&self, ino: u64, name: &[u8]) -> Result<&[u8], Errno> {
        let found = self.xattrs_of(ino)?.xattrs.iter().find(|x| *escaped(&x.name) == *name);
        found.map(|xattr| &*xattr.value).ok_or(Errno::NO_XATTR)
    }

    fn xattr_names(&self, ino: u64) -> Result<Vec<u8>, Errno> {
        let mut list = Vec::new();
        for xattr in &self.xattrs_of(ino)?.xattrs {
            list.extend_from_slice(&escaped(&xattr.name));
            list.push(0);
        }
        Ok(list)
    }

    fn read(&self, ino: u64, offset: u64, size: u32, reply: Answer) {
        match self.inode(ino) {
            Some((_, inode)) if inode.kind == Kind::File => self.read_file(inode, offset, size, reply),
            _ => Box::new(reply).error(libc::EIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(layer: u16, file_offset: u64, layer_offset: u64, len: u64) -> LayerExtent {
        LayerExtent { layer, file_offset, layer_offset, len }
    }

    fn piece(layer: u16, layer_offset: u64, at: u32, len: u32) -> Piece {
        Piece { layer, layer_offset, at, len }
    }

    #[test]
    fn a_read_is_cut_at_extents_and_holes() {
        let extents = [extent(0, 100, 5000, 50), extent(0, 150, 9000, 10), extent(3, 1000, 512, 100)];
        assert_eq!(pieces(&extents, 0, 100), []);
        assert_eq!(pieces(&extents, 120, 10), [piece(0, 5020, 0, 10)]);
        let all = [piece(0, 5000, 100, 50), piece(0, 9000, 150, 10), piece(3, 512, 1000, 100)];
        assert_eq!(pieces(&extents, 0, 4096), all);
        assert_eq!(pieces(&extents, 149, 2), [piece(0, 5049, 0, 1), piece(0, 9000, 1, 1)]);
        assert_eq!(pieces(&extents, 160, 840), []);
        assert_eq!(pieces(&extents, 1099, 4096), [piece(3, 611, 0, 1)]);
        assert_eq!(pieces(&extents, 1100, 4096), []);
    }

    #[test]
    fn extents_that_lie_are_no_panic() {
        let extents = [extent(0, u64::MAX - 1, u64::MAX - 1, u64::MAX)];
        assert_eq!(pieces(&extents, u64::MAX - 10, 4096).len(), 1);
        assert_eq!(pieces(&extents, 0, 4096), []);
    }

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = system_time(Timestamp { secs: -2, nanos: 999_999_999 });
        assert_eq!(UNIX_EPOCH.duration_since(time).unwrap(), Duration::new(1, 1));
        assert!(system_time(Timestamp { secs: i64::MIN, nanos: 0 }) <= UNIX_EPOCH);
    }

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        assert_eq!(encode_device((1, 3)), 0x103);
        assert_eq!(encode_device((259, 70_000)), (70_000 & 0xff) | (259 << 8) | ((70_000 & !0xff) << 12));
    }
}
