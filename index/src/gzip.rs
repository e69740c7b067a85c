//! gzip framing (RFC 1952): member headers and trailers around raw deflate.

use crate::IndexError;
use crate::source::Source;

const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

/// An error about the gzip data at `offset` of the blob.
pub(crate) fn corrupt(offset: u64, reason: impl Into<String>) -> IndexError {
    IndexError::BlobCorrupt { format: "gzip", offset, reason: reason.into() }
}

/// The end of the blob where gzip data should be.
pub(crate) fn truncated(offset: u64) -> IndexError {
    IndexError::BlobTruncated { format: "gzip", offset }
}

/// Consumes the two magic bytes of a member. `false`: the blob ends here, or what follows is no gzip member but
/// padding or garbage, which gzip, Go and so containerd ignore after the last member.
pub(crate) fn member_follows(source: &mut impl Source) -> Result<bool, IndexError> {
    Ok(source.byte()? == Some(0x1f) && source.byte()? == Some(0x8b))
}

/// Consumes a member header after its magic bytes.
pub(crate) fn read_header(source: &mut impl Source) -> Result<(), IndexError> {
    let mut header = HeaderBytes { source, crc: crate::inflate::crc32(0, &[0x1f, 0x8b]) };
    let start = header.source.offset();
    let [method, flags, ..] = header.take::<8>()?;
    if method != 8 {
        return Err(corrupt(start, format!("unknown compression method {method}")));
    }
    if flags & RESERVED != 0 {
        return Err(corrupt(start, "reserved header flags are set"));
    }
    if flags & FEXTRA != 0 {
        for _ in 0..u16::from_le_bytes(header.take()?) {
            header.next()?;
        }
    }
    for flag in [FNAME, FCOMMENT] {
        if flags & flag != 0 {
            while header.next()? != 0 {}
        }
    }
    if flags & FHCRC != 0 {
        let actual = header.crc as u16;
        if u16::from_le_bytes(header.take()?) != actual {
            return Err(corrupt(start, "wrong header checksum"));
        }
    }
    Ok(())
}

/// Consumes a member trailer.
pub(crate) fn read_trailer(source: &mut impl Source) -> Result<Trailer, IndexError> {
    let mut bytes = HeaderBytes { source, crc: 0 };
    Ok(Trailer { crc: u32::from_le_bytes(bytes.take()?), size: u32::from_le_bytes(bytes.take()?) })
}

/// What a member says about its decoded bytes.
pub(crate) struct Trailer {
    /// CRC-32.
    pub(crate) crc: u32,
    /// Length modulo 2^32.
    pub(crate) size: u32,
}

struct HeaderBytes<'a, S: Source> {
    source: &'a mut S,
    crc: u32,
}

impl<S: Source> HeaderBytes<'_, S> {
    fn next(&mut self) -> Result<u8, IndexError> {
        let byte = self.source.byte()?.ok_or_else(|| truncated(self.source.offset()))?;
        self.crc = crate::inflate::crc32(self.crc, &[byte]);
        Ok(byte)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], IndexError> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = self.next()?;
        }
        Ok(bytes)
    }
}
