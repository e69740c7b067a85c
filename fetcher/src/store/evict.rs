//! Throwing local bytes of a layer away without anybody ever reading the hole.
//!
//! The order is what counts. Fills of the layer are held off first. Then, with all reads held off, the spans are taken
//! out of the map in memory: who looked before has read, who looks later finds them missing. Then the map on disk
//! forgets them, durably, and only then the holes are punched. A crash at any point leaves bytes that nobody believes
//! in, or nothing at all.

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::Layer;
use super::layer::load;
use super::lease::Lease;
use super::span_map::Bits;

/// Holes are made of whole blocks of this many bytes.
const BLOCK: u64 = 4096;

impl Layer {
    /// Evicts those of the spans that are here, on which no pin is and which no reader waits for. Returns the bytes
    /// of disk that this freed; none when the file is read directly by anybody. `released`: somebody has just let go of
    /// the file, and the kernel may need a moment to close it.
    pub(super) fn evict(&self, spans: &[usize], released: bool) -> io::Result<u64> {
        let _fills = self.fills.write().unwrap_or_else(PoisonError::into_inner);
        let lease = if released { Lease::wait(&self.data) } else { Lease::take(&self.data) };
        let Some(_lease) = lease? else { return Ok(0) };
        let gone = {
            let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            if self.pins.hold_all() {
                return Ok(0);
            }
            let wanted = self.pins.wanted();
            let free = spans.iter().filter(|i| !wanted.iter().any(|range| range.contains(i)));
            self.take_out(free.copied())
        };
        if gone.iter().all(|word| *word == 0) {
            return Ok(0);
        }
        let before = self.disk_bytes()?;
        self.write_down(&gone)?;
        for run in runs(&gone) {
            self.punch_spans(run)?;
        }
        Ok(before.saturating_sub(self.disk_bytes()?))
    }

    /// Drops all local bytes; the index stays.
    ///
    /// # Errors
    /// When the file is read directly, without [`Layer::read_local`], or the map cannot be written (then nothing is
    /// dropped) or the bytes cannot be freed.
    pub fn forget(&self) -> io::Result<()> {
        let busy = || {
            io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("layer {} is read by a mount directly", self.id()),
            )
        };
        let _fills = self.fills.write().unwrap_or_else(PoisonError::into_inner);
        let _lease = Lease::wait(&self.data)?.ok_or_else(busy)?;
        let gone = {
            let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            if self.pins.are_direct() {
                return Err(busy());
            }
            self.take_out(0..self.index.span_count())
        };
        self.write_down(&gone)?;
        self.punch_all()
    }

    /// Stops believing in spans whose bytes are found to be wrong. Their bytes stay where they are, since somebody may
    /// read the file directly; the right ones are written over them.
    pub(super) fn distrust(&self, spans: &[usize]) -> io::Result<()> {
        let _fills = self.fills.write().unwrap_or_else(PoisonError::into_inner);
        let gone = {
            let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            self.take_out(spans.iter().copied())
        };
        self.write_down(&gone)
    }

    /// Bytes of disk that the layer file takes.
    ///
    /// # Errors
    /// The file system's.
    pub fn disk_bytes(&self) -> io::Result<u64> {
        Ok(self.data.metadata()?.blocks() * 512)
    }

    /// Clears spans in memory; the gate is held alone. Returns those that were there.
    fn take_out(&self, spans: impl Iterator<Item = usize>) -> Bits {
        let mut gone = vec![0; self.trusted.len()];
        for span in spans {
            let (word, bit) = (span / 64, 1u64 << (span % 64));
            let Some(trusted) = self.trusted.get(word) else { continue };
            let was_trusted = trusted.fetch_and(!bit, Ordering::AcqRel) & bit != 0;
            let was_suspect = self.suspect[word].fetch_and(!bit, Ordering::AcqRel) & bit != 0;
            if was_trusted {
                self.trusted_count.fetch_sub(1, Ordering::AcqRel);
            }
            if was_trusted || was_suspect {
                gone[word] |= bit;
            }
        }
        gone
    }

    fn write_down(&self, gone: &[u64]) -> io::Result<()> {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the map's lock, so that no `sync` that began before makes them durable again.
        self.epoch.fetch_add(1, Ordering::AcqRel);
        map.write_evicted(gone, &self.local_bits())
    }

    /// Frees the blocks of absent spans. A block at an edge that is shared with spans that are absent as well goes too.
    fn punch_spans(&self, run: Range<usize>) -> io::Result<()> {
        let Some(last) = run.end.checked_sub(1) else { return Ok(()) };
        let (first, last) = (self.index.span(run.start), self.index.span(last));
        let (mut from, mut to) = (first.offset, last.offset.saturating_add(last.len));
        let absent = |from: u64, to: u64| {
            self.index.spans_covering(from, to.saturating_sub(from)).all(|i| self.lacks_span(i))
        };
        let down = from / BLOCK * BLOCK;
        if absent(down, from) {
            from = down;
        }
        let up = to.checked_next_multiple_of(BLOCK).unwrap_or(to);
        if absent(to, up) {
            to = up;
        }
        self.punch(from, to.saturating_sub(from))
    }

    /// Frees what a write has left of a span that does not count as local.
    pub(super) fn discard_leftover(&self, span: usize) {
        let _fills = self.fills.write().unwrap_or_else(PoisonError::into_inner);
        if self.lacks_span(span) && !self.pins.hold_all() && self.punch_spans(span..span + 1).is_err() {
            tracing::debug!(layer = %self.id(), span, "a part of a span stays on the disk");
        }
    }

    fn punch_all(&self) -> io::Result<()> {
        let size = self.index.layer_size();
        // To the end of the last block: part of a block would be zeroed but kept.
        let Some(len) = size.checked_next_multiple_of(BLOCK) else {
            return Err(io::ErrorKind::FileTooLarge.into());
        };
        match self.punch(0, len) {
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                self.data.set_len(0)?;
                self.data.set_len(size)
            }
            result => result,
        }
    }

    fn punch(&self, from: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let (from, len) = (i64::try_from(from).map_err(too_large)?, i64::try_from(len).map_err(too_large)?);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.data, flags, from, len)?)
    }

    /// Spans that may be evicted in principle, longest unused first: their last use, number and length in bytes.
    /// `true` instead of a time that counts: only a stream of the whole layer brings such a span back.
    pub(super) fn evictable(&self) -> Vec<(bool, u64, usize, u64)> {
        if self.pins.hold_all() {
            return Vec::new();
        }
        let wanted = self.pins.wanted();
        let (trusted, suspect) = (load(&self.trusted), load(&self.suspect));
        let here = |i: &usize| {
            let bit = 1u64 << (i % 64);
            (trusted[i / 64] | suspect[i / 64]) & bit != 0 && !wanted.iter().any(|range| range.contains(i))
        };
        let key = |i| {
            let span = self.index.span(i);
            (!self.can_fault(&span), self.touched.span(i), i, span.len)
        };
        let mut spans: Vec<_> = (0..self.index.span_count()).filter(here).map(key).collect();
        spans.sort_unstable();
        spans
    }

    /// Whether a span counts as local, looked at again or not.
    #[cfg(test)]
    pub(super) fn counts(&self, span: usize) -> bool {
        !self.lacks_span(span)
    }
}

/// Runs of set bits.
fn runs(bits: &[u64]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for i in (0..bits.len() * 64).filter(|i| bits[i / 64] & (1 << (i % 64)) != 0) {
        match runs.last_mut() {
            Some(last) if last.end == i => last.end += 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}
