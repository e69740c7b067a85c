//! From the async body of a blob to a blocking `Read`, through a bounded channel.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::{Buf as _, Bytes};
use lazyrun_index::LayerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::claims::LayerState;
use super::{Inner, Progress};
use crate::client::BlobReader;
use crate::error::FetchError;
use crate::store::Layer;

/// Bytes that wait for the decoder: enough to keep it busy while the socket is asked again. There may be a stream for
/// each of many layers.
const DEPTH: usize = 1 << 20;

/// How often a stream that gives way looks whether a fault waits for it.
const TICK: Duration = Duration::from_millis(50);
/// After so many looks it reads a piece all the same: a busy reader must not keep it out for ever.
const MAX_TICKS: u32 = 20;

/// First wait before a source that failed is asked again; doubles each time, with jitter.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

enum Piece {
    /// Bytes, and their place among those that wait.
    Data(Bytes, OwnedSemaphorePermit),
    End,
    Failed(FetchError),
}

/// The sending half, fed in an async task.
pub(super) struct Pump {
    pieces: mpsc::UnboundedSender<Piece>,
    /// Bounds the channel by bytes: pieces are what reads of the socket gave, 1 to 400 KiB.
    room: Arc<Semaphore>,
}

/// How fast a stream may be read.
pub(super) struct Pace(Option<Background>);

/// What a stream in the background minds.
struct Background {
    inner: Arc<Inner>,
    layer: LayerId,
    state: Arc<LayerState>,
    /// Steps back for faults.
    yields: bool,
    /// There is no other source to turn to.
    last: bool,
    progress: Arc<dyn Progress>,
}

impl Pace {
    /// As fast as it comes.
    pub(super) fn full() -> Pace {
        Pace(None)
    }

    /// Within the limit of hydration. The `last` source of a layer is waited for when it does not answer.
    pub(super) fn background(
        inner: &Arc<Inner>,
        layer: &Layer,
        last: bool,
        progress: &Arc<dyn Progress>,
    ) -> Pace {
        let (inner, state) = (Arc::clone(inner), inner.state(layer.id()));
        let progress = Arc::clone(progress);
        Pace(Some(Background { inner, layer: layer.id(), state, yields: false, last, progress }))
    }

    /// The same, and only while no fault is being served, unless a fault waits for this very stream.
    pub(super) fn yielding(
        inner: &Arc<Inner>,
        layer: &Layer,
        last: bool,
        progress: &Arc<dyn Progress>,
    ) -> Pace {
        let Pace(background) = Pace::background(inner, layer, last, progress);
        Pace(background.map(|background| Background { yields: true, ..background }))
    }

    async fn turn(&self) {
        let Some(this) = &self.0 else { return };
        let mut ticks = 0;
        // A fault that waits for the stream is in a hurry whatever else is said.
        while !this.state.stream_wanted() {
            let may = async {
                if this.yields && ticks < MAX_TICKS {
                    this.inner.scheduler.quiet().await;
                }
                if !this.inner.hastes.is_unlimited(this.layer) {
                    this.inner.throttle.ready().await;
                }
            };
            if tokio::time::timeout(TICK, may).await.is_ok() {
                return;
            }
            ticks += 1;
        }
    }

    fn charge(&self, bytes: u64) {
        if let Some(this) = &self.0 {
            this.inner.throttle.charge(bytes);
        }
    }

    /// Waits `wait` and says so, if the error is one that may pass and nobody minds the wait.
    async fn outlast(&self, error: &FetchError, wait: Duration) -> bool {
        let Some(this) = self.0.as_ref().filter(|this| this.last && error.is_transient()) else {
            return false;
        };
        if !this.inner.hastes.is_patient(this.layer) || this.state.stream_wanted() {
            return false;
        }
        this.progress.waiting(this.layer.diff_id, Some(error));
        tracing::debug!(layer = %this.layer, %error, ?wait, "a stream waits for its source");
        tokio::time::sleep(wait.max(error.retry_after().unwrap_or_default())).await;
        true
    }

    fn goes_on(&self) {
        if let Some(this) = &self.0 {
            this.progress.waiting(this.layer.diff_id, None);
        }
    }
}

/// The blocking half.
pub(super) struct PumpReader {
    pieces: mpsc::UnboundedReceiver<Piece>,
    current: Bytes,
    /// The place of `current`.
    place: Option<OwnedSemaphorePermit>,
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
    let (sender, pieces) = mpsc::unbounded_channel();
    let reader = PumpReader { pieces, current: Bytes::new(), place: None, ended: false, failure };
    (Pump { pieces: sender, room: Arc::new(Semaphore::new(DEPTH)) }, reader)
}

impl Pump {
    /// Reads the blob to its end and passes it on; stops when the other side does. `count` hears of each piece.
    pub(super) async fn run(self, mut blob: BlobReader, pace: Pace, mut count: impl FnMut(u64)) {
        let waits = ExponentialBuilder::default().with_min_delay(FIRST_WAIT).with_max_delay(LONGEST_WAIT);
        let waits = waits.without_max_times().with_jitter();
        let mut delays = None;
        loop {
            pace.turn().await;
            let piece = match blob.next().await {
                Ok(Some(bytes)) => {
                    count(bytes.len() as u64);
                    pace.charge(bytes.len() as u64);
                    if delays.take().is_some() {
                        pace.goes_on();
                    }
                    let Some(place) = self.place(bytes.len()).await else { return };
                    Piece::Data(bytes, place)
                }
                Ok(None) => Piece::End,
                Err(error) => {
                    let wait = delays.get_or_insert_with(|| waits.build()).next().unwrap_or(LONGEST_WAIT);
                    let closed = self.pieces.closed();
                    tokio::select! {
                        () = closed => return,
                        // What has come so far is not lost: the reader goes on where it broke off.
                        again = pace.outlast(&error, wait) => if again { continue },
                    }
                    Piece::Failed(error)
                }
            };
            let last = !matches!(piece, Piece::Data(..));
            if self.pieces.send(piece).is_err() || last {
                return;
            }
        }
    }

    /// Room for a piece; `None` once nobody reads.
    async fn place(&self, len: usize) -> Option<OwnedSemaphorePermit> {
        // A piece that is larger than all room takes all of it.
        let permits = u32::try_from(len.min(DEPTH)).unwrap_or(u32::MAX);
        tokio::select! {
            place = Arc::clone(&self.room).acquire_many_owned(permits) => place.ok(),
            () = self.pieces.closed() => None,
        }
    }
}

impl Read for PumpReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(bytes, place)) => (self.current, self.place) = (bytes, Some(place)),
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
