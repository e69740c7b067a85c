//! The way of a layer from the thread that makes it to containerd: digested, compressed, in pieces, with a bound on
//! how many wait.

use std::io::{self, Write};

use flate2::write::GzEncoder;
use lazyrun_index::{Digest, Hasher};
use tokio::sync::mpsc;

/// Bytes of one piece: containerd takes messages of up to 4 MiB from everybody.
pub(super) const PIECE: usize = 1 << 20;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// That of a media type; `None` for media types that are no layers, or encrypted ones.
    pub(super) fn of(media_type: &str) -> Option<Self> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Some(Self::None)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Some(Self::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// What is known of a layer when all of it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Digests {
    /// Of the tar.
    pub(super) diff_id: Digest,
    /// Of the blob.
    pub(super) blob: Digest,
}

/// Takes a tar, sends a blob.
pub(super) struct Layer {
    encoder: Encoder,
    diff_id: Hasher,
}

enum Encoder {
    None(Pieces),
    Gzip(GzEncoder<Pieces>),
    Zstd(zstd::Encoder<'static, Pieces>),
}

impl Layer {
    /// Sends pieces to `to`.
    ///
    /// # Errors
    /// When the compressor can't be made.
    pub(super) fn new(compression: Compression, to: mpsc::Sender<Vec<u8>>) -> io::Result<Self> {
        let pieces = Pieces { to, piece: Vec::with_capacity(PIECE), blob: Hasher::new() };
        let encoder = match compression {
            Compression::None => Encoder::None(pieces),
            Compression::Gzip => Encoder::Gzip(GzEncoder::new(pieces, flate2::Compression::default())),
            Compression::Zstd => Encoder::Zstd(zstd::Encoder::new(pieces, 0)?),
        };
        Ok(Self { encoder, diff_id: Hasher::new() })
    }

    /// Sends the rest.
    ///
    /// # Errors
    /// When nobody takes it any more.
    pub(super) fn finish(self) -> io::Result<Digests> {
        let mut pieces = match self.encoder {
            Encoder::None(pieces) => pieces,
            Encoder::Gzip(encoder) => encoder.finish()?,
            Encoder::Zstd(encoder) => encoder.finish()?,
        };
        pieces.send()?;
        Ok(Digests { diff_id: self.diff_id.finish(), blob: pieces.blob.finish() })
    }
}

impl Write for Layer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.encoder {
            Encoder::None(to) => to.write(bytes),
            Encoder::Gzip(to) => to.write(bytes),
            Encoder::Zstd(to) => to.write(bytes),
        }?;
        self.diff_id.update(&bytes[..written]);
        Ok(written)
    }

    // Pieces are sent when they are full.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Pieces {
    to: mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
    blob: Hasher,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.blob.update(&piece);
        let sent = self.to.blocking_send(piece);
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "nobody waits for it any more"))
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..taken]);
        if self.piece.len() == PIECE {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
