//! One request to a registry: connection, authorization, redirects, statuses.

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;

use super::ClientOptions;
use super::call::UploadProgress;
pub(crate) use super::call::{Call, Repository};
use super::gates::{Gates, Pass};
use super::hedge::Hedges;
use super::redirect::{MAX_HOPS, RedirectCache, next_hop, same_origin};
use super::retry::{Retrier, RetryPolicy, retry_after};
use crate::auth::{Authorization, CredentialStore, TokenCache};
use crate::error::FetchError;
use crate::manifest::printable;
use crate::observe::Exchange;
use crate::stats::ClientCounters;

/// Largest token answer or error body that is read, in bytes.
pub(super) const MAX_SMALL_BODY: u64 = 256 << 10;

/// How often one call answers a 401. Tokens are shared, and some are good for few requests.
const MAX_ANSWERS: usize = 3;

/// Connections, tokens and what was learnt about hosts.
pub(crate) struct Transport {
    pub(crate) options: ClientOptions,
    pub(crate) counters: Arc<ClientCounters>,
    trusted: OnceLock<Result<Client, String>>,
    insecure: OnceLock<Result<Client, String>>,
    local: OnceLock<Result<Client, String>>,
    /// As `trusted`, with connections of its own for requests apart.
    spare: OnceLock<Result<Client, String>>,
    /// Insecure registries that turned out to speak only plain http.
    plain: Mutex<HashMap<String, bool>>,
    pub(super) credentials: CredentialStore,
    pub(super) tokens: TokenCache,
    /// One token request at a time per registry: a hundred blobs must not ask for a hundred tokens.
    pub(super) token_turn: tokio::sync::Mutex<()>,
    /// One change of a list of referrers at a time: a registry has no way to change it safely.
    pub(super) referrers_turn: tokio::sync::Mutex<()>,
    /// Registries (by endpoint) that are known to have the referrers API.
    pub(super) referrers_api: Mutex<HashSet<String>>,
    redirects: RedirectCache,
    pub(super) gates: Gates,
    pub(super) hedges: Hedges,
}

impl Transport {
    pub(crate) fn new(options: ClientOptions) -> Self {
        // reqwest is built without a crypto provider; whoever was first keeps theirs.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let policy = policy_of(&options);
        Transport {
            credentials: CredentialStore::new(options.docker_config.clone()),
            options,
            counters: Arc::default(),
            trusted: OnceLock::new(),
            insecure: OnceLock::new(),
            local: OnceLock::new(),
            spare: OnceLock::new(),
            plain: Mutex::default(),
            tokens: TokenCache::default(),
            token_turn: tokio::sync::Mutex::default(),
            referrers_turn: tokio::sync::Mutex::default(),
            referrers_api: Mutex::default(),
            redirects: RedirectCache::default(),
            gates: Gates::new(&policy),
            hedges: Hedges::default(),
        }
    }

