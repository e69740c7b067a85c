//! The snapshotter of containerd: `containerd.services.snapshots.v1` on a unix socket.
//!
//! Snapshots that containerd fills itself are directories, stacked by overlayfs, as its own overlayfs snapshotter has
//! them. A layer of an image that is pulled with its name ([`labels`]) becomes a snapshot without being unpacked or
//! even fetched: containerd is told that it is there already and downloads nothing. The first container on such
//! layers gets the image's view ([`attached`]) below its own directory.
//!
//! The snapshotter never calls containerd: that holds locks while it waits for an answer. Only the diff service ([`diff`])
//! does, for which containerd holds none, and tasks that run behind the answers ([`blobs`]).

pub mod attached;
mod blobs;
mod collect;
mod cri;
mod diff;
mod dirs;
pub mod error;
pub mod filter;
pub mod images;
pub mod labels;
mod mounts;
pub mod proto;
pub mod record;
mod server;
mod service;
pub mod store;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use crate::containerd::Containerd;
use crate::daemon::Daemon;
use crate::daemon::images::Images;
use crate::ipc::protocol::{IndexOptions, RegistryOptions};
use crate::paths::Paths;
use attached::Attached;
use blobs::Blobs;
use dirs::Dirs;
use images::SnapshotImages;
use store::Store;

pub use server::serve;

/// Where containerd finds the snapshotter unless it was told.
pub const DEFAULT_ADDRESS: &str = "/run/lazyrun/snapshotter.sock";

/// Whether layers that are taken over are downloaded into containerd's content store all the same
/// (`lazyrun snapshotter --keep-blobs`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum KeepBlobs {
    /// Only when `lazyrun containerd fetch` asks for them
    #[default]
    Off,
    /// After each pull, when nothing else wants the link, within the limit of hydration
    Background,
}

/// How the daemon serves containerd.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SnapshotterOptions {
    /// How registries are talked to.
    pub registry: RegistryOptions,
    /// Whose indexes are used.
    pub index: IndexOptions,
    /// Where containerd itself listens, if not where it does by default.
    #[serde(default)]
    pub containerd: Option<PathBuf>,
    /// Whether it gets all layers.
    #[serde(default)]
    pub keep_blobs: KeepBlobs,
    /// Whether CRI's image service is forwarded to it, and pull secrets are taken from what passes.
    #[serde(default)]
    pub cri: bool,
}

/// The snapshots of an instance.
pub struct Snapshots {
    /// What is known of them.
    pub store: Arc<Store>,
    /// The views that are attached for them.
    pub attached: Attached,
    /// The images whose layers are snapshots.
    pub images: Arc<SnapshotImages>,
    /// Where containerd listens.
    pub containerd: PathBuf,
    /// Whether CRI's image service is forwarded to it.
    cri: bool,
    /// What downloads layers for containerd, if that is wanted.
    blobs: Option<Arc<Blobs>>,
    dirs: Dirs,
    // diffIDs of layers that were removed since what they leave was deleted.
    removed: Mutex<Vec<Vec<Digest>>>,
    // Whether a task waits to delete what was in use when its snapshots were removed.
    cleans: AtomicBool,
}

impl Snapshots {
    /// Opens the snapshots of an instance; `None` if it has none and, without options, is not to have any.
    ///
    /// # Errors
    /// When their directory or database can't be used.
    pub fn open(
        paths: &Paths,
        images: &Arc<Images>,
        options: Option<&SnapshotterOptions>,
    ) -> Result<Option<Self>> {
        let database = paths.snapshots().join("snapshots.db");
        if options.is_none() && !database.exists() {
            return Ok(None);
        }
        let dirs = Dirs::new(paths.snapshots())?;
        let store = Store::open(&database).with_context(|| format!("opening {}", database.display()))?;
        let store = Arc::new(store);
        let mut options = options.cloned().unwrap_or_default();
        options.registry.pull_secrets = options.cri;
        let containerd = options.containerd.unwrap_or_else(|| crate::containerd::DEFAULT_ADDRESS.into());
        let blobs = match options.keep_blobs {
            KeepBlobs::Off => None,
            KeepBlobs::Background => {
                let containerd = Containerd::at(&containerd)?;
                Some(Arc::new(Blobs::new(containerd, options.registry.clone(), Arc::clone(&store))))
            }
        };
        let images = SnapshotImages::new(Arc::clone(images), options.registry, options.index);
        Ok(Some(Self {
            store,
            attached: Attached::new(dirs.clone()),
            images: Arc::new(images),
            containerd,
            cri: options.cri,
            blobs,
            dirs,
            removed: Mutex::default(),
            cleans: AtomicBool::default(),
        }))
    }

    /// Goes on with downloads for containerd that an earlier daemon had begun.
    ///
    /// # Errors
    /// When the database can't be read.
    pub(crate) fn resume_blobs(&self, daemon: &Arc<Daemon>) -> Result<()> {
        self.blobs.as_ref().map_or(Ok(()), |blobs| blobs.resume(daemon))
    }
}
