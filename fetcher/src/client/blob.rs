//! Reading blobs: whole or in ranges, resumed where a connection broke.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use lazyrun_index::Digest;
use reqwest::{Response, Url};

use super::range::{BodyStart, judge};
use super::transport::{Call, Repository, Transport, host_of};
use crate::error::FetchError;

/// Bytes that are read and thrown away for a range from a server that ignores ranges.
const MAX_SKIP: u64 = 8 << 20;
/// Progress that earns a broken read another try.
const PROGRESS_FOR_RETRY: u64 = 4 << 20;

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
            source: self.clone(),
            digest,
            start: range.start,
            position: range.start,
            end: range.end.max(range.start),
            whole: range.start == 0 && size == Some(range.end),
            body: None,
            failures: 0,
            credited: range.start,
            first_byte: None,
        }
    }
}

/// Reads a run of a blob piece by piece, through broken connections.
pub struct BlobReader {
    source: BlobSource,
    digest: Digest,
    start: u64,
    position: u64,
    end: u64,
    whole: bool,
    body: Option<Body>,
    failures: usize,
    credited: u64,
    first_byte: Option<Duration>,
}

struct Body {
    response: Response,
    skip: u64,
}

impl BlobReader {
    /// Whether all bytes have come.
    pub fn is_done(&self) -> bool {
        self.position >= self.end
    }

    /// The blob that is read.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Time from sending the last request to its response's header, once there was one.
    pub fn first_byte(&self) -> Option<Duration> {
        self.first_byte
    }

    /// The next piece; `None` when all bytes of the range have come.
    ///
    /// # Errors
    /// When the bytes do not come after retries. The reader may be asked again after an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        while !self.is_done() {
            match self.step().await {
                Ok(Some(chunk)) => return Ok(Some(chunk)),
                Ok(None) => {}
                Err(error) => self.after_failure(error).await?,
            }
        }
        Ok(None)
    }

    /// Connects if there is no connection and reads one piece of the body.
    async fn step(&mut self) -> Result<Option<Bytes>, FetchError> {
        let mut body = match self.body.take() {
            Some(body) => body,
            None => self.open().await?,
        };
        let transport = Arc::clone(&self.source.transport);
        let Some(mut chunk) = transport.next_chunk(&mut body.response, &self.what()).await? else {
            return Err(FetchError::Truncated {
                host: host_of(body.response.url()),
                digest: self.digest,
                got: self.position - self.start,
                want: self.end - self.start,
            });
        };
        if body.skip > 0 {
            let skipped = body.skip.min(chunk.len() as u64);
            body.skip -= skipped;
            // Cannot truncate: it is at most the length of a buffer.
            let _ = chunk.split_to(skipped as usize);
        }
        let wanted = self.end - self.position;
        if chunk.len() as u64 > wanted {
            chunk.truncate(wanted as usize);
        }
        self.position += chunk.len() as u64;
        self.body = Some(body);
        Ok(Some(chunk).filter(|c| !c.is_empty()))
    }

    /// Makes sure that a response has begun, with retries.
    pub(crate) async fn connect(&mut self) -> Result<(), FetchError> {
        while self.body.is_none() && !self.is_done() {
            match self.open().await {
                Ok(body) => self.body = Some(body),
                Err(error) => self.after_failure(error).await?,
            }
        }
        Ok(())
    }

    async fn open(&mut self) -> Result<Body, FetchError> {
        let from_start = self.whole && self.position == 0;
        let mut call = Call::blob(&self.source.repository, self.digest);
        call.range = (!from_start).then_some((self.position, self.end));
        let began = Instant::now();
        let response = self.source.transport.send(&call).await?;
        self.first_byte = Some(began.elapsed());
        let start = judge(response.status(), response.headers(), self.position, self.end)
            .map_err(|reason| self.protocol(response.url(), reason))?;
        match start {
            BodyStart::AtRange => Ok(Body { response, skip: 0 }),
            // A stream that is resumed has to get there anyhow; a lone range must not cost a whole blob.
            BodyStart::Skip(skip) if skip <= MAX_SKIP || self.whole => Ok(Body { response, skip }),
            BodyStart::Skip(_) => {
                Err(FetchError::RangeIgnored { host: host_of(response.url()), digest: self.digest })
            }
        }
    }

    /// Waits before the next try, or gives the error back when there were enough.
    async fn after_failure(&mut self, error: FetchError) -> Result<(), FetchError> {
        self.body = None;
        if self.position - self.credited >= PROGRESS_FOR_RETRY {
            self.failures = 0;
            self.credited = self.position;
        }
        let policy = self.source.transport.policy();
        let asked = error.retry_after().unwrap_or_default();
        let resumable = error.is_transient() || matches!(error, FetchError::Truncated { .. });
        let Some(wait) = policy.delays().nth(self.failures).filter(|_| resumable && asked <= policy.max_wait)
        else {
            return Err(error);
        };
        self.failures += 1;
        let wait = wait.max(asked);
        tracing::debug!(%error, ?wait, blob = %self.digest, position = self.position, "blob read is resumed");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    fn what(&self) -> String {
        format!("blob {}", self.digest)
    }

    fn protocol(&self, url: &Url, reason: String) -> FetchError {
        FetchError::Protocol { host: host_of(url), what: self.what(), reason }
    }
}
