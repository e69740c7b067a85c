//! The two sequential passes over a blob: building an index, and hydrating with a known one.

use std::io::{Read, Seek, Write};

use crate::decode::{Cutter, Entrance};
use crate::format::SPAN_LEN_MAX;
#[cfg(fuzzing)]
use crate::inline::run;
#[cfg(not(fuzzing))]
use crate::pipeline::run;
use crate::pipeline::{Consumer, Passed};
use crate::reader::{SpanHasher, check_digest};
use crate::tar::{Entry, Parser, TarSink};
use crate::writer::IndexWriter;
use crate::{
    Compression, Digest, DigestOf, Hasher, IndexError, LayerIndex, LayerSink, Layout, SpanInfo,
    StreamOptions, StreamSummary,
};

/// Reads a layer blob once, from its first to its last byte, and writes its index into `out`.
///
/// `sink` gets the layer file's bytes and every span. `out` is written from its beginning; publishing it
/// (fsync, rename) is up to the caller. After an error `out` holds nothing usable, and the function returns as
/// soon as the read of `blob` that is under way does. Memory is bounded whatever the layer's size.
pub fn index_layer<R: Read + Send, W: Write + Seek>(
    blob: R,
    sink: &mut dyn LayerSink,
    out: W,
    opts: &StreamOptions,
) -> Result<StreamSummary, IndexError> {
    let mut options = opts.sane();
    options.max_span_len = options.max_span_len.min(SPAN_LEN_MAX / 2);
    options.span_len = options.span_len.min(options.max_span_len);
    let mut builder = Builder {
        sink,
        parser: Parser::new(),
        writer: IndexWriter::new(out, Layout::Tar)?,
        diff_id: Hasher::new(),
        span_hasher: SpanHasher::new(),
        at: 0,
        span_start: 0,
        span_blob: 0,
        entrance: Entrance::None,
    };
    let passed = run(blob, Cutter::new(options), &mut builder)?;
    builder.finish(&passed)
}

/// Reads a layer blob once with its index known: every span's digest, the blob's and the diffID are checked.
///
/// Bytes reach `sink` before their span is proven; the span is proven when [`LayerSink::span`] is called.
pub fn hydrate_layer<R: Read + Send>(
    index: &LayerIndex,
    blob: R,
    sink: &mut dyn LayerSink,
) -> Result<StreamSummary, IndexError> {
    let mut hydrator = Hydrator {
        index,
        sink,
        diff_id: Hasher::new(),
        span_hasher: SpanHasher::new(),
        at: 0,
        next: 0,
        end: if index.span_count() > 0 { index.span(0).len } else { 0 },
    };
    let passed = run(blob, Cutter::never(), &mut hydrator)?;
    hydrator.finish(&passed)
}

struct Builder<'a, W> {
    sink: &'a mut dyn LayerSink,
    parser: Parser,
    writer: IndexWriter<W>,
    diff_id: Hasher,
    span_hasher: SpanHasher,
    /// Bytes of the layer file so far.
    at: u64,
    /// Where the open span starts in the layer file.
    span_start: u64,
    /// Where it starts in the blob.
    span_blob: u64,
    entrance: Entrance,
}

impl<W: Write + Seek> TarSink for IndexWriter<W> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        Self::entry(self, &entry.view(&entry.xattr_refs()))
    }
}

impl<W: Write + Seek> Consumer for Builder<'_, W> {
    fn begin(&mut self, compression: Compression) -> Result<(), IndexError> {
        self.entrance = match compression {
            Compression::None => Entrance::Plain,
            Compression::Gzip => Entrance::GzipMember { skip: 0 },
            Compression::Zstd => Entrance::ZstdFrame { skip: 0 },
        };
        Ok(())
    }

    fn data(&mut self, bytes: &[u8], blob: u64) -> Result<(), IndexError> {
        self.diff_id.update(bytes);
        self.span_hasher.update(bytes);
        let offset = self.at;
        self.sink.data(offset, bytes).map_err(|source| IndexError::Sink { offset, source })?;
        self.parser.feed(bytes, &mut self.writer)?;
        self.at += bytes.len() as u64;
        self.sink.progress(blob);
        Ok(())
    }

    fn cut(&mut self, end: u64, start: u64, entrance: Entrance) -> Result<(), IndexError> {
        if self.at == self.span_start {
            return Ok(());
        }
        let index = u32::try_from(self.writer.span_count())
            .map_err(|_| IndexError::bad_index("the layer has more spans than can be counted"))?;
        let span = SpanInfo {
            index,
            blob_offset: self.span_blob,
            blob_len: end - self.span_blob,
            offset: self.span_start,
            len: self.at - self.span_start,
            pad: 0,
            digest: self.span_hasher.take(),
            digest_of: DigestOf::Decoded,
            restartable: self.entrance != Entrance::None,
        };
        self.writer.span(&span, &self.entrance)?;
        self.sink.span(&span).map_err(|source| IndexError::Sink { offset: span.offset, source })?;
        self.span_start = self.at;
        self.span_blob = start;
        self.entrance = entrance;
        Ok(())
    }

    fn window(&mut self, better: Vec<u8>) {
        if let Entrance::Deflate { window, .. } = &mut self.entrance {
            *window = better;
        }
    }
}

