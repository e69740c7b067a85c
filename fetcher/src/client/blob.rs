//! Reading blobs: whole or in ranges, resumed where a connection broke.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use futures_util::{Stream, stream};
use lazyrun_index::Digest;
use reqwest::Response;

use super::range::{BodyStart, judge};
use super::trail::{Trail, Witness};
use super::transport::{Call, Repository, Transport, host_of};
use crate::error::FetchError;
use crate::observe::Class;

/// Bytes that are read and thrown away for a range from a server that ignores ranges.
const MAX_SKIP: u64 = 8 << 20;
/// Progress that earns a broken read all its tries again: some proxies cut every connection after a while.
const PROGRESS_FOR_RETRY: u64 = 256 << 10;
/// Tries of a read that is answered against the protocol: a single such answer may be somebody's on the way.
const PROTOCOL_TRIES: usize = 2;

/// The blobs of one repository, with what it takes to read them.
#[derive(Clone)]
pub struct BlobSource {
    pub(super) transport: Arc<Transport>,
    pub(super) repository: Arc<Repository>,
}

impl std::fmt::Debug for BlobSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlobSource({})", self.repository.name())
    }
}

impl BlobSource {
    /// Registry and repository that the blobs come from.
    pub fn name(&self) -> String {
        self.repository.name()
    }

    /// Bytes `range` of a blob. Nothing is verified: a part has no digest.
    ///
    /// # Errors
    /// When the bytes cannot be had after retries.
    pub async fn range(&self, digest: Digest, range: Range<u64>) -> Result<Bytes, FetchError> {
        let mut reader = self.reader(digest, range.clone(), None);
        let mut out = BytesMut::new();
        while let Some(chunk) = reader.next().await? {
            if out.is_empty() && reader.is_done() {
                return Ok(chunk);
            }
            out.extend_from_slice(&chunk);
        }
        Ok(out.freeze())
    }

    /// A whole blob of `size` bytes, front to back. A broken connection is resumed by range; what comes is at
    /// most `size` bytes and not verified.
    ///
    /// # Errors
    /// When the first bytes cannot be had after retries; later errors come from the stream.
    pub async fn stream(
        &self,
        digest: Digest,
        size: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, FetchError>> + Send + use<>, FetchError> {
        let mut reader = self.reader(digest, 0..size, Some(size));
        reader.connect().await?;
        Ok(stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|chunk| (chunk, reader)))
        }))
    }

    /// A reader of bytes `range`; `size` is the blob's size when known.
    pub fn reader(&self, digest: Digest, range: Range<u64>, size: Option<u64>) -> BlobReader {
        BlobReader {
            trail: None,
            witness: Witness::new(self, digest),
            source: self.clone(),
            digest,
            start: range.start,
            position: range.start,
            end: range.end.max(range.start),
            whole: range.start == 0 && size == Some(range.end),
            body: None,
            ready: None,
            patient: false,
            class: Class::default(),
            hedge: None,
            failures: 0,
            protocol_failures: 0,
            credited: range.start,
            first_byte: None,
        }
    }
}

/// Reads a run of a blob piece by piece, through broken connections.
pub struct BlobReader {
    source: BlobSource,
    /// Where it goes, from the first request on.
    trail: Option<Trail>,
    witness: Witness,
    digest: Digest,
    start: u64,
    position: u64,
    end: u64,
    whole: bool,
    body: Option<Body>,
    /// A piece that came while connecting.
    ready: Option<Bytes>,
    patient: bool,
    class: Class,
    /// Where a second request goes when the first is slow, until there was one.
    hedge: Option<BlobSource>,
    failures: usize,
    protocol_failures: usize,
    credited: u64,
    first_byte: Option<Duration>,
}

struct Body {
    response: Response,
    skip: u64,
}

/// What one request is for.
#[derive(Clone, Copy)]
struct Wish {
    digest: Digest,
    start: u64,
    position: u64,
    end: u64,
    whole: bool,
    patient: bool,
    class: Class,
    /// A second request beside a slow one.
    second: bool,
}

/// What one request brought: a piece of its body and what is to come.
struct Got {
    body: Body,
    chunk: Bytes,
    /// Time to the header, if the request was sent for this.
    first_byte: Option<Duration>,
}

impl BlobReader {
    /// Whether all bytes have come.
    pub fn is_done(&self) -> bool {
        self.position >= self.end
    }

