//! Bearer tokens: asking for them and keeping them while they are good.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;
use serde::Deserialize;

use super::config::Credential;
use crate::error::FetchError;

/// Lifetime of a token that names none (distribution's token spec).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// No token is kept longer, whatever it says.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The `Authorization` value that worked last for a repository.
#[derive(Clone)]
pub(crate) struct Authorization {
    /// Complete header value; a secret.
    pub(crate) value: Arc<str>,
    expires: Option<Instant>,
}

impl Authorization {
    pub(crate) fn new(value: String, lifetime: Option<Duration>) -> Self {
        let expires = lifetime.map(|l| {
            // A little early, so that it does not run out on the way.
            Instant::now() + l.saturating_sub((l / 10).min(Duration::from_secs(10)))
        });
        Authorization { value: value.into(), expires }
    }

    fn is_fresh(&self) -> bool {
        self.expires.is_none_or(|at| Instant::now() < at)
    }
}

/// What an authorization is to allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
    Delete,
}

impl Access {
    /// The scope to ask for: what the challenge names, and what is needed if it does not name that. (Some
    /// registries always name `pull`.)
    pub(crate) fn scope(self, challenged: Option<&str>, repository: &str) -> String {
        let (needed, actions) = match self {
            Access::Pull => ("pull", "pull"),
            Access::Push => ("push", "pull,push"),
            Access::Delete => ("delete", "pull,push,delete"),
        };
        let challenged = challenged.unwrap_or_default().trim();
        let allows = |scope: &str| {
            let named = scope.rsplit(':').next().unwrap_or_default();
            named.split(',').any(|a| a == needed || a == "*")
        };
        // For reading the registry knows best: it may name a catalog or another repository.
        if !challenged.is_empty() && (self == Access::Pull || challenged.split(' ').any(allows)) {
            return challenged.to_owned();
        }
        format!("repository:{repository}:{actions}")
    }
}

/// Root of a host's API, repository and what is allowed: a token's scope is one repository.
pub(crate) type TokenKey = (String, String, Access);

/// How long it is remembered that shared tokens of a registry do not last.
const CHURN: Duration = Duration::from_secs(60);

/// The authorizations that worked.
#[derive(Default)]
pub(crate) struct TokenCache {
    entries: Mutex<HashMap<TokenKey, Authorization>>,
    /// Whose turn it is to get one.
    turns: Mutex<HashMap<TokenKey, Arc<tokio::sync::Mutex<()>>>>,
    /// When shared ones were last found to be used up by others.
    churning: Mutex<HashMap<TokenKey, Instant>>,
}

impl TokenCache {
    pub(crate) fn get(&self, key: &TokenKey) -> Option<Authorization> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(key).filter(|a| a.is_fresh()).cloned()
    }

    pub(crate) fn put(&self, key: TokenKey, authorization: Authorization) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, a| a.is_fresh());
        entries.insert(key, authorization);
    }

    pub(crate) fn forget(&self, key: &TokenKey) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// What whoever gets a new authorization for all holds meanwhile.
    pub(crate) fn turn(&self, key: &TokenKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(key.clone()).or_default())
    }

    /// A shared authorization was refused right after it was got, and one for a single request was not: tokens are good
    /// for few requests there.
    pub(crate) fn note_churn(&self, key: &TokenKey) {
        self.forget(key);
        let mut churning = self.churning.lock().unwrap_or_else(PoisonError::into_inner);
        churning.retain(|_, at| at.elapsed() < CHURN);
        churning.insert(key.clone(), Instant::now());
    }

    /// Whether each request needs a token of its own.
    pub(crate) fn churns(&self, key: &TokenKey) -> bool {
        let churning = self.churning.lock().unwrap_or_else(PoisonError::into_inner);
        churning.get(key).is_some_and(|at| at.elapsed() < CHURN)
    }
}

/// A token request, ready to be sent.
pub(crate) struct TokenRequest {
    pub(crate) url: Url,
    /// Form body of a POST (identity token); otherwise it is a GET.
    pub(crate) form: Option<String>,
    /// Basic credentials for the GET.
    pub(crate) basic: Option<(String, String)>,
}

/// Builds the token request for a challenge.
///
/// The realm is foreign text: it must be http(s), may be plain http only when the registry itself is spoken to
/// in plain http, holds no user info and does not point into this machine or the link-local network unless the
/// registry lies there too.
pub(crate) fn request(
    registry: &Url,
    realm: &str,
    service: Option<&str>,
    scope: &str,
    credential: Option<&Credential>,
) -> Result<TokenRequest, FetchError> {
    let bad = |reason: &str| FetchError::Protocol {
        host: registry.host_str().unwrap_or_default().to_owned(),
        what: "a token challenge".to_owned(),
        reason: reason.to_owned(),
    };
    let mut url = Url::parse(realm).map_err(|_| bad("its realm is not a URL"))?;
    match url.scheme() {
        "https" => {}
        "http" if registry.scheme() == "http" => {}
        _ => return Err(bad("its realm is not an https URL")),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("its realm holds user info"));
    }
    if is_inside(&url) && !is_inside(registry) {
        return Err(bad("its realm points into this machine or its local link"));
    }
    if let Some(Credential::IdentityToken(token)) = credential {
        let mut form = Url::parse("form:").map_err(|_| bad("internal"))?;
        {
            let mut pairs = form.query_pairs_mut();
            pairs.append_pair("grant_type", "refresh_token").append_pair("client_id", "lazyrun");
            pairs.append_pair("refresh_token", token).append_pair("scope", scope);
            if let Some(service) = service {
                pairs.append_pair("service", service);
            }
        }
        let body = form.query().unwrap_or_default().to_owned();
        return Ok(TokenRequest { url, form: Some(body), basic: None });
    }
    {
        let mut pairs = url.query_pairs_mut();
        if let Some(service) = service {
            pairs.append_pair("service", service);
        }
        for one in scope.split(' ').filter(|s| !s.is_empty()) {
            pairs.append_pair("scope", one);
        }
    }
    let basic = match credential {
        Some(Credential::Password { user, password }) => {
            url.query_pairs_mut().append_pair("account", user);
            Some((user.clone(), password.clone()))
        }
        _ => None,
    };
    Ok(TokenRequest { url, form: None, basic })
}

