//! When and how long to wait before asking again.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBuilder, Retryable as _};
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::error::FetchError;

/// How often and how patiently failed requests are repeated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetryPolicy {
    /// Repetitions after the first try.
    pub(crate) retries: usize,
    /// First wait; doubles each time, with jitter.
    pub(crate) base: Duration,
    /// Longest wait between two tries, also when the server asks for more.
    pub(crate) max_wait: Duration,
}

/// A policy whose repetitions are counted.
#[derive(Clone, Copy)]
pub(crate) struct Retrier<'a> {
    pub(crate) policy: RetryPolicy,
    pub(crate) retries: &'a AtomicU64,
}

impl std::ops::Deref for Retrier<'_> {
    type Target = RetryPolicy;

    fn deref(&self) -> &RetryPolicy {
        &self.policy
    }
}

impl Retrier<'_> {
    /// [`RetryPolicy::run`].
    pub(crate) async fn run<T, F, Fut>(&self, mut operation: F) -> Result<T, FetchError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let mut again = false;
        let counted = || {
            self.retries.fetch_add(u64::from(std::mem::replace(&mut again, true)), Relaxed);
            operation()
        };
        self.policy.run(counted).await
    }
}

impl RetryPolicy {
    pub(crate) fn delays(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        self.builder().build()
    }

    fn builder(&self) -> ExponentialBuilder {
        ExponentialBuilder::default()
            .with_min_delay(self.base)
            .with_max_delay(self.max_wait)
            .with_max_times(self.retries)
            .with_jitter()
    }

    /// Repeats `operation` while its error is transient. A server that asks for more patience than `max_wait`
    /// is not asked again.
    pub(crate) async fn run<T, F, Fut>(&self, operation: F) -> Result<T, FetchError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let max_wait = self.max_wait;
        operation
            .retry(self.builder())
            .when(move |e| e.is_transient() && e.retry_after().is_none_or(|after| after <= max_wait))
            .adjust(|e, wait| wait.map(|w| e.retry_after().map_or(w, |after| after.max(w))))
            .notify(|e, wait| tracing::debug!(error = %e, ?wait, "request is repeated"))
            .await
    }
}

/// Reads `Retry-After`: seconds or an HTTP date.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = http_date(text)?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the one form that servers may send (RFC 9110 section 5.6.7).
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let rest = text.split_once(", ")?.1.strip_suffix(" GMT")?;
    let mut words = rest.split(' ');
    let day: i64 = words.next()?.parse().ok().filter(|d| (1..=31).contains(d))?;
    let name = words.next()?;
    let month = i64::try_from(MONTHS.iter().position(|m| *m == name)?).ok()? + 1;
    let year: i64 = words.next()?.parse().ok().filter(|y| (1970..=9999).contains(y))?;
    let mut clock = words.next()?.split(':').map(|p| p.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if hour > 23 || minute > 59 || second > 60 || words.next().is_some() {
        return None;
    }
    // Days from the civil calendar, months counted from March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let seconds = u64::try_from(days).ok()? * 86_400 + hour * 3600 + minute * 60 + second;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read() {
        let at = http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 784_111_777);
        let leap = http_date("Thu, 29 Feb 2024 00:00:00 GMT").unwrap();
        assert_eq!(leap.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 1_709_164_800);
        for bad in ["", "Sun, 06 Nov 1994", "Sun, 06 Foo 1994 08:49:37 GMT", "x, 99 Nov 1994 08:49:37 GMT"] {
            assert!(http_date(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_date() {
        let headers = |v: &str| HeaderMap::from_iter([(RETRY_AFTER, v.parse().unwrap())]);
        assert_eq!(retry_after(&headers("7")), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(&headers("Sun, 06 Nov 1994 08:49:37 GMT")), Some(Duration::ZERO));
        assert_eq!(retry_after(&headers("soon")), None);
    }

    #[tokio::test]
    async fn only_transient_errors_are_repeated() {
        let policy =
            RetryPolicy { retries: 3, base: Duration::from_millis(1), max_wait: Duration::from_secs(5) };
        let tries = |error: FetchError| async move {
            let count = std::cell::Cell::new(0);
            let result: Result<(), _> = policy
                .run(|| {
                    count.set(count.get() + 1);
                    std::future::ready(Err(error.clone()))
                })
                .await;
            assert!(result.is_err());
            count.get()
        };
        let limited =
            |secs| FetchError::RateLimited { host: "h".into(), retry_after: Some(Duration::from_secs(secs)) };
        assert_eq!(tries(limited(0)).await, 4);
        assert_eq!(tries(limited(315_360_000)).await, 1);
        assert_eq!(tries(FetchError::ImageNotFound { image: "a".into() }).await, 1);
    }
}
