//! The streaming decoders: blob bytes in, layer-file bytes and the places to restart at out.

use std::ops::Range;

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use crate::gzip;
use crate::inflate::{Inflater, crc32};
use crate::source::Source;
use crate::window::Trimmer;
use crate::{Compression, IndexError, StreamOptions};

/// How decoding can start at the beginning of a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entrance {
    /// The blob bytes are the layer-file bytes.
    Plain,
    /// At a gzip member's header; `skip` decoded bytes come before the span.
    GzipMember { skip: u64 },
    /// At a deflate block: the last `bits` bits of the first byte belong to it; `window` was decoded before.
    Deflate { bits: u8, window: Vec<u8> },
    /// At the start of a zstd frame; `skip` decoded bytes come before the span.
    ZstdFrame { skip: u64 },
    /// Nowhere: the span can only be reached from the one before.
    None,
}

/// Where the decoders put what they find. An error stops the decoder.
pub(crate) trait Output {
    /// Room for decoded bytes, never empty.
    fn space(&mut self) -> &mut [u8];
    /// The first `n` bytes of `space` are filled now; `blob` is the source's offset.
    fn filled(&mut self, n: usize, blob: u64) -> Result<(), IndexError>;
    /// A better window for the deflate block at which the open span starts.
    fn window(&mut self, window: Vec<u8>) -> Result<(), IndexError>;
    /// The span that was open ends at blob byte `end`; the next starts at `start` through `entrance`.
    fn cut(&mut self, end: u64, start: u64, entrance: Entrance) -> Result<(), IndexError>;
}

/// How far before touched bytes borders are used: deflate blocks are longer only where little is in them.
const APPROACH: u64 = 128 << 10;
/// Least decoded bytes of a span that ends for the sake of touched bytes.
const MIN_CUT: u64 = 16 << 10;

/// Decides where spans end.
pub(crate) struct Cutter<'a> {
    options: StreamOptions,
    /// Runs of the layer file that are read together and little else: spans should follow them. Ascending, apart.
    touched: &'a [Range<u64>],
    /// Borders are where the caller likes, not where a block happens to end.
    exact: bool,
    blob: u64,
    start: u64,
    at: u64,
    restartable: bool,
}

impl<'a> Cutter<'a> {
    pub(crate) fn new(options: StreamOptions, touched: &'a [Range<u64>]) -> Self {
        Self { options, touched, exact: false, blob: 0, start: 0, at: 0, restartable: true }
    }

    /// A cutter for those who know the spans already: it never cuts.
    pub(crate) fn never() -> Self {
        let never = u64::MAX;
        let options =
            StreamOptions { span_size: never, span_len: never, max_span_len: never, max_layer_len: never };
        Self::new(options, &[])
    }

    fn advance(&mut self, produced: usize) {
        self.at += produced as u64;
        while self.touched.first().is_some_and(|run| run.end <= self.start) {
            self.touched = &self.touched[1..];
        }
    }

    /// Where the next touched run is being approached.
    fn approach(&self, run: &Range<u64>) -> u64 {
        if self.exact { run.start } else { run.start.saturating_sub(APPROACH) }
    }

    /// Whether a touched run is near ahead, or has just been left behind.
    fn hinted(&self) -> bool {
        let Some(run) = self.touched.first() else { return false };
        let ahead = self.at >= self.approach(run) && self.at <= run.start && self.at - self.start >= MIN_CUT;
        ahead || (self.at >= run.end && self.start < run.end)
    }

    /// How many of `len` decoded bytes to make before asking again.
    fn room(&self, len: usize) -> usize {
        let places =
            self.touched.first().into_iter().flat_map(|run| [self.approach(run), run.start, run.end]);
        let next = places.filter(|place| *place > self.at).min();
        next.map_or(len, |place| usize::try_from(place - self.at).map_or(len, |left| left.min(len)))
    }

    /// The next border is to become a checkpoint. Spans that cannot be restarted end at the first that can.
    fn due(&self, blob: u64) -> bool {
        let len = self.at - self.start;
        len > 0 && (!self.restartable || self.full(blob, len) || self.hinted())
    }

