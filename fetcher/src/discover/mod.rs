//! Finding indexes that others have made of an image's layers, before it is started.
//!
//! Everything found is a claim (see [`crate::Origin`]); a stream of the layer proves it later. Here it is
//! checked as far as that goes without the layer: digests, sizes, which image and layer it is of, and that it is
//! a valid index. What fails is left out with a warning; an image without index still starts.

mod beside;
mod load;
mod table_image;
mod tables;

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lazyrun_index::Digest;
use tokio::sync::{OnceCell, Semaphore};

use crate::artifact::{
    ArtifactDocument, Candidate, Descriptor, bad, candidates_in_list, check_document, load_document,
    pinned_by_manifest,
};
use crate::client::RegistryClient;
use crate::error::FetchError;
use crate::manifest::{LayerDescriptor, ResolvedImage};
use crate::trust::{IndexPolicy, Origin, OriginKind, Trust, TrustMode};

pub use beside::{Beside, find_profile, resolve_and_look};

/// Requests at a time.
const PARALLEL: usize = 6;
/// Indexes that are unpacked or made at a time: each may take as much memory as it is long, twice.
const DECODERS: usize = 2;
/// Artifacts that are tried, best first.
const MAX_CANDIDATES: usize = 8;
/// Bytes of indexes that one discovery holds in memory.
const MAX_BYTES: u64 = 512 << 20;
const NO_ROOM: &str = "there is no room for it in memory";

/// Bounds of a discovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoverOptions {
    /// How long it may take: a start waits for it. What was found until then is used.
    pub limit: Duration,
    /// Artifacts that have lied before: they are not looked at.
    pub refused: HashSet<Digest>,
}

impl Default for DiscoverOptions {
    fn default() -> Self {
        DiscoverOptions { limit: Duration::from_secs(5), refused: HashSet::new() }
    }
}

/// An index that somebody says is of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimedIndex {
    /// The index in our own format; it is valid and names the layer's blob and diffID.
    pub bytes: Vec<u8>,
    /// Where it came from.
    pub origin: Origin,
}

/// What a discovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundIndexes {
    /// Indexes by the diffID of their layer; at most one for each layer that was asked for.
    pub layers: HashMap<Digest, ClaimedIndex>,
    /// The profile that lies beside the first indexes that were taken: bytes that nobody has looked at.
    pub profile: Option<Vec<u8>>,
    /// What was skipped and why: one sentence each, naming the artifact or layer.
    pub warnings: Vec<String>,
}

/// Looks for indexes of the layers `want` (diffIDs) of an image, as far as `policy` admits them.
///
/// Never fails and never takes much longer than five seconds: what cannot be used becomes a warning.
pub async fn discover(
    client: &RegistryClient,
    image: &ResolvedImage,
    want: &[Digest],
    policy: &IndexPolicy,
) -> FoundIndexes {
    discover_with(client, image, want, policy, &DiscoverOptions::default()).await
}

/// As [`discover`], with bounds of the caller.
pub async fn discover_with(
    client: &RegistryClient,
    image: &ResolvedImage,
    want: &[Digest],
    policy: &IndexPolicy,
    options: &DiscoverOptions,
) -> FoundIndexes {
    discover_beside(client, image, want, policy, options, Beside::default()).await
}

/// As [`discover_with`], with what has been seen beside the image already ([`resolve_and_look`]).
pub async fn discover_beside(
    client: &RegistryClient,
    image: &ResolvedImage,
    want: &[Digest],
    policy: &IndexPolicy,
    options: &DiscoverOptions,
    beside: Beside,
) -> FoundIndexes {
    let search = Search {
        client,
        image,
        policy,
        options,
        beside: Mutex::new(beside.found),
        gate: Semaphore::new(PARALLEL),
        decoders: Semaphore::new(DECODERS),
        table_image: OnceCell::new(),
        state: Mutex::new(State::new(image, want)),
    };
    if policy.trust == TrustMode::Proven {
        if let Some(pinned) = policy.pinned {
            search.warn(format!("index {pinned} is not used: only proven indexes are trusted"));
        }
    } else if tokio::time::timeout(options.limit, search.run()).await.is_err() {
        let limit = options.limit.as_secs_f32();
        let missing = search.missing().len();
        search.warn(format!("the search for indexes was ended after {limit} s; {missing} layers have none"));
    }
    let state = search.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    FoundIndexes { layers: state.found, profile: state.profile, warnings: state.warnings }
}

