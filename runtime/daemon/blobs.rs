//! Layers as they lie in registries, for containerd's content store.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lazyrun_fetcher::Progress;
use serde_json::Value;

use super::Daemon;
use crate::containerd::fetch::{Fetch, Fetched, Pulled};
use crate::containerd::{Containerd, DEFAULT_ADDRESS};
use crate::failure::sentence;
use crate::ipc::containerd::FetchRequest;

impl Daemon {
    /// Fetches what containerd lacks of images and answers as [`FetchRequest`] says.
    pub(super) async fn fetch_blobs(
        self: &Arc<Self>,
        request: FetchRequest,
        progress: Arc<dyn Progress>,
    ) -> Result<Value> {
        let address = request.address.unwrap_or_else(|| self.containerd_address());
        let containerd = Containerd::at(&address)?;
        let client = self.images.client(&request.registry)?;
        let pulled = self.blocking(Self::pulled_images).await?;
        let fetch = Fetch {
            containerd: &containerd,
            namespace: &request.namespace,
            client: &client,
            pulled: &pulled,
            platforms: &request.platforms,
            background: None,
            progress: &progress,
        };
        let (mut fetched, mut failure) = (Vec::new(), None);
        for image in &request.images {
            match fetch.image(image).await {
                Ok(done) => fetched.push(done),
                // One that fails is no reason to leave out the others.
                Err(error) => {
                    let error = with_name(error, image);
                    match failure {
                        None => failure = Some(error),
                        Some(_) => progress.note(&sentence(&error)),
                    }
                }
            }
        }
        let Some(error) = failure else { return Ok(serde_json::to_value(fetched)?) };
        for Fetched { image, fetched, blobs, .. } in fetched {
            progress.note(&format!("{image} is done: {fetched} of its {blobs} blobs were fetched"));
        }
        Err(error)
    }

    /// The images of snapshots.
    fn pulled_images(&self) -> Result<Vec<Pulled>> {
        let rows =
            self.snapshots().map(|snapshots| snapshots.store.images()).transpose()?.unwrap_or_default();
        let images = rows.into_iter().filter_map(|(_, row)| {
            let manifest = STANDARD.decode(&row.manifest).ok()?;
            Some(Pulled::new(row.reference.parse().ok()?, &manifest))
        });
        Ok(images.collect())
    }

    fn containerd_address(&self) -> PathBuf {
        self.snapshots().map_or_else(|| DEFAULT_ADDRESS.into(), |snapshots| snapshots.containerd.clone())
    }
}

/// An error that says which image it is about.
fn with_name(error: anyhow::Error, image: &str) -> anyhow::Error {
    match sentence(&error).contains(image) {
        true => error,
        false => error.context(format!("fetching {image}")),
    }
}
