//! Where the read of a blob goes: from mirror to mirror to the registry, and who has given what.

use std::sync::{Arc, Mutex, PoisonError};

use lazyrun_index::Digest;

use super::ask::{Ask, Route};
use super::blob::BlobSource;
use super::transport::place_of;
use crate::error::FetchError;
use crate::hosts::{Endpoint, Lack, Need};

/// The hosts that a read may go to, and the one that it is at.
#[derive(Clone)]
pub(super) struct Trail {
    pub(super) source: BlobSource,
    route: Arc<Route>,
    at: usize,
    /// What the registry itself said when it was asked in vain.
    refusal: Option<FetchError>,
}

impl Trail {
    /// The trail of a blob's bytes; `ranged`: not all of them from the start.
    ///
    /// # Errors
    /// When the settings are malformed, or no host may be asked.
    pub(super) async fn begin(source: BlobSource, digest: Digest, ranged: bool) -> Result<Trail, FetchError> {
        let with = ranged.then_some(Lack::Ranges(digest));
        let ask = Ask { blob: Some(digest), with, ..Ask::new(&source.repository, Need::Pull) };
        let route = Arc::new(source.transport.route(&ask).await?);
        Ok(Trail { source, route, at: 0, refusal: None })
    }

    /// The host that is asked now. A route is never empty.
    pub(super) fn host(&self) -> &Arc<Endpoint> {
        &self.route[self.at]
    }

    /// Where a second request beside a slow one goes: to the next host if that is one to be asked, or to the same.
    pub(super) fn beside(&self) -> Trail {
        let mut beside = self.clone();
        let next = self.route.get(self.at + 1).filter(|_| self.host().is_mirror());
        if next.is_some_and(|next| !self.source.transport.health.rests(next)) {
            beside.at += 1;
        }
        beside
    }

    /// Notes what went wrong at the host that is asked now.
    pub(super) fn failed(&self, digest: Digest, error: &FetchError) {
        let (transport, host) = (&self.source.transport, self.host());
        transport.redirects.forget(&place_of(host), digest);
        if !host.is_mirror() {
            return;
        }
        transport.health.failed(host, error);
        if matches!(error, FetchError::RangeIgnored { .. } | FetchError::Protocol { .. }) {
            transport.health.lacks(host, Lack::Ranges(digest));
        }
    }

    /// Goes on to the next host.
    ///
    /// # Errors
    /// What went wrong here, or at the registry itself, when there is none, or none that is worth it.
    pub(super) fn go_on(&mut self, error: FetchError) -> Result<(), FetchError> {
        let is_last = self.at + 1 >= self.route.len();
        // Only where the registry could not be asked is a mirror that rests worth a try.
        let final_word = !self.host().is_mirror() && !error.is_transient();
        if is_last || final_word {
            return Err(self.refusal.take().unwrap_or(error));
        }
        tracing::debug!(host = self.host().host(), %error, "a blob is read from the next host");
        if !self.host().is_mirror() {
            self.refusal = Some(error);
        }
        self.at += 1;
        Ok(())
    }
}

/// Remembers which hosts gave the bytes of a read, for when they turn out to be wrong.
#[derive(Clone)]
pub(crate) struct Witness {
    source: BlobSource,
    digest: Digest,
    seen: Arc<Mutex<Vec<Arc<Endpoint>>>>,
}

impl Witness {
    pub(super) fn new(source: &BlobSource, digest: Digest) -> Witness {
        Witness { source: source.clone(), digest, seen: Arc::default() }
    }

    /// A host gives bytes.
    pub(super) fn saw(&self, host: &Arc<Endpoint>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.iter().any(|one| one.key() == host.key()) {
            seen.push(Arc::clone(host));
        }
    }

    /// The bytes do not verify: mirrors that they came from are not asked for this blob any more. True if there were
    /// any, so that another try brings other bytes.
    pub(crate) fn disown(&self) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let health = &self.source.transport.health;
        let mut news = false;
        for mirror in seen.iter().filter(|host| host.is_mirror()) {
            tracing::warn!(mirror = mirror.host(), blob = %self.digest, "a mirror has given wrong bytes");
            news |= !health.is_disbelieved(mirror, self.digest);
            health.disbelieve(mirror, self.digest);
        }
        news
    }
}
