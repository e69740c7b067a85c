//! Reading answers: bodies piece by piece or whole, and what a status means.

use std::sync::atomic::Ordering::Relaxed;

use bytes::{Bytes, BytesMut};
use reqwest::header::CONTENT_TYPE;
use reqwest::{Response, StatusCode};
use serde::Deserialize;

use super::call::Call;
use super::classify::classify;
use super::retry::retry_after;
use super::transport::{Transport, host_of};
use crate::error::FetchError;
use crate::hosts::Endpoint;
use crate::manifest::printable;
use crate::observe::Exchange;

/// Largest token answer or error body that is read, in bytes.
pub(super) const MAX_SMALL_BODY: u64 = 256 << 10;

impl Transport {
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
    pub(super) async fn check(
        &self,
        response: Response,
        call: &Call<'_>,
        at: &Endpoint,
    ) -> Result<Response, FetchError> {
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
                Err(denied(call, at, detail.as_deref().unwrap_or("no permission")))
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
}

pub(super) fn denied(call: &Call<'_>, at: &Endpoint, reason: &str) -> FetchError {
    FetchError::Denied {
        image: call.repository.name(),
        host: at.credential_name.clone(),
        reason: reason.to_owned(),
    }
}