    pub(crate) fn policy(&self) -> Retrier<'_> {
        Retrier { policy: policy_of(&self.options), retries: &self.counters.retries }
    }

    /// Sends a call, answers a 401, follows redirects; the answer's status is 200 or 206 (or 416).
    pub(crate) async fn send(&self, call: &Call<'_>) -> Result<Response, FetchError> {
        if let Some(response) = self.send_to_known_place(call).await? {
            return Ok(response);
        }
        let key = call.token_key();
        let mut authorization = self.tokens.get(&key);
        for answered in 0..=MAX_ANSWERS {
            let base = self.base_url(&call.repository.endpoint).await?;
            let response = self.follow(&base, call, authorization.as_ref()).await?;
            if response.status() != StatusCode::UNAUTHORIZED || !same_origin(response.url(), &base) {
                return self.check(response, call).await;
            }
            // A token may be used up by others before it is used here; what else was refused stays refused.
            let again = authorization.as_ref().is_none_or(|a| a.value.starts_with("Bearer "));
            if answered > 0 && (answered == MAX_ANSWERS || !again) {
                self.tokens.forget(&key);
                let reason = if authorization.is_some() {
                    "the credentials were not accepted"
                } else {
                    "a login is needed"
                };
                return Err(denied(call, self.error_detail(response).await.as_deref().unwrap_or(reason)));
            }
            authorization = Some(self.answer_challenge(call, response, authorization).await?);
        }
        Err(denied(call, "the credentials were not accepted"))
    }

    /// Tries the URL that a redirect led to before; `None` when it is not known or not good any more.
    async fn send_to_known_place(&self, call: &Call<'_>) -> Result<Option<Response>, FetchError> {
        let Some(digest) = call.blob else { return Ok(None) };
        let name = call.repository.name();
        let Some(url) = self.redirects.get(&name, digest) else { return Ok(None) };
        let response = self.exchange(&url, call, None).await?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                Ok(Some(response))
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                self.check(response, call).await.map(Some)
            }
            // Expired, mostly 403: the registry gives a new one.
            _ => {
                self.redirects.forget(&name, digest);
                Ok(None)
            }
        }
    }

    /// Sends to the call's place and wherever it redirects; the authorization goes only to `base`, the
    /// registry. What writes is not sent anew somewhere else unless the status says so (307, 308).
    async fn follow(
        &self,
        base: &Url,
        call: &Call<'_>,
        authorization: Option<&Authorization>,
    ) -> Result<Response, FetchError> {
        let fail = |reason: &str| self.protocol(&host_of(base), call, reason);
        let mut url = match &call.place {
            Some(place) => place.clone(),
            None => base
                .join(&format!("/v2/{}/{}", call.repository.path, call.resource))
                .map_err(|e| fail(&e.to_string()))?,
        };
        for _ in 0..=MAX_HOPS {
            let shown = authorization.filter(|_| same_origin(base, &url));
            let response = self.exchange(&url, call, shown).await?;
            let status = response.status();
            if !status.is_redirection() || status == StatusCode::NOT_MODIFIED {
                if let Some(digest) = call.blob
                    && !same_origin(base, &url)
                    && status.is_success()
                {
                    self.redirects.put(&call.repository.name(), digest, url);
                }
                return Ok(response);
            }
            if call.action.writes()
                && !matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT)
            {
                return Err(fail("it redirects what should be written"));
            }
            let location = response.headers().get(LOCATION).and_then(|v| v.to_str().ok());
            url = next_hop(&url, location).map_err(fail)?;
        }
        Err(fail("too many redirects"))
    }

    /// One HTTP exchange up to the response's header.
    async fn exchange(
        &self,
        url: &Url,
        call: &Call<'_>,
        authorization: Option<&Authorization>,
    ) -> Result<Response, FetchError> {
        let host = host_of(url);
        let client = if call.apart { self.client_apart(url)? } else { self.client_for(url)? };
        let seen = Exchange::begin(self, &host, call);
        let pass = self.gates.enter(&host, call.patient).await;
        seen.sent();
        let (mut request, progress) = call.request(client, url);
        if let Some(accept) = call.accept {
            request = request.header(ACCEPT, accept);
        }
        if let Some((start, end)) = call.range {
            request = request.header(RANGE, format!("bytes={start}-{}", end.saturating_sub(1)));
        }
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, sensitive(&authorization.value)?);
        }
        let mut answer = match progress {
            None => self.timed(&host, &call.resource, request.send()).await,
            Some(progress) => self.timed_upload(&host, &call.resource, request.send(), &progress).await,
        };
        seen.answered(&mut answer);
        let response = answer?;
        self.answered(&pass, &response);
        Ok(response)
    }

    /// Gives the place in the host's window back, and lets the host say that it is too much.
    pub(super) fn answered(&self, pass: &Pass, response: &Response) {
        if pass.answered(response.status(), response.headers()) {
            self.counters.throttled.fetch_add(1, Relaxed);
        }
    }

    /// Waits for a response's header at most as long as a stall may last, and words the errors.
    pub(super) async fn timed(
        &self,
        host: &str,
        what: &str,
        exchange: impl Future<Output = Result<Response, reqwest::Error>>,
    ) -> Result<Response, FetchError> {
        self.counters.requests.fetch_add(1, Relaxed);
        let limit = self.options.stall_timeout;
        match tokio::time::timeout(limit, exchange).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(classify(host, what, error)),
            Err(_) => Err(FetchError::Stalled { host: host.to_owned(), what: what.to_owned(), after: limit }),
        }
    }

    /// As `timed`, for a request with a long body: it may take as long as bytes of it keep leaving.
    async fn timed_upload(
        &self,
        host: &str,
        what: &str,
        exchange: impl Future<Output = Result<Response, reqwest::Error>>,
        progress: &UploadProgress,
    ) -> Result<Response, FetchError> {
        self.counters.requests.fetch_add(1, Relaxed);
        let limit = self.options.stall_timeout;
        let mut exchange = std::pin::pin!(exchange);
        loop {
            let deadline = progress.last() + limit;
            match tokio::time::timeout_at(deadline.into(), &mut exchange).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => return Err(classify(host, what, error)),
                Err(_) if progress.last() + limit > deadline => {}
                Err(_) => {
                    let (host, what) = (host.to_owned(), what.to_owned());
                    return Err(FetchError::Stalled { host, what, after: limit });
                }
            }
        }
    }

    /// The next piece of a body; `None` at its end.
    pub(crate) async fn next_chunk(
        &self,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<Bytes>, FetchError> {
        let limit = self.options.stall_timeout;
        let host = host_of(response.url());
        let piece = match tokio::time::timeout(limit, response.chunk()).await {
            Ok(Ok(chunk)) => {
                let len = chunk.as_ref().map_or(0, |c| c.len() as u64);
                self.counters.bytes.fetch_add(len, Relaxed);
                Ok(chunk)
            }
            Ok(Err(error)) => Err(classify(&host, what, error)),
            Err(_) => Err(FetchError::Stalled { host, what: what.to_owned(), after: limit }),
        };
        Exchange::piece(response, &piece);
        piece
    }

    /// A whole body of at most `limit` bytes.
    pub(crate) async fn body(
        &self,
        mut response: Response,
        what: &str,
        limit: u64,
    ) -> Result<Bytes, FetchError> {
        let host = host_of(response.url());
        let too_large = || FetchError::TooLarge { host: host.clone(), what: what.to_owned(), limit };
        if response.content_length().is_some_and(|l| l > limit) {
            return Err(too_large());
        }
        let mut out = BytesMut::new();
        while let Some(chunk) = self.next_chunk(&mut response, what).await? {
            if out.len() as u64 + chunk.len() as u64 > limit {
                return Err(too_large());
            }
            out.extend_from_slice(&chunk);
        }
        Ok(out.freeze())
    }

    /// Turns an error status into an error.
    async fn check(&self, response: Response, call: &Call<'_>) -> Result<Response, FetchError> {
        let status = response.status();
        let host = host_of(response.url());
        match status {
            _ if call.action.writes() && status.is_success() => Ok(response),
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                let html = response
                    .headers()
                    .get(CONTENT_TYPE)
                    .is_some_and(|v| v.as_bytes().starts_with(b"text/html"));
                if html && status == StatusCode::OK {
                    return Err(self.protocol(
                        &host,
                        call,
                        "it sent a web page; is there a captive portal or a proxy?",
                    ));
                }
                Ok(response)
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let detail = self.error_detail(response).await;
                Err(denied(call, detail.as_deref().unwrap_or("no permission")))
            }
            // Without the registry's words a refused manifest would be a riddle.
            _ if call.action.writes()
                && status.is_client_error()
                && status != StatusCode::TOO_MANY_REQUESTS =>
            {
                let reason =
                    self.error_detail(response).await.unwrap_or_else(|| "it gives no reason".to_owned());
                Err(FetchError::Rejected {
                    host,
                    status: status.as_u16(),
                    what: call.resource.clone(),
                    reason,
                })
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => match call.blob {
                Some(digest) => Err(FetchError::BlobNotFound { host, digest }),
                None => Err(FetchError::Server {
                    host,
                    status: 404,
                    what: call.resource.clone(),
                    retry_after: None,
                }),
            },
            StatusCode::TOO_MANY_REQUESTS => {
                Err(FetchError::RateLimited { host, retry_after: retry_after(response.headers()) })
            }
            _ => Err(FetchError::Server {
                host,
                status: status.as_u16(),
                what: call.resource.clone(),
                retry_after: retry_after(response.headers()),
            }),
        }
    }

    /// The first message of a registry's JSON error.
    pub(super) async fn error_detail(&self, response: Response) -> Option<String> {
        #[derive(Deserialize)]
        struct Errors {
            #[serde(default)]
            errors: Vec<OneError>,
            details: Option<String>,
        }
        #[derive(Deserialize)]
        struct OneError {
            #[serde(default)]
            message: String,
        }
        let body = self.body(response, "an error", MAX_SMALL_BODY).await.ok()?;
        let errors: Errors = serde_json::from_slice(&body).ok()?;
        let first = errors.errors.into_iter().map(|e| e.message).find(|m| !m.is_empty()).or(errors.details)?;
        Some(printable(&first))
    }

    /// `http://host/` or `https://host/` for a registry; learns which for insecure ones.
    pub(super) async fn base_url(&self, endpoint: &str) -> Result<Url, FetchError> {
        let parse = |scheme: &str| {
            Url::parse(&format!("{scheme}://{endpoint}/")).map_err(|e| FetchError::Unreachable {
                host: endpoint.to_owned(),
                reason: format!("not a host name: {e}"),
            })
        };
        let url = parse("https")?;
        if is_loopback(&url) {
            return parse("http");
        }
        if !self.is_insecure(endpoint) {
            return Ok(url);
        }
        let known = self.plain.lock().unwrap_or_else(PoisonError::into_inner).get(endpoint).copied();
        let plain = match known {
            Some(plain) => plain,
            None => {
                let probe = self.client_for(&url)?.get(url.clone());
                let plain = self.timed(endpoint, "the registry", probe.send()).await.is_err();
                self.plain.lock().unwrap_or_else(PoisonError::into_inner).insert(endpoint.to_owned(), plain);
                plain
            }
        };
        if plain { parse("http") } else { Ok(url) }
    }

    fn is_insecure(&self, endpoint: &str) -> bool {
        self.options.insecure_registries.iter().any(|name| name == endpoint)
    }

    pub(super) fn client_for(&self, url: &Url) -> Result<&Client, FetchError> {
        let host = host_of(url);
        let (slot, insecure, proxied) = if is_loopback(url) {
            (&self.local, self.is_insecure(&host), false)
        } else if self.is_insecure(&host) {
            (&self.insecure, true, true)
        } else {
            (&self.trusted, false, true)
        };
        let client = slot.get_or_init(|| self.build_client(insecure, proxied));
        client.as_ref().map_err(|reason| FetchError::Tls { host, reason: reason.clone() })
    }

    /// As `client_for`, but over connections of its own where requests would share one (HTTP/2).
    fn client_apart(&self, url: &Url) -> Result<&Client, FetchError> {
        let host = host_of(url);
        if is_loopback(url) || self.is_insecure(&host) {
            return self.client_for(url);
        }
        let client = self.spare.get_or_init(|| self.build_client(false, true));
        client.as_ref().map_err(|reason| FetchError::Tls { host, reason: reason.clone() })
    }

    fn build_client(&self, insecure: bool, proxied: bool) -> Result<Client, String> {
        let build = |roots: bool| {
            let mut builder = Client::builder()
                .user_agent(self.options.user_agent.clone())
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(self.options.connect_timeout)
                .pool_idle_timeout(Duration::from_secs(60))
                .tcp_nodelay(true)
                .tcp_keepalive(Duration::from_secs(30))
                .http2_adaptive_window(true)
                .retry(reqwest::retry::never())
                .tls_danger_accept_invalid_certs(insecure);
            if !proxied {
                builder = builder.no_proxy();
            }
            if !roots {
                builder = builder.tls_certs_only([]);
            }
            builder.build()
        };
        // A machine without CA certificates can still use loopback registries.
        let result = if proxied { build(true) } else { build(true).or_else(|_| build(false)) };
        result.map_err(|e| deepest(&e))
    }

    pub(super) fn protocol(&self, host: &str, call: &Call<'_>, reason: &str) -> FetchError {
        FetchError::Protocol { host: host.to_owned(), what: call.resource.clone(), reason: reason.to_owned() }
    }
}

