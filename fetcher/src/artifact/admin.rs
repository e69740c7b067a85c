//! What index artifacts an image has, and taking them away.

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use lazyrun_index::Digest;

use super::document::{ArtifactDocument, Candidate, artifact_kind, candidates_in_list, pinned_by_manifest};
use super::{MAX_BLOBS, kind_of};
use crate::client::RegistryClient;
use crate::error::FetchError;
use crate::manifest::ResolvedImage;
use crate::reference::Reference;
use crate::trust::{OriginKind, Trust};

/// Artifacts that are looked at to list them.
const MAX_LISTED: usize = 100;
/// Requests at a time.
const PARALLEL: usize = 6;

/// An index artifact of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexArtifact {
    /// The artifact's manifest.
    pub digest: Digest,
    /// What kind of index it is.
    pub kind: OriginKind,
    /// What ties it to the image.
    pub trust: Trust,
    /// Bytes of its manifest and its blobs.
    pub size: u64,
    /// When it was made (RFC 3339), if it says so.
    pub created: Option<String>,
    /// Format version of its indexes, if it says so.
    pub format: Option<u32>,
    /// Span size its indexes were made with, in bytes of blob, if it says so.
    pub span_size: Option<u64>,
    /// Its indexes.
    pub layers: Vec<IndexedLayer>,
}

/// One layer's index in an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexedLayer {
    /// Digest of the layer's blob.
    pub layer: Digest,
    /// diffID of the layer.
    pub diff_id: Digest,
    /// Digest of the index's blob.
    pub blob: Digest,
    /// Bytes of the index's blob.
    pub size: u64,
}

/// All index artifacts of an image, in the order in which they are preferred, and a warning for each that cannot
/// be read. Tables inside of layers (eStargz, zstd:chunked) are no artifacts.
///
/// # Errors
/// When the registry cannot say what refers to the image.
pub async fn list_indexes(
    client: &RegistryClient,
    image: &ResolvedImage,
) -> Result<(Vec<IndexArtifact>, Vec<String>), FetchError> {
    let mut candidates: Vec<Candidate> = pinned_by_manifest(image).into_iter().collect();
    candidates.extend(candidates_in_list(image));
    candidates.extend(candidates_of_referrers(client, &image.reference, image.manifest_digest).await?);
    candidates.sort_by(Candidate::order);
    let mut seen = std::collections::HashSet::new();
    candidates.retain(|c| seen.insert(c.digest));
    candidates.truncate(MAX_LISTED);
    let loads: Vec<_> = candidates.iter().map(|candidate| describe(client, image, candidate)).collect();
    let loaded: Vec<_> = stream::iter(loads).buffered(PARALLEL).collect().await;
    let (mut found, mut warnings) = (Vec::new(), Vec::new());
    for (candidate, described) in candidates.iter().zip(loaded) {
        match described {
            Ok(artifact) => found.push(artifact),
            Err(error) => warnings.push(format!("{} {}: {error}", candidate.kind, candidate.digest)),
        }
    }
    Ok((found, warnings))
}

/// The artifacts that refer to an image's manifest and are indexes of a kind that counts there. One request for all
/// kinds: a start waits for it.
pub(crate) async fn candidates_of_referrers(
    client: &RegistryClient,
    reference: &Reference,
    manifest: Digest,
) -> Result<Vec<Candidate>, FetchError> {
    let referrers = client.referrers(reference, manifest, &[]).await?;
    let made = referrers.iter().filter_map(|d| {
        let kind = d.artifact_type.as_deref().and_then(kind_of)?;
        // Of version 2 only those count that the image itself names.
        if kind == OriginKind::SociV2 {
            return None;
        }
        Some(Candidate::new(kind, Trust::Repository, d))
    });
    let mut found: Vec<Candidate> = made.collect();
    found.sort_by(Candidate::order);
    found.truncate(MAX_BLOBS);
    Ok(found)
}

async fn describe(
    client: &RegistryClient,
    image: &ResolvedImage,
    candidate: &Candidate,
) -> Result<IndexArtifact, FetchError> {
    let (manifest_size, document) = load_document(client, image, candidate.digest).await?;
    let layers = document.blobs.iter().map(|(blob, of)| IndexedLayer {
        layer: of.digest,
        diff_id: of.diff_id,
        blob: blob.digest,
        size: blob.size,
    });
    Ok(IndexArtifact {
        digest: candidate.digest,
        kind: document.kind,
        trust: candidate.trust,
        size: manifest_size + document.blobs.iter().map(|(blob, _)| blob.size).sum::<u64>(),
        created: document.created(),
        format: document.format(),
        span_size: document.span_size(),
        layers: layers.collect(),
    })
}

/// Fetches an artifact's manifest and checks it against the image; gives its length, too.
pub(crate) async fn load_document(
    client: &RegistryClient,
    image: &ResolvedImage,
    digest: Digest,
) -> Result<(u64, ArtifactDocument), FetchError> {
    check_document(image, digest, client.artifact_manifest(&image.reference, digest).await?)
}

/// Checks an artifact's manifest, if the registry has it, against the image; gives its length, too.
pub(crate) fn check_document(
    image: &ResolvedImage,
    digest: Digest,
    bytes: Option<Bytes>,
) -> Result<(u64, ArtifactDocument), FetchError> {
    let bytes = bytes.ok_or_else(|| bad(image, digest, "the registry does not have it".to_owned()))?;
    let document = ArtifactDocument::parse(&bytes, image).map_err(|reason| bad(image, digest, reason))?;
    Ok((bytes.len() as u64, document))
}

pub(crate) fn bad(image: &ResolvedImage, artifact: Digest, reason: String) -> FetchError {
    FetchError::Artifact { image: image.reference.familiar(), artifact, reason }
}

/// Deletes an index artifact that refers to the image; `false` when the registry does not have it.
///
/// Only what is an index and of this image is deleted, and nothing that the image itself names: that is part of
/// it. The blobs go with the registry's next garbage collection.
///
/// # Errors
/// When it is something else, or the registry does not delete ([`FetchError::Undeletable`]).
pub async fn delete_index(
    client: &RegistryClient,
    image: &ResolvedImage,
    artifact: Digest,
) -> Result<bool, FetchError> {
    let part_of_image = pinned_by_manifest(image).into_iter().chain(candidates_in_list(image));
    if part_of_image.into_iter().any(|c| c.digest == artifact) {
        return Err(bad(image, artifact, "it is part of the image and cannot be deleted alone".to_owned()));
    }
    let reference = &image.reference;
    if let Some(bytes) = client.artifact_manifest(reference, artifact).await? {
        let kind = artifact_kind(&bytes, image).map_err(|reason| bad(image, artifact, reason))?;
        if kind == OriginKind::SociV2 {
            return Err(bad(image, artifact, "it may be part of another image".to_owned()));
        }
        let by_registry = client.delete_manifest(reference, artifact).await?;
        // After the deletion, or a failed one would leave something that nobody finds any more.
        client.unlist_referrer(reference, image.manifest_digest, artifact).await?;
        return Ok(by_registry);
    }
    client.unlist_referrer(reference, image.manifest_digest, artifact).await?;
    Ok(false)
}
