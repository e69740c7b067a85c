//! Manifests of index artifacts, and where an image names them.

use std::collections::BTreeMap;

use lazyrun_index::Digest;
use serde::Deserialize;

use super::descriptor::{Descriptor, RawDescriptor, parse_descriptors};
use super::{
    CREATED, FORMAT, LAYER_DIFF_ID, LAYER_DIGEST, MAX_BLOBS, MAX_INDEX, OWN_LAYER_INDEX,
    OWN_LAYER_INDEX_ZSTD, SOCI_INDEX_DIGEST, SOCI_LAYER_DIGEST, SOCI_MANIFEST_DIGEST, SPAN_SIZE, kind_of,
};
use crate::manifest::{LayerDescriptor, OCI_MANIFEST, ResolvedImage, printable};
use crate::trust::{OriginKind, Trust};

/// An index artifact that may be of use, not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) kind: OriginKind,
    pub(crate) digest: Digest,
    pub(crate) trust: Trust,
    /// Format version and time by its descriptor: they only order candidates.
    format: u32,
    created: String,
}

impl Candidate {
    pub(crate) fn new(kind: OriginKind, trust: Trust, descriptor: &Descriptor) -> Self {
        let format = descriptor.annotation(FORMAT).and_then(|v| v.parse().ok()).unwrap_or(0);
        let created = descriptor.annotation(CREATED).unwrap_or_default().to_owned();
        Candidate { kind, digest: descriptor.digest, trust, format, created }
    }

    /// One of which only the digest is known.
    pub(crate) fn bare(kind: OriginKind, trust: Trust, digest: Digest) -> Self {
        Candidate { kind, digest, trust, format: 0, created: String::new() }
    }

    /// Smallest first: bound before repository, own before foreign, then the newest; the digest decides what
    /// nothing else does, so that all nodes choose alike.
    pub(crate) fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
        let foreign = |c: &Candidate| c.kind != OriginKind::Own;
        (a.trust, foreign(a), a.kind)
            .cmp(&(b.trust, foreign(b), b.kind))
            .then_with(|| b.format.cmp(&a.format))
            .then_with(|| b.created.cmp(&a.created))
            .then_with(|| a.digest.cmp(&b.digest))
    }
}

/// The SOCI index (version 2) that the image's manifest names.
pub(crate) fn pinned_by_manifest(image: &ResolvedImage) -> Option<Candidate> {
    let digest = image_annotations(image).get(SOCI_INDEX_DIGEST)?.parse().ok()?;
    Some(Candidate::bare(OriginKind::SociV2, Trust::Bound, digest))
}

