//! The few messages of the kernel's fuse.h that are read and written here and not by fuser.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;

/// Bytes of `fuse_in_header`.
pub(super) const IN_HEADER: usize = 40;
/// `FUSE_INIT`.
const OP_INIT: u32 = 26;
/// `FUSE_NOTIFY_INVAL_INODE`: forget cached contents of a file.
const NOTIFY_INVAL_INODE: i32 = 2;
/// `FUSE_NOTIFY_RESEND` (Linux 6.9): hand out again what was read and never answered.
const NOTIFY_RESEND: i32 = 7;
/// `FUSE_FORGET`, `FUSE_INTERRUPT`, `FUSE_BATCH_FORGET`: nobody waits for an answer.
const WITHOUT_ANSWER: [u32; 3] = [2, 36, 42];

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RequestHeader {
    /// Bytes of the whole request.
    pub(super) len: u32,
    pub(super) opcode: u32,
    pub(super) unique: u64,
}

impl RequestHeader {
    /// `None` for what is too short to have one.
    pub(super) fn parse(request: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(request.get(at..at + 4)?.try_into().ok()?));
        let unique = u64::from_ne_bytes(request.get(8..16)?.try_into().ok()?);
        Some(Self { len: word(0)?, opcode: word(4)?, unique })
    }

    pub(super) fn wants_answer(self) -> bool {
        !WITHOUT_ANSWER.contains(&self.opcode)
    }
}

/// The request that an answer is for.
pub(super) fn answered_by(answer: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(answer.get(8..16)?.try_into().ok()?))
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

/// Has the kernel forget the cached contents of a file, if it knows it.
pub(super) fn invalidate(dev: impl AsFd, ino: u64) -> io::Result<()> {
    // fuse_notify_inval_inode_out: inode, offset, length (none: to the end).
    let mut body = [0; 24];
    body[..8].copy_from_slice(&ino.to_ne_bytes());
    write(dev, NOTIFY_INVAL_INODE, 0, &body)
}

fn write(dev: impl AsFd, error: i32, unique: u64, body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
    let mut header = [0; 16];
    header[..4].copy_from_slice(&len.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    match nix::sys::uio::writev(dev, &[IoSlice::new(&header), IoSlice::new(body)]) {
        Ok(_) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// A FUSE_INIT request that offers everything: fuse_in_header, fuse_init_in (64 bytes).
pub(super) fn init_request() -> [u8; IN_HEADER + 64] {
    let mut req = [0; IN_HEADER + 64];
    let mut put = |at: usize, value: u32| req[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    put(0, (IN_HEADER + 64) as u32);
    put(4, OP_INIT);
    put(8, 2);
    put(40, 7);
    put(44, 40);
    put(48, 128 * 1024);
    put(52, u32::MAX);
    put(56, u32::MAX >> 1);
    req
}
