//! What can be asked about containerd's images, and what comes back.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::protocol::RegistryOptions;
pub use crate::containerd::fetch::{Fetched, Platforms};

/// Brings the layers that containerd's content store lacks of images; answers a list of [`Fetched`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FetchRequest {
    /// Where containerd listens, if not where the snapshotter was told.
    pub address: Option<PathBuf>,
    /// containerd's namespace.
    pub namespace: String,
    /// Names of the images.
    pub images: Vec<String>,
    /// Which variants.
    pub platforms: Platforms,
    /// How registries are talked to.
    pub registry: RegistryOptions,
}
