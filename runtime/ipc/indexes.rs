//! What can be asked about indexes, and what comes back.

use lazyrun_fetcher::{OriginKind, Trust};
use lazyrun_index::{Compression, Digest, Layout};
use serde::{Deserialize, Serialize};

/// What to do with the indexes of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IndexAction {
    /// Builds those of all layers here, streaming each blob that has no proven one; answers [`IndexedImage`].
    Build {
        /// Streams every layer that the image's profile touches anew, with spans that follow the profile.
        along_profile: bool,
    },
    /// Pushes them beside the image, building what is missing; answers [`Pushed`].
    Push {
        /// Leaves out the image's profile.
        without_profile: bool,
        /// Time (RFC 3339) to note in the artifact.
        created: Option<String>,
    },
    /// Takes them over from the registry; answers [`IndexedImage`].
    Pull,
    /// Tells what the registry has, as a list of [`ArtifactSummary`].
    List,
    /// Tells what is here; answers [`IndexedImage`].
    Inspect,
    /// Lists entries of one layer; answers a [`Page`](super::index_lists::Page) of
    /// [`EntryRow`](super::index_lists::EntryRow)s.
    Entries {
        /// The layer, 0 at the bottom.
        layer: usize,
        /// The first entry to tell.
        from: usize,
    },
    /// Lists spans of one layer; answers a [`Page`](super::index_lists::Page) of
    /// [`SpanRow`](super::index_lists::SpanRow)s.
    Spans {
        /// The layer, 0 at the bottom.
        layer: usize,
        /// The first span to tell.
        from: usize,
    },
    /// Compares those that are here with the blobs; answers [`IndexedImage`].
    Verify,
    /// Deletes from the registry the artifact that the request names, or all of lazyrun's own; answers the list of
    /// digests.
    Remove,
}

/// An image and the indexes of its layers that are here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IndexedImage {
    /// The reference.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Its layers, bottom first.
    pub layers: Vec<IndexedLayer>,
}

/// One layer of an image and its index.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IndexedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// diffID.
    #[serde(rename = "DiffID")]
    pub diff_id: Digest,
    /// Compressed bytes.
    pub size: u64,
    /// Its index, if one is here.
    pub index: Option<IndexSummary>,
}

/// An index that is here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IndexSummary {
    /// `built` here, or the form in which it was found.
    pub origin: String,
    /// Manifest of the artifact it came from.
    pub artifact: Option<Digest>,
    /// Whether a stream of the blob has proven it.
    pub proven: bool,
    /// `tar` or `table`.
    pub layout: String,
    /// `gzip`, `zstd` or `none`.
    pub compression: String,
    /// Number of entries.
    pub entries: u64,
    /// Number of spans.
    pub spans: u64,
    /// How many of them can be decoded on their own.
    pub restartable: u64,
    /// Bytes of the layer file.
    pub layer_size: u64,
    /// Bytes of the layer file that are local.
    pub local: u64,
    /// Bytes of the index itself.
    pub index_size: u64,
    /// The same in percent of the layer file.
    pub overhead: f64,
}

/// An index artifact in the registry.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ArtifactSummary {
    /// Digest of its manifest.
    pub digest: Digest,
    /// What kind of index it is.
    pub kind: OriginKind,
    /// What ties it to the image.
    pub trust: Trust,
    /// How many layers it has an index of.
    pub layers: usize,
    /// Bytes in all.
    pub size: u64,
    /// Format version, if it says so.
    pub format: Option<u32>,
    /// Span size in bytes of blob, if it says so.
    pub span_size: Option<u64>,
    /// When it was made, if it says so.
    pub created: Option<String>,
}

/// An artifact that was pushed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Pushed {
    /// Digest of its manifest.
    pub digest: Digest,
    /// How many layers it has an index of.
    pub layers: usize,
    /// Bytes in all.
    pub size: u64,
    /// Whether the image's profile is in it.
    pub profile: bool,
    /// Bytes that the registry did not have yet.
    pub sent: u64,
}

/// A compression as it is shown.
pub fn compression_name(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "none",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}

/// A layout as it is shown.
pub fn layout_name(layout: Layout) -> &'static str {
    match layout {
        Layout::Tar => "tar",
        Layout::Table => "table",
    }
}
