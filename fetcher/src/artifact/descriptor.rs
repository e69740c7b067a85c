//! Descriptors: how one document names another (image-spec, descriptor.md).

use std::collections::BTreeMap;

use lazyrun_index::Digest;
use serde::Deserialize;
use serde_json::{Value, json};

/// Names a manifest or a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type of what it names.
    pub media_type: String,
    /// Digest of what it names.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// What kind of artifact it is, if it is one.
    pub artifact_type: Option<String>,
    /// Annotations, those of the named manifest in lists of referrers.
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// A descriptor without artifact type and annotations.
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        let (media_type, annotations) = (media_type.to_owned(), BTreeMap::new());
        Descriptor { media_type, digest, size, artifact_type: None, annotations }
    }

    /// An annotation, if it is there and not empty.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// As JSON, the same bytes for the same descriptor.
    pub(crate) fn to_json(&self) -> Value {
        let mut value =
            json!({"mediaType": self.media_type, "digest": self.digest.to_string(), "size": self.size});
        if let Some(artifact_type) = &self.artifact_type {
            value["artifactType"] = json!(artifact_type);
        }
        if !self.annotations.is_empty() {
            value["annotations"] = json!(self.annotations);
        }
        value
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
    artifact_type: Option<String>,
    #[serde(default, deserialize_with = "crate::manifest::annotations")]
    annotations: BTreeMap<String, String>,
}

impl RawDescriptor {
    pub(super) fn media_type(&self) -> &str {
        &self.media_type
    }

    /// `None` if the digest is not of sha256.
    pub(super) fn parsed_digest(&self) -> Option<Digest> {
        self.digest.parse().ok()
    }

    /// `None` if the digest is not of sha256.
    pub(super) fn check(self) -> Option<Descriptor> {
        Some(Descriptor {
            media_type: self.media_type,
            digest: self.digest.parse().ok()?,
            size: self.size,
            artifact_type: self.artifact_type.filter(|t| !t.is_empty()),
            annotations: self.annotations,
        })
    }
}

#[derive(Deserialize)]
struct RawList {
    #[serde(default)]
    manifests: Option<Vec<RawDescriptor>>,
}

/// The descriptors of an image index; those that cannot be meant for us (other digests) are left out. `None` if
/// it is no index.
pub(crate) fn parse_descriptors(bytes: &[u8]) -> Option<Vec<Descriptor>> {
    let raw: RawList = serde_json::from_slice(bytes).ok()?;
    // Go writes an empty list that was never made as null.
    Some(raw.manifests.unwrap_or_default().into_iter().filter_map(RawDescriptor::check).collect())
}

#[derive(Deserialize)]
struct RawLayers {
    #[serde(default)]
    layers: Option<Vec<RawDescriptor>>,
}

/// The layers of an image manifest, whatever they are; none if it is something else.
pub(crate) fn parse_layers(bytes: &[u8]) -> Vec<Descriptor> {
    let raw = serde_json::from_slice(bytes).unwrap_or(RawLayers { layers: None });
    raw.layers.unwrap_or_default().into_iter().filter_map(RawDescriptor::check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_leniently() {
        let digest = Digest::of(b"x").to_string();
        let text = format!(
            r#"{{"manifests":[{{"mediaType":"m","digest":"{digest}","size":3,"artifactType":"t","annotations":{{"a":"b","c":1}}}},
                {{"digest":"sha512:00","size":1}}]}}"#
        );
        let found = parse_descriptors(text.as_bytes()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].annotation("a"), Some("b"));
        assert_eq!(found[0].annotation("c"), None);
        let again = parse_descriptors(json!({"manifests": [found[0].to_json()]}).to_string().as_bytes());
        assert_eq!(again.unwrap(), found);
        assert_eq!(parse_descriptors(br#"{"manifests":null}"#).unwrap(), []);
        assert!(parse_descriptors(b"<html>").is_none());
        assert!(parse_descriptors(br#"{"manifests":[{"digest":"x","size":-1}]}"#).is_none());
    }
}
