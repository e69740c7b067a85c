//! What is written to a connection beside a session of fuser's: answers that it need not see, notifications, and the
//! INIT that it wants to have.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;

use zerocopy::{FromBytes, IntoBytes};

use super::protocol::abi::{InHeader, InitIn, NotifyInvalInodeOut, OutHeader, opcode};

/// `FUSE_NOTIFY_INVAL_INODE`: forget cached contents of a file.
const NOTIFY_INVAL_INODE: i32 = 2;
/// `FUSE_NOTIFY_RESEND` (Linux 6.9): hand out again what was read and never answered.
const NOTIFY_RESEND: i32 = 7;

/// The header of an answer; `None` for what is too short to have one.
pub(super) fn answer_header(answer: &[u8]) -> Option<OutHeader> {
    OutHeader::read_from_prefix(answer).ok().map(|(header, _)| header)
}

/// Answers a request: with these bytes, or with an errno if it is not 0. That the kernel has no such request any more
/// is no error: it was answered by somebody else, or whoever asked is gone.
pub(super) fn answer(dev: impl AsFd, unique: u64, errno: i32, bytes: &[u8]) -> io::Result<()> {
    let bytes = if errno == 0 { bytes } else { &[] };
    write(dev, -errno, unique, bytes)
}

/// Asks for the requests that were read and not answered. EINVAL: the kernel cannot.
pub(super) fn ask_to_resend(dev: impl AsFd) -> io::Result<()> {
    write(dev, NOTIFY_RESEND, 0, &[])
}

/// Has the kernel behind a `/dev/fuse` descriptor forget the cached contents of a file, if it knows it. Waits for reads of
/// the file that are under way: a process whose threads answer them must leave it to another
/// ([`Mounter::invalidate`](crate::mounter::Mounter::invalidate)), or it can't end while they wait, even when killed.
///
/// # Errors
/// The kernel's; that it does not know the file is none.
pub fn invalidate(dev: impl AsFd, ino: u64) -> io::Result<()> {
    // To the end.
    let whole = NotifyInvalInodeOut { ino, off: 0, len: 0 };
    write(dev, NOTIFY_INVAL_INODE, 0, whole.as_bytes())
}

fn write(dev: impl AsFd, error: i32, unique: u64, body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(size_of::<OutHeader>() + body.len()).map_err(io::Error::other)?;
    let header = OutHeader { len, error, unique };
    match nix::sys::uio::writev(dev, &[IoSlice::new(header.as_bytes()), IoSlice::new(body)]) {
        Ok(_) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// An INIT request that offers everything.
pub(super) fn init_request() -> Vec<u8> {
    let len = (size_of::<InHeader>() + size_of::<InitIn>()) as u32;
    let header = InHeader { len, opcode: opcode::INIT, unique: 2, ..InHeader::default() };
    let (flags, flags2) = (u32::MAX, u32::MAX >> 1);
    let init = InitIn { major: 7, minor: 40, max_readahead: 128 * 1024, flags, flags2, ..InitIn::default() };
    [header.as_bytes(), init.as_bytes()].concat()
}
