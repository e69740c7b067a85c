//! Several ranges of a blob by one request. Many registries and the stores behind them do that, others do not; it saves
//! requests where it works, and is never needed.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyrun_index::Digest;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Response, StatusCode};

use super::blob::BlobSource;
use super::multipart::Parts;
use super::trail::{Trail, Witness};
use super::transport::{Call, host_of};
use crate::error::FetchError;
use crate::observe::Class;

/// Ranges of one request. Some servers count them, and headers have a bound.
pub(crate) const MAX_PARTS: usize = 64;
/// A registry that refused is asked again after this time.
const FORGIVEN: Duration = Duration::from_secs(3600);
/// Registries remembered.
const MAX_REGISTRIES: usize = 256;

/// Registries that are known not to send several ranges at once, and since when.
#[derive(Default)]
pub(crate) struct PartRefusals(Mutex<HashMap<String, Instant>>);

impl PartRefusals {
    fn knows(&self, registry: &str) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(registry).is_some_and(|since| since.elapsed() < FORGIVEN)
    }

    fn note(&self, registry: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_REGISTRIES {
            known.clear();
        }
        known.insert(registry.to_owned(), Instant::now());
    }
}

/// Reads several ranges of a blob from one answer.
pub(crate) struct PartsReader {
    source: BlobSource,
    digest: Digest,
    response: Response,
    parts: Parts,
    witness: Witness,
    first_byte: Duration,
}

impl BlobSource {
    /// Whether the registry may still be thought to send several ranges at once.
    pub(crate) fn may_do_parts(&self) -> bool {
        !self.transport.part_refusals.knows(&self.repository.registry)
    }

    /// Asks for several ranges, apart and at most [`MAX_PARTS`], by one request that lets others go first. `None`: the
    /// registry does not do that, which is remembered.
    ///
    /// # Errors
    /// When the request fails otherwise. It is not repeated.
    pub(crate) async fn parts(
        &self,
        digest: Digest,
        ranges: &[Range<u64>],
    ) -> Result<Option<PartsReader>, FetchError> {
        let trail = Trail::begin(self.clone(), digest, true).await?;
        let mut call = Call::blob(&self.repository, digest);
        call.ranges = ranges.to_vec();
        (call.patient, call.class) = (true, Class::Prefetch);
        let began = Instant::now();
        let refused = || self.transport.part_refusals.note(&self.repository.registry);
        let response = match self.transport.send(&call, trail.host()).await {
            Ok(response) => response,
            // 501 or whatever else a server thinks of it.
            Err(error @ (FetchError::Server { .. } | FetchError::Protocol { .. }))
                if !error.is_transient() =>
            {
                tracing::debug!(%error, "several ranges at once are refused");
                refused();
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let parts = kind
            .filter(|_| response.status() == StatusCode::PARTIAL_CONTENT)
            .and_then(|kind| Parts::new(kind, ranges));
        let Some(parts) = parts else {
            refused();
            return Ok(None);
        };
        let witness = Witness::new(self, digest);
        witness.saw(trail.host());
        let first_byte = began.elapsed();
        Ok(Some(PartsReader { source: self.clone(), digest, response, parts, witness, first_byte }))
    }
}

impl PartsReader {
    /// The blob that is read.
    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    /// Time to the header of the answer.
    pub(crate) fn first_byte(&self) -> Duration {
        self.first_byte
    }

    /// Tells later which host the bytes came from.
    pub(crate) fn witness(&self) -> &Witness {
        &self.witness
    }

    /// The next bytes and their place in the blob; `None` when all have come.
    ///
    /// # Errors
    /// When the answer breaks off or is not what was asked for.
    pub(crate) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, FetchError> {
        let what = format!("parts of blob {}", self.digest);
        loop {
            match self.parts.next() {
                Ok(Some(piece)) => return Ok(Some(piece)),
                Ok(None) if self.parts.is_done() => return Ok(None),
                Ok(None) => {}
                Err(reason) => {
                    self.source.transport.part_refusals.note(&self.source.repository.registry);
                    return Err(FetchError::Protocol { host: host_of(self.response.url()), what, reason });
                }
            }
            match self.source.transport.next_chunk(&mut self.response, &what).await? {
                Some(chunk) => self.parts.feed(&chunk),
                None => return Err(FetchError::Interrupted { what: "an answer with several parts" }),
            }
        }
    }
}
