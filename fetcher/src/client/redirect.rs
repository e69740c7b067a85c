//! Redirects, followed by hand: credentials stay behind, and where a blob was found is remembered.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lazyrun_index::Digest;
use lru::LruCache;
use reqwest::Url;

/// Longest chain of redirects that is followed.
pub(crate) const MAX_HOPS: usize = 5;
/// Signed URLs live 5 to 60 minutes; a shorter memory costs one more redirect now and then.
const LIFETIME: Duration = Duration::from_secs(240);
/// Blobs remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Where the next request goes, or why it does not.
pub(crate) fn next_hop(from: &Url, location: Option<&str>) -> Result<Url, &'static str> {
    let location = location.ok_or("a redirect without a readable Location")?;
    let mut to = from.join(location).map_err(|_| "a redirect to something that is not a URL")?;
    match (from.scheme(), to.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err("a redirect from https to plain http"),
        _ => return Err("a redirect to something that is not http"),
    }
    if !to.username().is_empty() || to.password().is_some() {
        return Err("a redirect whose URL holds user info");
    }
    to.set_fragment(None);
    Ok(to)
}

/// Whether credentials for `a` may be shown to `b`.
pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// Final URLs of blobs, by repository at a host (signed URLs are granted to those who may read it) and digest.
pub(crate) struct RedirectCache {
    entries: Mutex<LruCache<(String, Digest), (Url, Instant)>>,
}

impl Default for RedirectCache {
    fn default() -> Self {
        RedirectCache { entries: Mutex::new(LruCache::new(CAPACITY)) }
    }
}

impl RedirectCache {
    pub(crate) fn get(&self, repository: &str, digest: Digest) -> Option<Url> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (repository.to_owned(), digest);
        match entries.get(&key) {
            Some((url, at)) if at.elapsed() < LIFETIME => Some(url.clone()),
            Some(_) => {
                entries.pop(&key);
                None
            }
            None => None,
        }
    }

    pub(crate) fn put(&self, repository: &str, digest: Digest, url: Url) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.put((repository.to_owned(), digest), (url, Instant::now()));
    }

    /// Nothing that lies at the host of `url` is good any more.
    pub(crate) fn forget_host(&self, url: &Url) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let lost: Vec<_> =
            entries.iter().filter(|(_, (at, _))| same_origin(at, url)).map(|(key, _)| key.clone()).collect();
        for key in lost {
            entries.pop(&key);
        }
    }

    pub(crate) fn forget(&self, repository: &str, digest: Digest) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).pop(&(repository.to_owned(), digest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hops_are_checked() {
        let from = Url::parse("https://r.example/v2/a/blobs/x").unwrap();
        let hop = |l| next_hop(&from, Some(l)).map(|u| u.to_string());
        assert_eq!(hop("/b?c#d").unwrap(), "https://r.example/b?c");
        assert_eq!(hop("https://cdn.example/x").unwrap(), "https://cdn.example/x");
        for bad in ["http://r.example/", "file:///etc/passwd", "https://u:p@cdn.example/", "https://"] {
            assert!(hop(bad).is_err(), "{bad}");
        }
        assert!(next_hop(&from, None).is_err());
    }

    #[test]
    fn origins_compare_default_ports() {
        let u = |t| Url::parse(t).unwrap();
        assert!(same_origin(&u("https://a/x"), &u("https://a:443/y")));
        assert!(!same_origin(&u("https://a/"), &u("http://a/")));
        assert!(!same_origin(&u("http://127.0.0.1:1/"), &u("http://127.0.0.1:2/")));
        assert!(!same_origin(&u("https://a/"), &u("https://a.b/")));
    }
}
