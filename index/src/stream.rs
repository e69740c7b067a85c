//! The sequential passes over a blob: building an index, hydrating with a known one, proving a claimed one.

use std::io::{Read, Seek, Write};
use std::ops::Range;

use crate::claims::{Claims, follow};
use crate::compare::{Comparer, Mismatch};
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
    index_layer_along(blob, sink, out, opts, &[])
}

/// As [`index_layer`], with spans that follow what is read together: where one of the runs `touched` of the layer file
/// starts or ends, a span does so at the next place that can be entered. The runs ascend and lie apart.
pub fn index_layer_along<R: Read + Send, W: Write + Seek>(
    blob: R,
    sink: &mut dyn LayerSink,
    out: W,
    opts: &StreamOptions,
    touched: &[Range<u64>],
) -> Result<StreamSummary, IndexError> {
    let mut builder = Builder::new(sink, out, None, opts.max_layer_len)?;
    let passed = run(blob, cutter(opts, touched), &mut builder, |_| {})?;
    Ok(builder.finish(&passed)?.0)
}

fn cutter<'a>(opts: &StreamOptions, touched: &'a [Range<u64>]) -> Cutter<'a> {
    let mut options = opts.sane();
    options.max_span_len = options.max_span_len.min(SPAN_LEN_MAX / 2);
    options.span_len = options.span_len.min(options.max_span_len);
    Cutter::new(options, touched)
}

/// Reads a layer blob once with its index known: every span's digest, the blob's and the diffID are checked.
///
/// Bytes reach `sink` before their span is proven; the span is proven when [`LayerSink::span`] is called. A span
/// whose digest in the index is not of decoded bytes is told with the digest of its decoded bytes, and one
/// without a digest only when all of the layer is proven. Tables cannot be hydrated this way.
pub fn hydrate_layer<R: Read + Send>(
    index: &LayerIndex,
    blob: R,
    sink: &mut dyn LayerSink,
) -> Result<StreamSummary, IndexError> {
    if index.layout() == Layout::Table {
        return Err(IndexError::TableLayout);
    }
    let (claims, mut tap) = follow(index, sink);
    let mut hydrator = Hydrator { index, claims, diff_id: Hasher::new() };
    let passed = run(blob, Cutter::never(), &mut hydrator, |bytes| tap.feed(bytes))?;
    hydrator.finish(&passed)
}

/// Reads a layer blob once with an index that somebody claims to be its: builds the true index into `out` as
/// [`index_layer`] does and finds out whether the claim is true.
///
/// For a claim of [`Layout::Tar`] `sink` gets the layer file's bytes, also those behind the claimed spans, and the
/// *claimed* spans: each as soon as its digest fits, those without one once the whole layer is proven. They are
/// told with the digest of their decoded bytes, so that a span that came through its claimed entrance before can be
/// compared. For a claim of [`Layout::Table`] `sink` gets the tar's bytes and no spans: the caller copies the contents
/// from there.
///
/// A blob that is damaged or not the layer's gives the same errors as [`hydrate_layer`]; when the blob is what it
/// should be and the claim is not, the error is [`IndexError::Lie`]. A table's extents are not looked at:
/// see [`compare`](crate::compare).
pub fn prove_layer<R: Read + Send, W: Write + Seek>(
    claimed: &LayerIndex,
    blob: R,
    sink: &mut dyn LayerSink,
    out: W,
    opts: &StreamOptions,
) -> Result<StreamSummary, IndexError> {
    let (mut claims, mut tap) = follow(claimed, sink);
    let mut builder = Builder::new(&mut claims, out, Some(Comparer::new(claimed)), opts.max_layer_len)?;
    let passed = run(blob, cutter(opts, &[]), &mut builder, |bytes| tap.feed(bytes))?;
    let (summary, comparer) = builder.finish(&passed)?;
    check_layer(claimed, summary.blob_digest, summary.diff_id)?;
    claims.hear_all();
    if let Some(wrong) = claims.wrong() {
        let (index, claimed, proven) = (wrong.span.index, wrong.span.digest, wrong.actual);
        return Err(Mismatch::Span { index, claimed, proven }.into());
    }
    check_size(claimed, summary.layer_size)?;
    comparer.map_or(Ok(()), Comparer::finish)?;
    let offset = summary.layer_size;
    claims.finish(summary.blob_size).map_err(|source| IndexError::Sink { offset, source })?;
    Ok(summary)
}

