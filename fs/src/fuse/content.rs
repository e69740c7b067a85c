//! What a FUSE server needs of whoever has the bytes.

use std::sync::Arc;

use fuser::{Errno, ReplyData, RequestId};

use super::relay::Relay;

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

/// The answer to a READ: by fuser, or straight to the kernel where fuser's answers would be copied on their way.
#[derive(Debug)]
pub struct Answer {
    reply: ReplyData,
    direct: Option<(Arc<Relay>, u64)>,
}

impl Answer {
    pub(super) fn new(reply: ReplyData, unique: RequestId, relay: Option<&Arc<Relay>>) -> Self {
        Self { reply, direct: relay.map(|relay| (Arc::clone(relay), unique.0)) }
    }

    fn give(self, errno: i32, bytes: &[u8]) {
        match self.direct {
            Some((relay, unique)) => {
                relay.answer(unique, errno, bytes);
                // fuser must say something too: the relay drops it, unless the kernel refused what was said here.
                self.reply.error(Errno::EIO);
            }
            None if errno != 0 => self.reply.error(Errno::from_i32(errno)),
            None => self.reply.data(bytes),
        }
    }
}

impl ReadReply for Answer {
    fn data(self: Box<Self>, bytes: &[u8]) {
        self.give(0, bytes);
    }

    fn error(self: Box<Self>, errno: i32) {
        self.give(errno.max(1), &[]);
    }
}
