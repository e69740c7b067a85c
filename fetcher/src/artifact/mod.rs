//! Index artifacts: manifests that lie beside an image in its repository and hold an index of each of its layers.
//!
//! Our own (docs/FORMAT.md, "In the registry") and those of SOCI. What is read here is foreign: nothing of it is
//! believed further than its digest goes.

mod admin;
mod descriptor;
mod document;
mod own;
mod push;

pub use admin::{IndexArtifact, IndexedLayer, delete_index, list_indexes};
pub(crate) use admin::{bad, candidates_of_referrers, check_document, load_document};
pub use descriptor::Descriptor;
pub(crate) use descriptor::{parse_descriptors, parse_layers};
pub(crate) use document::{ArtifactDocument, Candidate, candidates_in_list, pinned_by_manifest};
pub(crate) use own::{decode_blob, decode_profile};
pub use push::{IndexSource, PushOptions, PushReport, push_indexes};

use crate::trust::OriginKind;

/// Artifact type of our own index artifacts.
pub const OWN_ARTIFACT_TYPE: &str = "application/vnd.lazyrun.index.v1+json";
/// Media type of one layer's index in it.
pub const OWN_LAYER_INDEX: &str = "application/vnd.lazyrun.layer-index.v2";
/// The same, compressed with zstd.
pub const OWN_LAYER_INDEX_ZSTD: &str = "application/vnd.lazyrun.layer-index.v2+zstd";
/// Media type of a profile in it: which runs of its layers a start touches.
pub const OWN_PROFILE_ZSTD: &str = "application/vnd.lazyrun.profile.v3+zstd";
/// Artifact type of SOCI indexes that refer to their image.
pub const SOCI_V1_ARTIFACT_TYPE: &str = "application/vnd.amazon.soci.index.v1+json";
/// Artifact type of SOCI indexes that their image's manifest or index names.
pub const SOCI_V2_ARTIFACT_TYPE: &str = "application/vnd.amazon.soci.index.v2+json";

/// Annotation of an index blob: digest of the layer blob it is of.
pub(crate) const LAYER_DIGEST: &str = "org.lazyrun.index.layer";
/// Annotation of an index blob: diffID of the layer.
pub(crate) const LAYER_DIFF_ID: &str = "org.lazyrun.index.diff-id";
/// Annotation of an artifact: format version of its indexes.
pub(crate) const FORMAT: &str = "org.lazyrun.index.format";
/// Annotation of an artifact: span size its indexes were made with, in bytes of blob.
pub(crate) const SPAN_SIZE: &str = "org.lazyrun.index.span-size";
/// Annotation of an artifact: when it was made (RFC 3339).
pub(crate) const CREATED: &str = "org.opencontainers.image.created";
/// Annotation of an image manifest: digest of its SOCI index.
pub(crate) const SOCI_INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// Annotation of a SOCI index's descriptor in an image index: digest of the image manifest.
pub(crate) const SOCI_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
/// Annotation of a zTOC: digest of the layer blob it is of.
pub(crate) const SOCI_LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";

/// Largest index of one layer that is read, in bytes, also after decompression.
const MAX_INDEX: u64 = 256 << 20;
/// An index may be this long, in bytes, however small its layer's blob is.
const SMALL_INDEX: u64 = 4 << 20;
/// Longest profile, in bytes, before and after decompression.
pub(crate) const MAX_PROFILE: u64 = 8 << 20;
/// Most blobs an artifact may have.
pub(crate) const MAX_BLOBS: usize = 512;

/// Longest index, in bytes, of a layer whose blob has `blob_size` bytes: one that is longer than the blob saves
/// nothing. What foreign bytes unpack to is bounded by this.
pub(crate) fn index_limit(blob_size: u64) -> u64 {
    blob_size.clamp(SMALL_INDEX, MAX_INDEX)
}

/// The kind of index artifact behind an artifact type.
pub(crate) fn kind_of(artifact_type: &str) -> Option<OriginKind> {
    match artifact_type {
        OWN_ARTIFACT_TYPE => Some(OriginKind::Own),
        SOCI_V1_ARTIFACT_TYPE => Some(OriginKind::SociV1),
        SOCI_V2_ARTIFACT_TYPE => Some(OriginKind::SociV2),
        _ => None,
    }
}
