//! Proving an adopted index: one stream of the whole blob tells whether it told the truth.
//!
//! The layer is used meanwhile, so the stream gives way to faults unless one of them waits for it. What passes fills
//! the layer file like any stream; a proof that fails half-way starts from scratch.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use lazyrun_index::{Digest, DigestOf, Hasher, IndexError, LayerSink, Layout, SpanInfo, prove_layer};
use tracing::Instrument as _;

use super::claims::LayerState;
use super::polite::Polite;
use super::pump::{Failure, Pace, PumpReader, pump};
use super::{Inner, Progress, blocking, ingest, table};
use crate::error::FetchError;
use crate::observe::Class;
use crate::store::{Layer, LayerPin, is_full};

/// Passes per source when what comes is damaged.
const TRIES: usize = 2;
/// Decoded bytes held for spans whose digest is not told yet. What is beyond is fetched again later.
const MAX_PENDING: usize = 16 << 20;
/// Stored spans between two writes of the map.
const SAVE_EVERY: u32 = 16;

/// Proves the layer's index and stores what passes. A lie is remembered in the store.
pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    if let Some(lie) = layer.lie() {
        return Err(lie);
    }
    let span = tracing::info_span!("prove", layer = %layer.id(), image = inner.image_of(layer));
    match layer.id().layout {
        Layout::Tar => tar(inner, layer, progress).instrument(span).await?,
        Layout::Table => table::run(inner, layer, progress).instrument(span).await?,
    }
    inner.state(layer.id()).changed.notify_waiters();
    Ok(())
}

async fn tar(inner: &Arc<Inner>, layer: &Arc<Layer>, progress: &Arc<dyn Progress>) -> Result<(), FetchError> {
    let (owned_inner, owned_layer, owned_progress) =
        (Arc::clone(inner), Arc::clone(layer), Arc::clone(progress));
    pass(inner, layer, progress, move |reader, problem| {
        let (inner, layer) = (&owned_inner, &owned_layer);
        let mut sink = Sink::new(layer, inner.state(layer.id()), &owned_progress);
        // The index that comes out is as good as the adopted one that has been proven by it.
        let options = inner.options.stream_of(layer.index().blob_size());
        let proven = prove_layer(layer.index(), reader, &mut sink, io::empty(), &options);
        let stored = layer.save_map();
        let contradiction = sink.contradiction.take();
        match proven {
            Ok(_) => {}
            Err(IndexError::Lie(mismatch)) => {
                return Err(inner.store.condemn(layer, &mismatch.to_string()));
            }
            Err(error) => {
                let digest = layer.index().blob_digest();
                return Err(ingest::layer_error(digest, error, problem, &layer.data_path()));
            }
        }
        if let Some(span) = contradiction {
            let reason =
                format!("span {span} decodes to other bytes by its checkpoint than by the whole blob");
            return Err(inner.store.condemn(layer, &reason));
        }
        stored
            .and_then(|()| layer.prove())
            .map_err(|e| FetchError::store("writing", &layer.data_path(), e))?;
        inner.store.know_contents(layer);
        Ok(())
    })
    .await
}

/// Feeds `work` with the blob from the first source that can deliver it.
pub(super) async fn pass<T: Send + 'static>(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
    work: impl Fn(PumpReader, &Failure) -> Result<T, FetchError> + Send + Sync + 'static,
) -> Result<T, FetchError> {
    let _slot = inner.scheduler.stream().await?;
    let _memory = inner.memory.stream(layer).await?;
    let (digest, size) = (layer.index().blob_digest(), layer.index().blob_size());
    let work = Arc::new(work);
    let mut failure = FetchError::NoSource { diff_id: layer.diff_id() };
    let sources = inner.sources(layer)?;
    for (number, source) in sources.iter().enumerate() {
        let mut tries = 0;
        while tries < TRIES {
            tries += 1;
            let pace = Pace::yielding(inner, layer, number + 1 == sources.len(), progress);
            let problem = Failure::default();
            let (feeder, reader) = pump(problem.clone());
            let work = Arc::clone(&work);
            let worker = blocking("proving a layer", move || {
                let _polite = Polite::now();
                work(reader, &problem)
            });
            inner.counters.background_requests.fetch_add(1, Relaxed);
            let blob = source.reader(digest, 0..size, Some(size)).for_class(Class::Hydrate);
            let witness = blob.witness();
            let feed = feeder.run(blob, pace, |n| {
                inner.counters.background_bytes.fetch_add(n, Relaxed);
                inner.scheduler.link.arrived(n, Instant::now());
            });
            let ((), result) = tokio::join!(feed, worker);
            match result {
                Err(error) if ingest::is_damage(&error) => {
                    tracing::warn!(%error, source = source.name(), "layer is streamed again");
                    // What a mirror has spoilt is no try of the registry.
                    tries -= usize::from(witness.disown());
                    failure = error;
                }
                Err(error) if error.is_transient() => {
                    failure = error;
                    break;
                }
                done => return done,
            }
        }
    }
    Err(failure)
}

