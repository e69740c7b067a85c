//! From a packed table to its JSON text, as a stream.

use std::io::{self, Read};

use super::json::{self, Record};
use super::{Packing, TableError};
use crate::Digest;
use crate::decode::ZSTD_WINDOW_LOG_MAX;
use crate::gzip;
use crate::inflate::Inflater;
use crate::source::{SliceSource, Source};
use crate::tar::{BLOCK, Header, clean};

/// Name of the JSON file in eStargz's tar.
const JSON_NAME: &[u8] = b"stargz.index.json";

/// Reads all records. Returns the digest and the length of the JSON text.
pub(super) fn json(
    packing: Packing,
    packed: &[u8],
    each: &mut dyn FnMut(Record) -> Result<(), TableError>,
) -> Result<(Digest, u64), TableError> {
    match packing {
        Packing::GzipTar => {
            let mut member = GzipMember::new(packed).map_err(|e| TableError::packed(e.to_string()))?;
            let len = json_len(&mut member)?;
            let (digest, read) = json::read(member.take(len), each)?;
            if read != len {
                return Err(TableError::Length {
                    what: "the unpacked table of contents",
                    expected: len,
                    actual: read,
                });
            }
            Ok((digest, read))
        }
        Packing::Zstd => {
            let failed = |e: io::Error| TableError::packed(e.to_string());
            let mut decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(failed)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(failed)?;
            json::read(decoder, each)
        }
    }
}

/// Consumes the tar header in front of the JSON text; returns the text's length.
fn json_len(tar: &mut impl Read) -> Result<u64, TableError> {
    let mut block = [0; BLOCK];
    tar.read_exact(&mut block).map_err(|e| TableError::packed(e.to_string()))?;
    let header =
        Header::parse(&block).map_err(|e| TableError::packed(format!("its tar header is bad: {e}")))?;
    if clean(&header.name).as_deref() != Ok(JSON_NAME) || !matches!(header.flag, b'0' | 0) {
        return Err(TableError::packed("its tar does not start with the file stargz.index.json"));
    }
    let len = u64::try_from(header.size).map_err(|_| TableError::packed("its length is negative"))?;
    super::check_json_len(len)
}

/// The decoded bytes of one gzip member. Its checksum is not looked at: the table has a digest.
struct GzipMember<'a> {
    source: SliceSource<'a>,
    inflater: Inflater,
    ended: bool,
}

impl<'a> GzipMember<'a> {
    fn new(packed: &'a [u8]) -> Result<Self, crate::IndexError> {
        let mut source = SliceSource::new(packed, 0);
        if !gzip::member_follows(&mut source)? {
            return Err(gzip::corrupt(0, "no gzip member starts here"));
        }
        gzip::read_header(&mut source)?;
        let inflater = Inflater::new().map_err(|e| gzip::corrupt(0, e))?;
        Ok(Self { source, inflater, ended: false })
    }
}

impl Read for GzipMember<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut produced = 0;
        while produced == 0 && !self.ended && !out.is_empty() {
            let input = self.source.fill().map_err(io::Error::other)?;
            let step = self.inflater.run(input, out, false).map_err(io::Error::other)?;
            if step.consumed == 0 && step.produced == 0 && !step.end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.source.consume(step.consumed);
            self.ended = step.end;
            produced = step.produced;
        }
        Ok(produced)
    }
}
