//! gzip blobs from the fuzzer's bytes.

use flate2::{Compress, Compression, Crc, Decompress, FlushCompress, FlushDecompress, Status};

use crate::{EMPTY_TAR, LAYER_MAX};

const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

/// Raw deflate streams, one after the other, as members with right trailers. The first begins with an empty tar
/// in a stored block. What is no deflate stream stands at the end as it is.
pub(crate) fn members(streams: &[u8]) -> Vec<u8> {
    let mut first = vec![0, 0, 4, 0xff, 0xfb];
    first.extend_from_slice(&EMPTY_TAR);
    first.extend_from_slice(streams);
    let (mut blob, mut rest) = (Vec::new(), &first[..]);
    while !rest.is_empty() {
        blob.extend_from_slice(&HEADER);
        let Some((len, trailer)) = inflate(rest) else {
            blob.extend_from_slice(rest);
            break;
        };
        blob.extend_from_slice(&rest[..len]);
        blob.extend_from_slice(&trailer);
        rest = &rest[len..];
    }
    blob
}

/// Length and gzip trailer of the deflate stream at the start of `bytes`.
fn inflate(bytes: &[u8]) -> Option<(usize, [u8; 8])> {
    let (mut inflater, mut crc, mut out) = (Decompress::new(false), Crc::new(), vec![0; 1 << 16]);
    loop {
        let (before_in, before) = (inflater.total_in(), inflater.total_out());
        let input = &bytes[before_in as usize..];
        let status = inflater.decompress(input, &mut out, FlushDecompress::None).ok()?;
        let produced = (inflater.total_out() - before) as usize;
        crc.update(&out[..produced]);
        if status == Status::StreamEnd {
            let mut trailer = [0; 8];
            trailer[..4].copy_from_slice(&crc.sum().to_le_bytes());
            trailer[4..].copy_from_slice(&crc.amount().to_le_bytes());
            return Some((inflater.total_in() as usize, trailer));
        }
        let stuck = produced == 0 && inflater.total_in() == before_in;
        if stuck || inflater.total_out() > LAYER_MAX as u64 {
            return None;
        }
    }
}

/// Compresses content at any level, with flush points or in many members, as `pieces` says.
pub(crate) fn compressed(content: &[u8], level: u8, pieces: u8) -> Vec<u8> {
    let mut blob = Vec::new();
    let size = 700 + usize::from(pieces >> 2) * 97;
    let each = if pieces & 1 == 0 { content.len() } else { size };
    for member in content.chunks(each) {
        let mut crc = Crc::new();
        crc.update(member);
        blob.extend_from_slice(&HEADER);
        deflate(member, size, level, pieces & 2 != 0, &mut blob);
        blob.extend_from_slice(&crc.sum().to_le_bytes());
        blob.extend_from_slice(&crc.amount().to_le_bytes());
    }
    blob
}

fn deflate(content: &[u8], piece: usize, level: u8, flush: bool, blob: &mut Vec<u8>) {
    let mut deflater = Compress::new(Compression::new(u32::from(level % 10)), false);
    let flush = match (flush, level & 0x40 != 0) {
        (false, _) => FlushCompress::None,
        (true, false) => FlushCompress::Sync,
        (true, true) => FlushCompress::Full,
    };
    let mut pieces = content.chunks(piece).peekable();
    while let Some(piece) = pieces.next() {
        let flush = if pieces.peek().is_none() { FlushCompress::Finish } else { flush };
        let start = deflater.total_in();
        loop {
            let input = &piece[(deflater.total_in() - start) as usize..];
            blob.reserve(input.len() + 1024);
            let status = deflater.compress_vec(input, blob, flush).expect("deflate takes anything");
            let finishing = flush == FlushCompress::Finish && status != Status::StreamEnd;
            if (deflater.total_in() - start) as usize == piece.len()
                && !finishing
                && blob.len() < blob.capacity()
            {
                break;
            }
        }
    }
}

/// One member of stored blocks.
pub(crate) fn stored(content: &[u8]) -> Vec<u8> {
    compressed(content, 0, 0)
}
