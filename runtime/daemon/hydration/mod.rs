//! Hydration: which images become whole in the background, when, and how fast.
//!
//! A start asks for it, or the user does. What was asked for is on disk until it is done, so that a daemon that comes
//! after a crash or a reboot goes on with it, whether anything is started or not. The bytes are the fetcher's business.

mod job;
mod layers;
mod requests;
mod saved;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use lazyrun_fetcher::{FetchError, Reference};
use lazyrun_index::{Digest, LayerId};
use tokio::task::AbortHandle;

use super::images::Images;
use super::views::chain_id;
use crate::ipc::hydration::LazyState;
use crate::ipc::protocol::{ImageRequest, PullPolicy};
use job::Watch;
use saved::{Entry, Saved, SavedFile};

/// All hydration of an instance.
pub struct Hydration {
    images: Arc<Images>,
    file: SavedFile,
    state: Mutex<State>,
    /// Hydration of layers that belong to no recorded image.
    layers: Mutex<HashMap<LayerId, AbortHandle>>,
    // Whether all is paused, for those layers.
    paused: tokio::sync::watch::Sender<bool>,
}

struct State {
    saved: Saved,
    jobs: HashMap<String, Job>,
    /// Work for starts that precedes hydration, by reference.
    starts: Vec<(String, AbortHandle)>,
    /// chainIDs that shall stay lazy, by the container or mount that says so.
    kept_lazy: HashMap<String, Digest>,
    /// Why hydration of an image ended early.
    failed: HashMap<String, String>,
}

struct Job {
    task: AbortHandle,
    watch: Arc<Watch>,
}

/// An image stays lazy for as long as this lives.
pub struct KeptLazy {
    hydration: Arc<Hydration>,
    user: String,
}

impl std::fmt::Debug for KeptLazy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeptLazy({})", self.user)
    }
}

impl Drop for KeptLazy {
    fn drop(&mut self) {
        self.hydration.state().kept_lazy.remove(&self.user);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let hydration = Arc::clone(&self.hydration);
            runtime.spawn(async move { hydration.begin_all().await });
        }
    }
}

