//! The parsers of foreign bytes for the fuzz targets; only there with `--cfg fuzzing`. Each returns the error
//! messages it caused.

use bytes::Bytes;
use lazyrun_index::Digest;
use reqwest::Url;

use crate::artifact::{ArtifactDocument, Candidate, candidates_in_list, parse_descriptors};
use crate::auth::{Challenge, holds, parse_answer, parse_challenges, token_request};
use crate::manifest::{Document, choose, parse};
use crate::{Platform, Reference, ResolvedImage};

fn image() -> Reference {
    Reference {
        registry: "r.example".to_owned(),
        repository: "a/b".to_owned(),
        tag: Some("c".to_owned()),
        digest: None,
    }
}

fn said<T>(result: Result<T, crate::FetchError>) -> Vec<String> {
    result.err().map(|error| error.to_string()).into_iter().collect()
}

/// A manifest, list or index, and the choice among the manifests of a list.
pub fn manifest(bytes: &[u8]) -> Vec<String> {
    match parse(&image(), bytes) {
        Ok(Document::List(list)) => {
            let arm = Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("v7".into()) };
            [Platform::host(), arm].iter().flat_map(|p| said(choose(&image(), &list, p))).collect()
        }
        Ok(Document::Image(_)) => Vec::new(),
        Err(error) => vec![error.to_string()],
    }
}

/// An image with one layer, beside which index artifacts may lie.
fn image_with(list: Option<Vec<u8>>) -> Result<ResolvedImage, crate::FetchError> {
    let (layer, diff_id) = (Digest::of(b"layer"), Digest::of(b"diff"));
    let config = format!(r#"{{"rootfs": {{"diff_ids": ["{diff_id}"]}}}}"#);
    let manifest = format!(
        r#"{{"schemaVersion": 2, "config": {{"digest": "{}"}}, "layers": [{{"digest": "{layer}", "size": 1}}]}}"#,
        Digest::of(config.as_bytes())
    );
    let mut resolved = ResolvedImage::from_parts(image(), manifest.into(), config.into())?;
    resolved.list = list.map(Bytes::from);
    Ok(resolved)
}

/// The manifest of an index artifact, or a list of descriptors as referrers and image indexes are. The words `@M`, `@L`
/// and `@D` stand for digests of the image: its manifest, its layer and the layer's diffID.
pub fn artifact(bytes: &[u8]) -> Vec<String> {
    let Ok(image) = image_with(None) else { return Vec::new() };
    let text = String::from_utf8_lossy(bytes)
        .replace("@M", &image.manifest_digest.to_string())
        .replace("@L", &image.layers[0].digest.to_string())
        .replace("@D", &image.layers[0].diff_id.to_string());
    let document = ArtifactDocument::parse(text.as_bytes(), &image);
    let _ = parse_descriptors(text.as_bytes());
    if let Ok(image) = image_with(Some(text.into_bytes())) {
        let found = candidates_in_list(&image);
        assert!(found.is_sorted_by(|a, b| Candidate::order(a, b).is_le()));
    }
    document.err().into_iter().collect()
}

/// A config, with a manifest of three layers that names it.
pub fn config(bytes: &[u8]) -> Vec<String> {
    let (config, layer) = (Digest::of(bytes), Digest::of(b"layer"));
    let layer = format!(r#"{{"digest": "{layer}", "size": 1}}"#);
    let manifest = format!(
        r#"{{"schemaVersion": 2, "config": {{"digest": "{config}"}}, "layers": [{layer}, {layer}, {layer}]}}"#
    );
    said(ResolvedImage::from_parts(image(), manifest.into(), Bytes::copy_from_slice(bytes)))
}

/// A `WWW-Authenticate` header and the token requests that it leads to.
///
/// # Panics
/// When a request would go where credentials must not go.
pub fn challenge(header: &str) -> Vec<String> {
    let Ok(registry) = Url::parse("https://r.example/") else { return Vec::new() };
    let mut messages = Vec::new();
    for challenge in parse_challenges(std::iter::once(header)) {
        let Challenge::Bearer { realm, service, scope } = challenge else { continue };
        let scope = scope.unwrap_or_default();
        match token_request(&registry, &realm, service.as_deref(), &scope, None) {
            Ok(request) => {
                assert_eq!(request.url.scheme(), "https");
                assert!(request.url.username().is_empty() && request.url.password().is_none());
                let host = request.url.host_str().unwrap_or_default().trim_end_matches('.');
                let inside =
                    host.parse::<std::net::Ipv4Addr>().map(|v4| v4.is_loopback() || v4.is_link_local());
                assert!(!inside.unwrap_or(host == "localhost" || host == "[::1]"), "{}", request.url);
            }
            Err(error) => messages.push(error.to_string()),
        }
    }
    messages
}

/// A token endpoint's answer.
///
/// # Panics
/// When a token is no header value.
pub fn token_answer(bytes: &[u8]) -> Vec<String> {
    if let Some(answer) = parse_answer(bytes) {
        assert!(reqwest::header::HeaderValue::from_str(&answer.value).is_ok());
    }
    Vec::new()
}

/// Docker's configuration file; no helper is run.
pub fn docker_config(bytes: &[u8]) -> Vec<String> {
    holds(bytes, "r.example").err().map(|error| error.to_string()).into_iter().collect()
}