/// Stores the spans of the claimed index as the prover lets them pass.
struct Sink {
    layer: Arc<Layer>,
    /// What was seen to be here is still here when it is compared.
    _pin: LayerPin,
    state: Arc<LayerState>,
    progress: Arc<dyn Progress>,
    /// `forget`s before the pass.
    epoch: u64,
    /// The span whose bytes are passing, what of it has passed, and its digest.
    current: Option<Passing>,
    /// The next span to pass.
    next: usize,
    /// Spans that have passed and are not told to be right yet.
    pending: VecDeque<(usize, Vec<u8>)>,
    pending_len: usize,
    /// Spans without a digest: what they were found to have.
    found: HashMap<usize, Digest>,
    unsaved: u32,
    /// A span that a fault has stored before with other bytes. Whether the index is to blame is known when the whole
    /// blob is proven.
    contradiction: Option<usize>,
}

struct Passing {
    span: SpanInfo,
    /// Nobody else writes this span: it goes to the file at once.
    ahead: bool,
    bytes: Vec<u8>,
    done: u64,
    hasher: Hasher,
}

impl Sink {
    fn new(layer: &Arc<Layer>, state: Arc<LayerState>, progress: &Arc<dyn Progress>) -> Sink {
        let pin = layer.pin_busy();
        Sink {
            epoch: layer.epoch(),
            _pin: pin,
            layer: Arc::clone(layer),
            state,
            progress: Arc::clone(progress),
            current: None,
            next: 0,
            pending: VecDeque::new(),
            pending_len: 0,
            found: HashMap::new(),
            unsaved: 0,
            contradiction: None,
        }
    }

    fn begin(&self, number: usize) -> Passing {
        let span = self.layer.index().span(number);
        let ahead = span.digest_of == DigestOf::Nothing && !self.layer.can_fault(&span);
        // Its length was bounded when the index was checked; growing by doubling would take twice as much.
        let bytes = if ahead { Vec::new() } else { Vec::with_capacity(span.len as usize) };
        Passing { span, ahead, bytes, done: 0, hasher: Hasher::new() }
    }

    fn pass(&mut self, passing: &mut Passing, bytes: &[u8]) -> io::Result<()> {
        let at = passing.span.offset + passing.done;
        passing.done += bytes.len() as u64;
        if passing.ahead {
            passing.hasher.update(bytes);
            if !self.layer.has_span(passing.span.index as usize) {
                self.layer.write_ahead(at, bytes)?;
            }
        } else {
            passing.bytes.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn passed(&mut self, passing: Passing) -> io::Result<()> {
        let number = passing.span.index as usize;
        if passing.ahead {
            self.found.insert(number, passing.hasher.finish());
            return Ok(());
        }
        if passing.span.digest_of == DigestOf::Nothing {
            // Known from an earlier proof, so it need not wait for the end of this one.
            return self.store(&passing.span, &passing.bytes);
        }
        self.pending_len += passing.bytes.len();
        self.pending.push_back((number, passing.bytes));
        while self.pending_len > MAX_PENDING && self.pending.len() > 1 {
            self.pending_len -= self.pending.pop_front().map_or(0, |(_, bytes)| bytes.len());
        }
        Ok(())
    }

    fn store(&mut self, span: &SpanInfo, bytes: &[u8]) -> io::Result<()> {
        let known = self.layer.has_span(span.index as usize);
        if known && span.digest_of == DigestOf::Decoded {
            return Ok(());
        }
        match self.layer.write_span_for(self.state.stream_need(), span, bytes) {
            Ok(true) => {}
            Ok(false) => {
                self.contradiction.get_or_insert(span.index as usize);
            }
            // The index is proven all the same; who wants the span fetches it.
            Err(error) if is_full(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
        self.stored()
    }

    fn stored(&mut self) -> io::Result<()> {
        self.state.changed.notify_waiters();
        self.unsaved += 1;
        if self.unsaved >= SAVE_EVERY {
            self.layer.save_map()?;
            self.unsaved = 0;
        }
        Ok(())
    }
}

impl LayerSink for Sink {
    fn data(&mut self, offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        // What is beyond the claimed end is the prover's business.
        let left = self.layer.index().layer_size().saturating_sub(offset);
        bytes = &bytes[..usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len())];
        while !bytes.is_empty() {
            let mut passing = match self.current.take() {
                Some(passing) => passing,
                None => self.begin(self.next),
            };
            let left = passing.span.len - passing.done;
            let (now, later) = bytes.split_at(usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len()));
            self.pass(&mut passing, now)?;
            bytes = later;
            if passing.done == passing.span.len {
                self.next += 1;
                self.passed(passing)?;
            } else {
                self.current = Some(passing);
            }
        }
        Ok(())
    }

    fn span(&mut self, proven: &SpanInfo) -> io::Result<()> {
        let number = proven.index as usize;
        let span = self.layer.index().span(number);
        if let Some(digest) = self.found.remove(&number) {
            if self.layer.has_span(number) {
                if !self.layer.agrees(&span, digest)? {
                    self.contradiction.get_or_insert(number);
                }
                return Ok(());
            }
            self.layer.admit_span(&span, digest, self.epoch)?;
            return self.stored();
        }
        let Some(at) = self.pending.iter().position(|(n, _)| *n == number) else { return Ok(()) };
        let Some((_, bytes)) = self.pending.remove(at) else { return Ok(()) };
        self.pending_len -= bytes.len();
        self.store(&span, &bytes)
    }

    fn progress(&mut self, blob_bytes: u64) {
        self.progress.advance(self.layer.diff_id(), blob_bytes, self.layer.index().blob_size());
    }
}
