//! One request to a host: connection, authorization, redirects, statuses.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::LOCATION;
use reqwest::{Response, StatusCode, Url};

use super::ClientOptions;
use super::answer::denied;
use super::call::UploadProgress;
pub(crate) use super::call::{Call, Repository};
use super::classify::{classify, is_turned_away};
use super::gates::{Gates, Pass};
use super::hedge::Hedges;
use super::login::Share;
use super::parts::PartRefusals;
use super::pools::{Pools, Way};
use super::redirect::{MAX_HOPS, RedirectCache, next_hop, same_origin};
use super::retry::{Retrier, RetryPolicy};
use crate::auth::{Authorization, CredentialStore, TokenCache};
use crate::error::FetchError;
use crate::hosts::{Endpoint, Health, Hosts, Role, TlsSettings, is_loopback};
use crate::observe::Exchange;
use crate::stats::ClientCounters;

/// How often one call answers a 401. Tokens are shared, and some are good for few requests.
const MAX_ANSWERS: usize = 3;

/// How often a request that a server turned away is sent over a fresh connection.
const FRESH_CONNECTIONS: usize = 4;

/// Bound for connecting to a mirror, if it is not set: the next host is nearer than a long wait.
const MIRROR_CONNECT: Duration = Duration::from_secs(3);

/// Longest wait for a mirror's answer to begin, for the same reason. It may have to ask the registry itself first.
const MIRROR_ANSWER: Duration = Duration::from_secs(8);

/// Connections, tokens and what was learnt about hosts.
pub(crate) struct Transport {
    pub(crate) options: ClientOptions,
    pub(crate) counters: Arc<ClientCounters>,
    pub(super) hosts: Hosts,
    pub(super) health: Health,
    pub(super) pools: Pools,
    /// Insecure registries (by host) of which it is known whether they speak only plain http.
    plain: Mutex<HashMap<String, bool>>,
    pub(super) credentials: CredentialStore,
    pub(super) tokens: TokenCache,
    /// One change of a list of referrers at a time: a registry has no way to change it safely.
    pub(super) referrers_turn: tokio::sync::Mutex<()>,
    /// Registries that are known to have the referrers API.
    pub(super) referrers_api: Mutex<HashSet<String>>,
    pub(super) redirects: RedirectCache,
    pub(super) gates: Gates,
    pub(super) hedges: Hedges,
    pub(super) part_refusals: PartRefusals,
}

impl Transport {
    pub(crate) fn new(options: ClientOptions) -> Self {
        // reqwest is built without a crypto provider; whoever was first keeps theirs.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let policy = policy_of(&options);
        Transport {
            credentials: CredentialStore::new(options.credential_files.clone())
                .with_providers(options.credential_providers.clone())
                .with_keychain(options.keychain.clone()),
            hosts: Hosts::new(options.hosts.clone(), options.insecure_registries.clone()),
            health: Health::new(options.mirror_rest),
            pools: Pools::new(options.user_agent.clone(), options.proxies.clone()),
            options,
            counters: Arc::default(),
            plain: Mutex::default(),
            tokens: TokenCache::default(),
            referrers_turn: tokio::sync::Mutex::default(),
            referrers_api: Mutex::default(),
            redirects: RedirectCache::default(),
            gates: Gates::new(&policy),
            hedges: Hedges::default(),
            part_refusals: PartRefusals::default(),
        }
    }

