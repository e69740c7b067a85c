//! From the async body of a blob to a blocking `Read`, through a bounded channel.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

use super::Inner;
use super::claims::LayerState;
use crate::client::BlobReader;
use crate::error::FetchError;

/// Pieces that wait for the decoder; a piece is what one read of the socket gave, 8 to 400 KiB.
const DEPTH: usize = 32;

/// How often a stream that gives way looks whether a fault waits for it.
const TICK: Duration = Duration::from_millis(50);
/// After so many looks it reads a piece all the same: a busy reader must not keep it out for ever.
const MAX_TICKS: u32 = 20;

enum Piece {
    Data(Bytes),
    End,
    Failed(FetchError),
}

/// The sending half, fed in an async task.
pub(super) struct Pump {
    pieces: mpsc::Sender<Piece>,
}

/// How fast a stream may be read.
#[derive(Clone)]
pub(super) struct Pace(Option<(Arc<Inner>, Arc<LayerState>)>);

impl Pace {
    /// As fast as it comes.
    pub(super) fn full() -> Pace {
        Pace(None)
    }

    /// Only while no fault is being served, unless a fault waits for this very stream.
    pub(super) fn yielding(inner: &Arc<Inner>, state: Arc<LayerState>) -> Pace {
        Pace(Some((Arc::clone(inner), state)))
    }

    async fn turn(&self) {
        let Some((inner, state)) = &self.0 else { return };
        for _ in 0..MAX_TICKS {
            if state.stream_wanted() || tokio::time::timeout(TICK, inner.scheduler.quiet()).await.is_ok() {
                return;
            }
        }
    }
}

/// The blocking half.
pub(super) struct PumpReader {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
    failure: Failure,
}

/// Why reading failed, for whoever gets only an `io::Error` from in between.
#[derive(Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Option<FetchError>>>);

impl Failure {
    pub(super) fn set(&self, error: FetchError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    pub(super) fn take(&self) -> Option<FetchError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

pub(super) fn pump(failure: Failure) -> (Pump, PumpReader) {
    let (sender, pieces) = mpsc::channel(DEPTH);
    (Pump { pieces: sender }, PumpReader { pieces, current: Bytes::new(), ended: false, failure })
}

impl Pump {
    /// Reads the blob to its end and passes it on; stops when the other side does. `count` hears of each piece.
    pub(super) async fn run(self, mut blob: BlobReader, pace: Pace, mut count: impl FnMut(u64)) {
        loop {
            pace.turn().await;
            let piece = match blob.next().await {
                Ok(Some(bytes)) => {
                    count(bytes.len() as u64);
                    Piece::Data(bytes)
                }
                Ok(None) => Piece::End,
                Err(error) => Piece::Failed(error),
            };
            let last = !matches!(piece, Piece::Data(_));
            if self.pieces.send(piece).await.is_err() || last {
                return;
            }
        }
    }
}

impl Read for PumpReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(bytes)) => self.current = bytes,
                Some(Piece::End) => self.ended = true,
                Some(Piece::Failed(error)) => {
                    let text = error.to_string();
                    self.failure.set(error);
                    return Err(io::Error::other(text));
                }
                // The task was dropped: this is no end of the blob.
                None => {
                    self.failure.set(FetchError::Interrupted { what: "a stream" });
                    return Err(io::Error::other("the stream was interrupted"));
                }
            }
        }
        let len = buf.len().min(self.current.len());
        buf[..len].copy_from_slice(&self.current[..len]);
        self.current.advance(len);
        Ok(len)
    }
}
