//! What `lazyrun hydrate` and the lists with `--lazy` ask for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use lazyrun_fetcher::{Layer, Progress};
use lazyrun_index::Digest;
use serde_json::Value;

use super::super::Daemon;
use super::super::views::chain_id;
use super::Hydration;
use super::saved::Entry;
use crate::failure::Failure;
use crate::ipc::hydration::{HydrationAction, LazyContainer, LazyImage, Locality};
use crate::ipc::protocol::{ImageRequest, PullPolicy};

/// How often who waits is told how far it is.
const REPORT: Duration = Duration::from_millis(200);

impl Daemon {
    /// Does what a request about hydration asks for and answers as [`HydrationAction`] says.
    pub(in crate::daemon) async fn hydrate(
        self: &Arc<Self>,
        action: HydrationAction,
        progress: Arc<dyn Progress>,
    ) -> Result<Value> {
        let hydration = &self.hydration;
        Ok(match action {
            HydrationAction::Start { image, wait } => {
                serde_json::to_value(self.start_hydration(&image, wait, &progress).await?)?
            }
            HydrationAction::Pause { image } => {
                let keys = self.named(image).await?;
                hydration.pause(keys);
                hydration.save_now().await?;
                Value::Null
            }
            HydrationAction::Resume { image } => {
                let keys = self.named(image).await?;
                hydration.resume(keys)?;
                hydration.save_now().await?;
                hydration.begin_all().await;
                Value::Null
            }
            HydrationAction::Limit { bytes_per_second } => {
                self.images.fetcher().limit_background(bytes_per_second);
                hydration.state().saved.limit = Some(bytes_per_second.unwrap_or(0));
                hydration.save_now().await?;
                Value::Null
            }
            HydrationAction::Images => {
                self.blocking(|this| Ok(serde_json::to_value(this.lazy_images()?)?)).await?
            }
            HydrationAction::Containers { all } => {
                self.blocking(move |this| Ok(serde_json::to_value(this.lazy_containers(all)?)?)).await?
            }
        })
    }

    async fn start_hydration(
        self: &Arc<Self>,
        request: &ImageRequest,
        wait: bool,
        progress: &Arc<dyn Progress>,
    ) -> Result<Digest> {
        if self.hydration.state().saved.paused {
            let why = "hydration of all images is paused; `lazyrun hydrate --resume` resumes it";
            return Err(Failure::new(1, why).into());
        }
        // Whether there is such an image is told at once; its bytes come in the background.
        let image = self.images.resolve(request).await?;
        let key = self.hydration.want(request, true)?;
        self.hydration.save_now().await?;
        self.hydration.begin(&key).await;
        if wait {
            let diff_ids = image.diff_ids();
            self.wait_for_hydration(&key, &diff_ids, progress).await?;
        }
        Ok(image.manifest_digest)
    }

    /// Waits until all layers are local and proven.
    async fn wait_for_hydration(
        self: &Arc<Self>,
        key: &str,
        diff_ids: &[Digest],
        progress: &Arc<dyn Progress>,
    ) -> Result<()> {
        let mut told = String::new();
        let mut told_of = HashMap::new();
        loop {
            let watch = self.hydration.state().jobs.get(key).map(|job| Arc::clone(&job.watch));
            for (layer, done, total) in watch.iter().flat_map(|watch| watch.layers()) {
                if told_of.insert(layer, done) != Some(done) {
                    progress.advance(layer, done, total);
                }
            }
            let Some(watch) = watch else {
                let (key, ids) = (key.to_owned(), diff_ids.to_vec());
                let left = self.blocking(move |this| this.why_not_whole(&key, &ids)).await?;
                match left {
                    None => return Ok(()),
                    Some(Left::For(why)) => return Err(Failure::daemon(why).into()),
                    Some(Left::Paused) => tell(progress, &mut told, "hydration is paused"),
                }
                tokio::time::sleep(REPORT).await;
                continue;
            };
            match watch.waiting() {
                Some(why) => tell(progress, &mut told, &format!("{why}; this is tried again")),
                None => told.clear(),
            }
            tokio::time::sleep(REPORT).await;
        }
    }

    /// Why an image without a job is not whole; `None` if it is.
    fn why_not_whole(&self, key: &str, diff_ids: &[Digest]) -> Result<Option<Left>> {
        let layers = self.layers_here(diff_ids)?;
        if layers.len() == diff_ids.len() && layers.iter().all(|l| l.is_hydrated()) {
            return Ok(None);
        }
        let state = self.hydration.state();
        let paused = state.saved.paused || state.saved.images.get(key).is_some_and(|e| e.paused);
        if let Some(why) = state.failed.get(key) {
            return Ok(Some(Left::For(why.clone())));
        }
        if paused && state.saved.images.contains_key(key) {
            return Ok(Some(Left::Paused));
        }
        Ok(Some(Left::For(format!(
            "hydration of {key} was stopped, because it or its local bytes were removed"
        ))))
    }

