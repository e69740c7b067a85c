//! What lies beside an image, looked up while its config is still on its way.
//!
//! That takes no more than the digest of the manifest. Looked up afterwards it would be two more round trips that a start
//! waits for.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use lazyrun_index::Digest;

use super::{DiscoverOptions, MAX_CANDIDATES};
use crate::artifact::{Candidate, candidates_of_referrers, check_document, decode_profile};
use crate::client::RegistryClient;
use crate::error::FetchError;
use crate::manifest::ResolvedImage;
use crate::platform::Platform;
use crate::reference::Reference;

/// Index artifacts that refer to an image, best first, with their manifests as they are.
#[derive(Debug, Default)]
pub struct Beside {
    /// Absent when nobody has looked, or not in time.
    pub(super) found: Option<Listed>,
}

/// What the registry says.
pub(super) type Listed = Result<Vec<(Candidate, Result<Option<Bytes>, FetchError>)>, FetchError>;

/// As [`RegistryClient::resolve`], and meanwhile looks for index artifacts in the image's repository, for
/// [`discover_with`](super::discover_with). That they cannot be had is told there.
///
/// # Errors
/// As [`RegistryClient::resolve`].
pub async fn resolve_and_look(
    client: &RegistryClient,
    reference: &Reference,
    platform: &Platform,
    options: &DiscoverOptions,
) -> Result<(ResolvedImage, Beside), FetchError> {
    let found = client.find_image(reference, platform).await?;
    let manifest = Digest::of(&found.manifest);
    // The first takes the connection that is open: what lies beside is two answers away, the config one.
    let (beside, image) = tokio::join!(
        biased;
        within(options.limit, list(client, reference, manifest, options)),
        client.with_config(reference, found)
    );
    Ok((image?, Beside { found: beside }))
}

/// The profile that lies with the best index artifact beside an image that has one. Nobody has looked at its bytes.
///
/// # Errors
/// When the registry cannot be asked.
pub async fn find_profile(
    client: &RegistryClient,
    image: &ResolvedImage,
) -> Result<Option<Vec<u8>>, FetchError> {
    let options = DiscoverOptions::default();
    for (candidate, bytes) in list(client, &image.reference, image.manifest_digest, &options).await? {
        let Ok((_, document)) = check_document(image, candidate.digest, bytes?) else { continue };
        let Some(blob) = document.profile else { continue };
        let bytes = client.blob(&image.reference, blob.digest, "profile", blob.size).await?;
        if let Ok(profile) = decode_profile(&bytes) {
            return Ok(Some(profile));
        }
    }
    Ok(None)
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

/// Lists the artifacts that refer to a manifest and gets the manifests of the best.
pub(super) async fn list(
    client: &RegistryClient,
    reference: &Reference,
    manifest: Digest,
    options: &DiscoverOptions,
) -> Listed {
    let mut candidates = candidates_of_referrers(client, reference, manifest).await?;
    candidates.retain(|c| !options.refused.contains(&c.digest));
    candidates.truncate(MAX_CANDIDATES);
    let fetches = candidates.into_iter().map(|candidate| async move {
        let document = client.artifact_manifest(reference, candidate.digest).await;
        (candidate, document)
    });
    Ok(join_all(fetches).await)
}
