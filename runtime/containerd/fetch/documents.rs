//! Manifests and indexes, as far as it takes to find what they name.

use anyhow::{Result, bail, ensure};
use lazyrun_fetcher::Platform;
use lazyrun_index::Digest;
use serde::Deserialize;

/// Most entries of one document.
const MAX_ENTRIES: usize = 4096;

/// What a document names.
#[derive(Debug)]
pub(super) enum Document {
    /// The manifests of an index or manifest list.
    Index(Vec<Entry>),
    /// Config and layers of a manifest, the config first.
    Manifest(Vec<Entry>),
}

/// Something that is named by its digest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    /// Its digest.
    pub(super) digest: Digest,
    /// Its size in bytes.
    pub(super) size: u64,
    /// Its media type.
    #[serde(default)]
    pub(super) media_type: String,
    /// What it is for, in an index.
    pub(super) platform: Option<Platform>,
}

#[derive(Deserialize)]
struct RawDocument {
    config: Option<Entry>,
    layers: Option<Vec<Entry>>,
    manifests: Option<Vec<Entry>>,
}

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    /// When it is neither manifest nor index, or both.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let raw: RawDocument = serde_json::from_slice(bytes)?;
        match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) => Ok(Self::Index(bounded(manifests)?)),
            (None, Some(config), Some(layers)) => {
                Ok(Self::Manifest(bounded([config].into_iter().chain(layers).collect())?))
            }
            // A document that is both could mean one image here and another elsewhere (CVE-2021-41190).
            _ => bail!("it is neither a manifest nor an index"),
        }
    }

    /// Everything that is named.
    pub(super) fn entries(&self) -> &[Entry] {
        match self {
            Self::Index(entries) | Self::Manifest(entries) => entries,
        }
    }
}

fn bounded(entries: Vec<Entry>) -> Result<Vec<Entry>> {
    ensure!(entries.len() <= MAX_ENTRIES, "it has more than {MAX_ENTRIES} entries");
    Ok(entries)
}

impl Entry {
    /// The kind that containerd names it by in the content store.
    pub(super) fn kind(&self) -> &'static str {
        let is = |part: &str| self.media_type.contains(part);
        if is(".image.index.") || is(".manifest.list.") {
            "index"
        } else if is(".manifest.") {
            "manifest"
        } else if is(".config.") || is(".container.image.") {
            "config"
        } else if is(".layer.") || is(".rootfs.") {
            "layer"
        } else {
            "unknown"
        }
    }

    /// The label by which containerd's garbage collector finds it, as the `i`th of its document.
    pub(super) fn reference_label(&self, i: usize) -> String {
        let kind = match self.kind() {
            "config" => "config".to_owned(),
            "layer" => format!("l.{}", i.saturating_sub(1)),
            "manifest" | "index" => format!("m.{i}"),
            _ => format!("{i}"),
        };
        format!("{REFERENCE}.{kind}")
    }

    /// Whether its bytes lie outside of registries, where nobody asks for them.
    pub(super) fn is_foreign(&self) -> bool {
        self.media_type.contains("nondistributable") || self.media_type.contains(".foreign.")
    }
}

/// What labels begin with that name the digest of something to be kept.
pub(super) const REFERENCE: &str = "containerd.io/gc.ref.content";

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    #[test]
    fn manifests_name_config_and_layers() {
        let text = format!(
            r#"{{"schemaVersion": 2, "config": {{"mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": "{}", "size": 2}}, "layers": [
                {{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "digest": "{}", "size": 3}},
                {{"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": "{}", "size": 4,
                  "urls": ["https://r.example/x"]}}]}}"#,
            digest("config"),
            digest("a"),
            digest("b")
        );
        let document = Document::parse(text.as_bytes()).unwrap();
        assert!(matches!(document, Document::Manifest(_)));
        let labels: Vec<_> =
            document.entries().iter().enumerate().map(|(i, e)| e.reference_label(i)).collect();
        let ends = ["config", "l.0", "l.1"].map(|end| format!("{REFERENCE}.{end}"));
        assert_eq!(labels, ends);
        let foreign: Vec<_> = document.entries().iter().map(Entry::is_foreign).collect();
        assert_eq!(foreign, [false, false, true]);
    }

    #[test]
    fn what_is_no_document_is_refused() {
        let d = digest("x");
        for text in [
            String::new(),
            "[]".into(),
            "{}".into(),
            r#"{"manifests": [{"digest": "sha256:short", "size": 1}]}"#.into(),
            format!(r#"{{"manifests": [{{"digest": "{d}", "size": -1}}]}}"#),
            format!(r#"{{"manifests": [], "layers": [], "config": {{"digest": "{d}", "size": 1}}}}"#),
        ] {
            assert!(Document::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