/// SOCI's tables end with the archive, so that padding behind it belongs to no span: a layer file may be longer
/// than they say, never shorter. Others know its length.
fn check_size(claimed: &LayerIndex, proven: u64) -> Result<(), Mismatch> {
    let size = claimed.layer_size();
    let spans = claimed.span_count();
    let decoded = spans == 0 || claimed.span(spans - 1).digest_of == DigestOf::Decoded;
    match claimed.layout() {
        Layout::Table => Ok(()),
        Layout::Tar if size == proven || (size < proven && !decoded) => Ok(()),
        Layout::Tar => Err(Mismatch::LayerSize { claimed: size, proven }),
    }
}

struct Builder<'a, 'b, W, S: ?Sized> {
    sink: &'a mut S,
    parser: Parser,
    record: Record<'b, W>,
    diff_id: Hasher,
    span_hasher: SpanHasher,
    /// Bytes of the layer file so far, and how many it may have.
    at: u64,
    limit: u64,
    /// Where the open span starts in the layer file.
    span_start: u64,
    /// Where it starts in the blob.
    span_blob: u64,
    entrance: Entrance,
}

/// Where the entries go.
struct Record<'b, W> {
    writer: IndexWriter<W>,
    comparer: Option<Comparer<'b>>,
}

impl<W: Write + Seek> TarSink for Record<'_, W> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        let xattrs = entry.xattr_refs();
        let entry = entry.view(&xattrs);
        if let Some(comparer) = &mut self.comparer {
            comparer.entry(&entry);
        }
        self.writer.entry(&entry)
    }
}

/// A sink that may have something to do when all of a piece is taken.
trait PieceSink: LayerSink {
    fn piece_end(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl PieceSink for dyn LayerSink + '_ {}

impl PieceSink for Claims<'_> {
    fn piece_end(&mut self) -> std::io::Result<()> {
        self.advance()
    }
}

impl<W: Write + Seek, S: PieceSink + ?Sized> Consumer for Builder<'_, '_, W, S> {
    fn begin(&mut self, compression: Compression) -> Result<(), IndexError> {
        self.entrance = match compression {
            Compression::None => Entrance::Plain,
            Compression::Gzip => Entrance::GzipMember { skip: 0 },
            Compression::Zstd => Entrance::ZstdFrame { skip: 0 },
        };
        Ok(())
    }

    fn data(&mut self, bytes: &[u8], blob: u64) -> Result<(), IndexError> {
        if self.limit - self.at < bytes.len() as u64 {
            return Err(IndexError::TooLong { limit: self.limit });
        }
        self.diff_id.update(bytes);
        self.span_hasher.update(bytes);
        let offset = self.at;
        let sink = |source| IndexError::Sink { offset, source };
        self.sink.data(offset, bytes).map_err(sink)?;
        self.parser.feed(bytes, &mut self.record)?;
        self.at += bytes.len() as u64;
        self.sink.progress(blob);
        self.sink.piece_end().map_err(sink)
    }

