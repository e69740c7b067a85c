//! Where a file has data, and how a tar says so: the sparse format 1.0 of PAX, which Go, GNU tar and libarchive read.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// Shorter holes are written as the zeros that they read as.
const MIN_HOLE: u64 = 64 << 10;
/// Files with fewer bytes in such holes are written whole: not everything that reads tars knows of holes.
const MIN_HOLES: u64 = 1 << 20;
/// Most runs of data that are told apart in one file; what follows them counts as data.
const MAX_RUNS: usize = 1 << 16;

/// A run of bytes that are not a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The runs of data in a file of `size` bytes; `None` if it is to be written whole.
pub(super) fn runs(file: &File, size: u64) -> io::Result<Option<Vec<Run>>> {
    if size < MIN_HOLES {
        return Ok(None);
    }
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(file, at, Whence::SeekData)?.filter(|start| *start < size) else { break };
        let end = match seek(file, start, Whence::SeekHole)? {
            Some(end) if runs.len() < MAX_RUNS => end.min(size),
            _ => size,
        };
        match runs.last_mut() {
            Some(last) if start - (last.start + last.len) < MIN_HOLE => last.len = end - last.start,
            _ => runs.push(Run { start, len: end - start }),
        }
        at = end;
    }
    let data: u64 = runs.iter().map(|run| run.len).sum();
    Ok((size - data >= MIN_HOLES).then_some(runs))
}

// `None` behind the last data, and where the filesystem knows no holes.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek(file.as_fd(), from.cast_signed(), whence) {
        Ok(at) => Ok(Some(at.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What stands before the data of a sparse file, padded to a tar's block.
pub(super) fn map(runs: &[Run]) -> Vec<u8> {
    let mut text = format!("{}\n", runs.len());
    for run in runs {
        let _ = write!(text, "{}\n{}\n", run.start, run.len);
    }
    let mut map = text.into_bytes();
    map.resize(map.len().next_multiple_of(512), 0);
    map
}

/// Reads the runs of a file one after the other, and fails when they end too early: a tar has said their length.
pub(super) struct Data<'a> {
    file: &'a File,
    runs: std::slice::Iter<'a, Run>,
    run: Run,
}

impl<'a> Data<'a> {
    pub(super) fn new(file: &'a File, runs: &'a [Run]) -> Self {
        Self { file, runs: runs.iter(), run: Run { start: 0, len: 0 } }
    }
}

impl Read for Data<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.run.len == 0 {
            let Some(next) = self.runs.next() else { return Ok(0) };
            self.run = *next;
        }
        let most = usize::try_from(self.run.len).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.run.start)?;
        if read == 0 && most > 0 {
            let why = "it became shorter while it was read; pause the container and try again";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        self.run.start += read as u64;
        self.run.len -= read as u64;
        Ok(read)
    }
}
