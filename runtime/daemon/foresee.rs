//! What is done at a start so that the next one is faster, and what earlier ones have done for this one.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::future::BoxFuture;
use lazyrun_fetcher::{Layer, Progress, Reference, ResolvedImage};
use lazyrun_index::Digest;
use oci_spec::image::ImageConfiguration;
use serde_json::Value;

use super::images::Ready;
use super::layer_service::inode_of;
use super::profile::{PathTouches, Profile, Watched, paths_of, prefetch, translate};
use super::views::{Purpose, chain_id};
use super::why::Recorder;
use super::{Daemon, loading};
use crate::container::spec::{Command, RunOptions};
use crate::failure::Failure;
use crate::ipc::hydration::HydrateMode;
use crate::ipc::profiles::ProfileAction;
use crate::ipc::protocol::{ImageRequest, RunRequest};

/// Hydration begins when a start has had so long with all that was foreseen: until then it would only take the link and
/// the processors from it. As long as earlier starts touched something new, within these bounds; where nobody knows, once
/// this one has not waited for bytes for the lesser of them.
const SETTLES_AFTER: Duration = Duration::from_millis(500);
const SETTLES_BEFORE: Duration = Duration::from_secs(5);
/// After this time a container counts as started: what it reads is no longer recorded, and keeps hydration waiting no more.
const START: Duration = Duration::from_secs(30);

impl Daemon {
    /// Has what earlier starts touched, or else what the command will load, fetched first, and the rest after it unless
    /// the image is to stay lazy, and records what this one touches. It is recorded even if all contents are local as long
    /// as there is no profile of this image.
    ///
    /// # Errors
    /// A bad reference.
    pub(super) fn foresee(
        self: &Arc<Self>,
        ready: &Ready,
        request: &RunRequest,
        start: &Recorder,
    ) -> Result<Purpose> {
        let (purpose, first) = self.first_needs(ready, &request.options, start);
        if let Some(first) = first {
            // Wanted from now on, so that a daemon that is killed during the start goes on with it.
            let key = match request.hydrate {
                HydrateMode::Auto => self.hydration.want(&request.image, false)?,
                HydrateMode::Never => ready.image.reference.to_string(),
            };
            self.hydration.begin_after(key, first);
        }
        Ok(purpose)
    }

    /// As [`Daemon::foresee`], for layers that are containerd's and no recorded image's.
    pub(super) fn foresee_layers(self: &Arc<Self>, ready: &Ready, start: &Recorder) -> Purpose {
        let (purpose, first) = self.first_needs(ready, &RunOptions::default(), start);
        if let Some(first) = first {
            self.hydration.begin_layers_after(&ready.layers, first);
        }
        purpose
    }

    /// Records a start; gives the work that precedes hydration where something is missing.
    fn first_needs(
        self: &Arc<Self>,
        ready: &Ready,
        options: &RunOptions,
        start: &Recorder,
    ) -> (Purpose, Option<BoxFuture<'static, ()>>) {
        let layers = ready.layers.clone();
        let Some(chain) = chain_of(&layers) else { return (Purpose::Start, None) };
        let own = self.own_profile(chain, ready);
        let missing = layers.iter().any(|l| !l.is_hydrated());
        let purpose = if own.is_none() { Purpose::Recorded } else { Purpose::Start };
        if purpose == Purpose::Recorded || missing {
            self.record_start(chain, &layers);
        }
        if !missing {
            return (purpose, None);
        }
        let command = own.is_none().then(|| command_of(&ready.image, options)).flatten();
        let start = start.recording();
        if own.is_some() {
            start.profile(if ready.profile.is_some() { "registry" } else { "local" });
        }
        let (this, image) = (Arc::clone(self), ready.image.reference.clone());
        let first = async move {
            let profile = match own {
                Some(profile) => Some(profile),
                None => this.profile_of_other_tag(image, chain, layers.clone()).await,
            };
            if let Some(profile) = profile {
                start.profile_of_other_tag();
                prefetch(this.images.fetcher(), &layers, &profile).await;
                let settles = profile.duration().clamp(SETTLES_AFTER, SETTLES_BEFORE);
                tokio::time::sleep(settles).await;
                return;
            }
            if let Some(command) = command {
                loading::fetch(this.images.fetcher(), &this.views, &layers, command).await;
            }
            this.images.fetcher().settled(SETTLES_AFTER, START).await;
        };
        (purpose, Some(Box::pin(first)))
    }

