//! What is asked of a registry: the method, the place, the body.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream;
use lazyrun_index::Digest;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE,
};
use reqwest::{Client, Method, RequestBuilder, Url};

use super::transport::sensitive;
use crate::auth::{Access, Authorization, TokenKey};
use crate::error::FetchError;
use crate::hosts::Endpoint;
use crate::observe::Class;
use crate::reference::Reference;

/// Pieces in which a body leaves, in bytes. Each one counts as progress of the upload.
const PIECE: usize = 128 << 10;

/// A repository and how to talk about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Repository {
    /// As references name it: `docker.io`, `host` or `host:port`.
    pub(crate) registry: String,
    pub(crate) path: String,
    /// It is asked for a reference by digest.
    pub(crate) pinned: bool,
}

impl Repository {
    pub(crate) fn of(reference: &Reference) -> Self {
        Repository {
            registry: reference.registry.clone(),
            path: reference.repository.clone(),
            pinned: reference.digest.is_some(),
        }
    }

    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.registry, self.path)
    }
}

/// What is done with a resource.
#[derive(Clone)]
pub(crate) enum Action {
    /// GET.
    Read,
    /// HEAD.
    Probe,
    /// POST or PUT.
    Write { method: Method, content_type: Option<String>, body: Bytes },
    /// DELETE.
    Delete,
}

impl Action {
    /// Whether it changes something in the registry.
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Action::Write { .. } | Action::Delete)
    }
}

/// What is asked of a repository.
#[derive(Clone)]
pub(crate) struct Call<'a> {
    pub(crate) repository: &'a Repository,
    /// `manifests/latest`, `blobs/sha256:…`
    pub(crate) resource: String,
    /// Where exactly, if the registry has said so; otherwise it follows from the resource.
    pub(crate) place: Option<Url>,
    pub(crate) action: Action,
    pub(crate) accept: Option<&'static str>,
    /// First byte and byte after the last.
    pub(crate) range: Option<(u64, u64)>,
    /// Several ranges instead.
    pub(crate) ranges: Vec<Range<u64>>,
    /// The blob, whose final URL is then remembered.
    pub(crate) blob: Option<Digest>,
    /// Nobody waits for it: other requests to the same host go first.
    pub(crate) patient: bool,
    /// Not over the connection that other requests share.
    pub(crate) apart: bool,
    /// What for.
    pub(crate) class: Class,
}

impl<'a> Call<'a> {
    /// A GET of `resource`.
    pub(crate) fn get(repository: &'a Repository, resource: String) -> Self {
        Call {
            repository,
            resource,
            place: None,
            action: Action::Read,
            accept: None,
            range: None,
            ranges: Vec::new(),
            blob: None,
            patient: false,
            apart: false,
            class: Class::default(),
        }
    }

    /// A GET of a blob.
    pub(crate) fn blob(repository: &'a Repository, digest: Digest) -> Self {
        Call { blob: Some(digest), ..Call::get(repository, format!("blobs/{digest}")) }
    }

    /// Under what the authorization for this call is kept.
    pub(super) fn token_key(&self, at: &Endpoint) -> TokenKey {
        (at.root.to_string(), at.repository.clone(), self.access())
    }

    /// What the authorization must allow.
    pub(super) fn access(&self) -> Access {
        match self.action {
            Action::Read | Action::Probe => Access::Pull,
            Action::Write { .. } => Access::Push,
            Action::Delete => Access::Delete,
        }
    }

    /// Where it goes at a host whose API has this root.
    pub(super) fn url(&self, base: &Url, at: &Endpoint) -> Result<Url, String> {
        let whole = format!("{base}{}/{}", at.repository, self.resource);
        let mut url = Url::parse(&whole).map_err(|e| e.to_string())?;
        if let Some(namespace) = &at.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    /// Its headers; `said` are those that the settings of the host want.
    pub(super) fn headers(
        &self,
        said: Option<&HeaderMap>,
        authorization: Option<&Authorization>,
    ) -> Result<HeaderMap, FetchError> {
        let mut headers = said.cloned().unwrap_or_default();
        if let Some(accept) = self.accept {
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
        }
        let ranges = self.range.map(|(start, end)| start..end).into_iter().chain(self.ranges.iter().cloned());
        let ranges: Vec<String> =
            ranges.map(|r| format!("{}-{}", r.start, r.end.saturating_sub(1))).collect();
        if !ranges.is_empty() {
            let range = HeaderValue::try_from(format!("bytes={}", ranges.join(",")));
            headers.extend(range.ok().map(|range| (RANGE, range)));
        }
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, sensitive(&authorization.value)?);
        }
        Ok(headers)
    }

    /// Method and body; for an upload also what tells how it goes on.
    pub(super) fn request(&self, client: &Client, url: &Url) -> (RequestBuilder, Option<UploadProgress>) {
        match &self.action {
            Action::Read => (client.get(url.clone()).header(ACCEPT_ENCODING, "identity"), None),
            Action::Probe => (client.head(url.clone()).header(ACCEPT_ENCODING, "identity"), None),
            Action::Delete => (client.delete(url.clone()), None),
            Action::Write { method, content_type, body } => {
                let mut request = client.request(method.clone(), url.clone());
                if let Some(content_type) = content_type {
                    request = request.header(CONTENT_TYPE, content_type);
                }
                let progress = UploadProgress::default();
                (request.header(CONTENT_LENGTH, body.len()).body(in_pieces(body, &progress)), Some(progress))
            }
        }
    }
}

/// When the last piece of a body left.
#[derive(Clone)]
pub(super) struct UploadProgress(Arc<Mutex<Instant>>);

impl Default for UploadProgress {
    fn default() -> Self {
        UploadProgress(Arc::new(Mutex::new(Instant::now())))
    }
}

impl UploadProgress {
    pub(super) fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A body that notes when its pieces are taken.
fn in_pieces(body: &Bytes, progress: &UploadProgress) -> reqwest::Body {
    if body.len() <= PIECE {
        return body.clone().into();
    }
    let pieces = stream::unfold((body.clone(), progress.clone()), |(mut rest, progress)| async move {
        if rest.is_empty() {
            return None;
        }
        progress.note();
        let piece = rest.split_to(rest.len().min(PIECE));
        Some((Ok::<_, std::convert::Infallible>(piece), (rest, progress)))
    });
    reqwest::Body::wrap_stream(pieces)
}