/// Whether the URL's host is an address of this machine or of the local link (cloud metadata services).
fn is_inside(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(v4)) => v4.is_loopback() || v4.is_link_local() || v4.is_unspecified(),
        Ok(std::net::IpAddr::V6(v6)) => {
            v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_unspecified()
                // Also where it is an IPv4 address in other clothes, mapped or (long obsolete) compatible.
                || v6.to_ipv4().is_some_and(|v4| {
                    v4.is_loopback() || v4.is_link_local() || v4.is_unspecified()
                })
        }
        Err(_) => {
            let name = host.strip_suffix('.').unwrap_or(host);
            name == "localhost" || name.ends_with(".localhost")
        }
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
}

/// Reads a token endpoint's answer; `None` when it holds no token.
pub(crate) fn parse_answer(body: &[u8]) -> Option<Authorization> {
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let token = answer.token.filter(|t| !t.is_empty()).or(answer.access_token).filter(|t| !t.is_empty())?;
    if !token.bytes().all(|b| (0x21..0x7f).contains(&b)) {
        return None;
    }
    let lifetime = answer
        .expires_in
        .filter(|s| s.is_finite() && *s > 0.0)
        .map_or(DEFAULT_LIFETIME, |s| Duration::from_secs_f64(s.min(MAX_LIFETIME.as_secs_f64())));
    Some(Authorization::new(format!("Bearer {token}"), Some(lifetime)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn realm_must_be_safe() {
        let registry = url("https://r.example/");
        for realm in [
            "http://auth.example/token",
            "file:///etc/passwd",
            "https://169.254.169.254/latest",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:169.254.169.254]/",
            "https://[::ffff:0.0.0.0]/",
            "https://[::127.0.0.1]/",
            "https://localhost/",
            "https://localhost./",
            "https://a.localhost./",
            "https://u:p@auth.example/",
            "nonsense",
        ] {
            assert!(request(&registry, realm, None, "s", None).is_err(), "{realm}");
        }
        assert!(request(&registry, "https://auth.example/token", None, "s", None).is_ok());
        assert!(
            request(&url("http://127.0.0.1:5000/"), "http://127.0.0.1:5001/token", None, "s", None).is_ok()
        );
    }

    #[test]
    fn requests_carry_what_the_spec_says() {
        let registry = url("https://r.example/");
        let password = Credential::Password { user: "u".into(), password: "p".into() };
        let get =
            request(&registry, "https://a.example/t?x=1", Some("svc"), "repository:a:pull", Some(&password))
                .unwrap();
        assert_eq!(get.url.query(), Some("x=1&service=svc&scope=repository%3Aa%3Apull&account=u"));
        assert_eq!(get.basic, Some(("u".into(), "p".into())));
        let token = Credential::IdentityToken("id&".into());
        let post = request(&registry, "https://a.example/t", None, "s", Some(&token)).unwrap();
        assert!(post.form.unwrap().contains("refresh_token=id%26"));
        assert_eq!(post.url.as_str(), "https://a.example/t");
    }

    #[test]
    fn answers_are_checked() {
        assert_eq!(&*parse_answer(br#"{"access_token":"x"}"#).unwrap().value, "Bearer x");
        assert!(parse_answer(br#"{"token":"a\nb"}"#).is_none());
        assert!(parse_answer(br#"{"token":""}"#).is_none());
        assert!(parse_answer(b"<html>").is_none());
        assert!(parse_answer(br#"{"token":"x","expires_in":1e300}"#).unwrap().is_fresh());
    }

    #[test]
    fn scopes_hold_what_is_needed() {
        let scope = |access: Access, challenged| access.scope(challenged, "a/b");
        assert_eq!(scope(Access::Pull, None), "repository:a/b:pull");
        assert_eq!(scope(Access::Pull, Some("repository:x:pull")), "repository:x:pull");
        assert_eq!(scope(Access::Push, Some("repository:a/b:pull")), "repository:a/b:pull,push");
        assert_eq!(scope(Access::Push, Some("repository:a/b:push,pull")), "repository:a/b:push,pull");
        assert_eq!(scope(Access::Push, Some("repository:a/b:*")), "repository:a/b:*");
        assert_eq!(scope(Access::Delete, Some("")), "repository:a/b:pull,push,delete");
        assert_eq!(scope(Access::Delete, Some("repository:a/b:delete")), "repository:a/b:delete");
    }

    #[test]
    fn cache_drops_what_ran_out() {
        let cache = TokenCache::default();
        let key = ("r".to_owned(), "a".to_owned(), Access::Pull);
        cache.put(key.clone(), Authorization::new("x".into(), Some(Duration::ZERO)));
        assert!(cache.get(&key).is_none());
        cache.put(key.clone(), Authorization::new("y".into(), None));
        assert!(cache.get(&key).is_some());
        cache.forget(&key);
        assert!(cache.get(&key).is_none());
    }
}
