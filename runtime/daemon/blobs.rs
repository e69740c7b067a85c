//! Layers as they lie in registries, for containerd's content store.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use lazyrun_fetcher::{Progress, Reference};
use serde_json::Value;

use super::Daemon;
use crate::containerd::fetch::Fetch;
use crate::containerd::{Containerd, DEFAULT_ADDRESS};
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
        let known = self.blocking(Self::pulled_names).await?;
        let fetch = Fetch {
            containerd: &containerd,
            namespace: &request.namespace,
            client: &client,
            known: &known,
            platforms: &request.platforms,
            background: None,
            progress: &progress,
        };
        let mut fetched = Vec::new();
        for image in &request.images {
            fetched.push(fetch.image(image).await?);
        }
        Ok(serde_json::to_value(fetched)?)
    }

    /// The names that images of snapshots were pulled by.
    fn pulled_names(&self) -> Result<Vec<Reference>> {
        let rows =
            self.snapshots().map(|snapshots| snapshots.store.images()).transpose()?.unwrap_or_default();
        Ok(rows.iter().filter_map(|(_, row)| row.reference.parse().ok()).collect())
    }

    fn containerd_address(&self) -> PathBuf {
        self.snapshots().map_or_else(|| DEFAULT_ADDRESS.into(), |snapshots| snapshots.containerd.clone())
    }
}