/// Gets one artifact's indexes of the layers `want`, by its digest: as a discovery that pins it.
///
/// # Errors
/// When the artifact cannot be had or used, or holds no index of these layers.
pub async fn pull_index(
    client: &RegistryClient,
    image: &ResolvedImage,
    artifact: Digest,
    want: &[Digest],
) -> Result<FoundIndexes, FetchError> {
    let policy = IndexPolicy { trust: TrustMode::Bound, pinned: Some(artifact) };
    let options = DiscoverOptions { limit: Duration::from_secs(600), ..DiscoverOptions::default() };
    let found = discover_with(client, image, want, &policy, &options).await;
    match found.warnings.first() {
        Some(warning) if found.layers.is_empty() => Err(bad(image, artifact, warning.clone())),
        _ => Ok(found),
    }
}

/// A discovery under way.
struct Search<'a> {
    client: &'a RegistryClient,
    image: &'a ResolvedImage,
    policy: &'a IndexPolicy,
    options: &'a DiscoverOptions,
    beside: Mutex<Option<beside::Listed>>,
    gate: Semaphore,
    decoders: Semaphore,
    /// Layers of the image that holds eStargz tables, once somebody needs them.
    table_image: OnceCell<Result<Vec<Descriptor>, String>>,
    /// Outside of the futures, so that what was found stays when time is up.
    state: Mutex<State>,
}

struct State {
    want: Vec<LayerDescriptor>,
    found: HashMap<Digest, ClaimedIndex>,
    profile: Option<Vec<u8>>,
    warnings: Vec<String>,
    /// Bytes that may still be taken.
    room: u64,
}

impl State {
    fn new(image: &ResolvedImage, want: &[Digest]) -> Self {
        let mut seen = HashSet::new();
        let wanted = |l: &&LayerDescriptor| want.contains(&l.diff_id) && seen.insert(l.diff_id);
        let want = image.layers.iter().filter(wanted).cloned().collect();
        State { want, found: HashMap::new(), profile: None, warnings: Vec::new(), room: MAX_BYTES }
    }
}