    pub(crate) fn policy(&self) -> Retrier<'_> {
        Retrier { policy: policy_of(&self.options), retries: &self.counters.retries }
    }

    /// Sends a call to a host, answers a 401, follows redirects; the answer's status is 200 or 206 (or 416).
    pub(crate) async fn send(&self, call: &Call<'_>, at: &Endpoint) -> Result<Response, FetchError> {
        // Who asks beside a request that stands still asks for another place: that one may be why.
        if !call.apart
            && let Some(response) = self.send_to_known_place(call, at).await?
        {
            return Ok(response);
        }
        let key = call.token_key(at);
        let mut authorization = self.tokens.get(&key);
        let mut place = call.place.clone();
        for answered in 0..=MAX_ANSWERS {
            let base = self.base_url(at).await?;
            let response = self.follow(&base, place, call, at, authorization.as_ref()).await?;
            if response.status() != StatusCode::UNAUTHORIZED || !same_origin(response.url(), &base) {
                if answered > 1 {
                    self.tokens.note_churn(&key);
                }
                return self.check(response, call, at).await;
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
                return Err(denied(call, at, self.error_detail(response).await.as_deref().unwrap_or(reason)));
            }
            // On from where it was asked for: a token that is good for one request is used up on the way there.
            place = Some(response.url().clone());
            let share = if answered > 0 { Share::Own } else { Share::WithOthers };
            authorization = Some(self.answer_challenge(call, at, response, authorization, share).await?);
        }
        Err(denied(call, at, "the credentials were not accepted"))
    }

    /// Tries the URL that a redirect led to before; `None` when it is not known or not good any more.
    async fn send_to_known_place(
        &self,
        call: &Call<'_>,
        at: &Endpoint,
    ) -> Result<Option<Response>, FetchError> {
        let Some(digest) = call.blob else { return Ok(None) };
        let Some(url) = self.redirects.get(&place_of(at), digest) else { return Ok(None) };
        let response = match self.exchange(&url, &at.root, call, at, None).await {
            Ok(response) => response,
            // The registry may know a place that can be reached.
            Err(error) => {
                tracing::debug!(%error, "where the redirect led to is forgotten");
                self.redirects.forget_host(&url);
                return Ok(None);
            }
        };
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                Ok(Some(response))
            }
            StatusCode::TOO_MANY_REQUESTS => self.check(response, call, at).await.map(Some),
            status if status.is_server_error() => {
                self.redirects.forget_host(&url);
                self.check(response, call, at).await.map(Some)
            }
            // Expired, mostly 403: the registry gives a new one.
            _ => {
                self.redirects.forget(&place_of(at), digest);
                Ok(None)
            }
        }
    }

    /// Sends to a place, or where the call's resource is, and wherever that redirects; the authorization goes only to
    /// `base`, the registry. What writes is not sent anew somewhere else unless the status says so (307, 308).
    async fn follow(
        &self,
        base: &Url,
        place: Option<Url>,
        call: &Call<'_>,
        at: &Endpoint,
        authorization: Option<&Authorization>,
    ) -> Result<Response, FetchError> {
        let fail = |reason: &str| self.protocol(&host_of(base), call, reason);
        let mut url = match place {
            Some(place) => place,
            None => call.url(base, at).map_err(|e| fail(&e))?,
        };
        for _ in 0..=MAX_HOPS {
            let shown = authorization.filter(|_| same_origin(base, &url));
            let response = self.exchange(&url, base, call, at, shown).await?;
            let status = response.status();
            if !status.is_redirection() || status == StatusCode::NOT_MODIFIED {
                if let Some(digest) = call.blob
                    && !same_origin(base, &url)
                    && status.is_success()
                {
                    self.redirects.put(&place_of(at), digest, url);
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

    /// One HTTP exchange up to the response's header. What a server turned away unseen is sent again at once over a
    /// fresh connection.
    async fn exchange(
        &self,
        url: &Url,
        base: &Url,
        call: &Call<'_>,
        at: &Endpoint,
        authorization: Option<&Authorization>,
    ) -> Result<Response, FetchError> {
        let host = host_of(url);
        let apart = call.apart && url.scheme() == "https";
        let mut pooled = self.pools.get(self.way_to(url, at, apart).await)?;
        let mut seen = Exchange::begin(self, &host, call);
        let pass = self.gates.enter(&host, call.patient).await;
        // What was said for the host of the settings is for no other.
        let own = same_origin(url, base);
        let headers = call.headers(own.then_some(&at.headers), authorization)?;
        for fresh in 0.. {
            seen.sent();
            let (request, progress) = call.request(&pooled.client, url);
            let sent = request.headers(headers.clone()).send();
            self.counters.requests.fetch_add(1, Relaxed);
            let limit = match at.role {
                Role::Mirror => self.options.stall_timeout.min(MIRROR_ANSWER),
                Role::Origin => self.options.stall_timeout,
            };
            let answer = match progress {
                None => within(limit, sent).await,
                Some(progress) => while_it_leaves(limit, sent, &progress).await,
            };
            let mut answer = match answer {
                Some(Ok(response)) => Ok(response),
                Some(Err(error)) if fresh < FRESH_CONNECTIONS && is_turned_away(&error) => {
                    tracing::debug!(host, what = call.resource, "a fresh connection is opened");
                    pooled = self.pools.renew(&pooled)?;
                    drop(seen);
                    seen = Exchange::begin(self, &host, call);
                    continue;
                }
                Some(Err(error)) => Err(classify(&host, &call.resource, error)),
                None => Err(FetchError::Stalled { host, what: call.resource.clone(), after: limit }),
            };
            seen.answered(&mut answer);
            let response = answer?;
            self.answered(&pass, &response);
            return Ok(response);
        }
        Err(FetchError::Interrupted { what: "a request" })
    }

    /// How to connect to a URL that the settings of `at` lead to. Another host has its own settings, and may besides
    /// have a certificate of the same authority; certificates of the client are not shown to it.
    pub(super) async fn way_to(&self, url: &Url, at: &Endpoint, apart: bool) -> Way {
        let connect = at.dial_timeout.unwrap_or_else(|| match at.role {
            Role::Mirror => self.options.connect_timeout.min(MIRROR_CONNECT),
            Role::Origin => self.options.connect_timeout,
        });
        let same_host = at.root.host() == url.host()
            && (at.may_be_plain || at.root.port_or_known_default() == url.port_or_known_default());
        let secure = url.scheme() == "https";
        let tls = if !secure {
            TlsSettings::default()
        } else if same_host {
            at.tls.clone()
        } else {
            let mut tls = self.hosts.tls_of(url).await;
            tls.ca.extend(at.tls.ca.iter().filter(|ca| !tls.ca.contains(ca)).cloned().collect::<Vec<_>>());
            tls.stamps.extend(at.tls.stamps.iter().cloned());
            tls
        };
        Way { secure, local: is_loopback(url), tls, apart, connect }
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
        let after = self.options.stall_timeout;
        match within(after, exchange).await {
            Some(Ok(response)) => Ok(response),
            Some(Err(error)) => Err(classify(host, what, error)),
            None => Err(FetchError::Stalled { host: host.to_owned(), what: what.to_owned(), after }),
        }
    }

    /// The root of a host's API; learns whether an insecure one speaks only plain http.
    pub(super) async fn base_url(&self, at: &Endpoint) -> Result<Url, FetchError> {
        if !at.may_be_plain {
            return Ok(at.root.clone());
        }
        let host = at.host();
        let mut http = at.root.clone();
        let _ = http.set_scheme("http");
        let known = self.plain.lock().unwrap_or_else(PoisonError::into_inner).get(&host).copied();
        let plain = match known {
            Some(plain) => plain,
            None => {
                let client = self.pools.get(self.way_to(&at.root, at, false).await)?.client;
                let probe = self.timed(&host, "the registry", client.get(at.root.clone()).send()).await;
                let plain = match probe {
                    Ok(_) => false,
                    // Nobody there by https: what holds is whether there is somebody by http.
                    Err(FetchError::Unreachable { .. } | FetchError::Stalled { .. }) => {
                        let client = self.pools.get(self.way_to(&http, at, false).await)?.client;
                        let probe = self.timed(&host, "the registry", client.get(http.clone()).send()).await;
                        if probe.is_err() {
                            return Ok(at.root.clone());
                        }
                        true
                    }
                    Err(_) => true,
                };
                self.plain.lock().unwrap_or_else(PoisonError::into_inner).insert(host, plain);
                plain
            }
        };
        Ok(if plain { http } else { at.root.clone() })
    }

    pub(super) fn protocol(&self, host: &str, call: &Call<'_>, reason: &str) -> FetchError {
        FetchError::Protocol { host: host.to_owned(), what: call.resource.clone(), reason: reason.to_owned() }
    }
}

fn policy_of(options: &ClientOptions) -> RetryPolicy {
    RetryPolicy { retries: options.retries, base: options.retry_base, max_wait: options.max_retry_wait }
}

/// Under what the places of a repository's blobs at a host are kept.
pub(super) fn place_of(at: &Endpoint) -> String {
    format!("{}{}", at.root, at.repository)
}

/// Waits for an answer for so long.
async fn within<T>(limit: Duration, answer: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, answer).await.ok()
}

/// As `within`, for a request with a long body: it may take as long as bytes of it keep leaving.
async fn while_it_leaves<T>(
    limit: Duration,
    answer: impl Future<Output = T>,
    progress: &UploadProgress,
) -> Option<T> {
    let mut answer = std::pin::pin!(answer);
    loop {
        let deadline = progress.last() + limit;
        match tokio::time::timeout_at(deadline.into(), &mut answer).await {
            Ok(answer) => return Some(answer),
            Err(_) if progress.last() + limit > deadline => {}
            Err(_) => return None,
        }
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