/// The index artifacts that lie in the same image index for this image.
pub(crate) fn candidates_in_list(image: &ResolvedImage) -> Vec<Candidate> {
    let manifest = image.manifest_digest.to_string();
    let listed = image.list.as_deref().and_then(parse_descriptors).unwrap_or_default();
    let of_this = |d: &&Descriptor| match d.artifact_type.as_deref().and_then(kind_of) {
        // Its subject says whose it is.
        Some(OriginKind::Own) => true,
        Some(_) => d.annotation(SOCI_MANIFEST_DIGEST) == Some(&manifest),
        None => false,
    };
    let made = listed.iter().filter(of_this).filter_map(|d| {
        let kind = d.artifact_type.as_deref().and_then(kind_of)?;
        Some(Candidate::new(kind, Trust::Bound, d))
    });
    let mut found: Vec<Candidate> = made.take(MAX_BLOBS).collect();
    found.sort_by(Candidate::order);
    found
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawImageHead {
    media_type: Option<String>,
    #[serde(default, deserialize_with = "crate::manifest::annotations")]
    annotations: BTreeMap<String, String>,
}

fn image_head(image: &ResolvedImage) -> RawImageHead {
    let empty = RawImageHead { media_type: None, annotations: BTreeMap::new() };
    serde_json::from_slice(&image.manifest).unwrap_or(empty)
}

fn image_annotations(image: &ResolvedImage) -> BTreeMap<String, String> {
    image_head(image).annotations
}

/// How an artifact names the image's manifest as its subject.
pub(super) fn subject_of(image: &ResolvedImage) -> Descriptor {
    let media_type = image_head(image).media_type.filter(|t| !t.is_empty());
    let media_type = media_type.as_deref().unwrap_or(OCI_MANIFEST);
    Descriptor::new(media_type, image.manifest_digest, image.manifest.len() as u64)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawArtifact {
    schema_version: Option<u32>,
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    subject: Option<RawDescriptor>,
    #[serde(default, deserialize_with = "crate::manifest::annotations")]
    annotations: BTreeMap<String, String>,
}

/// The manifest of an index artifact that suits an image.
#[derive(Clone, Debug)]
pub(crate) struct ArtifactDocument {
    pub(crate) kind: OriginKind,
    /// Blobs and the layers of the image they are of.
    pub(crate) blobs: Vec<(Descriptor, LayerDescriptor)>,
    pub(crate) annotations: BTreeMap<String, String>,
}

impl ArtifactDocument {
    /// Reads a manifest and checks it against the image.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence.
    pub(crate) fn parse(bytes: &[u8], image: &ResolvedImage) -> Result<Self, String> {
        let (raw, kind) = parse_head(bytes, image)?;
        let layers = raw.layers.unwrap_or_default();
        if layers.len() > MAX_BLOBS {
            return Err(format!("its {} blobs are more than the {MAX_BLOBS} allowed", layers.len()));
        }
        let mut blobs = Vec::new();
        for layer in layers {
            let blob = layer.check().ok_or("one of its blobs has a digest that is not of sha256")?;
            if let Some(of) = match_layer(kind, &blob, image)? {
                blobs.push((blob, of));
            }
        }
        Ok(ArtifactDocument { kind, blobs, annotations: raw.annotations })
    }

    /// Format version of the indexes, by annotation.
    pub(crate) fn format(&self) -> Option<u32> {
        self.annotations.get(FORMAT)?.parse().ok()
    }

    /// Span size the indexes were made with, by annotation.
    pub(crate) fn span_size(&self) -> Option<u64> {
        self.annotations.get(SPAN_SIZE)?.parse().ok()
    }

    /// When the artifact was made, by annotation.
    pub(crate) fn created(&self) -> Option<String> {
        self.annotations.get(CREATED).map(|c| printable(c))
    }
}

/// The kind of an index artifact, if it is one and of this image.
pub(super) fn artifact_kind(bytes: &[u8], image: &ResolvedImage) -> Result<OriginKind, String> {
    parse_head(bytes, image).map(|(_, kind)| kind)
}

/// Reads an artifact's manifest and checks of what kind it is and whose.
fn parse_head(bytes: &[u8], image: &ResolvedImage) -> Result<(RawArtifact, OriginKind), String> {
    let raw: RawArtifact =
        serde_json::from_slice(bytes).map_err(|e| format!("its manifest cannot be read: {e}"))?;
    if raw.schema_version != Some(2) {
        return Err("its manifest's schemaVersion is not 2".to_owned());
    }
    let config = raw.config.as_ref().map(RawDescriptor::media_type);
    let artifact_type = raw.artifact_type.as_deref().filter(|t| !t.is_empty()).or(config).unwrap_or_default();
    let kind = kind_of(artifact_type)
        .ok_or_else(|| format!("{} is not a kind of index known here", shown(artifact_type)))?;
    // SOCI's version 2 has no subject: there the image names the index.
    match raw.subject.as_ref().and_then(RawDescriptor::parsed_digest) {
        None if kind == OriginKind::SociV2 => {}
        None => return Err("it does not say which image it is of".to_owned()),
        Some(subject) if subject != image.manifest_digest => {
            return Err(format!("it is of another image or platform, {subject}"));
        }
        Some(_) => {}
    }
    Ok((raw, kind))
}

/// The image's layer that a blob is an index of. `None` for blobs of kinds that later versions may add.
fn match_layer(
    kind: OriginKind,
    blob: &Descriptor,
    image: &ResolvedImage,
) -> Result<Option<LayerDescriptor>, String> {
    let key = match (kind, blob.media_type.as_str()) {
        (OriginKind::Own, OWN_LAYER_INDEX | OWN_LAYER_INDEX_ZSTD) => LAYER_DIGEST,
        (OriginKind::Own, _) => return Ok(None),
        _ => SOCI_LAYER_DIGEST,
    };
    // Other artifacts of SOCI (prefetch lists) lie among the zTOCs and name a layer too, with another type.
    if kind != OriginKind::Own && blob.media_type != "application/octet-stream" {
        return Ok(None);
    }
    let Some(named) = blob.annotation(key) else {
        return Err(format!("its blob {} does not say which layer it is of", blob.digest));
    };
    let layer = image
        .layers
        .iter()
        .find(|l| l.digest.to_string() == named)
        .ok_or_else(|| format!("it names layer {}, which the image does not have", shown(named)))?;
    if let Some(diff_id) = blob.annotation(LAYER_DIFF_ID)
        && diff_id != layer.diff_id.to_string()
    {
        return Err(format!("it gives layer {} a diffID that the image's config does not", layer.digest));
    }
    if blob.size == 0 || blob.size > MAX_INDEX {
        return Err(format!("the index of layer {} cannot have {} bytes", layer.digest, blob.size));
    }
    Ok(Some(layer.clone()))
}

fn shown(text: &str) -> String {
    if text.is_empty() { "an artifact without type".to_owned() } else { printable(text) }
}
