//! Images that containerd pulls: found by the labels of a request, kept with the snapshots, made ready when needed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::try_join_all;
use lazyrun_fetcher::{Beside, IndexPolicy, Layer, Progress, Reference, ResolvedImage, TrustMode};
use lazyrun_index::Digest;
use tokio::task::AbortHandle;

use super::labels::Wanted;
use super::record::{ImageRow, Remote};
use super::store::Store;
use crate::daemon::images::{Images, Ready};
use crate::daemon::views::chain_id;
use crate::ipc::protocol::{ImageRequest, IndexOptions, PullPolicy, RegistryOptions};

/// How long a registry may take to say what an image is. containerd waits meanwhile, and holds a lock.
const RESOLVE: Duration = Duration::from_secs(15);
/// How long an image that could not be found is not asked for again: its other layers would each wait as long.
const REFUSED: Duration = Duration::from_secs(30);
/// Most images that are remembered in memory.
const MAX_KNOWN: usize = 256;

/// An image that is known here.
#[derive(Debug)]
pub struct Known {
    /// Its row's key.
    pub key: String,
    /// Its documents.
    pub row: ImageRow,
    /// The image.
    pub image: ResolvedImage,
    /// The chainID of each layer with those below it.
    pub chains: Vec<Digest>,
    policy: IndexPolicy,
    // Whether it was or is being made ready.
    begun: AtomicBool,
    // What the registry said lies beside it, until that has been looked at; then the profile that was found.
    found: tokio::sync::OnceCell<Option<Vec<u8>>>,
    beside: Mutex<Option<Beside>>,
}

impl Known {
    fn new(key: String, row: ImageRow, image: ResolvedImage, policy: IndexPolicy, beside: Beside) -> Self {
        let mut chains: Vec<Digest> = Vec::with_capacity(image.layers.len());
        for layer in &image.layers {
            let chain = chains.last().map(|below| chain_id(&[*below, layer.diff_id]));
            chains.push(chain.flatten().unwrap_or(layer.diff_id));
        }
        let (found, beside) = (tokio::sync::OnceCell::new(), Mutex::new(Some(beside)));
        Self { key, row, image, chains, policy, begun: AtomicBool::new(false), found, beside }
    }
}

/// All images of snapshots.
pub struct SnapshotImages {
    images: Arc<Images>,
    registry: RegistryOptions,
    index: IndexOptions,
    known: Mutex<HashMap<String, Slot>>,
    jobs: Mutex<HashMap<String, AbortHandle>>,
}

#[derive(Clone, Default)]
struct Slot {
    cell: Arc<tokio::sync::OnceCell<Arc<Known>>>,
    refused: Option<(Instant, String)>,
}

impl SnapshotImages {
    /// Images fetched through `images` with these settings.
    pub fn new(images: Arc<Images>, registry: RegistryOptions, index: IndexOptions) -> Self {
        Self { images, registry, index, known: Mutex::default(), jobs: Mutex::default() }
    }

    /// The image that a request names; the registry is asked once.
    ///
    /// # Errors
    /// Why it can't be had.
    pub async fn get(&self, wanted: &Wanted, store: &Arc<Store>) -> Result<Arc<Known>> {
        let reference: Reference = wanted.reference.parse()?;
        let key = ImageRow::key(&reference.to_string(), wanted.manifest);
        let slot = self.slot(&key);
        if let Some((at, why)) = &slot.refused
            && at.elapsed() < REFUSED
        {
            anyhow::bail!("{why} (asked {} s ago)", at.elapsed().as_secs());
        }
        let known = slot.cell.get_or_try_init(|| async {
            let row = (Arc::clone(store), key.clone());
            let row = tokio::task::spawn_blocking(move || row.0.image(&row.1)).await??;
            match row {
                Some(row) => self.load(key.clone(), row).map(Arc::new),
                None => {
                    let resolved = tokio::time::timeout(RESOLVE, self.resolve(&reference, wanted.manifest));
                    resolved.await.with_context(|| format!("the registry of {reference} does not answer"))?
                }
            }
        });
        match known.await {
            Ok(known) => Ok(Arc::clone(known)),
            Err(error) => {
                let refused = Some((Instant::now(), format!("{error:#}")));
                self.lock().insert(key, Slot { refused, ..Slot::default() });
                Err(error)
            }
        }
    }