    /// The next byte of the blob that [`BlobReader::next`] gives.
    pub(crate) fn position(&self) -> u64 {
        self.position - self.ready.as_ref().map_or(0, |ready| ready.len() as u64)
    }

    /// The blob that is read.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Time from sending the last request to its response's header, once there was one.
    pub fn first_byte(&self) -> Option<Duration> {
        self.first_byte
    }

    /// Says what the bytes are for.
    pub fn for_class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    /// Lets other requests to the same host go first: nobody waits for these bytes.
    pub(crate) fn patient(mut self) -> Self {
        self.patient = true;
        self
    }

    /// Allows one second request, to `other` or to the same place, when a request brings nothing for much longer
    /// than usual. Whichever brings something first goes on.
    pub(crate) fn hedged(mut self, other: Option<BlobSource>) -> Self {
        self.hedge = Some(other.unwrap_or_else(|| self.source.clone()));
        self
    }

    /// The next piece; `None` when all bytes of the range have come.
    ///
    /// # Errors
    /// When the bytes do not come after retries. The reader may be asked again after an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        if let Some(chunk) = self.ready.take() {
            return Ok(Some(chunk));
        }
        while !self.is_done() {
            match self.step().await {
                Ok(chunk) if chunk.is_empty() => {}
                Ok(chunk) => return Ok(Some(chunk)),
                Err(error) => self.after_failure(error).await?,
            }
        }
        Ok(None)
    }

    /// Makes sure that the first piece has come, with retries.
    pub(crate) async fn connect(&mut self) -> Result<(), FetchError> {
        if self.ready.is_none() && self.body.is_none() {
            self.ready = self.next().await?;
        }
        Ok(())
    }

    /// Says that the bytes do not have the blob's digest: mirrors that they came from are not asked for it any more. True
    /// if there were any, so that another try brings other bytes.
    pub fn disown(&self) -> bool {
        self.witness.disown()
    }

    /// Tells later which hosts the bytes came from.
    pub(crate) fn witness(&self) -> Witness {
        self.witness.clone()
    }

    /// Connects if there is no connection and reads one piece of the body.
    async fn step(&mut self) -> Result<Bytes, FetchError> {
        let trail = match self.trail.take() {
            Some(trail) => trail,
            None => Trail::begin(self.source.clone(), self.digest, !self.whole).await?,
        };
        let trail = self.trail.insert(trail).clone();
        let wish = Wish {
            digest: self.digest,
            start: self.start,
            position: self.position,
            end: self.end,
            whole: self.whole,
            patient: self.patient,
            class: self.class,
            second: false,
        };
        let first = wish.piece(trail.clone(), &self.witness, self.body.take());
        let mut got = match self.hedge.take() {
            None => first.await?,
            Some(other) => {
                let hedges = &self.source.transport.hedges;
                let mut first = pin!(first);
                match tokio::time::timeout(hedges.patience(trail.host().key()), first.as_mut()).await {
                    Ok(got) => {
                        self.hedge = Some(other);
                        got?
                    }
                    Err(_) if !hedges.take() => first.await?,
                    Err(_) => {
                        let (got, winner) = wish.beside(first, &trail, other, &self.witness).await?;
                        self.trail = winner.or(self.trail.take());
                        got
                    }
                }
            }
        };
        self.first_byte = got.first_byte.or(self.first_byte);
        let wanted = self.end - self.position;
        if got.chunk.len() as u64 > wanted {
            got.chunk.truncate(wanted as usize);
        }
        self.position += got.chunk.len() as u64;
        self.body = Some(got.body);
        Ok(got.chunk)
    }

    /// Goes on to the next host, waits before the next try, or gives the error back when there were enough.
    async fn after_failure(&mut self, error: FetchError) -> Result<(), FetchError> {
        self.body = None;
        if self.position - self.credited >= PROGRESS_FOR_RETRY {
            self.failures = 0;
            self.protocol_failures = 0;
            self.credited = self.position;
        }
        // Without a trail the settings are to blame.
        let Some(trail) = &mut self.trail else { return Err(error) };
        trail.failed(self.digest, &error);
        let wait = if trail.host().is_mirror() { None } else { self.patience(&error) };
        let Some(wait) = wait else {
            let went_on = self.trail.as_mut().map_or(Ok(()), |trail| trail.go_on(error));
            // Who asks again begins again.
            return went_on.inspect_err(|_| self.trail = None);
        };
        self.failures += 1;
        tracing::debug!(%error, ?wait, blob = %self.digest, position = self.position, "blob read is resumed");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// How long to wait before the same host is asked again; `None`: it is not.
    fn patience(&mut self, error: &FetchError) -> Option<Duration> {
        let policy = self.source.transport.policy();
        let asked = error.retry_after().unwrap_or_default();
        let resumable = match error {
            FetchError::Truncated { .. } => true,
            FetchError::Protocol { .. } => {
                self.protocol_failures += 1;
                self.protocol_failures < PROTOCOL_TRIES
            }
            error => error.is_transient(),
        };
        let wait = policy.delays().nth(self.failures)?;
        let wait = (resumable && asked <= policy.max_wait).then(|| wait.max(asked))?;
        self.source.transport.counters.retries.fetch_add(1, Relaxed);
        Some(wait)
    }
}

