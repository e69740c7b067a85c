//! The bytes of a request, cut into spans as they come.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use bytes::{Buf as _, Bytes, BytesMut};
use lazyrun_index::{Digest, SpanInfo};

use super::Inner;
use super::scheduler::Class;
use crate::client::{BlobReader, PartsReader};
use crate::error::FetchError;

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
    position: &'a AtomicU64,
    reader: Reader,
    buffer: BytesMut,
    /// Byte of the blob at which `buffer` starts.
    base: u64,
}

impl<'a> Arriving<'a> {
    pub(super) fn new(inner: &'a Inner, class: Class, position: &'a AtomicU64, reader: Reader) -> Self {
        Arriving { inner, class, position, reader, buffer: BytesMut::new(), base: 0 }
    }

    /// The compressed bytes of a span. Spans are asked for in the order of their first bytes within a run, and they may
    /// overlap there.
    pub(super) async fn span(&mut self, span: &SpanInfo) -> Result<Bytes, FetchError> {
        let end = span.blob_offset.saturating_add(span.blob_len);
        while self.base > span.blob_offset || self.base + (self.buffer.len() as u64) < end {
            let Some((at, chunk)) = self.reader.next().await? else {
                return Err(FetchError::Corrupt {
                    digest: self.reader.digest(),
                    start: span.blob_offset,
                    end,
                    reason: "the index points beyond the end of the blob".to_owned(),
                });
            };
            if at != self.base + self.buffer.len() as u64 {
                // Another run begins.
                self.buffer.clear();
                self.base = at;
            }
            self.buffer.extend_from_slice(&chunk);
            self.count(chunk.len() as u64);
        }
        // Both differences are lengths inside the buffer, so they fit.
        self.buffer.advance((span.blob_offset - self.base) as usize);
        self.base = span.blob_offset;
        Ok(Bytes::copy_from_slice(&self.buffer[..span.blob_len as usize]))
    }

    fn count(&self, bytes: u64) {
        let counters = &self.inner.counters;
        let counter = match self.class {
            Class::Fault => &counters.fault_bytes,
            Class::Background => &counters.background_bytes,
        };
        counter.fetch_add(bytes, Relaxed);
        self.inner.scheduler.link.arrived(bytes, Instant::now());
        self.position.fetch_add(bytes, Relaxed);
    }
}
