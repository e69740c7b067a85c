//! Layers that were taken over, downloaded for containerd all the same, when nothing else wants the link.
//!
//! containerd is asked only here, in tasks of their own: while it waits for an answer of the snapshotter it holds locks.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use backon::{BackoffBuilder, ExponentialBuilder};
use lazyrun_fetcher::{NoProgress, Platform, Progress, Reference};
use lazyrun_index::Digest;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::record::ImageRow;
use super::store::Store;
use crate::containerd::fetch::{self, Fetch, Fetched, Platforms};
use crate::containerd::{Containerd, ContainerdError, Scope};
use crate::daemon::Daemon;
use crate::failure::sentence;
use crate::ipc::protocol::RegistryOptions;

/// How long after a layer was taken over it begins: by then most pulls have ended.
const SETTLE: Duration = Duration::from_secs(2);
/// First wait before a download that failed is tried again; doubles each time, with jitter.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// After so many tries it is given up until the image is pulled again, or the next start.
const TRIES: usize = 20;

/// An image in a namespace of containerd.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Kept {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The reference it was pulled by.
    pub(crate) reference: String,
    /// The digest of its manifest.
    pub(crate) manifest: Digest,
}

/// All such downloads.
pub(crate) struct Blobs {
    containerd: Containerd,
    registry: RegistryOptions,
    /// Where it is noted what is to be done, for the next daemon.
    store: Arc<Store>,
    /// One image at a time.
    turn: Semaphore,
    jobs: Mutex<HashMap<Kept, Job>>,
}

struct Job {
    task: AbortHandle,
    /// Layers of it were taken over since it began to look what is missing.
    again: bool,
}

impl Kept {
    /// The key of its row.
    fn key(&self) -> String {
        ImageRow::key(&self.reference, self.manifest)
    }

    fn of_key(namespace: String, key: &str) -> Option<Self> {
        let (manifest, reference) = key.split_once(' ')?;
        Some(Self { namespace, reference: reference.to_owned(), manifest: manifest.parse().ok()? })
    }
}

impl Blobs {
    /// Downloads for this containerd, with these settings.
    pub(super) fn new(containerd: Containerd, registry: RegistryOptions, store: Arc<Store>) -> Self {
        Self { containerd, registry, store, turn: Semaphore::new(1), jobs: Mutex::default() }
    }

    /// Goes on with what an earlier daemon had begun.
    ///
    /// # Errors
    /// When the database can't be read.
    pub(super) fn resume(self: &Arc<Self>, daemon: &Arc<Daemon>) -> Result<()> {
        for (namespace, key) in self.store.wanted_blobs()? {
            if let Some(image) = Kept::of_key(namespace, &key) {
                self.begin(daemon, image);
            }
        }
        Ok(())
    }

    /// Begins to download what containerd lacks of an image, in a while.
    pub(super) fn begin(self: &Arc<Self>, daemon: &Arc<Daemon>, image: Kept) {
        let mut jobs = self.jobs();
        if let Some(job) = jobs.get_mut(&image).filter(|job| !job.task.is_finished()) {
            job.again = true;
            return;
        }
        let (this, daemon, key) = (Arc::clone(self), Arc::clone(daemon), image.clone());
        let task = tokio::spawn(async move { this.run(&daemon, &key).await });
        jobs.insert(image, Job { task: task.abort_handle(), again: false });
    }