    /// The image of a row in the database.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn of_row(&self, key: &str, store: &Store) -> Result<Arc<Known>> {
        let slot = self.slot(key);
        if let Some(known) = slot.cell.get() {
            return Ok(Arc::clone(known));
        }
        let row = store.image(key)?.with_context(|| format!("the image {key} is not in the database"))?;
        let known = Arc::new(self.load(key.to_owned(), row)?);
        // Somebody else may have been faster.
        let _ = slot.cell.set(Arc::clone(&known));
        Ok(slot.cell.get().map_or(known, Arc::clone))
    }

    fn slot(&self, key: &str) -> Slot {
        let mut known = self.lock();
        if known.len() >= MAX_KNOWN && !known.contains_key(key) {
            known.clear();
        }
        known.entry(key.to_owned()).or_default().clone()
    }

    async fn resolve(&self, reference: &Reference, manifest: Digest) -> Result<Arc<Known>> {
        let trust = self.index.trust.unwrap_or_else(|| TrustMode::default_for(reference));
        let request = |reference: String| ImageRequest {
            reference,
            pull: PullPolicy::Missing,
            registry: self.registry.clone(),
            index: IndexOptions { trust: Some(trust), ..self.index.clone() },
        };
        let pinned = reference.with_digest(manifest);
        // Indexes may be named by the list that the tag leads to; a tag that has moved on is of no use.
        let mut found = None;
        if reference.digest.is_none() {
            let by_tag = self.images.find_image(&request(reference.to_string()), true).await;
            found = by_tag.ok().filter(|(image, _)| image.manifest_digest == manifest);
        }
        let (mut image, beside) = match found {
            Some(found) => found,
            None => self.images.find_image(&request(pinned.to_string()), true).await?,
        };
        anyhow::ensure!(image.manifest_digest == manifest, "{pinned} is not an image for this platform");
        image.reference = pinned;
        let encode = |bytes: &[u8]| STANDARD.encode(bytes);
        let row = ImageRow {
            reference: reference.to_string(),
            manifest: encode(&image.manifest),
            config: encode(&image.config),
            list: image.list.as_deref().map(encode),
            registry: self.registry.clone(),
        };
        let key = ImageRow::key(&row.reference, manifest);
        let policy = self.policy(&row, &image)?;
        self.images.add_sources(&self.images.client(&row.registry)?, &image);
        Ok(Arc::new(Known::new(key, row, image, policy, beside)))
    }

    fn load(&self, key: String, mut row: ImageRow) -> Result<Known> {
        row.registry.pull_secrets = self.registry.pull_secrets;
        let decode = |text: &String| STANDARD.decode(text).map(bytes::Bytes::from);
        let reference: Reference = row.reference.parse()?;
        let manifest = decode(&row.manifest)?;
        let reference = reference.with_digest(Digest::of(&manifest));
        let mut image = ResolvedImage::from_parts(reference, manifest, decode(&row.config)?)?;
        if let Some(list) = &row.list {
            image = image.with_list(decode(list)?)?;
        }
        let policy = self.policy(&row, &image)?;
        self.images.add_sources(&self.images.client(&row.registry)?, &image);
        Ok(Known::new(key, row, image, policy, Beside::default()))
    }

    // By the reference that was pulled: the digest is containerd's addition.
    fn policy(&self, row: &ImageRow, image: &ResolvedImage) -> Result<IndexPolicy> {
        let reference: Reference = row.reference.parse()?;
        let request = ImageRequest {
            reference: row.reference.clone(),
            pull: PullPolicy::Missing,
            registry: row.registry.clone(),
            index: self.index.clone(),
        };
        let named = ResolvedImage { reference, ..image.clone() };
        Ok(Images::policy(&request, &named))
    }

    /// Begins to make an image ready in the background: indexes are looked for, layers without one are streamed.
    pub fn begin(self: &Arc<Self>, known: &Arc<Known>) {
        if known.begun.swap(true, Relaxed) {
            return;
        }
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|_, job| !job.is_finished());
        let (this, image) = (Arc::clone(self), Arc::clone(known));
        let job = tokio::spawn(async move {
            let places: Vec<usize> = (0..image.image.layers.len()).collect();
            match this.layers_of(&image, &places).await {
                Ok(_) => tracing::info!(image = image.row.reference, "image is ready"),
                Err(error) => {
                    image.begun.store(false, Relaxed);
                    let error = format!("{error:#}");
                    tracing::warn!(image = image.row.reference, error, "image is not ready yet");
                }
            }
        });
        jobs.insert(known.key.clone(), job.abort_handle());
    }

    /// Ends what is under way for images that are gone.
    pub fn forget(&self, keys: &[String]) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = self.lock();
        for key in keys {
            if let Some(job) = jobs.remove(key) {
                job.abort();
            }
            known.remove(key);
        }
    }

    /// Takes the indexes that lie beside an image, once.
    async fn adopt(&self, known: &Known) -> Result<()> {
        let progress: Arc<dyn Progress> = Arc::new(lazyrun_fetcher::NoProgress);
        let images = &self.images;
        known
            .found
            .get_or_try_init(|| {
                let beside = known.beside.lock().unwrap_or_else(PoisonError::into_inner).take();
                let (image, registry, policy) = (&known.image, &known.row.registry, &known.policy);
                images.adopt_found(image, registry, policy, beside.unwrap_or_default(), &progress)
            })
            .await?;
        Ok(())
    }

    async fn layers_of(&self, known: &Known, places: &[usize]) -> Result<Vec<Arc<Layer>>> {
        self.adopt(known).await?;
        let progress: Arc<dyn Progress> = Arc::new(lazyrun_fetcher::NoProgress);
        let images = &self.images;
        let source = images.client(&known.row.registry)?.blobs(&known.image.reference);
        let one = |place: &usize| {
            let layer = known.image.layers.get(*place).cloned();
            let (source, progress) = (source.clone(), Arc::clone(&progress));
            async move {
                let layer = layer.context("the image has fewer layers than snapshots")?;
                images.layer(layer, source, &known.policy, &progress).await
            }
        };
        try_join_all(places.iter().map(one)).await
    }

    /// The name under which the image was pulled whose topmost layer here is the last of these.
    ///
    /// # Errors
    /// When its row can't be read.
    pub async fn name_of(self: &Arc<Self>, layers: &[Remote], store: &Arc<Store>) -> Result<String> {
        let key = layers.last().context("an image without layers")?.image.clone();
        let (this, store) = (Arc::clone(self), Arc::clone(store));
        let known = tokio::task::spawn_blocking(move || this.of_row(&key, &store));
        Ok(known.await.context("reading the images of snapshots")??.row.reference.clone())
    }

    /// What a container needs to start from these layers, bottom first. Waits until each has an index.
    ///
    /// # Errors
    /// When a layer can't be had.
    pub async fn ready(self: &Arc<Self>, layers: &[Remote], store: &Arc<Store>) -> Result<Ready> {
        // Layers that several images share belong to the one that was pulled first.
        let (this, store, of) = (Arc::clone(self), Arc::clone(store), layers.to_vec());
        let owners = tokio::task::spawn_blocking(move || {
            of.iter().map(|layer| this.of_row(&layer.image, &store)).collect::<Result<Vec<_>>>()
        });
        let owners = owners.await.context("reading the images of snapshots")??;
        let top = owners.last().context("an image without layers")?;
        let resolved = Instant::now();
        let adopted = try_join_all(owners.iter().map(|owner| self.adopt(owner))).await;
        adopted.with_context(|| format!("looking for the indexes of {}", top.row.reference))?;
        let indexed = Instant::now();
        let mut keys: Vec<&str> = layers.iter().map(|layer| layer.image.as_str()).collect();
        keys.sort_unstable();
        keys.dedup();
        let mut ready: Vec<Option<Arc<Layer>>> = vec![None; layers.len()];
        for key in keys {
            let ours: Vec<usize> = (0..layers.len()).filter(|i| layers[*i].image == key).collect();
            let Some(owner) = ours.first().map(|i| &owners[*i]) else { continue };
            let places: Vec<usize> = ours.iter().map(|i| layers[*i].position).collect();
            let got = self.layers_of(owner, &places).await;
            let got = got.with_context(|| format!("making {} ready", owner.row.reference))?;
            for (i, layer) in ours.into_iter().zip(got) {
                ready[i] = Some(layer);
            }
        }
        let layers: Vec<Arc<Layer>> = ready.into_iter().flatten().collect();
        let profile = top.found.get().cloned().flatten();
        let mut image = top.image.clone();
        image.reference = top.row.reference.parse()?;
        Ok(Ready { image, layers, profile, resolved, indexed })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
