//! What is known of a snapshot.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use super::filter::Fields;
use crate::ipc::protocol::RegistryOptions;

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// containerd's kinds of snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// To be read.
    View,
    /// To be written.
    Active,
    /// Finished; others may stand on it.
    Committed,
}

impl Kind {
    /// Its name in filters.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A moment, as protocol buffers have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds of the second.
    pub nanos: i32,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos().cast_signed() }
    }
}

/// Disk space that a snapshot takes, without what it stands on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of its blocks.
    pub size: i64,
    /// Inodes.
    pub inodes: i64,
}

/// The layer of an image that a snapshot stands for, in place of a directory of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// Names the image's row ([`ImageRow::key`]).
    pub image: String,
    /// The layer's place in the image, 0 at the bottom.
    pub position: usize,
    /// Its diffID.
    pub diff_id: Digest,
}

/// A snapshot as the database has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names its directory; never used again.
    pub id: u64,
    /// Its kind.
    pub kind: Kind,
    /// The name of what it stands on; empty if on nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub parent: String,
    /// Its labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// When it was made.
    pub created: Moment,
    /// When its labels were changed last.
    pub updated: Moment,
    /// What it took when it was committed.
    #[serde(default)]
    pub usage: Usage,
    /// Set if it is a layer of an image that is read lazily.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<Remote>,
}

/// A record with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// containerd's namespace.
    pub namespace: String,
    /// The snapshot's name, or key.
    pub name: String,
    /// What is known of it.
    pub record: Record,
}

impl Fields for Named {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "kind" => Some(self.record.kind.name().into()),
            "name" => Some(self.name.as_str().into()),
            "parent" => Some(self.record.parent.as_str().into()),
            "labels" => self.record.labels.get(&rest.join(".")).map(|value| value.as_str().into()),
            _ => None,
        }
    }
}

/// One of the snapshots that another one stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Below {
    /// Its id.
    pub id: u64,
    /// The layer it stands for, if it is one of an image.
    pub remote: Option<Remote>,
}

/// A snapshot and all it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its id.
    pub id: u64,
    /// Its kind.
    pub kind: Kind,
    /// Whether it stands for a layer itself.
    pub remote: Option<Remote>,
    /// What it stands on, nearest first.
    pub below: Vec<Below>,
    /// Options of its mounts that map ids.
    pub idmap: Vec<String>,
}

impl Chain {
    /// The layers of an image at the bottom of what it stands on: the id of the topmost of them, and all of them,
    /// bottom first.
    pub fn view(&self) -> Option<(u64, Vec<Remote>)> {
        let top = self.below.iter().position(|below| below.remote.is_some())?;
        let layers: Vec<Remote> = self.below[top..].iter().rev().filter_map(|b| b.remote.clone()).collect();
        Some((self.below[top].id, layers))
    }
}

/// An image whose layers are snapshots: its documents and where it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// The reference it was pulled by.
    pub reference: String,
    /// The manifest, in base64.
    pub manifest: String,
    /// The config, in base64.
    pub config: String,
    /// The manifest list it was chosen from, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<String>,
    /// How its registry is talked to.
    #[serde(default)]
    pub registry: RegistryOptions,
}

impl ImageRow {
    /// Names the row: the same manifest by two references is two images, each with its own registry.
    pub fn key(reference: &str, manifest: Digest) -> String {
        format!("{manifest} {reference}")
    }
}