impl Hydration {
    /// The hydration that `path` tells of; nothing runs yet. The fetcher's limit is set: to what was said at run time,
    /// else to `limit`.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn open(images: Arc<Images>, path: PathBuf, limit: Option<u64>) -> Result<Arc<Self>> {
        let file = SavedFile::new(path);
        let saved = file.load()?;
        let limit = saved.limit.map_or(limit, |limit| (limit > 0).then_some(limit));
        images.fetcher().limit_background(limit);
        let state = State {
            saved,
            jobs: HashMap::new(),
            starts: Vec::new(),
            kept_lazy: HashMap::new(),
            failed: HashMap::new(),
        };
        let paused = tokio::sync::watch::Sender::new(state.saved.paused);
        Ok(Arc::new(Self { images, file, state: Mutex::new(state), layers: Mutex::default(), paused }))
    }

    /// Goes on with everything that is wanted.
    pub async fn begin_all(self: &Arc<Self>) {
        let keys: Vec<String> = self.state().saved.images.keys().cloned().collect();
        for key in keys {
            self.begin(&key).await;
        }
    }

    /// Remembers that an image shall become whole; [`Hydration::begin`] starts with it. What the user `asked` for is
    /// no longer paused, and goes before the rest. Returns the full reference.
    ///
    /// # Errors
    /// A bad reference.
    pub fn want(self: &Arc<Self>, request: &ImageRequest, asked: bool) -> Result<String> {
        let key = request.reference.parse::<Reference>()?.to_string();
        {
            let mut state = self.state();
            state.failed.remove(&key);
            let request = ImageRequest { pull: PullPolicy::Missing, ..request.clone() };
            let entry = state.saved.images.entry(key.clone()).or_insert_with(|| Entry::new(request.clone()));
            entry.request = request;
            entry.wanted = true;
            if asked {
                (entry.asked, entry.paused) = (true, false);
            }
        }
        self.save_later();
        Ok(key)
    }

    /// Does what a start needs first, then begins with the rest of the image, unless that has been removed meanwhile.
    pub fn begin_after(self: &Arc<Self>, key: String, start: impl Future<Output = ()> + Send + 'static) {
        let (this, name) = (Arc::clone(self), key.clone());
        let mut state = self.state();
        let task = tokio::spawn(async move {
            start.await;
            this.begin(&name).await;
        });
        state.starts.retain(|(_, task)| !task.is_finished());
        state.starts.push((key, task.abort_handle()));
    }

    /// Starts with an image if it is due.
    pub async fn begin(self: &Arc<Self>, key: &str) {
        let (this, name) = (Arc::clone(self), key.to_owned());
        let chain = tokio::task::spawn_blocking(move || this.chain_of(&name)).await.ok().flatten();
        let mut state = self.state();
        let Some(entry) = state.saved.images.get(key) else { return };
        let kept = chain.is_some_and(|chain| state.kept_lazy.values().any(|c| *c == chain));
        if !entry.wanted || entry.paused || state.saved.paused || (kept && !entry.asked) {
            return;
        }
        let (request, asked) = (entry.request.clone(), entry.asked);
        if let Some(job) = state.jobs.get(key).filter(|job| job.watch.outcome().is_none()) {
            let same = job.watch.chain.get().is_none_or(|c| chain.is_none_or(|now| *c == now));
            if same {
                if asked {
                    job.watch.ask();
                }
                return;
            }
            // The tag has moved on; what still runs from the old image is served by faults.
            job.task.abort();
        }
        let watch = Arc::new(Watch::new(asked));
        if let Some(chain) = chain {
            let _ = watch.chain.set(chain);
        }
        let (this, name, seen) = (Arc::clone(self), key.to_owned(), Arc::clone(&watch));
        let task = tokio::spawn(async move {
            let result = job::run(&this.images, &request, &seen).await;
            this.ended(&name, &seen, &result);
        });
        state.jobs.insert(key.to_owned(), Job { task: task.abort_handle(), watch });
    }

    /// Keeps the image of a container or mount lazy until the answer is dropped. What the user has asked for goes on.
    pub fn keep_lazy(self: &Arc<Self>, user: &str, chain: Digest) -> KeptLazy {
        let mut state = self.state();
        state.kept_lazy.insert(user.to_owned(), chain);
        let asked: Vec<String> =
            state.saved.images.iter().filter(|(_, e)| e.asked).map(|(key, _)| key.clone()).collect();
        state.jobs.retain(|key, job| {
            let stop = job.watch.chain.get() == Some(&chain) && !asked.contains(key);
            if stop {
                job.task.abort();
            }
            !stop
        });
        drop(state);
        KeptLazy { hydration: Arc::clone(self), user: user.to_owned() }
    }

    /// Stops everything for images that are removed. Blocks on the disk.
    ///
    /// # Errors
    /// When the state can't be written.
    pub fn forget(&self, references: &[String]) -> Result<()> {
        let mut state = self.state();
        for key in references {
            state.stop(key);
            state.saved.images.remove(key);
            state.failed.remove(key);
        }
        state.starts.retain(|(key, task)| {
            let gone = references.contains(key);
            if gone {
                task.abort();
            }
            !gone
        });
        drop(state);
        self.save()
    }

    /// No longer wants the images that have one of these layers, because their local bytes are dropped. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// When the state can't be read or written.
    pub fn give_up(&self, diff_ids: &[Digest]) -> Result<()> {
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            if image.layers.iter().any(|l| diff_ids.contains(&l.diff_id)) {
                let mut state = self.state();
                state.stop(&record.reference);
                if let Some(entry) = state.saved.images.get_mut(&record.reference) {
                    (entry.wanted, entry.asked) = (false, false);
                }
            }
        }
        self.save()
    }

    /// What happens with an image, and why it waits or has ended. `references` are its names.
    pub fn state_of(
        &self,
        chain: Option<Digest>,
        references: &[String],
        hydrated: bool,
    ) -> (LazyState, String) {
        if hydrated {
            return (LazyState::Hydrated, String::new());
        }
        let state = self.state();
        let running = state.jobs.iter().filter(|(_, job)| job.watch.outcome().is_none());
        let mut own = running.filter(|(key, job)| match job.watch.chain.get() {
            Some(of) => chain == Some(*of),
            None => references.contains(key),
        });
        if let Some((_, job)) = own.next() {
            let waiting = job.watch.waiting();
            return waiting.map_or((LazyState::Hydrating, String::new()), |why| (LazyState::Waiting, why));
        }
        let entries = || references.iter().filter_map(|key| state.saved.images.get(key));
        if state.saved.paused || entries().any(|entry| entry.paused) {
            return (LazyState::Paused, String::new());
        }
        if state.kept_lazy.values().any(|kept| chain == Some(*kept)) {
            return (LazyState::KeptLazy, String::new());
        }
        let why = references.iter().find_map(|key| state.failed.get(key));
        (LazyState::Lazy, why.cloned().unwrap_or_default())
    }

    fn ended(self: &Arc<Self>, key: &str, watch: &Arc<Watch>, result: &Result<()>) {
        let outcome = match result {
            Ok(()) => Ok(()),
            Err(error) => Err(format!("{error:#}")),
        };
        {
            let mut state = self.state();
            // A job that was replaced has nothing to say any more.
            if !state.jobs.get(key).is_some_and(|job| Arc::ptr_eq(&job.watch, watch)) {
                return;
            }
            state.jobs.remove(key);
            match result {
                Ok(()) => tracing::info!(image = key, "image hydrated"),
                Err(error) => {
                    tracing::warn!(image = key, error = format!("{error:#}"), "hydration ended early");
                    state.failed.insert(key.to_owned(), format!("{error:#}"));
                }
            }
            // What a registry refuses is tried again by the next daemon; what the store has no room for, or drops again,
            // is not: that would fight with those who make room.
            let cause = result.as_ref().err().and_then(|error| error.downcast_ref::<FetchError>());
            let later = cause.is_some_and(|e| !e.is_full() && !matches!(e, FetchError::Forgotten { .. }));
            if let Some(entry) = state.saved.images.get_mut(key).filter(|_| !later) {
                (entry.wanted, entry.asked) = (false, false);
            }
        }
        watch.end(outcome);
        self.save_later();
    }

    /// chainID of the recorded image with this full reference.
    fn chain_of(&self, key: &str) -> Option<Digest> {
        let record = self.images.record_of(key)?;
        let image = self.images.load(&record).ok()?;
        chain_id(&image.layers.iter().map(|l| l.diff_id).collect::<Vec<_>>())
    }

    fn save(&self) -> Result<()> {
        self.file.write(|| {
            let mut state = self.state();
            state.saved.prune();
            state.saved.clone()
        })
    }

    async fn save_now(self: &Arc<Self>) -> Result<()> {
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || this.save()).await.context("saving the state of hydration")?
    }

    fn save_later(self: &Arc<Self>) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = this.save_now().await {
                tracing::warn!(%error, "the state of hydration can't be saved");
            }
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn stop(&mut self, key: &str) {
        if let Some(job) = self.jobs.remove(key) {
            job.task.abort();
        }
    }
}
