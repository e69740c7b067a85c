//! The pipeline on one thread, for fuzzing only: with short inputs, threads cost far more than the work, and what
//! they do in parallel is not what fuzzing looks for.

use std::io::Read;

use crate::decode::{Cutter, Entrance, Output, decode};
use crate::pipeline::{Consumer, Passed};
use crate::source::{SliceSource, Source};
use crate::{Compression, Digest, IndexError};

/// Length of the pieces and buffers: short, so that inputs reach over their borders.
const PIECE: usize = 1000;

/// Does what [`crate::pipeline::run`] does.
pub(crate) fn run<R: Read + Send>(
    mut blob: R,
    cutter: Cutter<'_>,
    consumer: &mut impl Consumer,
    mut tap: impl FnMut(&[u8]) + Send,
) -> Result<Passed, IndexError> {
    let mut bytes = Vec::new();
    blob.read_to_end(&mut bytes).map_err(|source| IndexError::Read { offset: 0, source })?;
    bytes.chunks(PIECE).for_each(&mut tap);
    let mut source = Pieces(SliceSource::new(&bytes, 0));
    let compression = Compression::detect(source.fill()?);
    consumer.begin(compression)?;
    let mut output = Inline { consumer, buffer: vec![0; PIECE], len: 0, blob: 0 };
    let data_end = decode(compression, &mut source, &mut output, cutter)?;
    output.flush()?;
    Ok(Passed { compression, blob_digest: Digest::of(&bytes), blob_size: bytes.len() as u64, data_end })
}

/// Hands out a slice in pieces.
struct Pieces<'a>(SliceSource<'a>);

impl Source for Pieces<'_> {
    fn fill(&mut self) -> Result<&[u8], IndexError> {
        let left = PIECE - (self.0.offset() % PIECE as u64) as usize;
        let bytes = self.0.fill()?;
        Ok(&bytes[..left.min(bytes.len())])
    }

    fn consume(&mut self, n: usize) {
        self.0.consume(n);
    }

    fn offset(&self) -> u64 {
        self.0.offset()
    }
}

struct Inline<'a, C> {
    consumer: &'a mut C,
    buffer: Vec<u8>,
    len: usize,
    blob: u64,
}

impl<C: Consumer> Inline<'_, C> {
    fn flush(&mut self) -> Result<(), IndexError> {
        let len = std::mem::take(&mut self.len);
        if len == 0 { Ok(()) } else { self.consumer.data(&self.buffer[..len], self.blob) }
    }
}

impl<C: Consumer> Output for Inline<'_, C> {
    fn space(&mut self) -> &mut [u8] {
        &mut self.buffer[self.len..]
    }

    fn filled(&mut self, n: usize, blob: u64) -> Result<(), IndexError> {
        self.len += n;
        self.blob = blob;
        if self.len == self.buffer.len() { self.flush() } else { Ok(()) }
    }

    fn window(&mut self, window: Vec<u8>) -> Result<(), IndexError> {
        self.consumer.window(window);
        Ok(())
    }

    fn cut(&mut self, end: u64, start: u64, entrance: Entrance) -> Result<(), IndexError> {
        self.flush()?;
        self.consumer.cut(end, start, entrance)
    }
}
