//! What the two servers have in common: a read-only tree that never changes, told to the kernel.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use super::content::Answer;
use super::relay::{MAX_ENTRIES, Relay};
use super::session::configure;
use super::stats::{Requests, count};
use super::{FOREVER, MAX_READ};

/// What every server asks for: reads in parallel, no open or opendir upcalls, requests resent on takeover.
const FLAGS: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_EXPLICIT_INVAL_DATA)
    .union(InitFlags::FUSE_HAS_RESEND);

/// A tree that [`serve`](super::serve) can serve: one of this module's servers. Inodes are the kernel's numbers,
/// the root is 1; nothing that was told once may change.
pub trait Server: Send + Sync + 'static {
    /// The counters to count requests in.
    fn requests(&self) -> &Arc<Requests>;
    /// Capabilities to ask for beside those that every server needs.
    fn flags(&self) -> InitFlags {
        InitFlags::empty()
    }
    /// Block size told by statfs.
    fn block_size(&self) -> u32;
    /// Number of inodes told by statfs.
    fn inodes(&self) -> u64 {
        0
    }
    /// The attributes of an inode, if there is such.
    fn attr(&self, ino: u64) -> Option<FileAttr>;
    /// What a name in a directory is. Attributes with inode number 0 say that there is no such name and never
    /// will be; an error is asked again.
    fn lookup(&self, dir: u64, name: &[u8]) -> Result<FileAttr, Errno>;
    /// Entry `i` of a directory that exists (`.` and `..` first): name, inode and kind.
    fn entry(&self, dir: u64, i: usize) -> Option<(&[u8], u64, FileType)>;
    /// A symbolic link's target.
    fn target(&self, _ino: u64) -> Option<&[u8]> {
        None
    }
    /// Value of an extended attribute. ENOSYS: there are none in the whole tree.
    fn xattr(&self, _ino: u64, _name: &[u8]) -> Result<&[u8], Errno> {
        Err(Errno::ENOSYS)
    }
    /// Names of an inode's extended attributes, each ended by NUL. ENOSYS: there are none in the whole tree.
    fn xattr_names(&self, _ino: u64) -> Result<Vec<u8>, Errno> {
        Err(Errno::ENOSYS)
    }
    /// Answers a READ of at most `size` bytes, now or later.
    fn read(&self, ino: u64, offset: u64, size: u32, reply: Answer);
}

/// What is known of a connection once its session stands.
#[derive(Debug, Default)]
pub(super) struct Negotiated {
    resends: AtomicBool,
    relay: OnceLock<Arc<Relay>>,
}

impl Negotiated {
    /// Whether the kernel said that it can resend requests.
    pub(super) fn kernel_resends(&self) -> bool {
        self.resends.load(Ordering::Relaxed)
    }

    /// From now on everything goes through this relay.
    pub(super) fn relay_by(&self, relay: Arc<Relay>) {
        let _ = self.relay.set(relay);
    }

    pub(super) fn relay(&self) -> Option<&Arc<Relay>> {
        self.relay.get()
    }
}

/// A [`Server`] as fuser wants it.
pub(super) struct ReadOnly<S> {
    server: S,
    negotiated: Arc<Negotiated>,
}

impl<S: Server> Filesystem for ReadOnly<S> {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let resends = config.capabilities().contains(InitFlags::FUSE_HAS_RESEND);
        self.negotiated.resends.store(resends, Ordering::Relaxed);
        configure(config, FLAGS.union(self.server.flags()));
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        count(&self.server.requests().lookup);
        match self.server.lookup(parent.0, name.as_bytes()) {
            Ok(attr) => reply.entry(&FOREVER, &attr, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {}

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        count(&self.server.requests().getattr);
        match self.server.attr(ino.0) {
            Some(attr) => reply.attr(&FOREVER, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        count(&self.server.requests().readlink);
        match self.server.target(ino.0) {
            Some(target) => reply.data(target),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        count(&self.server.requests().open);
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        count(&self.server.requests().open);
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock: Option<LockOwner>,
        reply: ReplyData,
    ) {
        count(&self.server.requests().read);
        self.server.read(
            ino.0,
            offset,
            size.min(MAX_READ),
            Answer::new(reply, req.unique(), self.negotiated.relay()),
        );
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed =
            self.list(ino.0, offset, |name, child, kind, next| reply.add(INodeNo(child), next, kind, name));
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.list(ino.0, offset, |name, child, _, next| {
            let Some(attr) = self.server.attr(child) else { return false };
            reply.add(attr.ino, next, name, &FOREVER, &attr, Generation(0))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        count(&self.server.requests().other);
        let block = self.server.block_size();
        reply.statfs(0, 0, 0, self.server.inodes(), 0, block, 255, block);
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock: LockOwner, reply: ReplyEmpty) {
        count(&self.server.requests().other);
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        count(&self.server.requests().xattr);
        answer_xattr(&self.server.xattr(ino.0, name.as_bytes()), size, reply);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        count(&self.server.requests().xattr);
        answer_xattr(&self.server.xattr_names(ino.0), size, reply);
    }
}

impl<S: Server> ReadOnly<S> {
    pub(super) fn new(server: S, negotiated: Arc<Negotiated>) -> Self {
        Self { server, negotiated }
    }

    /// Calls `add` with the entries of a directory from number `offset` on (name, inode, kind, number of the
    /// next) until it says that there is no more room.
    fn list(
        &self,
        dir: u64,
        offset: u64,
        mut add: impl FnMut(&OsStr, u64, FileType, u64) -> bool,
    ) -> Result<(), Errno> {
        count(&self.server.requests().readdir);
        if self.server.attr(dir).is_none() {
            return Err(Errno::ENOENT);
        }
        let mut next = usize::try_from(offset).unwrap_or(usize::MAX);
        let end =
            next.saturating_add(if self.negotiated.relay().is_some() { MAX_ENTRIES } else { usize::MAX });
        while next < end
            && let Some((name, child, kind)) = self.server.entry(dir, next)
        {
            next += 1;
            if add(OsStr::from_bytes(name), child, kind, next as u64) {
                break;
            }
        }
        Ok(())
    }
}

/// A size of 0 asks how much there is.
fn answer_xattr(value: &Result<impl AsRef<[u8]>, Errno>, size: u32, reply: ReplyXattr) {
    let value = match value {
        Ok(value) => value.as_ref(),
        Err(errno) => return reply.error(*errno),
    };
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}
