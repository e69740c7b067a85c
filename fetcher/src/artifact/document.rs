//! Manifests of index artifacts, and where an image names them.

use std::collections::BTreeMap;

use lazyrun_index::Digest;
use serde::Deserialize;

use super::descriptor::{Descriptor, RawDescriptor, parse_descriptors};
use super::{
    CREATED, FORMAT, LAYER_DIFF_ID, LAYER_DIGEST, MAX_BLOBS, MAX_PROFILE, OWN_LAYER_INDEX,
    OWN_LAYER_INDEX_ZSTD, OWN_PROFILE_ZSTD, SOCI_INDEX_DIGEST, SOCI_LAYER_DIGEST, SOCI_MANIFEST_DIGEST,
    SPAN_SIZE, index_limit, kind_of,
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
    /// Blob with the profile of a start.
    pub(crate) profile: Option<Descriptor>,
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
        let (mut blobs, mut profile) = (Vec::new(), None);
        for layer in layers {
            let blob = layer.check().ok_or("one of its blobs has a digest that is not of sha256")?;
            if kind == OriginKind::Own && blob.media_type == OWN_PROFILE_ZSTD {
                // One that is too long saves nothing; the indexes are good all the same.
                profile = profile.or(Some(blob).filter(|blob| blob.size <= MAX_PROFILE));
                continue;
            }
            if let Some(of) = match_layer(kind, &blob, image)? {
                blobs.push((blob, of));
            }
        }
        Ok(ArtifactDocument { kind, blobs, profile, annotations: raw.annotations })
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
    if blob.size == 0 || blob.size > index_limit(layer.size) {
        return Err(format!("the index of layer {} cannot have {} bytes", layer.digest, blob.size));
    }
    Ok(Some(layer.clone()))
}

