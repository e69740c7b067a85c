//! Where streamed layers go: a file with holes for zeros, on a disk that is never filled to its end, in a store that
//! never grows beyond its limit.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use lazyrun_index::{Digest, LayerSink, SpanInfo};

use crate::error::FetchError;
use crate::store::{Need, NoRoom, Room};

/// Decoded bytes gathered for one write.
const WRITE_SIZE: usize = 1 << 20;
/// What a span takes of the index, about: most of it is what a decoder has to know to begin there.
const SPAN_COST: u64 = 36 << 10;
/// Zeros in a row that are left out of the file, in bytes.
const HOLE: usize = 64 << 10;

/// Writes the layer file. Nobody reads it before it is proven and published.
pub(super) struct FileSink<'a> {
    data: &'a File,
    /// Byte at which `gathered` starts.
    at: u64,
    gathered: Vec<u8>,
    room: &'a Room,
    /// Bytes of the index that come at its end.
    promised: u64,
    /// Where storing ended, when the store's limit ended it and the rest is only looked at.
    ended: Option<u64>,
    /// Whether that may be.
    may_end: bool,
    /// Hears how many bytes of the blob are consumed.
    progress: &'a (dyn Fn(u64) + Sync),
}

impl<'a> FileSink<'a> {
    /// A sink in a store with this room, which has to take everything.
    pub(super) fn new(data: &'a File, room: &'a Room, progress: &'a (dyn Fn(u64) + Sync)) -> Self {
        let gathered = Vec::with_capacity(WRITE_SIZE);
        FileSink { data, at: 0, gathered, room, promised: 0, ended: None, may_end: false, progress }
    }

    /// Where the store's limit leaves no room, what is still to come is not stored: once the layer is indexed, it can
    /// be fetched when it is wanted.
    pub(super) fn may_end_early(mut self) -> Self {
        self.may_end = true;
        self
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        let gathered = std::mem::take(&mut self.gathered);
        self.store(&gathered, self.at)?;
        self.at += gathered.len() as u64;
        self.gathered = gathered;
        self.gathered.clear();
        Ok(())
    }

    /// How many bytes from the start are stored, if not all are; what was written beyond them is freed.
    pub(super) fn ended_early(&self) -> io::Result<Option<u64>> {
        if let Some(stored) = self.ended {
            self.data.set_len(stored)?;
        }
        Ok(self.ended)
    }

    fn store(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.ended.is_some() {
            return Ok(());
        }
        match write_with_holes(self.data, bytes, offset, self.room) {
            Err(e) if self.may_end && matches!(no_room(&e), Some(NoRoom::Limit { .. })) => {
                tracing::info!(reason = %e, "a layer is indexed without being stored further");
                self.ended = Some(offset);
                Ok(())
            }
            result => result,
        }
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
            self.store(bytes, offset)?;
            self.at += bytes.len() as u64;
        } else {
            self.gathered.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        self.promised += SPAN_COST;
        self.room.promise(SPAN_COST);
        Ok(())
    }

    fn progress(&mut self, blob_bytes: u64) {
        (self.progress)(blob_bytes);
    }
}

impl Drop for FileSink<'_> {
    fn drop(&mut self) {
        self.room.keep_promise(self.promised);
    }
}

/// Writes into a file that has nothing yet from `offset` on; long runs of zeros become holes, which cost no disk.
fn write_with_holes(file: &File, bytes: &[u8], offset: u64, room: &Room) -> io::Result<()> {
    let write = |from: usize, to: usize| match &bytes[from..to] {
        [] => Ok(()),
        run => {
            let offset = offset + from as u64;
            room.with_room(offset, run.len(), Need::Ahead, || file.write_all_at(run, offset))
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

/// What an error of a [`FileSink`] on `path` says of the layer with this blob.
pub(super) fn sink_error(digest: Digest, path: &Path, error: io::Error) -> FetchError {
    match no_room(&error) {
        Some(&NoRoom::Reserve { free, reserve }) => {
            FetchError::NoRoom { digest, path: path.to_owned(), free, reserve }
        }
        _ => FetchError::store("writing", path, error),
    }
}

fn no_room(error: &io::Error) -> Option<&NoRoom> {
    error.get_ref()?.downcast_ref()
}