impl Wish {
    /// Lets a second request run beside a slow first one. An error of one leaves the other its chance. Also gives the
    /// trail of the second, if that won.
    async fn beside(
        self,
        first: impl Future<Output = Result<Got, FetchError>>,
        trail: &Trail,
        other: BlobSource,
        witness: &Witness,
    ) -> Result<(Got, Option<Trail>), FetchError> {
        let counters = &trail.source.transport.counters;
        counters.hedges.fetch_add(1, Relaxed);
        tracing::debug!(blob = %self.digest, "a slow request gets a second one");
        let wish = Wish { second: true, ..self };
        let second = pin!(async {
            let trail = if other.repository == trail.source.repository {
                trail.beside()
            } else {
                Trail::begin(other, self.digest, !self.whole).await?
            };
            Ok((wish.piece(trail.clone(), witness, None).await?, trail))
        });
        let won = match select(pin!(first), second).await {
            Either::Left((Ok(got), _)) => return Ok((got, None)),
            Either::Left((Err(_), second)) => second.await?,
            Either::Right((Ok(won), _)) => won,
            Either::Right((Err::<_, FetchError>(_), first)) => return Ok((first.await?, None)),
        };
        counters.hedges_won.fetch_add(1, Relaxed);
        Ok((won.0, Some(won.1)))
    }

    /// Sends a request unless there is a body to go on with, and reads the next piece of the body.
    async fn piece(self, trail: Trail, witness: &Witness, body: Option<Body>) -> Result<Got, FetchError> {
        let (mut body, first_byte) = match body {
            Some(body) => (body, None),
            None => self.open(&trail).await?,
        };
        let what = self.what();
        let Some(mut chunk) = trail.source.transport.next_chunk(&mut body.response, &what).await? else {
            return Err(FetchError::Truncated {
                host: host_of(body.response.url()),
                digest: self.digest,
                got: self.position - self.start,
                want: self.end - self.start,
            });
        };
        witness.saw(trail.host());
        if body.skip > 0 {
            let skipped = body.skip.min(chunk.len() as u64);
            body.skip -= skipped;
            // Cannot truncate: it is at most the length of a buffer.
            let _ = chunk.split_to(skipped as usize);
        }
        Ok(Got { body, chunk, first_byte })
    }

    async fn open(self, trail: &Trail) -> Result<(Body, Option<Duration>), FetchError> {
        let (transport, host) = (&trail.source.transport, trail.host());
        let from_start = self.whole && self.position == 0;
        let mut call = Call::blob(&trail.source.repository, self.digest);
        call.range = (!from_start).then_some((self.position, self.end));
        (call.patient, call.apart, call.class) = (self.patient, self.second, self.class);
        let began = Instant::now();
        let response = transport.send(&call, host).await?;
        let first_byte = began.elapsed();
        transport.hedges.observe(host.key(), first_byte);
        if host.is_mirror() {
            transport.health.answered(host);
        }
        let answering = || host_of(response.url());
        let start = judge(response.status(), response.headers(), self.position, self.end)
            .map_err(|reason| FetchError::Protocol { host: answering(), what: self.what(), reason })?;
        let skip = match start {
            BodyStart::AtRange => 0,
            // A stream that is resumed has to get there anyhow; a lone range must not cost a whole blob.
            BodyStart::Skip(skip) if skip <= MAX_SKIP || self.whole => skip,
            BodyStart::Skip(_) => {
                return Err(FetchError::RangeIgnored { host: answering(), digest: self.digest });
            }
        };
        Ok((Body { response, skip }, Some(first_byte)))
    }

    fn what(self) -> String {
        format!("blob {}", self.digest)
    }
}
