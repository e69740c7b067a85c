//! Brings what containerd's content store lacks of an image. Layers that the snapshotter took over were never downloaded,
//! and containerd can't export, push or convert an image without their blobs. A blob's exact bytes are only in a
//! registry: what is kept here is its uncompressed content, and no compressor is sure to give the same bytes again.

mod blob;
mod documents;
mod walk;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use lazyrun_fetcher::{Fetcher, Platform, Progress, Reference, RegistryClient};
use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use super::{Containerd, ContainerdError, Scope};
use crate::failure::Failure;
use documents::Document;

/// Blobs that are fetched at a time, as containerd does.
const AT_ONCE: usize = 3;
/// How long what was fetched of an image is kept when a call breaks off, for a later one that goes on.
const HELD: Duration = Duration::from_secs(24 * 60 * 60);
/// The label of the leases that do so.
const LEASE_LABEL: &str = "lazyrun/fetch";

/// Of which variants of an image everything is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Platforms {
    /// The best one for this platform.
    Best(Platform),
    /// All that its index names.
    All,
}

impl fmt::Display for Platforms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Best(platform) => platform.fmt(f),
            Self::All => f.write_str("all"),
        }
    }
}

/// What an image has, and how much of it had to be fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Fetched {
    /// The image's name in containerd.
    pub image: String,
    /// The digest of its manifest or index.
    pub digest: Digest,
    /// Its configs and layers.
    pub blobs: usize,
    /// Those that containerd did not have.
    pub fetched: usize,
    /// Bytes that came from registries.
    pub bytes: u64,
}

/// An image that has been pulled.
#[derive(Debug)]
pub struct Pulled {
    /// By which name.
    pub(super) reference: Reference,
    /// What its manifest names.
    pub(super) blobs: HashSet<Digest>,
}

impl Pulled {
    /// One with this manifest.
    pub fn new(reference: Reference, manifest: &[u8]) -> Self {
        let document = Document::parse(manifest);
        let entries = document.iter().flat_map(Document::entries);
        Self { reference, blobs: entries.map(|entry| entry.digest).collect() }
    }
}

/// How images are fetched.
pub struct Fetch<'a> {
    /// Whose content store is filled.
    pub containerd: &'a Containerd,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// What talks to registries.
    pub client: &'a RegistryClient,
    /// Images that have been pulled: containerd itself notes registries without their ports, and nothing of the layers that
    /// a commit took over from another image.
    pub pulled: &'a [Pulled],
    /// Of which variants.
    pub platforms: &'a Platforms,
    /// Where given, it is done in the background: after faults, and within this one's limit.
    pub background: Option<&'a Fetcher>,
    /// Who hears how far each blob is.
    pub progress: &'a Arc<dyn Progress>,
}

impl Fetch<'_> {
    /// Fetches all blobs of an image that are missing. What a broken call leaves is resumed by the next one.
    ///
    /// # Errors
    /// When containerd has no such image or can't be reached, or a blob can't be had; the other blobs are fetched
    /// all the same.
    pub async fn image(&self, name: &str) -> Result<Fetched> {
        let scope = Scope { namespace: self.namespace.to_owned(), lease: None };
        let full = name.parse::<Reference>().ok();
        let mut names = vec![name.to_owned()];
        names.extend(full.as_ref().map(ToString::to_string).filter(|full| full != name));
        for name in names {
            if let Some(root) = self.containerd.image(&scope, &name).await? {
                return self.tree(&name, root, full.as_ref()).await;
            }
        }
        let namespace = self.namespace;
        let why = format!(
            "containerd has no image {name} in its namespace {namespace}; `ctr -n {namespace} images ls` lists its \
             images, and --namespace names another namespace"
        );
        Err(Failure::new(1, why).into())
    }

    /// Fetches all blobs that are missing below a manifest or index. `from` is where they may lie besides the places
    /// that containerd itself has noted.
    ///
    /// # Errors
    /// As [`Fetch::image`].
    pub async fn tree(&self, image: &str, root: Digest, from: Option<&Reference>) -> Result<Fetched> {
        let purpose = purpose(root, self.platforms);
        let label = (LEASE_LABEL, purpose.as_str());
        let lease = self.containerd.lease_for(self.namespace, HELD, label).await?;
        let blobs = walk::blobs(self, lease.scope(), root, from).await;
        let blobs = blobs.with_context(|| format!("looking for the layers of {image}"))?;
        let mut fetched =
            Fetched { image: image.to_owned(), digest: root, blobs: blobs.len(), fetched: 0, bytes: 0 };
        let each: Vec<_> = blobs.iter().map(|blob| blob::fetch(self, lease.scope(), blob)).collect();
        let mut results = futures_util::stream::iter(each).buffer_unordered(AT_ONCE);
        let mut failure = None;
        while let Some(result) = results.next().await {
            match result {
                Ok(None) => {}
                Ok(Some(bytes)) => {
                    fetched.fetched += 1;
                    fetched.bytes += bytes;
                }
                // One that fails is no reason to give up the others half-way.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        drop(results);
        if let Some(error) = failure {
            return Err(error.context(format!("fetching the blobs of {image}")));
        }
        // The image itself holds the blobs from now on.
        self.containerd.end_all(self.namespace, label).await?;
        Ok(fetched)
    }
}

/// What the leases are for of calls that fetch the same.
fn purpose(root: Digest, platforms: &Platforms) -> String {
    format!("{root} {platforms}")
}

/// Lets go of what calls that broke off have fetched of an image that is gone.
///
/// # Errors
/// When containerd can't be reached or refuses.
pub async fn forget(
    containerd: &Containerd,
    namespace: &str,
    root: Digest,
    platforms: &Platforms,
) -> Result<(), ContainerdError> {
    containerd.end_all(namespace, (LEASE_LABEL, &purpose(root, platforms))).await
}
