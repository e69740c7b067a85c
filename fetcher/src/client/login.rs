//! Answering a 401: credentials are looked up, tokens fetched and kept.

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};

use super::answer::{MAX_SMALL_BODY, denied};
use super::retry::retry_after;
use super::transport::{Call, Transport, host_of, sensitive};
use crate::auth::{self, Authorization, Challenge};
use crate::error::FetchError;
use crate::hosts::Endpoint;
use crate::observe::Exchange;

/// For whom an authorization is got.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// For everybody who reads from the repository: a hundred blobs must not ask for a hundred tokens.
    WithOthers,
    /// For this request alone: shared ones were used up by others before it came to its turn.
    Own,
}

impl Transport {
    /// Finds what satisfies a 401's challenge.
    pub(super) async fn answer_challenge(
        &self,
        call: &Call<'_>,
        at: &Endpoint,
        response: Response,
        stale: Option<Authorization>,
        share: Share,
    ) -> Result<Authorization, FetchError> {
        let key = call.token_key(at);
        let registry = response.url().clone();
        let values = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges = auth::parse_challenges(values.iter().filter_map(|v| v.to_str().ok()));
        // Reading the short body keeps the connection.
        let _ = self.body(response, "an error", MAX_SMALL_BODY).await;
        if share == Share::Own || self.tokens.churns(&key) {
            return self.authorize(call, at, &registry, &challenges).await;
        }
        // One token request at a time for a repository.
        let turn = self.tokens.turn(&key);
        let _turn = turn.lock().await;
        // Somebody else may have been faster.
        if let Some(fresh) = self.tokens.get(&key)
            && stale.as_ref().is_none_or(|s| s.value != fresh.value)
        {
            return Ok(fresh);
        }
        self.tokens.forget(&key);
        let authorization = self.authorize(call, at, &registry, &challenges).await?;
        self.tokens.put(key, authorization.clone());
        Ok(authorization)
    }

    /// A new authorization by one of the ways that the host offers.
    async fn authorize(
        &self,
        call: &Call<'_>,
        at: &Endpoint,
        registry: &Url,
        challenges: &[Challenge],
    ) -> Result<Authorization, FetchError> {
        let found = self.credentials.get(&at.credential_name, &at.repository).await?;
        let credential = found.map(|found| found.credential);
        let bearer = challenges.iter().find_map(|c| match c {
            Challenge::Bearer { realm, service, scope } => Some((realm, service, scope)),
            Challenge::Basic => None,
        });
        if let (Some(_), Some(auth::Credential::RegistryToken(token))) = (bearer, &credential) {
            return Ok(Authorization::new(format!("Bearer {token}"), None));
        }
        if let Some((realm, service, scope)) = bearer {
            let scope = call.access().scope(scope.as_deref(), &at.repository);
            let request =
                auth::token_request(registry, realm, service.as_deref(), &scope, credential.as_ref())?;
            self.policy().run(|| self.fetch_token(call, at, &request)).await
        } else if challenges.contains(&Challenge::Basic) {
            match credential {
                Some(auth::Credential::Password { user, password }) => {
                    Ok(Authorization::new(auth::basic(&user, &password), None))
                }
                _ => Err(denied(call, at, "it wants a user name and password and none are stored")),
            }
        } else {
            Err(denied(call, at, "it wants a kind of login that is not known here"))
        }
    }

    pub(super) async fn fetch_token(
        &self,
        call: &Call<'_>,
        at: &Endpoint,
        wanted: &auth::TokenRequest,
    ) -> Result<Authorization, FetchError> {
        let host = host_of(&wanted.url);
        let client = self.pools.get(self.way_to(&wanted.url, at, false).await)?.client;
        let seen = Exchange::begin_token(self, &host, call);
        let pass = self.gates.enter(&host, false).await;
        seen.sent();
        let mut request = match &wanted.form {
            Some(form) => client
                .post(wanted.url.clone())
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.clone()),
            None => client.get(wanted.url.clone()),
        };
        if let Some((user, password)) = &wanted.basic {
            request = request.header(AUTHORIZATION, sensitive(&auth::basic(user, password))?);
        }
        let mut answer = self.timed(&host, "a token", request.send()).await;
        seen.answered(&mut answer);
        let response = answer?;
        self.answered(&pass, &response);
        match response.status() {
            StatusCode::OK => {
                let body = self.body(response, "a token", MAX_SMALL_BODY).await?;
                auth::parse_answer(&body).ok_or_else(|| FetchError::Protocol {
                    host,
                    what: "a token request".to_owned(),
                    reason: "there is no usable token in it".to_owned(),
                })
            }
            StatusCode::TOO_MANY_REQUESTS => {
                Err(FetchError::RateLimited { host, retry_after: retry_after(response.headers()) })
            }
            status if status.is_server_error() => Err(FetchError::Server {
                host,
                status: status.as_u16(),
                what: "a token".to_owned(),
                retry_after: retry_after(response.headers()),
            }),
            // Redirects are not followed: the credentials are for this place.
            _ => {
                let detail = self.error_detail(response).await;
                Err(denied(call, at, detail.as_deref().unwrap_or("its token service refused")))
            }
        }
    }
}
