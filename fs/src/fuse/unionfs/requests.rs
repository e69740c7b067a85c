//! Which request is answered where, and those about names and attributes.

use std::ffi::CStr;
use std::sync::Arc;

use nix::errno::Errno;

use super::UnionFs;
use super::convert::{attr_out, entry_out, nothing, set_attr, statfs};
use crate::fuse::protocol::abi::{FSYNC_FDATASYNC, InHeader, IoctlIn, IoctlOut, SetattrIn, XattrSize};
use crate::fuse::protocol::{Answer, Operation, Request, Serve};
use crate::union::{Attr, Caller, EXTENDED_FLAGS, New, Node, Result};

/// `FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS` and `FS_IOC_FSGETXATTR` of `linux/fs.h`.
const GET_FLAGS: u32 = nix::request_code_read!(b'f', 1, size_of::<libc::c_long>()) as u32;
const SET_FLAGS: u32 = nix::request_code_write!(b'f', 2, size_of::<libc::c_long>()) as u32;
const GET_EXTENDED_FLAGS: u32 = nix::request_code_read!(b'X', 31, EXTENDED_FLAGS) as u32;
/// Linux bounds values and lists of attributes.
const MAX_XATTR: usize = 64 << 10;

impl Serve for UnionFs {
    fn answer(&self, request: &Request<'_>, answer: &mut Answer) -> Result<()> {
        self.admit(request)?;
        let (header, id) = (&request.header, request.header.nodeid);
        match &request.operation {
            Operation::Lookup(name) => self.lookup(id, name, answer),
            Operation::Getattr => self.tell(&self.union.attr(&*self.node(id)?)?, answer),
            Operation::Setattr(set) => self.set_attr(header, set, answer),
            Operation::Readlink => {
                answer.put_bytes(&self.union.read_link(&*self.node(id)?)?);
                Ok(())
            }
            Operation::Symlink { name, target } => {
                self.make(header, name, New::Symlink(target), (0o777, 0), answer)
            }
            Operation::Mknod(of, name) => {
                let new = New::Special(of.mode & libc::S_IFMT, u64::from(of.rdev));
                self.make(header, name, new, (of.mode & 0o7777, of.umask), answer)
            }
            Operation::Mkdir(of, name) => {
                self.make(header, name, New::Directory, (of.mode & 0o7777, of.umask), answer)
            }
            Operation::Unlink(name) => self.union.unlink(&self.node(id)?, name),
            Operation::Rmdir(name) => self.union.rmdir(&self.node(id)?, name),
            Operation::Rename { newdir, flags, old, new } => {
                self.union.rename((&self.node(id)?, old), (&self.node(*newdir)?, new), *flags)
            }
            Operation::Link { old, name } => {
                let attr = self.union.link(&self.node(*old)?, &self.node(id)?, name)?;
                self.name(&attr, answer);
                Ok(())
            }
            Operation::Open(open) => self.open(header, open, answer),
            Operation::Create(create, name) => self.create(header, create, name, answer),
            Operation::Tmpfile(create) => self.tmpfile(header, create, answer),
            Operation::Read(read) => self.read(read, answer),
            Operation::Write(write, data) => self.write(header, write, data, answer),
            Operation::Release(release) => {
                self.release(id, release.fh);
                Ok(())
            }
            Operation::Fsync(of) => {
                let data_only = of.fsync_flags & FSYNC_FDATASYNC != 0;
                self.union.sync_file(&*self.files.get(of.fh)?, data_only)
            }
            Operation::Fallocate(of) => {
                self.files.get(of.fh)?.allocate(of.mode.cast_signed(), of.offset, of.length)
            }
            Operation::Lseek(of) => self.seek(of, answer),
            Operation::CopyFileRange(of) => self.copy_range(of, answer),
            Operation::Opendir => self.open_dir(id, answer),
            Operation::Readdir(read) => self.read_dir(read, answer),
            Operation::Readdirplus(read) => self.read_dir_plus(read, answer),
            Operation::Releasedir(release) => {
                drop(self.dirs.remove(release.fh));
                Ok(())
            }
            Operation::Fsyncdir => self.union.sync_dir(&*self.node(id)?),
            Operation::Statfs => {
                answer.put(&statfs(&self.union.statfs()?));
                Ok(())
            }
            Operation::Setxattr { flags, name, value } => {
                self.union.set_xattr(&self.node(id)?, name, value, flags.cast_signed())
            }
            Operation::Getxattr { size, name } => self.get_xattr(id, *size, name, answer),
            Operation::Listxattr { size } => self.list_xattr(id, *size, answer),
            Operation::Removexattr(name) => self.union.remove_xattr(&self.node(id)?, name),
            Operation::Ioctl(of, data) => self.ioctl(header, of, data, answer),
            Operation::Destroy => Ok(()),
            // The kernel goes on without. FLUSH too: nothing is held back.
            Operation::Forget(_) | Operation::BatchForget(_) | Operation::Interrupt | Operation::Other => {
                Err(Errno::ENOSYS)
            }
        }
    }

