//! Making one image whole: all its layers at once, through outages of the registry.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Result;
use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::future::{Either, join_all, select};
use lazyrun_fetcher::{FetchError, Haste, Layer, Progress};
use lazyrun_index::Digest;
use tokio::sync::watch;

use super::super::images::Images;
use super::super::views::chain_id;
use crate::ipc::protocol::ImageRequest;

/// First wait before a registry that did not answer is asked again; doubles each time, with jitter.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest such wait; the jitter comes on top.
const LONGEST_WAIT: Duration = Duration::from_secs(59);

/// How a job ended: well, or why not.
pub(super) type Outcome = Result<(), String>;

/// What is seen of a job.
pub(super) struct Watch {
    /// chainID of the image, once it is known.
    pub(super) chain: OnceLock<Digest>,
    layers: Mutex<HashMap<Digest, (u64, u64)>>,
    /// What waits for its registry, and why: layers, or the image itself.
    waiting: Mutex<HashMap<Option<Digest>, String>>,
    /// Counts steps forward.
    steps: AtomicU64,
    asked: watch::Sender<bool>,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Watch {
    pub(super) fn new(asked: bool) -> Self {
        Self {
            chain: OnceLock::new(),
            layers: Mutex::default(),
            waiting: Mutex::default(),
            steps: AtomicU64::new(0),
            asked: watch::Sender::new(asked),
            outcome: watch::Sender::new(None),
        }
    }

    /// The user asked for it: it goes before others from now on, and a registry that was away is asked at once.
    pub(super) fn ask(&self) {
        self.asked.send_replace(true);
    }

    /// Bytes done and in all of each layer that has moved.
    pub(super) fn layers(&self) -> Vec<(Digest, u64, u64)> {
        lock(&self.layers).iter().map(|(layer, (done, total))| (*layer, *done, *total)).collect()
    }

    /// Why it waits for a registry, if it does.
    pub(super) fn waiting(&self) -> Option<String> {
        lock(&self.waiting).values().next().cloned()
    }

    /// How it ended, once it has.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.outcome.borrow().clone()
    }

    pub(super) fn end(&self, outcome: Outcome) {
        self.outcome.send_replace(Some(outcome));
    }

    fn wait_for(&self, what: Option<Digest>, reason: Option<String>) {
        let mut waiting = lock(&self.waiting);
        match reason {
            Some(reason) => waiting.insert(what, reason),
            None => waiting.remove(&what),
        };
    }
}

impl Progress for Watch {
    fn advance(&self, layer: Digest, done: u64, total: u64) {
        lock(&self.layers).insert(layer, (done, total));
        self.steps.fetch_add(1, Relaxed);
    }

    fn waiting(&self, layer: Digest, reason: Option<&FetchError>) {
        self.wait_for(Some(layer), reason.map(ToString::to_string));
    }
}

/// Makes an image whole; ends early only for what waiting does not mend.
pub(super) async fn run(
    images: &Arc<Images>,
    request: &ImageRequest,
    watch: &Arc<Watch>,
) -> Result<(), anyhow::Error> {
    let progress: Arc<dyn Progress> = Arc::<Watch>::clone(watch);
    let ready = outlast(watch, None, || images.ready(request, &progress)).await?;
    if let Some(chain) = chain_id(&ready.layers.iter().map(|l| l.diff_id()).collect::<Vec<_>>()) {
        let _ = watch.chain.set(chain);
    }
    // One that fails is no reason to give up the others half-way.
    let jobs = ready.layers.iter().map(|layer| {
        let progress = &progress;
        async move {
            let id = Some(layer.diff_id());
            outlast(watch, id, || async { Ok(one_layer(images, layer, watch, progress).await?) }).await
        }
    });
    join_all(jobs).await.into_iter().collect()
}

/// Hydrates a layer: in the background, and before others once that is asked for.
async fn one_layer(
    images: &Images,
    layer: &Arc<Layer>,
    watch: &Watch,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    let mut asked = watch.asked.subscribe();
    let asked = async move { asked.wait_for(|asked| *asked).await.is_ok() };
    let quiet = pin!(images.prove(layer, Haste::Background, progress));
    match select(quiet, pin!(asked)).await {
        Either::Left((result, _)) => result,
        // The same work, joined once more.
        Either::Right((_, quiet)) => tokio::join!(quiet, images.prove(layer, Haste::First, progress)).1,
    }
}

/// Does something until it works or fails for good. Between tries that failed for a registry that is away it waits
/// longer and longer, unless there was progress.
async fn outlast<T, F>(watch: &Watch, what: Option<Digest>, attempt: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let delays = ExponentialBuilder::default().with_min_delay(FIRST_WAIT).with_max_delay(LONGEST_WAIT);
    let delays = delays.without_max_times().with_jitter();
    let mut waits = delays.build();
    loop {
        let before = watch.steps.load(Relaxed);
        let error = match attempt().await {
            Ok(done) => {
                watch.wait_for(what, None);
                return Ok(done);
            }
            Err(error) => error,
        };
        let cause = error.downcast_ref::<FetchError>();
        if !cause.is_some_and(passes) {
            watch.wait_for(what, None);
            return Err(error);
        }
        if watch.steps.load(Relaxed) != before {
            waits = delays.build();
        }
        let wait = waits.next().unwrap_or(LONGEST_WAIT);
        tracing::debug!(%error, ?wait, "hydration waits for a registry");
        watch.wait_for(what, Some(error.to_string()));
        let mut asked = watch.asked.subscribe();
        asked.mark_unchanged();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = asked.changed() => waits = delays.build(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether trying again later may help.
fn passes(error: &FetchError) -> bool {
    error.is_transient() || matches!(error, FetchError::Truncated { .. } | FetchError::Interrupted { .. })
}