fn shown(text: &str) -> String {
    if text.is_empty() { "an artifact without type".to_owned() } else { printable(text) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::super::{OWN_ARTIFACT_TYPE, SOCI_V1_ARTIFACT_TYPE, SOCI_V2_ARTIFACT_TYPE};
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    /// An image of two layers with a SOCI index named by its manifest, in a list with what `more` says.
    fn image(more: &[Value]) -> ResolvedImage {
        let layer = |n: u8| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest(n).to_string(), "size": 7});
        let config =
            json!({"rootfs": {"diff_ids": [digest(11).to_string(), digest(12).to_string()]}}).to_string();
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"digest": Digest::of(config.as_bytes()).to_string()},
            "layers": [layer(1), layer(2)],
            "annotations": {SOCI_INDEX_DIGEST: digest(50).to_string()}});
        let manifest = Bytes::from(manifest.to_string());
        let mut entries = vec![json!({"digest": Digest::of(&manifest).to_string()})];
        entries.extend_from_slice(more);
        let list = json!({"schemaVersion": 2, "manifests": entries}).to_string();
        let reference = "localhost/a:b".parse().unwrap();
        let image = ResolvedImage::from_parts(reference, manifest, config.into()).unwrap();
        image.with_list(list.into()).unwrap()
    }

    fn entry(n: u8, kind: &str, annotations: &Value) -> Value {
        json!({"digest": digest(n).to_string(), "artifactType": kind, "annotations": annotations})
    }

    #[test]
    fn what_the_image_names_is_bound() {
        let own = image(&[]).manifest_digest.to_string();
        let image = image(&[
            entry(60, SOCI_V2_ARTIFACT_TYPE, &json!({SOCI_MANIFEST_DIGEST: own})),
            entry(61, SOCI_V2_ARTIFACT_TYPE, &json!({SOCI_MANIFEST_DIGEST: digest(9).to_string()})),
            entry(62, OWN_ARTIFACT_TYPE, &json!({})),
            entry(63, "application/x", &json!({})),
        ]);
        assert_eq!(pinned_by_manifest(&image).unwrap().digest, digest(50));
        let found = candidates_in_list(&image);
        let told: Vec<_> = found.iter().map(|c| (c.kind, c.digest, c.trust)).collect();
        let bound = Trust::Bound;
        assert_eq!(told, [(OriginKind::Own, digest(62), bound), (OriginKind::SociV2, digest(60), bound)]);
        assert_eq!(subject_of(&image).media_type, "application/vnd.docker.distribution.manifest.v2+json");
        let other = json!({"schemaVersion": 2, "manifests": [{"digest": digest(1).to_string()}]}).to_string();
        assert!(image.with_list(other.into()).is_err());
    }

    #[test]
    fn candidates_have_one_order() {
        let candidate = |kind, trust, n: u8, format: &str, created: &str| {
            let mut descriptor = Descriptor::new("m", Digest::from_bytes([n; 32]), 1);
            descriptor.annotations.insert(FORMAT.to_owned(), format.to_owned());
            descriptor.annotations.insert(CREATED.to_owned(), created.to_owned());
            Candidate::new(kind, trust, &descriptor)
        };
        use OriginKind::{Own, SociV1, SociV2};
        let sorted = vec![
            candidate(Own, Trust::Bound, 9, "1", ""),
            candidate(SociV2, Trust::Bound, 1, "", ""),
            candidate(Own, Trust::Repository, 8, "3", "2026"),
            candidate(Own, Trust::Repository, 7, "3", "2025"),
            candidate(Own, Trust::Repository, 5, "2", "2027"),
            candidate(Own, Trust::Repository, 6, "2", "2027"),
            candidate(Own, Trust::Repository, 1, "nonsense", ""),
            candidate(SociV1, Trust::Repository, 0, "", ""),
        ];
        let mut shuffled: Vec<_> = sorted.iter().rev().cloned().collect();
        shuffled.swap(1, 5);
        shuffled.sort_by(Candidate::order);
        assert_eq!(shuffled, sorted);
    }

    fn soci(
        image: &ResolvedImage,
        kind: &str,
        layers: &[Value],
        subject: bool,
    ) -> Result<ArtifactDocument, String> {
        let mut manifest = json!({"schemaVersion": 2, "config": {"mediaType": kind, "digest": digest(0).to_string()}, "layers": layers});
        if subject {
            manifest["subject"] = json!({"digest": image.manifest_digest.to_string()});
        }
        ArtifactDocument::parse(manifest.to_string().as_bytes(), image)
    }

    fn ztoc(of: u8, media_type: &str, size: u64) -> Value {
        json!({"mediaType": media_type, "digest": digest(70).to_string(), "size": size,
            "annotations": {SOCI_LAYER_DIGEST: digest(of).to_string()}})
    }

    #[test]
    fn soci_indexes_are_read() {
        let image = image(&[]);
        let (blob, list) = (ztoc(2, "application/octet-stream", 9), ztoc(2, "application/vnd.x.prefetch", 9));
        let read = soci(&image, SOCI_V1_ARTIFACT_TYPE, &[blob.clone(), list], true).unwrap();
        assert_eq!(read.kind, OriginKind::SociV1);
        assert_eq!(read.blobs.len(), 1);
        assert_eq!(read.blobs[0].1.diff_id, digest(12));
        assert_eq!(
            soci(&image, SOCI_V2_ARTIFACT_TYPE, std::slice::from_ref(&blob), false).unwrap().kind,
            OriginKind::SociV2
        );
        let refused = |kind, blob: Value, subject| soci(&image, kind, &[blob], subject).unwrap_err();
        assert!(refused(SOCI_V1_ARTIFACT_TYPE, blob.clone(), false).contains("which image"));
        assert!(refused("application/x", blob, true).contains("application/x"));
        let strange = ztoc(3, "application/octet-stream", 9);
        assert!(refused(SOCI_V1_ARTIFACT_TYPE, strange, true).contains("does not have"));
        let huge = ztoc(1, "application/octet-stream", u64::MAX);
        assert!(refused(SOCI_V2_ARTIFACT_TYPE, huge, false).contains("cannot have"));
        let many: Vec<Value> = (0..600).map(|_| ztoc(1, "application/octet-stream", 9)).collect();
        assert!(soci(&image, SOCI_V2_ARTIFACT_TYPE, &many, false).unwrap_err().contains("600"));
        for text in ["", "[]", "{}", r#"{"schemaVersion":1}"#, r#"{"schemaVersion":2,"layers":7}"#] {
            assert!(ArtifactDocument::parse(text.as_bytes(), &image).is_err(), "{text}");
        }
    }
}