    fn record_start(self: &Arc<Self>, chain: Digest, layers: &[Arc<Layer>]) {
        let watched =
            layers.iter().map(|l| Watched::new(inode_of(l.file_name()), l.id(), l.index().layer_size()));
        if self.service.recorder.start(chain, watched.collect()) {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep(START).await;
                this.save_profile(chain);
            });
        }
    }

    /// Keeps the profile that came with the indexes for a later start, unless there is one.
    pub(super) fn keep_profile(&self, ready: &Ready) {
        if let Some(chain) = chain_of(&ready.layers) {
            self.own_profile(chain, ready);
        }
    }

    /// The profile that is here, or the one that came with the indexes.
    fn own_profile(&self, chain: Digest, ready: &Ready) -> Option<Profile> {
        if let Some(own) = self.profiles.load(chain).filter(|profile| profile.fits(&ready.layers)) {
            return Some(own);
        }
        let found =
            Profile::parse(ready.profile.as_deref()?).filter(|profile| profile.fits(&ready.layers))?;
        if let Err(error) = self.profiles.save(chain, &found) {
            tracing::warn!(image = %ready.image.reference, %error, "the profile from the registry can't be kept");
        }
        Some(found)
    }

    /// What the profile of the newest other image of the same repository means for these layers.
    async fn profile_of_other_tag(
        self: &Arc<Self>,
        image: Reference,
        chain: Digest,
        layers: Vec<Arc<Layer>>,
    ) -> Option<Profile> {
        let this = Arc::clone(self);
        let found = tokio::task::spawn_blocking(move || {
            let mut records = this.images.records().ok()?;
            records.sort_by(|a, b| b.pulled_at.cmp(&a.pulled_at));
            let of_same = records.iter().filter(|record| {
                let other = record.reference.parse::<Reference>();
                other.is_ok_and(|r| r.registry == image.registry && r.repository == image.repository)
            });
            of_same.filter_map(|record| this.images.load(record).ok()).find_map(|other| {
                let (from, profile) = this.profile_of(&other)?;
                if chain_of(&from) == Some(chain) { None } else { translate(&profile, &from, &layers) }
            })
        });
        found.await.ok().flatten()
    }

    /// The layers of an image that is here, and its profile.
    pub(super) fn profile_of(&self, image: &ResolvedImage) -> Option<(Vec<Arc<Layer>>, Profile)> {
        let store = self.images.fetcher().store();
        let layers = image.layers.iter().map(|l| store.get(l.diff_id).ok().flatten());
        let layers: Vec<Arc<Layer>> = layers.collect::<Option<_>>()?;
        let profile = self.profiles.load(chain_of(&layers)?).filter(|profile| profile.fits(&layers))?;
        Some((layers, profile))
    }

    /// Ends the recording of a start and keeps what it saw, beside what earlier ones saw.
    pub(super) fn save_profile(&self, chain: Digest) {
        self.views.started(chain);
        let Some(seen) = self.service.recorder.finish(chain) else { return };
        let profile = match self.profiles.load(chain) {
            Some(mut known) if known.is_about_same(&seen) => {
                known.merge(seen);
                known
            }
            _ => seen,
        };
        if let Err(error) = self.profiles.save(chain, &profile) {
            tracing::warn!(%chain, %error, "what a start touched can't be kept");
        }
    }

    /// Does what a profile request asks for and answers as [`ProfileAction`] says.
    pub(super) async fn profile(
        self: &Arc<Self>,
        request: ImageRequest,
        action: ProfileAction,
        progress: Arc<dyn Progress>,
    ) -> Result<Value> {
        match action {
            ProfileAction::Show => {
                let this = Arc::clone(self);
                let shown = tokio::task::spawn_blocking(move || this.touched_paths(&request.reference));
                Ok(serde_json::to_value(shown.await.context("reading the profile")??)?)
            }
            ProfileAction::Forget => Ok(serde_json::to_value(self.forget_profile(&request.reference)?)?),
            ProfileAction::Pull => {
                let ready = self.images.ready(&request, &progress).await?;
                let chain = chain_of(&ready.layers).context("the image has no layers")?;
                let client = self.images.client(&request.registry)?;
                let found = lazyrun_fetcher::find_profile(&client, &ready.image).await?;
                let profile = found.as_deref().and_then(Profile::parse).filter(|p| p.fits(&ready.layers));
                let Some(profile) = profile else {
                    let name = ready.image.reference.familiar();
                    return Err(
                        Failure::new(1, format!("no usable profile of {name} was found beside it")).into()
                    );
                };
                self.profiles.save(chain, &profile)?;
                Ok(serde_json::to_value(ready.image.manifest_digest)?)
            }
        }
    }

    fn touched_paths(&self, name: &str) -> Result<Vec<PathTouches>> {
        let record = self.images.find(name)?.into_iter().next().context("no record")?;
        let image = self.images.load(&record)?;
        let Some((layers, profile)) = self.profile_of(&image) else {
            return Err(no_profile(&image.reference).into());
        };
        Ok(paths_of(&profile, &layers))
    }

    fn forget_profile(&self, name: &str) -> Result<bool> {
        let record = self.images.find(name)?.into_iter().next().context("no record")?;
        let image = self.images.load(&record)?;
        let diff_ids = image.diff_ids();
        let chain = chain_id(&diff_ids).context("the image has no layers")?;
        self.service.recorder.finish(chain);
        self.profiles.delete(chain)
    }
}

/// What to say where an image has no profile.
pub(super) fn no_profile(image: &Reference) -> Failure {
    let name = image.familiar();
    Failure::new(1, format!("there is no profile of {name} here; `lazyrun profile build {name}` makes one"))
}

/// What the image and the options have executed; `None` when they do not say.
fn command_of(image: &ResolvedImage, options: &RunOptions) -> Option<Command> {
    let config = ImageConfiguration::from_reader(image.config.as_ref()).ok()?;
    Command::of(&config, options, None).ok()
}

fn chain_of(layers: &[Arc<Layer>]) -> Option<Digest> {
    chain_id(&layers.iter().map(|l| l.diff_id()).collect::<Vec<_>>())
}
