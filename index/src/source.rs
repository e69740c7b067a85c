//! Where the decoders take compressed bytes from: the pipeline's channel or a slice.

use std::sync::mpsc::{Receiver, Sender};

use crate::IndexError;

/// A run of blob bytes, handed out piece by piece.
pub(crate) trait Source {
    /// The bytes at hand, getting more if there are none. Empty only at the end of the blob.
    fn fill(&mut self) -> Result<&[u8], IndexError>;
    /// Marks `n` of the bytes `fill` returned as used.
    fn consume(&mut self, n: usize);
    /// Blob offset of the next byte.
    fn offset(&self) -> u64;

    /// The next byte, or `None` at the end.
    fn byte(&mut self) -> Result<Option<u8>, IndexError> {
        let byte = self.fill()?.first().copied();
        if byte.is_some() {
            self.consume(1);
        }
        Ok(byte)
    }
}

/// Blob bytes that are all in memory.
pub(crate) struct SliceSource<'a> {
    bytes: &'a [u8],
    offset: u64,
}

impl<'a> SliceSource<'a> {
    /// `offset` is the place of the first byte in the blob, for error messages.
    pub(crate) fn new(bytes: &'a [u8], offset: u64) -> Self {
        Self { bytes, offset }
    }
}

impl Source for SliceSource<'_> {
    fn fill(&mut self) -> Result<&[u8], IndexError> {
        Ok(self.bytes)
    }

    fn consume(&mut self, n: usize) {
        self.bytes = self.bytes.get(n..).unwrap_or_default();
        self.offset += n as u64;
    }

    fn offset(&self) -> u64 {
        self.offset
    }
}

/// A buffer on its way from the reader to the decoder, or the reader's error.
pub(crate) type Piece = Result<Vec<u8>, IndexError>;

/// Blob bytes that come from the reader's thread.
pub(crate) struct ChannelSource {
    pieces: Receiver<Piece>,
    used: Sender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    offset: u64,
    ended: bool,
}

impl ChannelSource {
    /// Takes buffers from `pieces` and gives them back over `used`.
    pub(crate) fn new(pieces: Receiver<Piece>, used: Sender<Vec<u8>>) -> Self {
        Self { pieces, used, piece: Vec::new(), at: 0, offset: 0, ended: false }
    }
}

impl Source for ChannelSource {
    fn fill(&mut self) -> Result<&[u8], IndexError> {
        while self.at == self.piece.len() && !self.ended {
            match self.pieces.recv() {
                Ok(piece) => {
                    let old = std::mem::replace(&mut self.piece, piece?);
                    self.at = 0;
                    // The reader may have ended already and not want it back.
                    let _ = self.used.send(old);
                }
                Err(_) => self.ended = true,
            }
        }
        Ok(&self.piece[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at = (self.at + n).min(self.piece.len());
        self.offset += n as u64;
    }

    fn offset(&self) -> u64 {
        self.offset
    }
}
