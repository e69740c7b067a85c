//! Where streamed layers go: a file with holes for zeros, on a disk that is never filled to its end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use lazyrun_index::{Digest, LayerSink, SpanInfo};
use nix::sys::statvfs::fstatvfs;

use crate::error::FetchError;

/// Decoded bytes gathered for one write.
const WRITE_SIZE: usize = 1 << 20;
/// Zeros in a row that are left out of the file, in bytes.
const HOLE: usize = 64 << 10;
/// Bytes written between two looks at the disk.
const LOOK_EVERY: u64 = 16 << 20;
/// A reserve never takes more of a disk than one part in so many, or small disks would hold nothing.
const RESERVE_PART: u64 = 20;

/// Writes the layer file. Nobody reads it before it is proven and published.
pub(super) struct FileSink<'a> {
    data: &'a File,
    /// Byte at which `gathered` starts.
    at: u64,
    gathered: Vec<u8>,
    room: Room,
    /// Hears how many bytes of the blob are consumed.
    progress: &'a (dyn Fn(u64) + Sync),
}

impl<'a> FileSink<'a> {
    /// A sink that leaves `reserve` bytes of the disk free, or a twentieth of a small one.
    pub(super) fn new(data: &'a File, reserve: u64, progress: &'a (dyn Fn(u64) + Sync)) -> Self {
        let room = Room { reserve, unlooked: 0 };
        FileSink { data, at: 0, gathered: Vec::with_capacity(WRITE_SIZE), room, progress }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        write_with_holes(self.data, &self.gathered, self.at, &mut self.room)?;
        self.at += self.gathered.len() as u64;
        self.gathered.clear();
        Ok(())
    }
}

impl LayerSink for FileSink<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset != self.at + self.gathered.len() as u64 {
            return Err(io::Error::other("streamed bytes are not in order"));
        }
        if self.gathered.len() + bytes.len() > WRITE_SIZE {
            self.flush()?;
        }
        if bytes.len() >= WRITE_SIZE {
            write_with_holes(self.data, bytes, offset, &mut self.room)?;
            self.at += bytes.len() as u64;
        } else {
            self.gathered.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        Ok(())
    }

    fn progress(&mut self, blob_bytes: u64) {
        (self.progress)(blob_bytes);
    }
}

/// Writes into a file that has nothing yet from `offset` on; long runs of zeros become holes, which cost no disk.
fn write_with_holes(file: &File, bytes: &[u8], offset: u64, room: &mut Room) -> io::Result<()> {
    let mut write = |from: usize, to: usize| match &bytes[from..to] {
        [] => Ok(()),
        run => {
            room.take(file, run.len() as u64)?;
            file.write_all_at(run, offset + from as u64)
        }
    };
    let (mut unwritten, mut at) = (0, 0);
    for block in bytes.chunks(HOLE) {
        let end = at + block.len();
        if block.len() == HOLE && block.iter().all(|byte| *byte == 0) {
            write(unwritten, at)?;
            unwritten = end;
        }
        at = end;
    }
    write(unwritten, at)
}

/// What may still be written without touching the disk's reserve.
struct Room {
    /// Bytes to leave free.
    reserve: u64,
    /// Bytes that may be written before the next look at the disk.
    unlooked: u64,
}

impl Room {
    fn take(&mut self, file: &File, len: u64) -> io::Result<()> {
        if self.unlooked < len {
            let disk = fstatvfs(file)?;
            let bytes = |blocks: u64| blocks.saturating_mul(disk.fragment_size());
            let free = bytes(disk.blocks_available());
            let reserve = self.reserve.min(bytes(disk.blocks()) / RESERVE_PART);
            let left = free.saturating_sub(reserve);
            // The kernel has counted what was written so far, so what it says is not diminished by that.
            if left < len {
                return Err(io::Error::new(io::ErrorKind::StorageFull, NoRoom { free, reserve }));
            }
            self.unlooked = left.min(LOOK_EVERY.max(len));
        }
        self.unlooked -= len;
        Ok(())
    }
}

/// The disk is not full, but more would touch its reserve.
#[derive(Debug, thiserror::Error)]
#[error("only {free} bytes are free, of which {reserve} are kept")]
struct NoRoom {
    free: u64,
    reserve: u64,
}

/// What an error of a [`FileSink`] on `path` says of the layer with this blob.
pub(super) fn sink_error(digest: Digest, path: &Path, error: io::Error) -> FetchError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<NoRoom>()) {
        Some(&NoRoom { free, reserve }) => {
            FetchError::NoRoom { digest, path: path.to_owned(), free, reserve }
        }
        None => FetchError::store("writing", path, error),
    }
}
