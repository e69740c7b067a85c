//! What may be asked about hydration, and what comes back.

use std::fmt;

use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use super::protocol::ImageRequest;

/// Whether what a start does not need is fetched as well (`--hydrate`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum HydrateMode {
    /// In the background, until the image is whole
    #[default]
    Auto,
    /// Only what is read, and what is known to be needed for the start
    Never,
}

/// What to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum HydrationAction {
    /// Makes an image whole, before others. Answers the digest of its manifest; with `wait`, once all of it is local
    /// and proven.
    Start {
        /// The image.
        image: Box<ImageRequest>,
        /// Whether to wait.
        wait: bool,
    },
    /// Stops hydration of an image, or of all, until it is resumed.
    Pause {
        /// Reference or id.
        image: Option<String>,
    },
    /// Resumes it.
    Resume {
        /// Reference or id.
        image: Option<String>,
    },
    /// Limits hydration to so many bytes per second, or not at all.
    Limit {
        /// Bytes per second.
        bytes_per_second: Option<u64>,
    },
    /// How far images are: a list of [`LazyImage`].
    Images,
    /// How far the images of containers are: a list of [`LazyContainer`].
    Containers {
        /// Also of those that have ended.
        all: bool,
    },
}

/// Where an image is on its way to be whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LazyState {
    /// Bytes are missing, and come when they are read.
    #[serde(rename = "lazy")]
    Lazy,
    /// The missing bytes are being fetched.
    #[serde(rename = "hydrating")]
    Hydrating,
    /// They will be, when somebody resumes it.
    #[serde(rename = "paused")]
    Paused,
    /// They will be, when the registry answers.
    #[serde(rename = "waiting for registry")]
    Waiting,
    /// Every byte is local and proven.
    #[serde(rename = "hydrated")]
    Hydrated,
    /// A container or mount asked for no hydration.
    #[serde(rename = "kept lazy")]
    KeptLazy,
}

impl fmt::Display for LazyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lazy => "lazy",
            Self::Hydrating => "hydrating",
            Self::Paused => "paused",
            Self::Waiting => "waiting for registry",
            Self::Hydrated => "hydrated",
            Self::KeptLazy => "kept lazy",
        })
    }
}

/// How far an image is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Locality {
    /// Percent of the bytes of all layer files that are local; 100 only when hydrated.
    pub percent: u64,
    /// Bytes of layer files that are local.
    pub local: u64,
    /// Bytes of all layer files whose index is known.
    pub total: u64,
    /// What happens.
    pub state: LazyState,
    /// Why it waits, or why hydration ended early; empty without a reason.
    pub reason: String,
}

/// An image as `lazyrun images --lazy` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LazyImage {
    /// Repository in its familiar form.
    pub repository: String,
    /// Tag, or `<none>`.
    pub tag: String,
    /// Digest of the config, docker's image id.
    #[serde(rename = "ID")]
    pub id: Digest,
    /// How far it is.
    #[serde(flatten)]
    pub locality: Locality,
}

/// A container as `lazyrun ps --lazy` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LazyContainer {
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its image, as typed.
    pub image: String,
    /// Its name.
    pub names: String,
    /// How far its image is.
    #[serde(flatten)]
    pub locality: Locality,
}
