//! Manifests, manifest lists and configs: Docker schema 2 and OCI image-spec.

use std::collections::BTreeMap;

use bytes::Bytes;
use lazyrun_index::Digest;
use serde::{Deserialize, Deserializer};

use crate::error::FetchError;
use crate::platform::Platform;
use crate::reference::Reference;

/// Media type of an OCI image manifest.
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media types offered when asking for a manifest.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";
/// Largest manifest that is read, in bytes (distribution-spec: registries should take 4 MiB).
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Largest config that is read, in bytes.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;
/// Most layers an image may have; Docker stops at 127.
const MAX_LAYERS: usize = 512;

/// One layer of an image as its manifest and config describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Digest of the blob as it lies in the registry.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Media type by the manifest; compression is told by magic bytes, not by this.
    pub media_type: String,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Annotations by the manifest: some layer formats tell there where their table is, and its digest.
    pub annotations: BTreeMap<String, String>,
}

/// An image whose manifest and config were fetched and verified.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// What was asked for.
    pub reference: Reference,
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// The manifest, byte for byte.
    pub manifest: Bytes,
    /// Digest of the config.
    pub config_digest: Digest,
    /// The config, byte for byte.
    pub config: Bytes,
    /// Layers, bottom first.
    pub layers: Vec<LayerDescriptor>,
    /// The manifest list or OCI index, byte for byte, that the manifest was chosen from, if it was.
    pub list: Option<Bytes>,
}

impl ResolvedImage {
    /// The layers' diffIDs, bottom first.
    pub fn diff_ids(&self) -> Vec<Digest> {
        self.layers.iter().map(|layer| layer.diff_id).collect()
    }

    /// Builds an image from stored bytes, with the same checks as a fresh one.
    ///
    /// # Errors
    /// When a document is malformed, unsupported, or the config is not the one the manifest names.
    pub fn from_parts(reference: Reference, manifest: Bytes, config: Bytes) -> Result<Self, FetchError> {
        let parsed = match parse(&reference, &manifest)? {
            Document::Image(image) => image,
            Document::List(_) => {
                return Err(invalid(&reference, "manifest", "it is a list of manifests, not one"));
            }
        };
        let got = Digest::of(&config);
        if got != parsed.config_digest {
            let host = reference.registry.clone();
            return Err(FetchError::WrongDigest { host, what: "config", want: parsed.config_digest, got });
        }
        let layers = join_layers(&reference, parsed.layers, &config)?;
        Ok(ResolvedImage {
            manifest_digest: Digest::of(&manifest),
            config_digest: parsed.config_digest,
            reference,
            manifest,
            config,
            layers,
            list: None,
        })
    }

    /// The same image with the list that its manifest was chosen from.
    ///
    /// # Errors
    /// When `list` does not name the manifest.
    pub fn with_list(self, list: Bytes) -> Result<Self, FetchError> {
        let named = match parse(&self.reference, &list)? {
            Document::List(entries) => entries.iter().any(|e| e.digest == self.manifest_digest),
            Document::Image(_) => false,
        };
        if !named {
            return Err(invalid(&self.reference, "manifest", "it is not in the list it should come from"));
        }
        Ok(ResolvedImage { list: Some(list), ..self })
    }
}

/// A manifest document, told apart by its content.
pub(crate) enum Document {
    /// Manifest list or OCI index.
    List(Vec<ListEntry>),
    /// Manifest of one image.
    Image(ImageManifest),
}

/// One manifest of a list.
pub(crate) struct ListEntry {
    pub(crate) digest: Digest,
    pub(crate) platform: Option<Platform>,
    /// What it is, if it is not an image: an index or a signature may lie in the same list.
    pub(crate) artifact_type: Option<String>,
}

/// The parts of an image manifest that matter here.
pub(crate) struct ImageManifest {
    pub(crate) config_digest: Digest,
    layers: Vec<BlobRef>,
}

struct BlobRef {
    digest: Digest,
    size: u64,
    media_type: String,
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: Option<String>,
    digest: String,
    size: Option<u64>,
    platform: Option<Platform>,
    artifact_type: Option<String>,
    #[serde(default, deserialize_with = "annotations")]
    annotations: BTreeMap<String, String>,
}

/// Reads annotations; those whose value is not a text are left out, as they mean nothing here.
pub(crate) fn annotations<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let raw = Option::<BTreeMap<String, serde_json::Value>>::deserialize(deserializer)?;
    let texts = raw.unwrap_or_default().into_iter().filter_map(|(key, value)| match value {
        serde_json::Value::String(text) => Some((key, text)),
        _ => None,
    });
    Ok(texts.collect())
}

