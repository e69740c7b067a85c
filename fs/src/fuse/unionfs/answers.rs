//! What several requests share: who asks, finding nodes, and the shapes of answers.

use std::ffi::{CString, OsStr};
use std::sync::Arc;

use fuser::{Generation, INodeNo, ReplyEmpty, ReplyEntry, Request};
use nix::errno::Errno;

use super::UnionFs;
use super::convert::{entry, errno, name};
use crate::union::{Attr, Caller, EXTENDED_FLAGS, New, Node, OpenFile, Result};

/// Inode numbers are never used again, so one generation is enough.
pub(super) const GENERATION: Generation = Generation(0);

/// `FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS` and `FS_IOC_FSGETXATTR` of `linux/fs.h`.
const GET_FLAGS: u32 = nix::request_code_read!(b'f', 1, size_of::<libc::c_long>()) as u32;
const SET_FLAGS: u32 = nix::request_code_write!(b'f', 2, size_of::<libc::c_long>()) as u32;
const GET_EXTENDED_FLAGS: u32 = nix::request_code_read!(b'X', 31, EXTENDED_FLAGS) as u32;

pub(super) fn caller(req: &Request) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), pid: req.pid() }
}

impl UnionFs {
    pub(super) fn node(&self, ino: INodeNo) -> Result<Arc<Node>> {
        self.union.node(ino.0)
    }

    pub(super) fn answer_entry(&self, result: Result<Attr>, reply: ReplyEntry) {
        match result {
            Ok(a) => {
                let (out, ttl) = entry(&a, self.ttl);
                reply.entry_with_ttls(&ttl, &self.ttl, &out, GENERATION);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    pub(super) fn make(
        &self,
        req: &Request,
        parent: INodeNo,
        file: &OsStr,
        new: New<'_>,
        modes: (u32, u32),
        reply: ReplyEntry,
    ) {
        let made = self
            .node(parent)
            .and_then(|parent| Ok(self.union.make(&parent, &name(file)?, new, modes, caller(req))?.1));
        self.answer_entry(made, reply);
    }

    /// What ioctl(2) answers: those for inode flags do something.
    pub(super) fn control(
        &self,
        node: &Arc<Node>,
        command: u32,
        data: &[u8],
        caller: Caller,
    ) -> Result<Vec<u8>> {
        match command {
            GET_FLAGS => Ok(self.union.flags(node)?.to_ne_bytes().to_vec()),
            GET_EXTENDED_FLAGS => Ok(self.union.extended_flags(node)?.to_vec()),
            SET_FLAGS => {
                let flags = data.first_chunk().ok_or(Errno::EINVAL)?;
                self.union.set_flags(node, u32::from_ne_bytes(*flags), caller)?;
                Ok(Vec::new())
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    /// Whether the kernel may do reads and writes itself.
    pub(super) fn wants_passthrough(file: &OpenFile, mode: u32) -> bool {
        file.is_upper() && mode & 0o6000 == 0
    }

    pub(super) fn open_or_create(
        &self,
        parent: &Arc<Node>,
        file: &CString,
        modes: (u32, u32),
        flags: i32,
        caller: Caller,
    ) -> Result<(Arc<Node>, Attr, OpenFile)> {
        match self.union.create(parent, file, modes, flags, caller) {
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                let (node, attr) = self.union.lookup(parent, file)?.ok_or(Errno::ENOENT)?;
                match self.union.open_file(&node, flags, caller) {
                    Ok(open) => Ok((node, attr, open)),
                    Err(e) => {
                        self.union.forget([(node.id(), 1)]);
                        Err(e)
                    }
                }
            }
            other => other,
        }
    }
}

pub(super) fn answer(result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}