    fn cut(&mut self, end: u64, start: u64, entrance: Entrance) -> Result<(), IndexError> {
        if self.at == self.span_start {
            return Ok(());
        }
        let index = u32::try_from(self.record.writer.span_count())
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
        self.record.writer.span(&span, &self.entrance)?;
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

impl<'a, 'b, W: Write + Seek, S: PieceSink + ?Sized> Builder<'a, 'b, W, S> {
    fn new(sink: &'a mut S, out: W, comparer: Option<Comparer<'b>>, limit: u64) -> Result<Self, IndexError> {
        Ok(Self {
            sink,
            parser: Parser::new(),
            record: Record { writer: IndexWriter::new(out, Layout::Tar)?, comparer },
            diff_id: Hasher::new(),
            span_hasher: SpanHasher::new(),
            at: 0,
            limit,
            span_start: 0,
            span_blob: 0,
            entrance: Entrance::None,
        })
    }

    fn finish(mut self, passed: &Passed) -> Result<(StreamSummary, Option<Comparer<'b>>), IndexError> {
        self.parser.finish()?;
        self.cut(passed.data_end, passed.data_end, Entrance::None)?;
        let mut summary = StreamSummary {
            blob_digest: passed.blob_digest,
            blob_size: passed.blob_size,
            diff_id: self.diff_id.finish(),
            layer_size: self.at,
            compression: passed.compression,
            entries: self.record.writer.entry_count(),
            spans: self.record.writer.span_count() as u32,
            index_size: 0,
        };
        self.record.writer.finish(&mut summary)?;
        self.sink.progress(passed.blob_size);
        Ok((summary, self.record.comparer))
    }
}

struct Hydrator<'a> {
    index: &'a LayerIndex,
    claims: Claims<'a>,
    diff_id: Hasher,
}

impl Consumer for Hydrator<'_> {
    fn begin(&mut self, _: Compression) -> Result<(), IndexError> {
        Ok(())
    }

    fn data(&mut self, bytes: &[u8], blob: u64) -> Result<(), IndexError> {
        let offset = self.claims.passed();
        let end = offset + bytes.len() as u64;
        if end > self.index.layer_size() {
            return Err(self.length(end));
        }
        self.diff_id.update(bytes);
        let sink = |source| IndexError::Sink { offset, source };
        self.claims.data(offset, bytes).map_err(sink)?;
        self.claims.progress(blob);
        self.claims.advance().map_err(sink)?;
        self.right()
    }

    fn cut(&mut self, _: u64, _: u64, _: Entrance) -> Result<(), IndexError> {
        Ok(())
    }

    fn window(&mut self, _: Vec<u8>) {}
}

impl Hydrator<'_> {
    /// An error if a span has turned out wrong.
    fn right(&self) -> Result<(), IndexError> {
        self.claims.wrong().map_or(Ok(()), |wrong| check_digest(&wrong.span, wrong.actual))
    }

    fn length(&self, actual: u64) -> IndexError {
        IndexError::LengthMismatch {
            what: "the layer file".into(),
            expected: self.index.layer_size(),
            actual,
        }
    }

    fn finish(mut self, passed: &Passed) -> Result<StreamSummary, IndexError> {
        let layer_size = self.claims.passed();
        if layer_size != self.index.layer_size() {
            return Err(self.length(layer_size));
        }
        self.claims.hear_all();
        self.right()?;
        let diff_id = self.diff_id.finish();
        check_layer(self.index, passed.blob_digest, diff_id)?;
        let offset = layer_size;
        self.claims.finish(passed.blob_size).map_err(|source| IndexError::Sink { offset, source })?;
        Ok(StreamSummary {
            blob_digest: passed.blob_digest,
            blob_size: passed.blob_size,
            diff_id,
            layer_size,
            compression: passed.compression,
            entries: self.index.entry_count() as u64,
            spans: self.index.span_count() as u32,
            index_size: self.index.index_size(),
        })
    }
}

/// Compares the blob's digest and the diffID with what an index says.
fn check_layer(index: &LayerIndex, blob_digest: Digest, diff_id: Digest) -> Result<(), IndexError> {
    let same = |what: &str, expected: Digest, actual: Digest| {
        if expected == actual {
            return Ok(());
        }
        Err(IndexError::DigestMismatch { what: what.into(), expected, actual })
    };
    same("the layer blob", index.blob_digest(), blob_digest)?;
    same("the layer file", index.diff_id(), diff_id)
}