    /// How much of `input` to decode before asking again: not past the byte after which the span is full.
    fn cap<'i>(&self, blob: u64, input: &'i [u8]) -> &'i [u8] {
        let left = self.options.span_size.saturating_sub(blob.saturating_sub(self.blob));
        if left == 0 {
            return input;
        }
        &input[..usize::try_from(left).map_or(input.len(), |left| left.min(input.len()))]
    }

    fn full(&self, blob: u64, len: u64) -> bool {
        blob.saturating_sub(self.blob) >= self.options.span_size || len >= self.options.span_len
    }

    /// The span has to end here although there is no border.
    fn overdue(&self, blob: u64) -> bool {
        let len = self.at - self.start;
        len >= self.options.max_span_len || (len > 0 && !self.restartable && self.full(blob, len))
    }

    fn cut(
        &mut self,
        output: &mut impl Output,
        end: u64,
        start: u64,
        entrance: Entrance,
    ) -> Result<(), IndexError> {
        self.restartable = entrance != Entrance::None;
        self.blob = start;
        self.start = self.at;
        output.cut(end, start, entrance)
    }
}

/// Decodes a whole blob. Returns the blob offset behind the last byte that was needed.
pub(crate) fn decode(
    compression: Compression,
    source: &mut impl Source,
    output: &mut impl Output,
    cutter: Cutter<'_>,
) -> Result<u64, IndexError> {
    match compression {
        Compression::None => plain(source, output, cutter),
        Compression::Gzip => gzip(source, output, cutter),
        Compression::Zstd => zstd(source, output, cutter),
    }
}

fn plain(
    source: &mut impl Source,
    output: &mut impl Output,
    mut cutter: Cutter<'_>,
) -> Result<u64, IndexError> {
    cutter.exact = true;
    loop {
        let at = source.offset();
        if cutter.due(at) {
            cutter.cut(output, at, at, Entrance::Plain)?;
        }
        let input = cutter.cap(at, source.fill()?);
        if input.is_empty() {
            return Ok(at);
        }
        let space = output.space();
        let n = cutter.room(input.len().min(space.len()));
        space[..n].copy_from_slice(&input[..n]);
        source.consume(n);
        cutter.advance(n);
        output.filled(n, source.offset())?;
    }
}

fn gzip(
    source: &mut impl Source,
    output: &mut impl Output,
    mut cutter: Cutter<'_>,
) -> Result<u64, IndexError> {
    let mut inflater = Inflater::new().map_err(|reason| gzip::corrupt(0, reason))?;
    if !gzip::member_follows(source)? {
        return Err(gzip::truncated(source.offset()));
    }
    loop {
        gzip::read_header(source)?;
        gzip_member(&mut inflater, source, output, &mut cutter)?;
        let end = source.offset();
        if !gzip::member_follows(source)? {
            return Ok(end);
        }
        inflater.reset().map_err(|reason| gzip::corrupt(end, reason))?;
        if cutter.due(end) {
            cutter.cut(output, end, end, Entrance::GzipMember { skip: 0 })?;
        }
    }
}

