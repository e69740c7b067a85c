//! What a FUSE server needs of whoever has the bytes.

use fuser::{Errno, ReplyData};

/// The layer files a server shows: names, sizes, bytes.
pub trait LayerFiles: Send + Sync + 'static {
    /// Inode number of the layer file with this name, at least 2. It is derived from the name, so that a
    /// server that takes over after a crash knows the numbers the kernel holds.
    fn by_name(&self, name: &[u8]) -> Option<u64>;
    /// Size of a layer file in bytes; it never changes once known.
    fn size(&self, ino: u64) -> Option<u64>;
    /// Reads `len` bytes at `offset` and answers `reply`, now or later, from any thread. Must not block.
    /// The range lies within the file. Fewer bytes than asked become EIO: the kernel would read zeros.
    fn read(&self, ino: u64, offset: u64, len: u32, reply: Box<dyn ReadReply>);
}

/// Where the bytes of one read go. Dropping it unanswered answers EIO.
pub trait ReadReply: Send {
    /// Hands over the bytes.
    fn data(self: Box<Self>, bytes: &[u8]);
    /// Refuses with an errno.
    fn error(self: Box<Self>, errno: i32);
}

impl ReadReply for ReplyData {
    fn data(self: Box<Self>, bytes: &[u8]) {
        ReplyData::data(*self, bytes);
    }

    fn error(self: Box<Self>, errno: i32) {
        ReplyData::error(*self, Errno::from_i32(errno));
    }
}
