//! What can be asked about the disk that an instance takes, and what comes back.

use lazyrun_fetcher::CacheLimit;
use serde::{Deserialize, Serialize};

/// What to do with what the instance has on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SystemAction {
    /// Sets limits, now and for every later daemon of this root; answers nothing.
    Limit(LimitChange),
    /// Tells what takes how much; answers [`DiskUsage`].
    Usage,
    /// Removes what is not needed; answers [`Pruned`].
    Prune(PruneOptions),
    /// Verifies every local span; answers [`CheckReport`].
    Check {
        /// Whether spans that are wrong are dropped, to be fetched again.
        repair: bool,
    },
}

/// A change of the limits; what is absent stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitChange {
    /// The limit of the store.
    pub limit: Option<LimitValue>,
    /// Bytes of the disk to be left free.
    pub reserve: Option<u64>,
}

/// A limit or none at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LimitValue {
    /// No limit.
    None,
    /// This one.
    At(CacheLimit),
}

impl std::str::FromStr for LimitValue {
    type Err = lazyrun_fetcher::ParseLimitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self::None) } else { text.parse().map(Self::At) }
    }
}

/// What to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneOptions {
    /// Also images that no container has.
    pub all: bool,
    /// Also all local bytes that can be fetched again and that nothing in use reads.
    pub cache: bool,
    /// Only tell.
    pub dry_run: bool,
}

/// What an instance has on disk. All sizes are bytes of disk (blocks), unless they say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DiskUsage {
    /// Images.
    pub images: Vec<ImageUsage>,
    /// Layer files.
    pub layers: Vec<LayerUsage>,
    /// Metadata images of merged views.
    pub views: Vec<ViewUsage>,
    /// Containers.
    pub containers: Vec<ContainerUsage>,
    /// Files of profiles.
    pub profiles: FilesUsage,
    /// What interrupted work has left.
    pub leftovers: FilesUsage,
    /// What the store keeps to.
    pub cache: CacheUsage,
}

/// The store and its limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CacheUsage {
    /// What counts towards the limit: layer files, their indexes and maps, and what is being streamed.
    pub used: u64,
    /// The limit as it was given; empty for none.
    pub limit: String,
    /// The limit in bytes; 0 for none.
    pub limit_bytes: u64,
    /// Bytes of the disk that are left free.
    pub reserve: u64,
    /// Size of the disk.
    pub disk_size: u64,
    /// What is free of it.
    pub disk_free: u64,
    /// Evictions since the daemon started.
    pub evictions: u64,
    /// Bytes freed by them.
    pub evicted: u64,
    /// Writes that found no room, since the daemon started.
    pub refused: u64,
}

/// Some files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilesUsage {
    /// How many.
    pub count: usize,
    /// What they take.
    pub size: u64,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageUsage {
    /// The full reference.
    pub reference: String,
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Layer files that other images have as well.
    pub shared_size: u64,
    /// Layer files that only this image has, and its documents.
    pub unique_size: u64,
    /// Bytes of its layer files when all is local.
    pub full: u64,
    /// Those that are local.
    pub local: u64,
    /// Containers made from it.
    pub containers: usize,
}

/// A layer file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LayerUsage {
    /// Its name in the store.
    #[serde(rename = "ID")]
    pub id: String,
    /// What the layer file takes.
    pub size: u64,
    /// What its index, maps and the like take.
    pub index_size: u64,
    /// Bytes of the layer file when all is local.
    pub full: u64,
    /// Those that are local.
    pub local: u64,
    /// `running`, `mounted`, or empty.
    pub in_use: String,
    /// Whether what is local can be fetched again.
    pub refetchable: bool,
    /// Images that have it.
    pub images: usize,
}

/// A view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ViewUsage {
    /// Its file.
    pub name: String,
    /// What it takes.
    pub size: u64,
    /// Whether a container or a mount uses it.
    pub in_use: bool,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerUsage {
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its name.
    pub names: String,
    /// Its image, as typed.
    pub image: String,
    /// What it has written, its log included.
    pub size: u64,
    /// Whether it runs.
    pub running: bool,
}

/// What was removed, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Pruned {
    /// Ids of containers.
    pub containers: Vec<String>,
    /// References of images.
    pub images: Vec<String>,
    /// Files of views.
    pub views: Vec<String>,
    /// Files and directories that interrupted work had left.
    pub leftovers: Vec<String>,
    /// Bytes of layer files that were evicted.
    pub evicted: u64,
    /// Bytes of disk that all of this freed.
    pub space_reclaimed: u64,
    /// Whether it was only told.
    pub dry_run: bool,
}

/// What a check of the store has found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CheckReport {
    /// Layers looked at.
    pub layers: usize,
    /// Local spans looked at.
    pub spans: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What is wrong.
    pub bad: Vec<BadSpan>,
    /// Whether it was dropped.
    pub repaired: bool,
}

/// A span whose bytes are not what its index says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BadSpan {
    /// The layer file.
    pub layer: String,
    /// Its number.
    pub span: usize,
    /// Where it starts in the layer file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}