fn gzip_member(
    inflater: &mut Inflater,
    source: &mut impl Source,
    output: &mut impl Output,
    cutter: &mut Cutter<'_>,
) -> Result<(), IndexError> {
    let (mut crc, mut size) = (0, 0u32);
    let mut last_byte = 0;
    let mut trimmer: Option<Trimmer> = None;
    loop {
        let offset = source.offset();
        let input = cutter.cap(offset, source.fill()?);
        let ended = input.is_empty();
        let space = output.space();
        let room = cutter.room(space.len());
        let space = &mut space[..room];
        let step =
            inflater.run(input, space, cutter.due(offset)).map_err(|reason| gzip::corrupt(offset, reason))?;
        crc = crc32(crc, &space[..step.produced]);
        size = size.wrapping_add(step.produced as u32);
        let used = &input[..step.consumed];
        last_byte = used.last().copied().unwrap_or(last_byte);
        // Before the next cut, so that the window goes to the span it belongs to.
        if let Some(full) = trimmer.take_if(|t| t.feed(used) || step.end || step.border.is_some()) {
            output.window(full.finish())?;
        }
        source.consume(step.consumed);
        let offset = source.offset();
        cutter.advance(step.produced);
        output.filled(step.produced, offset)?;
        if step.end {
            break;
        }
        if let Some(bits) = step.border {
            let window = inflater.window().map_err(|reason| gzip::corrupt(offset, reason))?;
            if bits < 8 {
                let value = if bits > 0 { last_byte >> (8 - bits) } else { 0 };
                trimmer = Some(Trimmer::new(bits, value, window.clone()));
            }
            // Whole bytes that zlib took and did not need are given back; a part of a byte belongs to both spans.
            let end = offset - u64::from(bits / 8);
            let bits = (bits % 8) as u8;
            cutter.cut(output, end, end - u64::from(bits > 0), Entrance::Deflate { bits, window })?;
        } else if cutter.overdue(offset) {
            if let Some(trimmer) = trimmer.take() {
                output.window(trimmer.finish())?;
            }
            cutter.cut(output, offset, offset, Entrance::None)?;
        } else if step.consumed == 0 && step.produced == 0 {
            return Err(if ended {
                gzip::truncated(offset)
            } else {
                gzip::corrupt(offset, "the decoder makes no progress")
            });
        }
    }
    let offset = source.offset();
    let trailer = gzip::read_trailer(source)?;
    if trailer.crc != crc {
        return Err(gzip::corrupt(offset, format!("CRC is {crc:08x} instead of {:08x}", trailer.crc)));
    }
    if trailer.size != size {
        return Err(gzip::corrupt(
            offset,
            format!("length is {size} instead of {} (modulo 2^32)", trailer.size),
        ));
    }
    Ok(())
}

/// Largest zstd window accepted: that of `zstd --ultra -22` and `--long`, and zstd's own default limit.
pub(crate) const ZSTD_WINDOW_LOG_MAX: u32 = 27;

pub(crate) fn zstd_corrupt(offset: u64, source: &std::io::Error) -> IndexError {
    IndexError::BlobCorrupt { format: "zstd", offset, reason: source.to_string() }
}

pub(crate) fn zstd_decoder() -> Result<Decoder<'static>, IndexError> {
    let setup = |source| IndexError::Setup { what: "zstd decoder", source };
    let mut decoder = Decoder::new().map_err(setup)?;
    decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).map_err(setup)?;
    Ok(decoder)
}

/// What one call of a zstd decoder did.
pub(crate) struct ZstdStep {
    pub(crate) consumed: usize,
    pub(crate) produced: usize,
    /// It stands between two frames.
    pub(crate) between: bool,
    /// It may have used one byte more than it says to have consumed: that of a frame's end is given back until all that
    /// was decoded is taken.
    pub(crate) holds_byte: bool,
}

/// One step of a zstd decoder.
pub(crate) fn zstd_step(
    decoder: &mut Decoder<'_>,
    input: &[u8],
    space: &mut [u8],
) -> std::io::Result<ZstdStep> {
    let mut input = InBuffer::around(input);
    let mut space = OutBuffer::around(space);
    let hint = decoder.run(&mut input, &mut space)?;
    let (consumed, produced) = (input.pos(), space.pos());
    Ok(ZstdStep { consumed, produced, between: hint == 0, holds_byte: hint == 1 })
}

fn zstd(
    source: &mut impl Source,
    output: &mut impl Output,
    mut cutter: Cutter<'_>,
) -> Result<u64, IndexError> {
    let mut decoder = zstd_decoder()?;
    let mut between = true;
    loop {
        let offset = source.offset();
        let ended = source.fill()?.is_empty();
        if between && ended {
            return Ok(offset);
        }
        if between && cutter.due(offset) {
            cutter.cut(output, offset, offset, Entrance::ZstdFrame { skip: 0 })?;
        }
        let input = cutter.cap(offset, source.fill()?);
        let step = zstd_step(&mut decoder, input, output.space()).map_err(|e| zstd_corrupt(offset, &e))?;
        source.consume(step.consumed);
        between = step.between;
        let offset = source.offset();
        cutter.advance(step.produced);
        output.filled(step.produced, offset)?;
        if ended && step.consumed == 0 && step.produced == 0 {
            return Err(IndexError::BlobTruncated { format: "zstd", offset });
        }
        if !between && cutter.overdue(offset) {
            let held = step.holds_byte && !source.fill()?.is_empty();
            cutter.cut(output, offset + u64::from(held), offset, Entrance::None)?;
        }
    }
}
