//! How much a host can take: how many requests may wait for its answer, and until when it wants to be left alone.
//!
//! All requests of the node to a host share one window. It halves when the host says that it is too much (429, 503)
//! and grows by one for each window of good answers, so that many layers at once settle at what the host bears. A
//! request holds its place only until the header of the answer has come: long bodies keep nobody waiting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use tokio::sync::Notify;

use super::retry::{RetryPolicy, retry_after};

/// Requests that may wait for a host that has never complained.
const MAX_WINDOW: f64 = 64.0;
/// The pause after a complaint that names none doubles so often. Each request has its own patience on top: a gate that
/// stayed closed for long would hold back even the news that the host is well again.
const MAX_DOUBLINGS: usize = 4;
/// Hosts remembered. Redirects are foreign text: they may name any number.
const MAX_HOSTS: usize = 1024;

/// The gates of all hosts.
pub(crate) struct Gates {
    hosts: Mutex<HashMap<String, Arc<Gate>>>,
    base: Duration,
    max_wait: Duration,
}

struct Gate {
    state: Mutex<State>,
    /// Told whenever somebody may find it open.
    changed: Notify,
}

struct State {
    window: f64,
    /// Requests that wait for the host's answer.
    inside: usize,
    /// Requests that wait at the gate and that a reader waits for.
    urgent: usize,
    /// Closed until then.
    until: Option<Instant>,
    /// When the window was last cut. Answers to what was sent before tell nothing new.
    cut: Option<Instant>,
    /// Cuts since the last good answer.
    cuts: usize,
}

/// A place in the window of a host; given back when dropped.
pub(crate) struct Pass {
    gate: Arc<Gate>,
    began: Instant,
    base: Duration,
    max_wait: Duration,
}

/// A request at the gate that others step back for.
struct Urgent<'a>(&'a Gate);

enum Entry {
    Open,
    Full,
    ClosedUntil(Instant),
}

impl Gates {
    pub(crate) fn new(policy: &RetryPolicy) -> Gates {
        Gates { hosts: Mutex::default(), base: policy.base, max_wait: policy.max_wait }
    }

    /// Waits until a request may be sent to `host`. What is `patient` lets everything else go first.
    pub(crate) async fn enter(&self, host: &str, patient: bool) -> Pass {
        let gate = self.gate(host);
        {
            let _urgent = (!patient).then(|| Urgent::new(&gate));
            loop {
                let changed = gate.changed.notified();
                match gate.try_enter(patient) {
                    Entry::Open => break,
                    Entry::Full => changed.await,
                    Entry::ClosedUntil(at) => {
                        tokio::select! {
                            () = changed => {}
                            () = tokio::time::sleep_until(at.into()) => {}
                        }
                    }
                }
            }
        }
        Pass { gate, began: Instant::now(), base: self.base, max_wait: self.max_wait }
    }

    /// How long a host wants to be left alone from now on.
    pub(crate) fn closed_for(&self, host: &str) -> Duration {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let until = hosts.get(host).and_then(|gate| gate.lock().until);
        until.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()))
    }

    /// The window of each host.
    pub(crate) fn windows(&self) -> Vec<(String, f64)> {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.iter().map(|(host, gate)| (host.clone(), gate.lock().window)).collect()
    }

    fn gate(&self, host: &str) -> Arc<Gate> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_HOSTS && !hosts.contains_key(host) {
            hosts.retain(|_, gate| Arc::strong_count(gate) > 1 || gate.is_closed());
            // Still full: all of them are closed by foreign words, which is no reason to grow.
            if hosts.len() >= MAX_HOSTS {
                hosts.clear();
            }
        }
        Arc::clone(hosts.entry(host.to_owned()).or_default())
    }
}

impl Default for Gate {
    fn default() -> Self {
        let state = State { window: MAX_WINDOW, inside: 0, urgent: 0, until: None, cut: None, cuts: 0 };
        Gate { state: Mutex::new(state), changed: Notify::new() }
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.lock().until.is_some_and(|at| at > Instant::now())
    }

    fn try_enter(&self, patient: bool) -> Entry {
        let mut state = self.lock();
        if let Some(at) = state.until.filter(|at| *at > Instant::now()) {
            return Entry::ClosedUntil(at);
        }
        // At least one, so that a host can tell that it is well again.
        if state.inside as f64 >= state.window.max(1.0).floor() || (patient && state.urgent > 0) {
            return Entry::Full;
        }
        state.inside += 1;
        Entry::Open
    }
}

