//! Indexes of test images, and index artifacts made by hand.

use bytes::Bytes;
use lazyrun_fetcher::{IndexSource, LayerDescriptor, OWN_ARTIFACT_TYPE, OWN_LAYER_INDEX, ResolvedImage};
use lazyrun_index::{Digest, StreamOptions, index_layer};
use serde_json::{Value, json};

use super::registry::Registry;
use super::{TestImage, TestLayer};

/// Media type of an image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The index of a layer, with small spans.
pub fn index_of(layer: &TestLayer) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    let options = StreamOptions { span_size: 32 << 10, span_len: 256 << 10, ..StreamOptions::default() };
    index_layer(layer.blob.as_ref(), &mut (), &mut out, &options).unwrap();
    out.into_inner()
}

/// The indexes of all layers, as they are given to be pushed.
pub fn indexes(image: &ResolvedImage, made: &TestImage) -> Vec<(LayerDescriptor, IndexSource)> {
    let sources = made.layers.iter().map(|l| IndexSource::from(index_of(l)));
    image.layers.iter().cloned().zip(sources).collect()
}

/// A manifest of an own artifact with one blob, as the crate would write it.
pub fn own_manifest(image: &ResolvedImage, layer: &LayerDescriptor, blob: &[u8]) -> Value {
    json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": OWN_ARTIFACT_TYPE,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}").to_string(), "size": 2},
        "layers": [{"mediaType": OWN_LAYER_INDEX, "digest": Digest::of(blob).to_string(), "size": blob.len(),
            "annotations": {"org.lazyrun.index.layer": layer.digest.to_string(),
                "org.lazyrun.index.diff-id": layer.diff_id.to_string()}}],
        "subject": {"mediaType": MANIFEST, "digest": image.manifest_digest.to_string(), "size": image.manifest.len()},
        "annotations": {"org.lazyrun.index.format": "99"}})
}

/// Puts an own artifact with one blob, changed by `change`; gives its descriptor as a referrer.
pub async fn put_own(
    registry: &Registry,
    image: &ResolvedImage,
    layer: &LayerDescriptor,
    blob: Vec<u8>,
    change: impl FnOnce(&mut Value),
) -> Value {
    let repository = &image.reference.repository;
    let mut manifest = own_manifest(image, layer, &blob);
    change(&mut manifest);
    registry.put_blob(repository, Bytes::from_static(b"{}")).await;
    registry.put_blob(repository, blob.into()).await;
    put_artifact(registry, repository, &manifest).await
}

/// Puts a manifest under its digest; gives its descriptor with annotations.
pub async fn put_artifact(registry: &Registry, repository: &str, manifest: &Value) -> Value {
    let bytes = Bytes::from(manifest.to_string());
    let digest = Digest::of(&bytes).to_string();
    registry.put_manifest(repository, &digest, bytes.clone(), MANIFEST).await;
    json!({"mediaType": MANIFEST, "digest": digest, "size": bytes.len(),
        "artifactType": manifest["artifactType"], "annotations": manifest["annotations"]})
}

/// Writes the list of referrers under the image's tag.
pub async fn put_referrers(registry: &Registry, image: &ResolvedImage, entries: &[Value]) {
    let list = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
    let tag = format!("sha256-{}", image.manifest_digest.hex());
    registry.put_manifest(&image.reference.repository, &tag, list.to_string().into(), INDEX).await;
}