    fn layers_here(&self, diff_ids: &[Digest]) -> Result<Vec<Arc<Layer>>> {
        let store = self.images.fetcher().store();
        let layers = diff_ids.iter().map(|diff_id| Ok(store.get(*diff_id)?));
        Ok(layers.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Full references of the images that a name means; `None` is all.
    async fn named(self: &Arc<Self>, name: Option<String>) -> Result<Option<Vec<(String, ImageRequest)>>> {
        let Some(name) = name else { return Ok(None) };
        let find = move |this: &Self| {
            let records = this.images.find(&name)?.into_iter();
            Ok(records.map(|r| (r.reference.clone(), r.request())).collect())
        };
        Ok(Some(self.blocking(find).await?))
    }

    fn lazy_images(&self) -> Result<Vec<LazyImage>> {
        let mut rows = Vec::new();
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            let summary = self.images.summary(&record)?;
            let diff_ids = image.diff_ids();
            let layers = self.layers_here(&diff_ids)?;
            rows.push(LazyImage {
                repository: summary.repository,
                tag: summary.tag,
                id: record.config,
                locality: self.locality(&layers, &diff_ids, &[record.reference]),
            });
        }
        Ok(rows)
    }

    fn lazy_containers(&self, all: bool) -> Result<Vec<LazyContainer>> {
        let mut names: HashMap<Digest, Vec<String>> = HashMap::new();
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            if let Some(chain) = chain_id(&image.layers.iter().map(|l| l.diff_id).collect::<Vec<_>>()) {
                names.entry(chain).or_default().push(record.reference);
            }
        }
        let mut rows = Vec::new();
        for container in self.containers.all().into_iter().filter(|c| all || c.is_running()) {
            let record = container.record();
            let ids = super::super::layer_ids(&record.layers, &record.diff_ids);
            let store = self.images.fetcher().store();
            let layers: Vec<Arc<Layer>> =
                ids.iter().filter_map(|id| store.by_id(*id).ok().flatten()).collect();
            let references = chain_id(&record.diff_ids).and_then(|chain| names.get(&chain));
            let references = references.map_or(&[][..], Vec::as_slice);
            rows.push(LazyContainer {
                locality: self.locality(&layers, &record.diff_ids, references),
                id: record.id,
                image: record.image,
                names: record.name,
            });
        }
        Ok(rows)
    }

    fn locality(&self, layers: &[Arc<Layer>], diff_ids: &[Digest], references: &[String]) -> Locality {
        let hydrated = layers.len() == diff_ids.len() && layers.iter().all(|l| l.is_hydrated());
        let local: u64 = layers.iter().map(|l| l.local_bytes()).sum();
        let total: u64 = layers.iter().map(|l| l.index().layer_size()).sum();
        let percent = match hydrated {
            true => 100,
            // Layers without an index have bytes that nobody can count.
            false => (local * 100).checked_div(total).unwrap_or(0).min(99),
        };
        let (state, reason) = self.hydration.state_of(chain_id(diff_ids), references, hydrated);
        Locality { percent, local, total, state, reason }
    }
}

enum Left {
    Paused,
    For(String),
}

// Each state once.
fn tell(progress: &Arc<dyn Progress>, told: &mut String, text: &str) {
    if told != text {
        progress.note(text);
        text.clone_into(told);
    }
}

impl Hydration {
    fn pause(&self, images: Option<Vec<(String, ImageRequest)>>) {
        let mut state = self.state();
        let Some(images) = images else {
            state.saved.paused = true;
            self.paused.send_replace(true);
            for (_, job) in state.jobs.drain() {
                job.task.abort();
            }
            return;
        };
        for (key, request) in images {
            state.stop(&key);
            let request = ImageRequest { pull: PullPolicy::Missing, ..request };
            state.saved.images.entry(key).or_insert_with(|| Entry::new(request)).paused = true;
        }
    }

    fn resume(&self, images: Option<Vec<(String, ImageRequest)>>) -> Result<()> {
        let mut state = self.state();
        let Some(images) = images else {
            state.saved.paused = false;
            self.paused.send_replace(false);
            state.saved.images.values_mut().for_each(|entry| entry.paused = false);
            return Ok(());
        };
        if state.saved.paused {
            let why =
                "hydration of all images is paused; `lazyrun hydrate --resume` without an image resumes it";
            return Err(Failure::new(1, why).into());
        }
        for (key, _) in images {
            if let Some(entry) = state.saved.images.get_mut(&key) {
                entry.paused = false;
            }
        }
        Ok(())
    }
}

impl super::super::meta::ImageRecord {
    /// A request for what is recorded.
    pub(super) fn request(&self) -> ImageRequest {
        ImageRequest {
            reference: self.reference.clone(),
            pull: PullPolicy::Missing,
            registry: self.registry.clone(),
            index: crate::ipc::protocol::IndexOptions::default(),
        }
    }
}