#[derive(Deserialize)]
struct RawConfig {
    rootfs: Option<RawRootfs>,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Tells a list from an image manifest and checks what can be checked without the config.
pub(crate) fn parse(reference: &Reference, bytes: &[u8]) -> Result<Document, FetchError> {
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|e| invalid(reference, "manifest", &format!("not a manifest: {e}")))?;
    if raw.schema_version == Some(1) {
        return Err(unsupported(
            reference,
            "its manifest is Docker schema 1, obsolete since 2017; push it again with a current docker",
        ));
    }
    if raw.schema_version != Some(2) {
        return Err(invalid(reference, "manifest", "schemaVersion is not 2"));
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => parse_list(reference, manifests).map(Document::List),
        (None, Some(config), Some(layers)) => parse_image(reference, config, layers).map(Document::Image),
        // A document that is both could mean one image here and another elsewhere (CVE-2021-41190).
        (Some(_), _, _) => Err(invalid(reference, "manifest", "it is both a list and an image")),
        _ => {
            let what = raw.media_type.unwrap_or_else(|| "a document".to_owned());
            Err(unsupported(reference, &format!("{} is not a container image", printable(&what))))
        }
    }
}

fn parse_list(reference: &Reference, manifests: Vec<RawDescriptor>) -> Result<Vec<ListEntry>, FetchError> {
    manifests
        .into_iter()
        .map(|raw| {
            let digest = parse_digest(reference, "manifest", &raw.digest)?;
            let platform = raw.platform;
            Ok(ListEntry { digest, platform, artifact_type: raw.artifact_type.filter(|t| !t.is_empty()) })
        })
        .collect()
}

fn parse_image(
    reference: &Reference,
    config: RawDescriptor,
    layers: Vec<RawDescriptor>,
) -> Result<ImageManifest, FetchError> {
    let config_type = config.media_type.unwrap_or_default();
    let known =
        ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
    if !config_type.is_empty() && !known.contains(&config_type.as_str()) {
        let kind = printable(&config_type);
        return Err(unsupported(reference, &format!("{kind} is an artifact, not a container image")));
    }
    if layers.len() > MAX_LAYERS {
        let reason = format!("{} layers are more than the {MAX_LAYERS} allowed", layers.len());
        return Err(invalid(reference, "manifest", &reason));
    }
    Ok(ImageManifest {
        config_digest: parse_digest(reference, "manifest", &config.digest)?,
        layers: layers.into_iter().map(|l| parse_layer(reference, l)).collect::<Result<_, _>>()?,
    })
}

fn parse_layer(reference: &Reference, raw: RawDescriptor) -> Result<BlobRef, FetchError> {
    let media_type = raw.media_type.unwrap_or_default();
    let shown = printable(&raw.digest);
    if media_type.contains("nondistributable") || media_type.contains(".foreign.") {
        let reason =
            format!("layer {shown} is a foreign layer that lies outside the registry ({media_type})");
        return Err(unsupported(reference, &printable(&reason)));
    }
    if media_type.ends_with("+encrypted") {
        return Err(unsupported(reference, &format!("layer {shown} is encrypted")));
    }
    let layer_like = media_type.is_empty()
        || media_type.starts_with("application/vnd.oci.image.layer.v1.tar")
        || media_type.starts_with("application/vnd.docker.image.rootfs.diff.tar");
    if !layer_like {
        let reason = format!("layer {shown} has the unknown media type {}", printable(&media_type));
        return Err(unsupported(reference, &reason));
    }
    let size =
        raw.size.ok_or_else(|| invalid(reference, "manifest", &format!("layer {shown} has no size")))?;
    let digest = parse_digest(reference, "manifest", &raw.digest)?;
    Ok(BlobRef { digest, size, media_type, annotations: raw.annotations })
}

/// Pairs the manifest's layers with the config's diffIDs.
fn join_layers(
    reference: &Reference,
    layers: Vec<BlobRef>,
    config: &[u8],
) -> Result<Vec<LayerDescriptor>, FetchError> {
    let config: RawConfig = serde_json::from_slice(config)
        .map_err(|e| invalid(reference, "config", &format!("not an image config: {e}")))?;
    let diff_ids = config.rootfs.map(|r| r.diff_ids).unwrap_or_default();
    if diff_ids.len() != layers.len() {
        let reason =
            format!("it names {} diffIDs but the manifest has {} layers", diff_ids.len(), layers.len());
        return Err(invalid(reference, "config", &reason));
    }
    layers
        .into_iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            Ok(LayerDescriptor {
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type,
                diff_id: parse_digest(reference, "config", &diff_id)?,
                annotations: layer.annotations,
            })
        })
        .collect()
}

