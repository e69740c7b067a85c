//! Pushing indexes beside their image.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lazyrun_index::Digest;

use super::own::{About, EMPTY_CONFIG, OwnBlob, make_blob, make_manifest, make_profile};
use super::{Descriptor, index_limit};
use crate::client::{RegistryClient, Uploaded};
use crate::error::FetchError;
use crate::manifest::{LayerDescriptor, ResolvedImage};

/// Indexes that are read, compressed and uploaded at the same time: each is in memory meanwhile.
const PARALLEL: usize = 3;

/// Where a layer's index is.
#[derive(Clone, Debug)]
pub enum IndexSource {
    /// In a file.
    File(PathBuf),
    /// In memory.
    Memory(Bytes),
}

impl From<PathBuf> for IndexSource {
    fn from(path: PathBuf) -> Self {
        IndexSource::File(path)
    }
}

impl From<Vec<u8>> for IndexSource {
    fn from(bytes: Vec<u8>) -> Self {
        IndexSource::Memory(bytes.into())
    }
}

/// What goes into an artifact beside the indexes. The default gives the same artifact for the same indexes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PushOptions {
    /// Span size the indexes were made with, in bytes of blob: noted in the artifact.
    pub span_size: Option<u64>,
    /// Time (RFC 3339) to note in the artifact; it makes each artifact another one.
    pub created: Option<String>,
    /// The profile of a start, for those who find the indexes; at most 8 MiB.
    pub profile: Option<Bytes>,
}

/// What was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushReport {
    /// The artifact's manifest.
    pub artifact: Digest,
    /// Layers of the image whose index it holds.
    pub layers: usize,
    /// Digests of layers whose index is left out, as it is longer than the layer's blob and saves nothing.
    pub left_out: Vec<Digest>,
    /// Bytes of its manifest and its blobs.
    pub size: u64,
    /// Bytes of blobs that the registry did not have yet.
    pub sent: u64,
}

/// Pushes indexes of an image's layers as one artifact beside the image, findable from it.
///
/// Each index is checked first: it must be valid and of the layer it is given for.
///
/// # Errors
/// When an index is not the layer's, or the registry does not take the artifact.
pub async fn push_indexes(
    client: &RegistryClient,
    image: &ResolvedImage,
    indexes: &[(LayerDescriptor, IndexSource)],
    options: &PushOptions,
) -> Result<PushReport, FetchError> {
    // In the image's order and each layer once, whatever the caller's order: the bytes must not depend on it.
    let mut chosen: Vec<(&LayerDescriptor, &IndexSource)> = Vec::new();
    for layer in &image.layers {
        let given = indexes.iter().find(|(of, _)| of.digest == layer.digest && of.diff_id == layer.diff_id);
        if let Some((_, source)) = given
            && chosen.iter().all(|(of, _)| of.digest != layer.digest)
        {
            chosen.push((layer, source));
        }
    }
    if chosen.is_empty() {
        let (image, what) = (image.reference.familiar(), "index");
        let reason = "there is no index of any of the image's layers".to_owned();
        return Err(FetchError::Invalid { image, what, reason });
    }
    let config = Bytes::from_static(EMPTY_CONFIG);
    client.upload_blob(&image.reference, Digest::of(&config), config).await?;
    let given: Vec<Digest> = chosen.iter().map(|(layer, _)| layer.digest).collect();
    let uploads: Vec<_> =
        chosen.into_iter().map(|(layer, source)| upload(client, image, layer, source)).collect();
    let uploaded: Vec<Option<(Descriptor, u32, u64)>> =
        stream::iter(uploads).buffered(PARALLEL).try_collect().await?;
    let left_out =
        given.into_iter().zip(&uploaded).filter(|(_, blob)| blob.is_none()).map(|(layer, _)| layer).collect();
    let blobs: Vec<(Descriptor, u32, u64)> = uploaded.into_iter().flatten().collect();
    let about = About {
        // Who reads it must know all of its indexes' formats, and prefers the artifact with the best worst.
        format: blobs.iter().map(|(_, format, _)| *format).min().unwrap_or_default(),
        span_size: options.span_size,
        created: options.created.as_deref(),
    };
    let mut sent = blobs.iter().map(|(_, _, sent)| sent).sum();
    let mut descriptors: Vec<Descriptor> = blobs.into_iter().map(|(descriptor, _, _)| descriptor).collect();
    let layers = descriptors.len();
    if let Some(profile) = &options.profile {
        let (descriptor, bytes) = make_profile(profile).map_err(|reason| FetchError::Invalid {
            image: image.reference.familiar(),
            what: "profile",
            reason,
        })?;
        if client.upload_blob(&image.reference, descriptor.digest, bytes).await? == Uploaded::Sent {
            sent += descriptor.size;
        }
        descriptors.push(descriptor);
    }
    let (artifact, bytes) = make_manifest(image, &descriptors, &about);
    let size = artifact.size + descriptors.iter().map(|d| d.size).sum::<u64>();
    client.put_artifact(&image.reference, image.manifest_digest, &artifact, bytes).await?;
    Ok(PushReport { artifact: artifact.digest, layers, left_out, size, sent })
}

/// Uploads one index; gives its descriptor, its format version and the bytes that were sent, or nothing if the
/// index is too long to be of use.
async fn upload(
    client: &RegistryClient,
    image: &ResolvedImage,
    layer: &LayerDescriptor,
    source: &IndexSource,
) -> Result<Option<(Descriptor, u32, u64)>, FetchError> {
    let (of, source) = (layer.clone(), source.clone());
    let made = tokio::task::spawn_blocking(move || {
        let index = match source {
            IndexSource::File(path) => read(&path, index_limit(of.size))?,
            IndexSource::Memory(bytes) => Some(Vec::from(bytes)),
        };
        let index = index.filter(|i| i.len() as u64 <= index_limit(of.size));
        Ok::<_, FetchError>(index.map(|index| make_blob(&of, index)))
    });
    let made = made.await.map_err(|_| FetchError::Interrupted { what: "packing an index" })??;
    let Some(made) = made else { return Ok(None) };
    let OwnBlob { descriptor, bytes, format } = made.map_err(|reason| FetchError::Invalid {
        image: image.reference.familiar(),
        what: "index",
        reason: format!("that of layer {}: {reason}", layer.digest),
    })?;
    let sent = match client.upload_blob(&image.reference, descriptor.digest, bytes).await? {
        Uploaded::Sent => descriptor.size,
        Uploaded::Existed => 0,
    };
    Ok(Some((descriptor, format, sent)))
}

/// A file of at most `limit` bytes; nothing if it is longer.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FetchError> {
    let fail = |e| FetchError::store("reading", path, e);
    if std::fs::metadata(path).map_err(fail)?.len() > limit {
        return Ok(None);
    }
    std::fs::read(path).map(Some).map_err(fail)
}