impl<'a> Urgent<'a> {
    fn new(gate: &'a Gate) -> Self {
        gate.lock().urgent += 1;
        Urgent(gate)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.lock().urgent -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Pass {
    /// The host has answered. True if the answer was that it is too much.
    pub(crate) fn answered(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            self.gate.lock().grow(self.began);
            return false;
        }
        let asked = retry_after(headers);
        let mut state = self.gate.lock();
        let news = state.cut.is_none_or(|cut| self.began >= cut);
        if news {
            state.window = (state.window.min(state.inside as f64) / 2.0).max(1.0);
            state.cut = Some(Instant::now());
            state.cuts += 1;
        }
        let wait = match asked {
            // Jitter on top: whoever else was told the same comes back at the same moment.
            Some(asked) => asked + self.backoff(0),
            None if news => self.backoff(state.cuts - 1),
            None => return true,
        };
        let until = Instant::now() + wait.min(self.max_wait);
        state.until = Some(state.until.map_or(until, |old| old.max(until)));
        true
    }

    fn backoff(&self, cuts: usize) -> Duration {
        let delays = ExponentialBuilder::default()
            .with_min_delay(self.base)
            .with_max_delay(self.max_wait)
            .without_max_times()
            .with_jitter();
        delays.build().nth(cuts.min(MAX_DOUBLINGS)).unwrap_or(self.max_wait)
    }
}

impl State {
    fn grow(&mut self, began: Instant) {
        if self.cut.is_none_or(|cut| began >= cut) {
            self.cuts = 0;
            self.window = (self.window + 1.0 / self.window).min(MAX_WINDOW);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.lock().inside -= 1;
        self.gate.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::RETRY_AFTER;

    fn gates() -> Gates {
        let (base, max_wait) = (Duration::from_millis(10), Duration::from_secs(5));
        Gates::new(&RetryPolicy { retries: 3, base, max_wait })
    }

    fn asks(seconds: u64) -> HeaderMap {
        HeaderMap::from_iter([(RETRY_AFTER, seconds.into())])
    }

    #[tokio::test]
    async fn the_window_halves_once_a_round_and_grows_slowly() {
        let gates = gates();
        let mut passes = Vec::new();
        for _ in 0..16 {
            passes.push(gates.enter("h", false).await);
        }
        let window = || gates.gate("h").lock().window;
        assert_eq!(window(), MAX_WINDOW);
        for pass in &passes {
            assert!(pass.answered(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new()));
        }
        // All were sent before the first complaint: it is one complaint.
        assert_eq!(window(), 8.0);
        drop(passes);
        for _ in 0..8 {
            assert!(!gates.enter("h", false).await.answered(StatusCode::OK, &HeaderMap::new()));
        }
        assert!(window() > 8.9 && window() < 9.1, "{}", window());
        for _ in 0..9 {
            gates.enter("h", false).await.answered(StatusCode::SERVICE_UNAVAILABLE, &asks(0));
        }
        assert_eq!(window(), 1.0);
        // Another host has nothing to do with it.
        assert_eq!(gates.gate("other").lock().window, MAX_WINDOW);
    }

    #[tokio::test]
    async fn a_longer_pause_is_not_cut_short() {
        let gates = gates();
        let (first, second) = (gates.enter("h", false).await, gates.enter("h", false).await);
        first.answered(StatusCode::TOO_MANY_REQUESTS, &asks(3));
        second.answered(StatusCode::TOO_MANY_REQUESTS, &asks(1));
        let until = gates.gate("h").lock().until.unwrap();
        assert!(until > Instant::now() + Duration::from_millis(2900));
        first.answered(StatusCode::TOO_MANY_REQUESTS, &asks(1 << 40));
        let until = gates.gate("h").lock().until.unwrap();
        assert!(until < Instant::now() + Duration::from_millis(5100), "no longer than the longest wait");
    }

    #[tokio::test]
    async fn what_a_reader_waits_for_goes_first() {
        let gates = Arc::new(gates());
        let inside = gates.enter("h", false).await;
        gates.gate("h").lock().window = 1.0;
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        let mut tasks = Vec::new();
        for patient in [true, true, false] {
            let (gates, sender) = (Arc::clone(&gates), sender.clone());
            tasks.push(tokio::spawn(async move {
                let _pass = gates.enter("h", patient).await;
                sender.send(patient).unwrap();
            }));
        }
        while gates.gate("h").lock().urgent == 0 {
            tokio::task::yield_now().await;
        }
        drop(inside);
        assert_eq!(order.recv().await, Some(false));
        assert_eq!(order.recv().await, Some(true));
        assert_eq!(order.recv().await, Some(true));
        // Whoever gives up at the gate is not waited for.
        let inside = gates.enter("h", false).await;
        let gone = tokio::time::timeout(Duration::from_millis(5), gates.enter("h", false)).await;
        assert!(gone.is_err());
        drop(inside);
        drop(gates.enter("h", true).await);
    }
}