fn policy_of(options: &ClientOptions) -> RetryPolicy {
    RetryPolicy { retries: options.retries, base: options.retry_base, max_wait: options.max_retry_wait }
}

pub(super) fn denied(call: &Call<'_>, reason: &str) -> FetchError {
    FetchError::Denied {
        image: call.repository.name(),
        host: call.repository.registry.clone(),
        reason: reason.to_owned(),
    }
}

/// A header value that the HTTP stack neither logs nor indexes.
pub(super) fn sensitive(value: &str) -> Result<reqwest::header::HeaderValue, FetchError> {
    let mut value = reqwest::header::HeaderValue::from_str(value).map_err(|_| FetchError::Credentials {
        host: "the registry".into(),
        reason: "they hold control characters".into(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// `host` or `host:port` as in a reference.
pub(crate) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Words an HTTP client's error without the URL (signed URLs are secrets).
fn classify(host: &str, what: &str, error: reqwest::Error) -> FetchError {
    let error = error.without_url();
    if let Some(tls) = error.source().and_then(find_tls) {
        return FetchError::Tls { host: host.to_owned(), reason: tls.to_string() };
    }
    let (host, reason) = (host.to_owned(), deepest(&error));
    if error.is_connect() {
        FetchError::Unreachable { host, reason }
    } else {
        FetchError::Broken { host, what: what.to_owned(), reason }
    }
}

/// The TLS error behind an error. An `io::Error` hides what it wraps from the chain of sources.
fn find_tls<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls);
    }
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.and_then(|inner| find_tls(inner)).or_else(|| error.source().and_then(find_tls))
}

/// The innermost cause, which is the one that says something.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut current = error;
    while let Some(source) = current.source() {
        current = source;
    }
    current.to_string()
}
