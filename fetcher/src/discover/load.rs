//! The indexes of one artifact.

use bytes::Bytes;
use futures_util::future::join_all;

use super::{ClaimedIndex, NO_ROOM, Search};
use crate::artifact::{ArtifactDocument, Candidate, Descriptor, bad, decode_blob, decode_profile};
use crate::error::FetchError;
use crate::manifest::LayerDescriptor;
use crate::trust::{Origin, OriginKind};

/// Indexes of one artifact whose faults are told one by one.
const MAX_REASONS: usize = 3;

/// What happened to one index.
enum Loaded {
    Taken,
    /// It could not be had; the others may be good.
    Missed(String),
    /// It is not what it should be: nothing of this artifact is used.
    Bad(String),
}

/// Takes the indexes of missing layers from an artifact, or none of them if one is bad.
pub(super) async fn take(search: &Search<'_>, candidate: &Candidate, document: ArtifactDocument) {
    let origin = Origin { kind: document.kind, artifact: Some(candidate.digest), trust: candidate.trust };
    let missing = search.missing();
    let wanted: Vec<_> = document
        .blobs
        .into_iter()
        .filter(|(_, layer)| missing.iter().any(|m| m.diff_id == layer.diff_id))
        .collect();
    if wanted.is_empty() && search.policy.pinned.is_some() {
        let reason = "it holds no index of the layers that lack one".to_owned();
        return search.warn(bad(search.image, candidate.digest, reason).to_string());
    }
    let loads = join_all(wanted.iter().map(|(blob, layer)| load(search, &origin, blob, layer)));
    let profile = async {
        match &document.profile {
            Some(blob) if search.state().profile.is_none() => load_profile(search, blob).await,
            _ => Ok(None),
        }
    };
    let (loads, profile) = tokio::join!(loads, profile);
    let mut spoilt = false;
    let mut reasons = Vec::new();
    match profile {
        Ok(None) => {}
        Ok(profile) => search.state().profile = profile,
        Err(reason) => reasons.push(format!("its profile: {reason}")),
    }
    for loaded in loads {
        match loaded {
            Loaded::Taken => {}
            Loaded::Missed(reason) => reasons.push(reason),
            Loaded::Bad(reason) => {
                spoilt = true;
                reasons.push(reason);
            }
        }
    }
    let more = reasons.len().saturating_sub(MAX_REASONS);
    reasons.truncate(MAX_REASONS);
    if let Some(last) = reasons.last_mut().filter(|_| more > 0) {
        last.push_str(&format!(" (and {more} more)"));
    }
    for reason in reasons {
        search.warn(bad(search.image, candidate.digest, reason).to_string());
    }
    if spoilt {
        search.disown(candidate.digest);
    }
}

/// Gets a profile; one that cannot be had costs nobody an index.
async fn load_profile(search: &Search<'_>, blob: &Descriptor) -> Result<Option<Vec<u8>>, String> {
    if !search.reserve(blob.size) {
        return Err(NO_ROOM.to_owned());
    }
    let _turn = search.gate.acquire().await;
    let bytes = search.client.blob(&search.image.reference, blob.digest, "profile", blob.size).await;
    decode_profile(&bytes.map_err(|e| e.to_string())?).map(Some)
}

async fn load(search: &Search<'_>, origin: &Origin, blob: &Descriptor, layer: &LayerDescriptor) -> Loaded {
    let of = |reason: &str| format!("the index of layer {}: {reason}", layer.digest);
    if !search.reserve(blob.size) {
        return Loaded::Missed(of(NO_ROOM));
    }
    let fetched = {
        let _turn = search.gate.acquire().await;
        search.client.blob(&search.image.reference, blob.digest, "index", blob.size).await
    };
    let bytes = match fetched {
        Ok(bytes) if bytes.len() as u64 == blob.size => bytes,
        Ok(bytes) => {
            return Loaded::Bad(of(&format!("it has {} bytes instead of {}", bytes.len(), blob.size)));
        }
        Err(error @ (FetchError::WrongDigest { .. } | FetchError::TooLarge { .. })) => {
            return Loaded::Bad(of(&error.to_string()));
        }
        Err(error) => return Loaded::Missed(of(&error.to_string())),
    };
    let (kind, media_type, layer_of) = (origin.kind, blob.media_type.clone(), layer.clone());
    match search.make(move || decode(kind, bytes, &media_type, &layer_of)).await {
        Ok(Ok(index)) => {
            search.keep(layer.diff_id, ClaimedIndex { bytes: index, origin: origin.clone() });
            Loaded::Taken
        }
        Ok(Err(reason)) => Loaded::Bad(of(&reason)),
        Err(reason) => Loaded::Missed(of(&reason)),
    }
}

/// Turns a blob of an artifact into an index in our format.
fn decode(
    kind: OriginKind,
    bytes: Bytes,
    media_type: &str,
    layer: &LayerDescriptor,
) -> Result<Vec<u8>, String> {
    match kind {
        OriginKind::Own => decode_blob(bytes, media_type, layer),
        _ => super::tables::ztoc(&bytes, layer),
    }
}
