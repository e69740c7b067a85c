//! What an HTTP client's error means.

use std::error::Error as _;

use h2::Reason;

use crate::error::FetchError;

/// Words an HTTP client's error without the URL (signed URLs are secrets).
pub(super) fn classify(host: &str, what: &str, error: reqwest::Error) -> FetchError {
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

/// Whether the server has not looked at the request at all and wants no more of them on this connection: a refused
/// stream, or one behind the last that a GOAWAY names (RFC 9113 sections 6.8 and 8.7).
pub(super) fn is_turned_away(error: &reqwest::Error) -> bool {
    let mut current: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(error) = current {
        if let Some(h2) = error.downcast_ref::<h2::Error>() {
            return h2.is_remote()
                && (h2.is_reset() && h2.reason() == Some(Reason::REFUSED_STREAM)
                    || h2.is_go_away() && h2.reason() == Some(Reason::NO_ERROR));
        }
        current = error.source();
    }
    false
}

/// The innermost cause, which is the one that says something.
pub(super) fn deepest(error: &dyn std::error::Error) -> String {
    let mut current = error;
    while let Some(source) = current.source() {
        current = source;
    }
    current.to_string()
}
