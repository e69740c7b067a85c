//! Decoding one span on its own.

use crate::decode::{Entrance, zstd_corrupt, zstd_decoder, zstd_step};
use crate::gzip;
use crate::inflate::Inflater;
use crate::source::{SliceSource, Source};
use crate::{IndexError, SpanInfo};

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
        Entrance::GzipMember => {
            if !gzip::member_follows(&mut source)? {
                return Err(gzip::corrupt(span.blob_offset, "no gzip member starts here"));
            }
            gzip::read_header(&mut source)?;
            deflate(0, 0, &[], source, out)
        }
        Entrance::Deflate { bits, window } => {
            let mut value = 0;
            if *bits > 0 {
                let byte = source.byte()?.ok_or_else(|| gzip::truncated(span.blob_offset))?;
                value = byte >> (8 - bits.min(&7));
            }
            deflate(*bits, value, window, source, out)
        }
        Entrance::ZstdFrame => zstd(source, out),
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

fn deflate(
    bits: u8,
    value: u8,
    window: &[u8],
    mut source: SliceSource<'_>,
    out: &mut [u8],
) -> Result<(), IndexError> {
    let start = source.offset();
    let mut inflater = Inflater::new().map_err(|reason| gzip::corrupt(start, reason))?;
    inflater.prime(bits.into(), value, window).map_err(|reason| gzip::corrupt(start, reason))?;
    let mut done = 0;
    while done < out.len() {
        let offset = source.offset();
        let input = source.fill()?;
        let ended = input.is_empty();
        let step =
            inflater.run(input, &mut out[done..], false).map_err(|reason| gzip::corrupt(offset, reason))?;
        done += step.produced;
        source.consume(step.consumed);
        if step.end && done < out.len() {
            // The CRC covers the member from its start, which may lie before this span; the span's digest
            // and, when streaming, the CRC itself are checked elsewhere.
            gzip::read_trailer(&mut source)?;
            if !gzip::member_follows(&mut source)? {
                return Err(gzip::truncated(source.offset()));
            }
            gzip::read_header(&mut source)?;
            inflater.reset().map_err(|reason| gzip::corrupt(offset, reason))?;
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

fn zstd(mut source: SliceSource<'_>, out: &mut [u8]) -> Result<(), IndexError> {
    let mut decoder = zstd_decoder()?;
    let mut done = 0;
    while done < out.len() {
        let offset = source.offset();
        let input = source.fill()?;
        let ended = input.is_empty();
        let (consumed, produced, _) =
            zstd_step(&mut decoder, input, &mut out[done..]).map_err(|e| zstd_corrupt(offset, &e))?;
        done += produced;
        source.consume(consumed);
        if ended && consumed == 0 && produced == 0 {
            return Err(IndexError::BlobTruncated { format: "zstd", offset });
        }
    }
    Ok(())
}