/// Chooses the list's manifest that suits `platform` best; among equals the first.
pub(crate) fn choose(
    reference: &Reference,
    list: &[ListEntry],
    platform: &Platform,
) -> Result<Digest, FetchError> {
    let mut best: Option<(u32, Digest)> = None;
    let images: Vec<&ListEntry> = list.iter().filter(|e| e.artifact_type.is_none()).collect();
    for entry in &images {
        // A list of one with no platform is what single-platform builders write.
        let rank = match &entry.platform {
            Some(offered) => platform.rank(offered),
            None => (images.len() == 1).then_some(0),
        };
        if let Some(rank) = rank
            && best.is_none_or(|(held, _)| rank > held)
        {
            best = Some((rank, entry.digest));
        }
    }
    best.map(|(_, digest)| digest).ok_or_else(|| {
        let mut offers: Vec<String> = images
            .iter()
            .filter_map(|e| e.platform.as_ref())
            .filter(|p| p.os != "unknown")
            .take(20)
            .map(|p| printable(&p.to_string()))
            .collect();
        offers.dedup();
        FetchError::NoPlatform {
            image: reference.familiar(),
            platform: platform.to_string(),
            available: if offers.is_empty() { "none".to_owned() } else { offers.join(", ") },
        }
    })
}

fn parse_digest(reference: &Reference, what: &'static str, text: &str) -> Result<Digest, FetchError> {
    text.parse().map_err(|_| invalid(reference, what, &format!("{} is not a sha256 digest", printable(text))))
}

fn invalid(reference: &Reference, what: &'static str, reason: &str) -> FetchError {
    FetchError::Invalid { image: reference.familiar(), what, reason: reason.to_owned() }
}

fn unsupported(reference: &Reference, reason: &str) -> FetchError {
    FetchError::Unsupported { image: reference.familiar(), reason: reason.to_owned() }
}

/// Foreign text made fit for one line of an error message.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reference() -> Reference {
        "localhost/a:b".parse().unwrap()
    }

    fn hash(n: u8) -> String {
        Digest::of(&[n]).to_string()
    }

    fn manifest(layer_type: &str, config: &[u8]) -> Bytes {
        let body = json!({"schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(config).to_string(), "size": config.len()},
            "layers": [{"mediaType": layer_type, "digest": hash(1), "size": 7}]});
        Bytes::from(body.to_string())
    }

    fn config(diff_ids: &[String]) -> Bytes {
        Bytes::from(json!({"rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string())
    }

    const TAR_GZ: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    #[test]
    fn builds_an_image_from_parts() {
        let config = config(&[hash(2)]);
        let image = ResolvedImage::from_parts(reference(), manifest(TAR_GZ, &config), config).unwrap();
        assert_eq!(image.layers.len(), 1);
        assert_eq!(image.layers[0].size, 7);
        assert_eq!(image.layers[0].diff_id.to_string(), hash(2));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let two = config(&[hash(2), hash(3)]);
        let error = ResolvedImage::from_parts(reference(), manifest(TAR_GZ, &two), two.clone()).unwrap_err();
        assert!(matches!(error, FetchError::Invalid { what: "config", .. }), "{error}");
        let error = ResolvedImage::from_parts(reference(), manifest(TAR_GZ, b"x"), two).unwrap_err();
        assert!(matches!(error, FetchError::WrongDigest { what: "config", .. }), "{error}");
        for media_type in [
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/wasm",
        ] {
            let error = parse(&reference(), &manifest(media_type, b"x")).err().unwrap();
            assert!(matches!(error, FetchError::Unsupported { .. }), "{media_type}: {error}");
        }
    }

    #[test]
    fn refuses_ambiguous_and_old_documents() {
        for body in
            ["{", "[]", "{}", r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, r#"{"schemaVersion":1}"#]
        {
            assert!(parse(&reference(), body.as_bytes()).is_err(), "{body}");
        }
        let negative = manifest(TAR_GZ, b"x");
        let negative = String::from_utf8(negative.to_vec()).unwrap().replace("\"size\":7", "\"size\":-7");
        assert!(parse(&reference(), negative.as_bytes()).is_err());
    }

    #[test]
    fn chooses_the_best_platform() {
        let entry = |n, p: Option<&str>| ListEntry {
            digest: Digest::of(&[n]),
            platform: p.map(|p| p.parse().unwrap()),
            artifact_type: None,
        };
        let artifact = |n, p| ListEntry { artifact_type: Some("application/x".into()), ..entry(n, p) };
        let list = [
            artifact(5, Some("linux/amd64")),
            entry(1, Some("linux/arm/v6")),
            entry(2, Some("linux/arm/v7")),
            entry(3, Some("linux/amd64")),
            entry(4, Some("unknown/unknown")),
        ];
        let pick = |p: &str| choose(&reference(), &list, &p.parse().unwrap());
        assert_eq!(pick("linux/arm/v7").unwrap(), Digest::of(&[2]));
        assert_eq!(pick("linux/amd64").unwrap(), Digest::of(&[3]));
        let error = pick("linux/s390x").unwrap_err().to_string();
        assert!(error.contains("linux/amd64") && !error.contains("unknown/"), "{error}");
        assert!(choose(&reference(), &[entry(9, None)], &Platform::host()).is_ok());
        let with_index = [artifact(5, None), entry(9, None)];
        assert_eq!(choose(&reference(), &with_index, &Platform::host()).unwrap(), Digest::of(&[9]));
    }
}
