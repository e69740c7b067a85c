//! Decoding one span on its own.

use crate::decode::{Entrance, zstd_corrupt, zstd_decoder, zstd_step};
use crate::gzip;
use crate::inflate::Inflater;
use crate::source::{SliceSource, Source};
use crate::{IndexError, SpanInfo};

/// Room for decoded bytes that come before the span and are thrown away.
const SCRATCH: usize = 64 * 1024;

/// Decodes `compressed` into all of `out`, starting through `entrance`.
pub(crate) fn decode_span(
    span: &SpanInfo,
    entrance: &Entrance,
    compressed: &[u8],
    out: &mut [u8],
) -> Result<(), IndexError> {
    let mut source = SliceSource::new(compressed, span.blob_offset);
    match entrance {
        Entrance::Plain => plain(compressed, out, span),
        Entrance::GzipMember { skip } => {
            if !gzip::member_follows(&mut source)? {
                return Err(gzip::corrupt(span.blob_offset, "no gzip member starts here"));
            }
            gzip::read_header(&mut source)?;
            let mut reader = Deflate::new(0, 0, &[], source)?;
            discard(*skip, |scratch| reader.read(scratch))?;
            reader.read(out)
        }
        Entrance::Deflate { bits, window } => {
            let mut value = 0;
            if *bits > 0 {
                let byte = source.byte()?.ok_or_else(|| gzip::truncated(span.blob_offset))?;
                value = byte >> (8 - bits.min(&7));
            }
            Deflate::new(*bits, value, window, source)?.read(out)
        }
        Entrance::ZstdFrame { skip } => {
            let mut reader = Zstd { decoder: zstd_decoder()?, source };
            discard(*skip, |scratch| reader.read(scratch))?;
            reader.read(out)
        }
        Entrance::None => Err(IndexError::NotRestartable { index: span.index as usize }),
    }
}

fn plain(compressed: &[u8], out: &mut [u8], span: &SpanInfo) -> Result<(), IndexError> {
    if compressed.len() != out.len() {
        return Err(IndexError::LengthMismatch {
            what: format!("span {}", span.index),
            expected: out.len() as u64,
            actual: compressed.len() as u64,
        });
    }
    out.copy_from_slice(compressed);
    Ok(())
}

/// Reads `n` bytes for nothing. The check of the index has bounded `n`.
fn discard(mut n: u64, mut read: impl FnMut(&mut [u8]) -> Result<(), IndexError>) -> Result<(), IndexError> {
    if n == 0 {
        return Ok(());
    }
    let mut scratch = vec![0; SCRATCH];
    while n > 0 {
        let part = n.min(SCRATCH as u64);
        read(&mut scratch[..part as usize])?;
        n -= part;
    }
    Ok(())
}

/// Deflate data, on through member trailers and headers.
struct Deflate<'a> {
    inflater: Inflater,
    source: SliceSource<'a>,
}

impl<'a> Deflate<'a> {
    fn new(bits: u8, value: u8, window: &[u8], source: SliceSource<'a>) -> Result<Self, IndexError> {
        let start = source.offset();
        let mut inflater = Inflater::new().map_err(|reason| gzip::corrupt(start, reason))?;
        inflater.prime(bits.into(), value, window).map_err(|reason| gzip::corrupt(start, reason))?;
        Ok(Self { inflater, source })
    }

    /// Fills all of `out`.
    fn read(&mut self, out: &mut [u8]) -> Result<(), IndexError> {
        let Self { inflater, source } = self;
        let mut done = 0;
        while done < out.len() {
            let offset = source.offset();
            let input = source.fill()?;
            let ended = input.is_empty();
            let step = inflater
                .run(input, &mut out[done..], false)
                .map_err(|reason| gzip::corrupt(offset, reason))?;
            done += step.produced;
            source.consume(step.consumed);
            if step.end {
                if done == out.len() {
                    // The next bytes, if anyone asks for them, are those of the next member.
                    return Ok(());
                }
                next_member(inflater, source)?;
            } else if step.consumed == 0 && step.produced == 0 {
                return Err(if ended {
                    gzip::truncated(offset)
                } else {
                    gzip::corrupt(offset, "the decoder makes no progress")
                });
            }
        }
        Ok(())
    }
}

/// Goes over a member's trailer and the next one's header.
fn next_member(inflater: &mut Inflater, source: &mut SliceSource<'_>) -> Result<(), IndexError> {
    // The CRC covers the member from its start, which may lie before this span; the span's digest
    // and, when streaming, the CRC itself are checked elsewhere.
    gzip::read_trailer(source)?;
    if !gzip::member_follows(source)? {
        return Err(gzip::truncated(source.offset()));
    }
    gzip::read_header(source)?;
    let offset = source.offset();
    inflater.reset().map_err(|reason| gzip::corrupt(offset, reason))
}

/// zstd data, on through frames.
struct Zstd<'a> {
    decoder: zstd::stream::raw::Decoder<'static>,
    source: SliceSource<'a>,
}

impl Zstd<'_> {
    /// Fills all of `out`.
    fn read(&mut self, out: &mut [u8]) -> Result<(), IndexError> {
        let mut done = 0;
        while done < out.len() {
            let offset = self.source.offset();
            let input = self.source.fill()?;
            let ended = input.is_empty();
            let step = zstd_step(&mut self.decoder, input, &mut out[done..])
                .map_err(|e| zstd_corrupt(offset, &e))?;
            done += step.produced;
            self.source.consume(step.consumed);
            if ended && step.consumed == 0 && step.produced == 0 {
                return Err(IndexError::BlobTruncated { format: "zstd", offset });
            }
        }
        Ok(())
    }
}