impl Search<'_> {
    async fn run(&self) {
        if self.missing().is_empty() {
            return;
        }
        if let Some(pinned) = self.policy.pinned {
            let candidate = Candidate::bare(OriginKind::Own, Trust::Bound, pinned);
            return self.take(&candidate, self.document(&candidate).await).await;
        }
        // While what is bound is loaded, those beside the image are looked up already.
        let (referring, ()) = tokio::join!(self.referring(), self.bound());
        for (candidate, document) in referring {
            if self.missing().is_empty() {
                break;
            }
            self.take(&candidate, document).await;
        }
    }

    /// Takes what the image's manifest or index names: artifacts first, since their tables are of the whole tar.
    async fn bound(&self) {
        let mut candidates = candidates_in_list(self.image);
        let named = pinned_by_manifest(self.image);
        if let Some(named) = named.filter(|n| candidates.iter().all(|c| c.digest != n.digest)) {
            candidates.push(named);
            candidates.sort_by(Candidate::order);
        }
        candidates.truncate(MAX_CANDIDATES);
        for (candidate, document) in self.documents(candidates).await {
            if self.missing().is_empty() {
                return;
            }
            self.take(&candidate, document).await;
        }
        tables::take(self).await;
    }

    /// Artifacts beside the image, best first, with their manifests.
    async fn referring(&self) -> Vec<(Candidate, Result<ArtifactDocument, FetchError>)> {
        if !self.policy.trust.admits(Trust::Repository) {
            return Vec::new();
        }
        let seen = self.beside.lock().unwrap_or_else(PoisonError::into_inner).take();
        let listed = match seen {
            Some(listed) => listed,
            None => {
                let (reference, manifest) = (&self.image.reference, self.image.manifest_digest);
                beside::list(self.client, reference, manifest, self.options).await
            }
        };
        let check = |(candidate, bytes): (Candidate, Result<_, FetchError>)| {
            let document = bytes.and_then(|bytes| check_document(self.image, candidate.digest, bytes));
            (candidate, document.map(|(_, document)| document))
        };
        match listed {
            Ok(found) => found.into_iter().map(check).collect(),
            Err(error) => {
                self.warn(format!("the indexes beside the image cannot be listed: {error}"));
                Vec::new()
            }
        }
    }

    /// The manifests of candidates, in their order.
    async fn documents(
        &self,
        candidates: Vec<Candidate>,
    ) -> Vec<(Candidate, Result<ArtifactDocument, FetchError>)> {
        let fetches = candidates.into_iter().map(|candidate| async move {
            let document = self.document(&candidate).await;
            (candidate, document)
        });
        futures_util::future::join_all(fetches).await
    }

    async fn document(&self, candidate: &Candidate) -> Result<ArtifactDocument, FetchError> {
        if self.options.refused.contains(&candidate.digest) {
            let reason = "it has lied about a layer before".to_owned();
            return Err(bad(self.image, candidate.digest, reason));
        }
        let _turn = self.gate.acquire().await;
        load_document(self.client, self.image, candidate.digest).await.map(|(_, document)| document)
    }

    /// Takes from one artifact the indexes that are still missing.
    async fn take(&self, candidate: &Candidate, document: Result<ArtifactDocument, FetchError>) {
        match document {
            Ok(document) => load::take(self, candidate, document).await,
            Err(error @ FetchError::Artifact { .. }) => self.warn(error.to_string()),
            Err(error) => self.warn(bad(self.image, candidate.digest, error.to_string()).to_string()),
        }
    }

    /// Layers that have no index yet.
    fn missing(&self) -> Vec<LayerDescriptor> {
        let state = self.state();
        state.want.iter().filter(|l| !state.found.contains_key(&l.diff_id)).cloned().collect()
    }

    /// Makes room for `bytes` of an index; `false` when there is none left.
    fn reserve(&self, bytes: u64) -> bool {
        let mut state = self.state();
        let left = state.room.checked_sub(bytes);
        state.room = left.unwrap_or(state.room);
        left.is_some()
    }

    /// Makes an index of foreign bytes, aside from the tasks and few at a time. Room is made for what it takes; the
    /// outer error is that there is none left.
    async fn make<F>(&self, make: F) -> Result<Result<Vec<u8>, String>, String>
    where
        F: FnOnce() -> Result<Vec<u8>, String> + Send + 'static,
    {
        let _turn = self.decoders.acquire().await;
        let made = tokio::task::spawn_blocking(make).await;
        let made = made.map_err(|_| "reading it was interrupted".to_owned())?;
        match made {
            Ok(index) if !self.reserve(index.len() as u64) => Err(NO_ROOM.to_owned()),
            other => Ok(other),
        }
    }

    fn keep(&self, diff_id: Digest, claimed: ClaimedIndex) {
        self.state().found.entry(diff_id).or_insert(claimed);
    }

    /// Takes back all that came from an artifact.
    fn disown(&self, artifact: Digest) {
        self.state().found.retain(|_, claimed| claimed.origin.artifact != Some(artifact));
    }

    fn warn(&self, warning: String) {
        tracing::debug!(image = %self.image.reference, "{warning}");
        self.state().warnings.push(warning);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
