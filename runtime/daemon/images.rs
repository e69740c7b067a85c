//! Images: from a reference to layers that have an index, with as little network as the policy allows.

mod records;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use futures_util::future::try_join_all;
use lazyrun_fetcher::observe::Watch;
use lazyrun_fetcher::{
    Beside, BlobSource, ClientOptions, ClientStats, DiscoverOptions, FetchError, Fetcher, Haste, HostStats,
    IndexPolicy, Keychain, Layer, LayerDescriptor, Platform, Progress, Reference, RegistryClient,
    ResolvedImage, Trust, TrustMode, discover_beside, resolve_and_look,
};
use lazyrun_index::{Digest, LayerId};
use tokio::sync::mpsc;

use super::lies::Lie;
use super::meta::Meta;
use super::metrics::{sum_clients, sum_hosts};
use crate::failure::Failure;
use crate::ipc::protocol::{ImageRequest, PullPolicy, RegistryOptions};
use crate::registries;

/// The images of an instance.
pub struct Images {
    meta: Meta,
    blobs: PathBuf,
    fetcher: Fetcher,
    clients: Mutex<HashMap<RegistryOptions, RegistryClient>>,
    lies: mpsc::Sender<Lie>,
    watch: Watch,
    keychain: Arc<Keychain>,
}

impl Images {
    /// Images recorded in `meta`, their manifests and configs in `blobs`. `lies` hears of indexes that are found
    /// not to tell the truth, `watch` of every request.
    pub fn new(meta: Meta, blobs: PathBuf, fetcher: Fetcher, lies: mpsc::Sender<Lie>, watch: Watch) -> Self {
        Self { meta, blobs, fetcher, clients: Mutex::default(), lies, watch, keychain: Arc::default() }
    }

    /// The pull secrets that pods came with.
    pub fn keychain(&self) -> &Arc<Keychain> {
        &self.keychain
    }

    /// What moves the bytes.
    pub fn fetcher(&self) -> &Fetcher {
        &self.fetcher
    }

    /// Requests sent to registries and bytes received from them since the start.
    pub fn traffic(&self) -> (u64, u64) {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.values().map(RegistryClient::stats).fold((0, 0), |(r, b), s| (r + s.requests, b + s.bytes))
    }

    /// What all clients have asked and received since the start.
    pub fn client_stats(&self) -> ClientStats {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        sum_clients(clients.values().map(RegistryClient::stats))
    }