    fn forget(&self, nodes: &mut dyn Iterator<Item = (u64, u64)>) {
        self.union.forget(nodes);
    }
}

impl UnionFs {
    pub(super) fn node(&self, id: u64) -> Result<Arc<Node>> {
        self.union.node(id)
    }

    /// Adds the node that a name leads to.
    pub(super) fn name(&self, attr: &Attr, answer: &mut Answer) {
        answer.put(&entry_out(attr, self.ttl));
    }

    fn tell(&self, attr: &Attr, answer: &mut Answer) -> Result<()> {
        answer.put(&attr_out(attr, self.ttl));
        Ok(())
    }

    fn lookup(&self, parent: u64, name: &CStr, answer: &mut Answer) -> Result<()> {
        match self.union.lookup(&self.node(parent)?, name)? {
            None => answer.put(&nothing(self.ttl)),
            Some((_, attr)) => self.name(&attr, answer),
        }
        Ok(())
    }

    fn set_attr(&self, header: &InHeader, set: &SetattrIn, answer: &mut Answer) -> Result<()> {
        let node = self.node(header.nodeid)?;
        let file = self.file_of(set);
        let attr = self.union.set_attr(&node, &set_attr(set), file.as_deref(), caller(header))?;
        self.tell(&attr, answer)
    }

    fn make(
        &self,
        header: &InHeader,
        name: &CStr,
        new: New<'_>,
        modes: (u32, u32),
        answer: &mut Answer,
    ) -> Result<()> {
        let (_, attr) = self.union.make(&self.node(header.nodeid)?, name, new, modes, caller(header))?;
        self.name(&attr, answer);
        Ok(())
    }

    fn get_xattr(&self, id: u64, size: u32, name: &CStr, answer: &mut Answer) -> Result<()> {
        let node = self.node(id)?;
        let room = answer.room((size as usize).min(MAX_XATTR));
        let n = self.union.get_xattr(&node, name, room)?;
        if size == 0 {
            answer.put(&xattr_size(n));
        } else {
            answer.fill(n);
        }
        Ok(())
    }

    fn list_xattr(&self, id: u64, size: u32, answer: &mut Answer) -> Result<()> {
        let list = self.union.list_xattr(&*self.node(id)?)?;
        match size {
            0 => answer.put(&xattr_size(list.len())),
            _ if list.len() <= size as usize => answer.put_bytes(&list),
            _ => return Err(Errno::ERANGE),
        }
        Ok(())
    }

    fn ioctl(&self, header: &InHeader, of: &IoctlIn, data: &[u8], answer: &mut Answer) -> Result<()> {
        let out = self.control(&self.node(header.nodeid)?, of.cmd, data, caller(header))?;
        answer.put(&IoctlOut::default());
        // The kernel takes no more than it has room for.
        answer.put_bytes(&out[..out.len().min(of.out_size as usize)]);
        Ok(())
    }

    /// What ioctl(2) answers: those for inode flags do something.
    fn control(&self, node: &Arc<Node>, command: u32, data: &[u8], caller: Caller) -> Result<Vec<u8>> {
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

    /// The option `allow_root` is not the kernel's: to it, everybody may ask.
    fn admit(&self, request: &Request<'_>) -> Result<()> {
        let Some(owner) = self.only else { return Ok(()) };
        let uid = request.header.uid;
        // What the kernel asks by itself, or of what is open.
        let harmless = matches!(
            request.operation,
            Operation::Destroy
                | Operation::Read(_)
                | Operation::Write(..)
                | Operation::Readdir(_)
                | Operation::Readdirplus(_)
                | Operation::Fsync(_)
                | Operation::Fsyncdir
                | Operation::Release(_)
                | Operation::Releasedir(_)
        );
        if uid == 0 || uid == owner || harmless { Ok(()) } else { Err(Errno::EACCES) }
    }
}

pub(super) fn caller(header: &InHeader) -> Caller {
    Caller { uid: header.uid, gid: header.gid, pid: header.pid }
}

/// The answer to who asks only for the size.
fn xattr_size(len: usize) -> XattrSize {
    XattrSize { size: u32::try_from(len).unwrap_or(u32::MAX), padding: 0 }
}
