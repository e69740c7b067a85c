//! The bytes of a request, cut into spans as they come.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use lazyrun_index::{Digest, SpanInfo};

use super::Inner;
use super::progress::Progress;
use crate::client::{BlobReader, PartsReader};
use crate::error::FetchError;
use crate::observe::Class;

/// What brings the bytes.
pub(super) enum Reader {
    One(BlobReader),
    Parts(PartsReader),
}

impl Reader {
    /// The next bytes and their place in the blob.
    async fn next(&mut self) -> Result<Option<(u64, Bytes)>, FetchError> {
        match self {
            Reader::One(reader) => {
                let at = reader.position();
                Ok(reader.next().await?.map(|bytes| (at, bytes)))
            }
            Reader::Parts(reader) => reader.next().await,
        }
    }

    fn digest(&self) -> Digest {
        match self {
            Reader::One(reader) => reader.digest(),
            Reader::Parts(reader) => reader.digest(),
        }
    }
}

/// Gathers what comes until a span is whole.
pub(super) struct Arriving<'a> {
    inner: &'a Inner,
    class: Class,
    /// Is told how many bytes have come.
    progress: &'a Progress,
    reader: Reader,
    /// Pieces that follow each other, as the network gave them: a span may be large, and is copied once.
    pieces: VecDeque<Bytes>,
    /// Byte of the blob at which the first piece starts, and byte behind the last.
    range: Range<u64>,
}

impl<'a> Arriving<'a> {
    pub(super) fn new(inner: &'a Inner, class: Class, progress: &'a Progress, reader: Reader) -> Self {
        Arriving { inner, class, progress, reader, pieces: VecDeque::new(), range: 0..0 }
    }

    /// The compressed bytes of a span. Within a run spans are asked for in the order of their first bytes, and they may
    /// overlap there; of the run nothing in front of `next` is asked for after this.
    pub(super) async fn span(&mut self, span: &SpanInfo, next: u64) -> Result<Vec<u8>, FetchError> {
        let end = span.blob_offset.saturating_add(span.blob_len);
        while self.range.start > span.blob_offset || self.range.end < end {
            let Some((at, chunk)) = self.reader.next().await? else {
                return Err(FetchError::Corrupt {
                    digest: self.reader.digest(),
                    start: span.blob_offset,
                    end,
                    reason: "the index points beyond the end of the blob".to_owned(),
                });
            };
            if at != self.range.end {
                // Another run begins.
                self.pieces.clear();
                self.range = at..at;
            }
            self.count(chunk.len() as u64);
            self.range.end += chunk.len() as u64;
            self.pieces.push_back(chunk);
            self.drop_until(span.blob_offset);
        }
        Ok(self.take(span.blob_offset..end, next))
    }

    /// Copies a range that has come, dropping pieces on the way as far as nothing needs them any more.
    fn take(&mut self, range: Range<u64>, next: u64) -> Vec<u8> {
        // A span's length was bounded when its index was checked.
        let len = (range.end - range.start) as usize;
        let mut bytes = Vec::with_capacity(len);
        let mut at = self.range.start;
        let mut needed = VecDeque::new();
        while bytes.len() < len
            && let Some(piece) = self.pieces.pop_front()
        {
            let skip = range.start.saturating_sub(at).min(piece.len() as u64) as usize;
            let rest = &piece[skip..];
            bytes.extend_from_slice(&rest[..rest.len().min(len - bytes.len())]);
            at += piece.len() as u64;
            if at > next {
                needed.push_back(piece);
            } else {
                self.range.start = at;
            }
        }
        while let Some(piece) = needed.pop_back() {
            self.pieces.push_front(piece);
        }
        bytes
    }

    fn drop_until(&mut self, offset: u64) {
        while self.pieces.front().is_some_and(|piece| self.range.start + piece.len() as u64 <= offset) {
            self.range.start += self.pieces.pop_front().map_or(0, |piece| piece.len() as u64);
        }
    }

    fn count(&self, bytes: u64) {
        let counters = &self.inner.counters;
        let counter = match self.class {
            Class::Fault => &counters.fault_bytes,
            _ => &counters.background_bytes,
        };
        counter.fetch_add(bytes, Relaxed);
        let now = Instant::now();
        self.inner.scheduler.link.arrived(bytes, now);
        self.progress.came(bytes, now);
    }
}