    /// How registries have answered since the start.
    pub fn hosts(&self) -> Vec<HostStats> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        sum_hosts(clients.values().flat_map(RegistryClient::host_stats))
    }

    /// The client for these settings.
    ///
    /// # Errors
    /// When its settings can't be used.
    pub fn client(&self, options: &RegistryOptions) -> Result<RegistryClient> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(options) {
            return Ok(client.clone());
        }
        let client = RegistryClient::new(ClientOptions {
            insecure_registries: options.insecure.clone(),
            credential_files: options.docker_config.iter().chain(&options.auth_files).cloned().collect(),
            credential_providers: options.providers.as_deref().cloned(),
            keychain: options.pull_secrets.then(|| Arc::clone(&self.keychain)),
            hosts: options.hosts.clone(),
            proxies: registries::proxies(),
            watch: self.watch.clone(),
            ..ClientOptions::default()
        })?;
        clients.insert(options.clone(), client.clone());
        Ok(client)
    }

    /// Finds the image: what is recorded here, or what the registry says now, as the policy has it. Its
    /// layers' sources are known to the fetcher afterwards.
    ///
    /// # Errors
    /// A bad reference, a registry's refusal, or an image that isn't here with `--pull never`.
    pub async fn resolve(&self, request: &ImageRequest) -> Result<ResolvedImage> {
        Ok(self.find_image(request, false).await?.0)
    }

    /// As [`Images::resolve`]; where the registry is asked, it is also asked what lies beside the image.
    async fn resolve_and_look(&self, request: &ImageRequest) -> Result<(ResolvedImage, Beside)> {
        self.find_image(request, true).await
    }

    /// As [`Images::resolve`]; with `look`, where the registry is asked, it is also asked what lies beside the image.
    pub(crate) async fn find_image(
        &self,
        request: &ImageRequest,
        look: bool,
    ) -> Result<(ResolvedImage, Beside)> {
        let reference: Reference = request.reference.parse()?;
        let client = self.client(&request.registry)?;
        let known = match (request.pull, self.recorded(&reference)?) {
            // One small request where nothing has changed.
            (PullPolicy::Always, Some(known)) if !is_current(&client, &known).await => None,
            (_, known) => known,
        };
        let trust = request.index.trust.unwrap_or_else(|| TrustMode::default_for(&reference));
        let look = look && request.index.digest.is_none() && trust.admits(Trust::Repository);
        let (image, beside) = match (known, request.pull) {
            (Some(image), _) => (image, Beside::default()),
            (None, PullPolicy::Never) => {
                let name = reference.familiar();
                return Err(Failure::daemon(format!(
                    "image {name} is not here, and --pull=never forbids to fetch it"
                ))
                .into());
            }
            (None, _) => {
                let found = if look {
                    resolve_and_look(&client, &reference, &Platform::host(), &self.discovery()).await
                } else {
                    let image = client.resolve(&reference, &Platform::host()).await;
                    image.map(|image| (image, Beside::default()))
                };
                match found {
                    Ok(found) => found,
                    Err(error) => {
                        return Err(
                            registries::with_hint(error, &client, &reference, &request.reference).await
                        );
                    }
                }
            }
        };
        self.add_sources(&client, &image);
        Ok((image, beside))
    }

    /// Tells the fetcher where the layers of an image come from.
    pub(crate) fn add_sources(&self, client: &RegistryClient, image: &ResolvedImage) {
        let source = client.blobs(&image.reference);
        for layer in &image.layers {
            self.fetcher.add_source(layer.diff_id, layer.clone(), source.clone());
        }
    }

    /// Tells the fetcher where the layers of all recorded images come from. Reads of containers that an earlier
    /// daemon left may arrive before anybody names their image again.
    ///
    /// # Errors
    /// The database's; an image that can't be loaded is passed over with a warning.
    pub fn add_recorded_sources(&self) -> Result<()> {
        for record in self.records()? {
            match self.load(&record).and_then(|image| Ok((self.client(&record.registry)?, image))) {
                Ok((client, image)) => self.add_sources(&client, &image),
                Err(error) => {
                    tracing::warn!(image = record.reference, %error, "a recorded image can't be used");
                }
            }
        }
        Ok(())
    }

    /// Which indexes of others a request admits.
    pub fn policy(request: &ImageRequest, image: &ResolvedImage) -> IndexPolicy {
        let mut policy = IndexPolicy::default_for(&image.reference);
        policy.trust = request.index.trust.unwrap_or(policy.trust);
        policy.pinned = request.index.digest;
        policy
    }

    /// An image and its layers, ready to be started from: [`Images::resolve`] and [`Images::layers`] with as few round
    /// trips as it takes.
    ///
    /// # Errors
    /// As those.
    pub async fn ready(
        self: &Arc<Self>,
        request: &ImageRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<Ready> {
        let ready = self.found(request, progress).await?;
        self.record_apart(&ready.image, &request.registry).await?;
        Ok(ready)
    }

    /// As [`Images::ready`], before it is written down: there is something to do while the disk does that.
    ///
    /// # Errors
    /// As [`Images::ready`].
    pub async fn found(&self, request: &ImageRequest, progress: &Arc<dyn Progress>) -> Result<Ready> {
        let (image, beside) = self.resolve_and_look(request).await?;
        let resolved = Instant::now();
        let policy = Self::policy(request, &image);
        let profile = self.adopt_found(&image, &request.registry, &policy, beside, progress).await?;
        let indexed = Instant::now();
        let layers = self.indexed_layers(&image, &request.registry, &policy, progress).await?;
        Ok(Ready { image, layers, profile, resolved, indexed })
    }

    /// The layers of an image, each with an index: one that is here, one that is found in the registry and that the
    /// policy admits, or one that is made by streaming the layer; layers are streamed all at once.
    ///
    /// # Errors
    /// When a layer can't be had or isn't what its digest and diffID say.
    pub async fn layers(
        self: &Arc<Self>,
        image: &ResolvedImage,
        registry: &RegistryOptions,
        policy: &IndexPolicy,
        progress: &Arc<dyn Progress>,
    ) -> Result<Vec<Arc<Layer>>> {
        self.adopt_found(image, registry, policy, Beside::default(), progress).await?;
        let layers = self.indexed_layers(image, registry, policy, progress).await?;
        // Only now is it known that the image is what its manifest says.
        self.record_apart(image, registry).await?;
        Ok(layers)
    }

    /// The layers of an image; those that have no index yet are streamed.
    async fn indexed_layers(
        &self,
        image: &ResolvedImage,
        registry: &RegistryOptions,
        policy: &IndexPolicy,
        progress: &Arc<dyn Progress>,
    ) -> Result<Vec<Arc<Layer>>> {
        let source = self.client(registry)?.blobs(&image.reference);
        let one = |descriptor: LayerDescriptor| self.layer(descriptor, source.clone(), policy, progress);
        try_join_all(image.layers.iter().cloned().map(one)).await
    }

    /// A layer of an image, with an index that the policy admits; streamed if there is none.
    pub(crate) async fn layer(
        &self,
        descriptor: LayerDescriptor,
        source: BlobSource,
        policy: &IndexPolicy,
        progress: &Arc<dyn Progress>,
    ) -> Result<Arc<Layer>> {
        if let Some(layer) = self.fetcher.store().get(descriptor.diff_id)? {
            // One that another request's policy admitted has to be proven first.
            let admitted = layer.origin().is_none_or(|origin| {
                let pinned = origin.artifact.is_some() && origin.artifact == policy.pinned;
                policy.trust.admits(origin.trust) || pinned && policy.trust.admits(Trust::Bound)
            });
            if admitted {
                return Ok(layer);
            }
            match self.prove(&layer, Haste::Unlimited, progress).await {
                // The proof of a table leaves the tar itself, which is then the better one.
                Ok(()) => return Ok(self.fetcher.store().get(descriptor.diff_id)?.unwrap_or(layer)),
                Err(error @ FetchError::Lie { .. }) => {
                    progress.note(&format!("{error}; it is streamed anew"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.fetcher.ingest(&descriptor, source, Arc::clone(progress)).await?)
    }

    /// Looks for indexes of the layers that have none here and takes over what the policy admits. Whatever goes wrong
    /// with that is a note: the layers can be streamed. Returns the profile that lies with the indexes.
    ///
    /// # Errors
    /// The store's.
    pub async fn adopt_found(
        &self,
        image: &ResolvedImage,
        registry: &RegistryOptions,
        policy: &IndexPolicy,
        beside: Beside,
        progress: &Arc<dyn Progress>,
    ) -> Result<Option<Vec<u8>>> {
        let client = self.client(registry)?;
        let store = self.fetcher.store();
        let mut want = Vec::new();
        for diff_id in image.layers.iter().map(|l| l.diff_id) {
            if want.contains(&diff_id) || store.get(diff_id)?.is_some() {
                continue;
            }
            for id in [LayerId::tar(diff_id), LayerId::table(diff_id)] {
                if let Some(lie) = store.by_id(id)?.and_then(|layer| layer.lie()) {
                    progress.note(&format!("{lie}; another index is used"));
                }
            }
            want.push(diff_id);
        }
        if want.is_empty() {
            return Ok(None);
        }
        let found = discover_beside(&client, image, &want, policy, &self.discovery(), beside).await;
        for warning in &found.warnings {
            tracing::warn!(image = %image.reference, warning, "an index is not used");
            progress.note(warning);
        }
        // Each waits for the disk; all at once wait hardly longer than one.
        let adoptions = found.layers.into_values().map(|claim| {
            let store = store.clone();
            tokio::task::spawn_blocking(move || store.adopt(&claim.bytes, &claim.origin))
        });
        for adopted in try_join_all(adoptions).await? {
            match adopted {
                Ok(layer) => tracing::info!(layer = layer.file_name(), "index adopted"),
                Err(error) => progress.note(&error.to_string()),
            }
        }
        Ok(found.profile)
    }

    fn discovery(&self) -> DiscoverOptions {
        let refused = self.fetcher.store().refused_artifacts();
        DiscoverOptions { refused, ..DiscoverOptions::default() }
    }

    /// Hydrates a layer, which proves its index; tells of a lie.
    ///
    /// # Errors
    /// As [`Fetcher::hydrate`].
    pub(super) async fn prove(
        &self,
        layer: &Arc<Layer>,
        haste: Haste,
        progress: &Arc<dyn Progress>,
    ) -> Result<(), FetchError> {
        let result = self.fetcher.hydrate_as(layer, haste, Arc::clone(progress)).await;
        if let Err(error @ FetchError::Lie { .. }) = &result {
            let _ = self.lies.try_send((Arc::clone(layer), error.clone()));
        }
        result
    }

    /// Makes all bytes of the layers local.
    ///
    /// # Errors
    /// As [`Images::layers`].
    pub async fn hydrate(&self, layers: &[Arc<Layer>], progress: &Arc<dyn Progress>) -> Result<()> {
        let jobs = layers.iter().map(|layer| self.prove(layer, Haste::Unlimited, progress));
        try_join_all(jobs).await?;
        Ok(())
    }
}

/// Whether the registry's tag still leads to an image that is recorded here.
async fn is_current(client: &RegistryClient, image: &ResolvedImage) -> bool {
    let known = image.list.as_ref().map_or(image.manifest_digest, |list| Digest::of(list));
    // What goes wrong here goes wrong once more, and is told, when the manifest itself is asked for.
    matches!(client.tag_digest(&image.reference).await, Ok(Some(now)) if now == known)
}

/// An image that can be started from.
pub struct Ready {
    /// The image.
    pub image: ResolvedImage,
    /// Its layers, bottom first, each with an index.
    pub layers: Vec<Arc<Layer>>,
    /// A profile that was found with the indexes: bytes that nobody has looked at.
    pub profile: Option<Vec<u8>>,
    /// When manifest and config were known.
    pub resolved: Instant,
    /// When it was known which indexes are used; what came after was streaming those layers that have none.
    pub indexed: Instant,
}