    /// Ends downloads of images that are gone, by their rows' keys. Blocks on the disk; to be called where tasks can be
    /// spawned.
    pub(super) fn forget(self: &Arc<Self>, keys: &[String]) {
        if keys.is_empty() {
            return;
        }
        // Held to the end: a pull that has put an image's row back meanwhile begins with its download only after that.
        let mut jobs = self.jobs();
        let back = |key: &String| matches!(self.store.image(key), Ok(Some(_)));
        let keys: HashSet<&String> = keys.iter().filter(|key| !back(key)).collect();
        let mut gone: HashSet<Kept> = jobs
            .extract_if(|image, _| keys.contains(&image.key()))
            .map(|(image, job)| {
                job.task.abort();
                image
            })
            .collect();
        for (namespace, key) in self.store.wanted_blobs().unwrap_or_default() {
            if !keys.contains(&key) {
                continue;
            }
            if let Err(error) = self.store.want_blobs(&namespace, &key, false) {
                tracing::warn!(image = key, %error, "that an image is gone can't be noted");
            }
            gone.extend(Kept::of_key(namespace, &key));
        }
        drop(jobs);
        for image in gone {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.let_go(&image).await });
        }
    }

    /// Has containerd drop what it got so far of an image that is gone, unless that has been pulled again.
    async fn let_go(&self, image: &Kept) {
        // What begins now with the same image waits for its turn, and then has a lease of its own.
        let Ok(_turn) = self.turn.acquire().await else { return };
        if self.jobs().contains_key(image) {
            return;
        }
        if let Err(error) = self.end_leases(image).await {
            tracing::warn!(image = image.reference, %error, "layers of a removed image stay for a day");
        }
    }

    async fn end_leases(&self, image: &Kept) -> Result<(), ContainerdError> {
        fetch::forget(&self.containerd, &image.namespace, image.manifest, &Self::platforms()).await
    }

    /// What is fetched of an image: a manifest's own blobs.
    fn platforms() -> Platforms {
        Platforms::Best(Platform::host())
    }

    /// Notes for the next daemon whether the image's layers are still to be downloaded.
    async fn note(&self, image: &Kept, wanted: bool) {
        let (store, namespace, key) = (Arc::clone(&self.store), image.namespace.clone(), image.key());
        let noted = tokio::task::spawn_blocking(move || store.want_blobs(&namespace, &key, wanted));
        if let Ok(Err(error)) = noted.await {
            tracing::warn!(image = image.reference, %error, "what containerd is to get can't be noted");
        }
    }

    async fn run(&self, daemon: &Daemon, image: &Kept) {
        let delays = ExponentialBuilder::default().with_min_delay(FIRST_WAIT).with_max_delay(LONGEST_WAIT);
        let delays = delays.with_max_times(TRIES).with_jitter();
        let mut waits = delays.build();
        loop {
            self.note(image, true).await;
            tokio::time::sleep(SETTLE).await;
            if let Some(job) = self.jobs().get_mut(image) {
                job.again = false;
            }
            let wait = match self.fetch(daemon, image).await {
                Ok(fetched) => {
                    if let Some(Fetched { fetched, bytes, .. }) = fetched {
                        tracing::info!(image = image.reference, fetched, bytes, "containerd has all layers");
                    }
                    self.note(image, false).await;
                    None
                }
                Err(error) => {
                    let (image, error, wait) = (&image.reference, sentence(&error), waits.next());
                    match wait {
                        Some(wait) => {
                            tracing::warn!(image, error, ?wait, "layers can't be downloaded for containerd");
                        }
                        None => tracing::warn!(
                            image,
                            error,
                            "layers can't be downloaded for containerd: given up until the image is pulled again or \
                             lazyrun starts"
                        ),
                    }
                    wait
                }
            };
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None if self.ends(image) => return,
                None => waits = delays.build(),
            }
        }
    }

    /// Forgets the job of an image, unless there is more to do.
    fn ends(&self, image: &Kept) -> bool {
        let mut jobs = self.jobs();
        let again = jobs.get(image).is_some_and(|job| job.again);
        if !again {
            jobs.remove(image);
        }
        !again
    }

    /// Downloads what is missing; `None` if containerd does not have the image any more.
    async fn fetch(&self, daemon: &Daemon, image: &Kept) -> Result<Option<Fetched>> {
        let _turn = self.turn.acquire().await?;
        let scope = Scope { namespace: image.namespace.clone(), lease: None };
        if self.containerd.info(&scope, image.manifest).await?.is_none() {
            self.end_leases(image).await?;
            return Ok(None);
        }
        let reference: Reference = image.reference.parse()?;
        let progress: Arc<dyn Progress> = Arc::new(NoProgress);
        let fetch = Fetch {
            containerd: &self.containerd,
            namespace: &image.namespace,
            client: &daemon.images().client(&self.registry)?,
            pulled: &[],
            platforms: &Self::platforms(),
            background: Some(daemon.images().fetcher()),
            progress: &progress,
        };
        fetch.tree(&image.reference, image.manifest, Some(&reference)).await.map(Some)
    }

    fn jobs(&self) -> MutexGuard<'_, HashMap<Kept, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(reference: &str) -> Kept {
        Kept { namespace: "n".into(), reference: reference.into(), manifest: Digest::of(b"m") }
    }

    #[tokio::test]
    async fn what_is_pulled_again_meanwhile_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("db")).unwrap());
        let nobody = Containerd::at(&dir.path().join("nobody")).unwrap();
        let blobs = Arc::new(Blobs::new(nobody, RegistryOptions::default(), Arc::clone(&store)));
        for image in [kept("gone"), kept("back")] {
            store.want_blobs(&image.namespace, &image.key(), true).unwrap();
            let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
            blobs.jobs().insert(image, Job { task, again: false });
        }
        let row = ImageRow {
            reference: "back".into(),
            manifest: String::new(),
            config: String::new(),
            list: None,
            registry: RegistryOptions::default(),
        };
        store.put_image(&kept("back").key(), &row).unwrap();
        blobs.forget(&[kept("gone").key(), kept("back").key()]);
        let left: Vec<Kept> = blobs.jobs().keys().cloned().collect();
        assert_eq!(left, [kept("back")]);
        assert_eq!(store.wanted_blobs().unwrap(), [("n".to_owned(), kept("back").key())]);
    }
}
