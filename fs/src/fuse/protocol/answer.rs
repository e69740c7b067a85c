//! Answers as the kernel reads them.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::abi::OutHeader;

const HEADER: usize = size_of::<OutHeader>();

/// What a request is answered with if it succeeds; used again for the next one.
#[derive(Debug)]
pub(in crate::fuse) struct Answer {
    /// A header, then what is in `used`, then room.
    bytes: Vec<u8>,
    used: usize,
}

impl Default for Answer {
    fn default() -> Self {
        Self { bytes: vec![0; HEADER + 4096], used: HEADER }
    }
}

impl Answer {
    /// Takes back what was put into it.
    pub(super) fn clear(&mut self) {
        self.used = HEADER;
    }

    /// Bytes so far.
    pub(in crate::fuse) fn len(&self) -> usize {
        self.used - HEADER
    }

    /// Adds a record.
    pub(in crate::fuse) fn put(&mut self, record: &(impl IntoBytes + Immutable)) {
        self.put_bytes(record.as_bytes());
    }

    /// Adds bytes.
    pub(in crate::fuse) fn put_bytes(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.used += bytes.len();
    }

    /// Room for the next `len` bytes, holding anything.
    pub(in crate::fuse) fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.used + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.used..end]
    }

    /// Adds the first `len` bytes of the room that was asked for.
    pub(in crate::fuse) fn fill(&mut self, len: usize) {
        self.used = (self.used + len).min(self.bytes.len());
    }

    /// Answers the request `unique`.
    pub(super) fn send(&mut self, dev: &OwnedFd, unique: u64, result: Result<(), Errno>) -> io::Result<()> {
        let (error, used) = match result {
            Ok(()) => (0, self.used),
            Err(e) => (-(e as i32), HEADER),
        };
        let len = u32::try_from(used).map_err(io::Error::other)?;
        self.bytes[..HEADER].copy_from_slice(OutHeader { len, error, unique }.as_bytes());
        nix::unistd::write(dev, &self.bytes[..used])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn answers_are_a_header_and_what_was_put() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut reader = std::fs::File::from(reader);
        let mut answer = Answer::default();
        let mut sent = |answer: &mut Answer, result| {
            answer.send(&writer, 7, result).unwrap();
            let mut bytes = vec![0; 64];
            let n = reader.read(&mut bytes).unwrap();
            bytes.truncate(n);
            bytes
        };
        answer.put(&3u64);
        answer.room(100)[..2].copy_from_slice(b"ab");
        answer.fill(2);
        assert_eq!(answer.len(), 10);
        let whole = OutHeader { len: 26, error: 0, unique: 7 };
        assert_eq!(sent(&mut answer, Ok(())), [whole.as_bytes(), 3u64.as_bytes(), b"ab"].concat());
        let failed = OutHeader { len: 16, error: -libc::ENOENT, unique: 7 };
        assert_eq!(sent(&mut answer, Err(Errno::ENOENT)), failed.as_bytes());
        answer.clear();
        assert_eq!(sent(&mut answer, Ok(())), OutHeader { len: 16, error: 0, unique: 7 }.as_bytes());
    }
}
