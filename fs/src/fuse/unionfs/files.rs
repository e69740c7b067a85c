//! Requests about files that are open, or are being opened.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::UnionFs;
use super::requests::caller;
use crate::fuse::MAX_READ;
use crate::fuse::protocol::abi::{
    CopyFileRangeIn, CreateIn, FOPEN_KEEP_CACHE, FOPEN_PASSTHROUGH, InHeader, LseekIn, OpenIn, OpenOut,
    ReadIn, SetattrIn, WRITE_KILL_SUIDGID, WriteIn, WriteOut, fattr,
};
use crate::fuse::protocol::{Answer, Backing};
use crate::union::{Attr, Caller, Node, OpenFile, Result};

impl UnionFs {
    pub(super) fn open(&self, header: &InHeader, open: &OpenIn, answer: &mut Answer) -> Result<()> {
        let node = self.node(header.nodeid)?;
        let file = self.union.open_file(&node, open.flags.cast_signed(), caller(header))?;
        let mode = || self.union.attr(&node).map_or(0o6000, |attr| attr.stat.st_mode);
        answer.put(&self.opened(file, mode));
        Ok(())
    }

    pub(super) fn create(
        &self,
        header: &InHeader,
        create: &CreateIn,
        name: &CStr,
        answer: &mut Answer,
    ) -> Result<()> {
        let parent = self.node(header.nodeid)?;
        let made = self.open_or_create(&parent, name, create, caller(header))?;
        self.created(made, answer);
        Ok(())
    }

    pub(super) fn tmpfile(&self, header: &InHeader, create: &CreateIn, answer: &mut Answer) -> Result<()> {
        let parent = self.node(header.nodeid)?;
        let flags = create.flags.cast_signed();
        let made = self.union.create_nameless(&parent, modes(create), flags, caller(header))?;
        self.created(made, answer);
        Ok(())
    }

    fn open_or_create(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        create: &CreateIn,
        caller: Caller,
    ) -> Result<(Arc<Node>, Attr, OpenFile)> {
        let flags = create.flags.cast_signed();
        match self.union.create(parent, name, modes(create), flags, caller) {
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                let (node, attr) = self.union.lookup(parent, name)?.ok_or(Errno::ENOENT)?;
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

    fn created(&self, (_, attr, file): (Arc<Node>, Attr, OpenFile), answer: &mut Answer) {
        let open = self.opened(file, || attr.stat.st_mode);
        self.name(&attr, answer);
        answer.put(&open);
    }

    /// Gives a file that was opened a number, and the kernel the file itself if it may read and write it.
    fn opened(&self, file: OpenFile, mode: impl FnOnce() -> u32) -> OpenOut {
        let wanted = || file.is_upper() && mode() & 0o6000 == 0;
        let register = || Backing::open(&self.dev, file.fd().map_err(io::Error::from)?);
        let backing = self.passthrough.open(file.node.id(), wanted, register);
        let fh = self.files.insert(file);
        match backing {
            Some(backing) => OpenOut { fh, open_flags: FOPEN_PASSTHROUGH, backing_id: backing.id() },
            None => OpenOut { fh, open_flags: FOPEN_KEEP_CACHE, backing_id: 0 },
        }
    }

    pub(super) fn release(&self, id: u64, fh: u64) {
        self.passthrough.close(id);
        drop(self.files.remove(fh));
    }

    /// The open file that SETATTR was asked through.
    pub(super) fn file_of(&self, set: &SetattrIn) -> Option<Arc<OpenFile>> {
        if set.valid & fattr::FH == 0 {
            return None;
        }
        self.files.get(set.fh).ok()
    }

    pub(super) fn read(&self, read: &ReadIn, answer: &mut Answer) -> Result<()> {
        let file = self.files.get(read.fh)?;
        let room = answer.room(read.size.min(MAX_READ) as usize);
        let n = file.read(room, read.offset)?;
        answer.fill(n);
        Ok(())
    }

    pub(super) fn write(
        &self,
        header: &InHeader,
        write: &WriteIn,
        data: &[u8],
        answer: &mut Answer,
    ) -> Result<()> {
        let kill = (write.write_flags & WRITE_KILL_SUIDGID != 0).then(|| caller(header));
        let n = self.files.get(write.fh)?.write(data, write.offset, kill)?;
        answer.put(&written(n));
        Ok(())
    }

    pub(super) fn seek(&self, seek: &LseekIn, answer: &mut Answer) -> Result<()> {
        let file = self.files.get(seek.fh)?;
        let at = file.seek(seek.offset.cast_signed(), seek.whence.cast_signed())?;
        answer.put(&at);
        Ok(())
    }

    pub(super) fn copy_range(&self, copy: &CopyFileRangeIn, answer: &mut Answer) -> Result<()> {
        let (from, to) = (self.files.get(copy.fh_in)?, self.files.get(copy.fh_out)?);
        let n = from.copy_to(copy.off_in, &to, copy.off_out, copy.len)?;
        answer.put(&written(n));
        Ok(())
    }
}

fn modes(create: &CreateIn) -> (u32, u32) {
    (create.mode & 0o7777, create.umask)
}

fn written(n: usize) -> WriteOut {
    WriteOut { size: u32::try_from(n).unwrap_or(u32::MAX), padding: 0 }
}