impl<W: Write + Seek> Builder<'_, W> {
    fn finish(mut self, passed: &Passed) -> Result<StreamSummary, IndexError> {
        self.parser.finish()?;
        self.cut(passed.data_end, passed.data_end, Entrance::None)?;
        let mut summary = StreamSummary {
            blob_digest: passed.blob_digest,
            blob_size: passed.blob_size,
            diff_id: self.diff_id.finish(),
            layer_size: self.at,
            compression: passed.compression,
            entries: self.writer.entry_count(),
            spans: self.writer.span_count() as u32,
            index_size: 0,
        };
        self.writer.finish(&mut summary)?;
        self.sink.progress(passed.blob_size);
        Ok(summary)
    }
}

struct Hydrator<'a> {
    index: &'a LayerIndex,
    sink: &'a mut dyn LayerSink,
    diff_id: Hasher,
    span_hasher: SpanHasher,
    at: u64,
    /// The span that is under way and where it ends in the layer file.
    next: usize,
    end: u64,
}

impl Consumer for Hydrator<'_> {
    fn begin(&mut self, _: Compression) -> Result<(), IndexError> {
        Ok(())
    }

    fn data(&mut self, mut bytes: &[u8], blob: u64) -> Result<(), IndexError> {
        self.diff_id.update(bytes);
        while !bytes.is_empty() {
            if self.at >= self.index.layer_size() {
                return Err(self.length(self.at + bytes.len() as u64));
            }
            let n = usize::try_from(self.end - self.at).map_or(bytes.len(), |left| left.min(bytes.len()));
            let (now, later) = bytes.split_at(n);
            let offset = self.at;
            self.sink.data(offset, now).map_err(|source| IndexError::Sink { offset, source })?;
            self.span_hasher.update(now);
            self.at += n as u64;
            bytes = later;
            if self.at == self.end {
                self.span_end()?;
            }
        }
        self.sink.progress(blob);
        Ok(())
    }

    fn cut(&mut self, _: u64, _: u64, _: Entrance) -> Result<(), IndexError> {
        Ok(())
    }

    fn window(&mut self, _: Vec<u8>) {}
}

impl Hydrator<'_> {
    fn span_end(&mut self) -> Result<(), IndexError> {
        let span = self.index.span(self.next);
        check_digest(&span, self.span_hasher.take())?;
        self.sink.span(&span).map_err(|source| IndexError::Sink { offset: span.offset, source })?;
        self.next += 1;
        if self.next < self.index.span_count() {
            self.end += self.index.span(self.next).len;
        }
        Ok(())
    }

    fn length(&self, actual: u64) -> IndexError {
        IndexError::LengthMismatch {
            what: "the layer file".into(),
            expected: self.index.layer_size(),
            actual,
        }
    }

    fn finish(self, passed: &Passed) -> Result<StreamSummary, IndexError> {
        if self.at != self.index.layer_size() {
            return Err(self.length(self.at));
        }
        let same = |what: &str, expected: Digest, actual: Digest| {
            if expected == actual {
                return Ok(());
            }
            Err(IndexError::DigestMismatch { what: what.into(), expected, actual })
        };
        let diff_id = self.diff_id.finish();
        same("the layer blob", self.index.blob_digest(), passed.blob_digest)?;
        same("the layer file", self.index.diff_id(), diff_id)?;
        self.sink.progress(passed.blob_size);
        Ok(StreamSummary {
            blob_digest: passed.blob_digest,
            blob_size: passed.blob_size,
            diff_id,
            layer_size: self.at,
            compression: passed.compression,
            entries: self.index.entry_count() as u64,
            spans: self.index.span_count() as u32,
            index_size: self.index.index_size(),
        })
    }
}
