//! Which mirrors are down, and what some of them cannot do.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lazyrun_index::Digest;
use lru::LruCache;

use super::endpoint::Endpoint;
use crate::error::FetchError;

/// Longest time after which it is tried again.
const LONGEST_REST: Duration = Duration::from_secs(300);
/// Server errors in a row after which a mirror counts as down. One may well be about one image only.
const ERRORS: u32 = 3;
/// How long it is remembered that a mirror cannot do something.
const LACK: Duration = Duration::from_secs(600);
/// How long a mirror is not asked for a blob that it has given wrong.
const DISBELIEF: Duration = Duration::from_secs(3600);
/// Blobs and lacks that are remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Something that not every mirror does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lack {
    /// Parts of this blob. Pull-through mirrors give all of what they do not have yet.
    Ranges(Digest),
    /// The referrers API.
    Referrers,
}

/// What was learnt about mirrors, by their keys.
pub(crate) struct Health {
    /// How long a mirror that could not be reached is left alone; it doubles with each failure after that.
    first_rest: Duration,
    state: Mutex<State>,
}

struct State {
    down: HashMap<String, Down>,
    lacks: LruCache<(String, Lack), Instant>,
    wrong: LruCache<(String, Digest), Instant>,
}

#[derive(Clone, Copy)]
struct Down {
    /// Failures to connect in a row.
    failures: u32,
    /// Server errors in a row.
    errors: u32,
    until: Option<Instant>,
    /// When the last failure was counted: requests that fail together are one failure.
    counted: Option<Instant>,
}

impl Health {
    pub(crate) fn new(first_rest: Duration) -> Health {
        let (down, lacks, wrong) = (HashMap::new(), LruCache::new(CAPACITY), LruCache::new(CAPACITY));
        Health { first_rest, state: Mutex::new(State { down, lacks, wrong }) }
    }

    /// Whether a mirror is worth a request now. When its rest is over one caller is told so, which then finds out for
    /// all; the others go on without it for as long as that may take (`probe`).
    pub(crate) fn is_up(&self, mirror: &Endpoint, probe: Duration) -> bool {
        let mut state = self.lock();
        let Some(until) = state.down.get_mut(mirror.key()).and_then(|d| d.until.as_mut()) else {
            return true;
        };
        let now = Instant::now();
        if now < *until {
            return false;
        }
        *until = now + probe;
        true
    }

    /// Whether a mirror is resting, without taking the turn to find out.
    pub(crate) fn rests(&self, mirror: &Endpoint) -> bool {
        self.lock().down.get(mirror.key()).and_then(|d| d.until).is_some_and(|until| Instant::now() < until)
    }

    /// A mirror has answered.
    pub(crate) fn answered(&self, mirror: &Endpoint) {
        self.lock().down.remove(mirror.key());
    }

    /// A request to a mirror has failed.
    pub(crate) fn failed(&self, mirror: &Endpoint, error: &FetchError) {
        let mut state = self.lock();
        let none = Down { failures: 0, errors: 0, until: None, counted: None };
        let down = state.down.entry(mirror.key().to_owned()).or_insert(none);
        match error {
            FetchError::Unreachable { .. } | FetchError::Stalled { .. } | FetchError::Tls { .. } => {}
            FetchError::Broken { .. } | FetchError::Server { status: 500.., .. } => {
                down.errors += 1;
                if down.errors < ERRORS {
                    return;
                }
            }
            // It lives, whatever else is wrong.
            _ => {
                state.down.remove(mirror.key());
                return;
            }
        }
        if down.counted.is_some_and(|at| at.elapsed() < self.first_rest / 2) {
            return;
        }
        let rest = self.first_rest.saturating_mul(1 << down.failures.min(5)).min(LONGEST_REST);
        down.failures += 1;
        down.counted = Some(Instant::now());
        down.until = Some(Instant::now() + rest);
        tracing::warn!(mirror = mirror.host(), %error, ?rest, "a mirror is left out for a while");
    }

    /// A mirror does not do something.
    pub(crate) fn lacks(&self, mirror: &Endpoint, what: Lack) {
        self.lock().lacks.put((mirror.key().to_owned(), what), Instant::now());
    }

    /// Whether a mirror was lately found not to do something.
    pub(crate) fn is_known_to_lack(&self, mirror: &Endpoint, what: Lack) -> bool {
        let state = self.lock();
        state.lacks.peek(&(mirror.key().to_owned(), what)).is_some_and(|at| at.elapsed() < LACK)
    }

    /// A mirror has given a blob wrong.
    pub(crate) fn disbelieve(&self, mirror: &Endpoint, blob: Digest) {
        self.lock().wrong.put((mirror.key().to_owned(), blob), Instant::now());
    }

    /// Whether a mirror has given a blob wrong lately.
    pub(crate) fn is_disbelieved(&self, mirror: &Endpoint, blob: Digest) -> bool {
        let state = self.lock();
        state.wrong.peek(&(mirror.key().to_owned(), blob)).is_some_and(|at| at.elapsed() < DISBELIEF)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
