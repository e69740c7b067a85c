//! Pulling one layer, and logging in for it.

use std::sync::Arc;

use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError, Layer, ResolvedImage};

use super::server::{Reply, Seen, full};
use super::{Bench, TestImage, TestLayer, amd64, no_progress, quick_client, quick_fetch, tar};

pub async fn ingest(bench: &Bench, name: &str) -> Result<Arc<Layer>, FetchError> {
    let image = bench.client.resolve(&name.parse().unwrap(), &amd64()).await?;
    ingest_first(bench, &image).await
}

pub async fn ingest_first(bench: &Bench, image: &ResolvedImage) -> Result<Arc<Layer>, FetchError> {
    bench.fetcher.ingest(&image.layers[0], bench.client.blobs(&image.reference), no_progress()).await
}

pub fn one_layer(seed: u64) -> TestImage {
    TestImage::new(vec![TestLayer::gzip(tar(seed, 30, 60_000))])
}

pub fn is_layer(image: &TestImage, seen: &Seen) -> bool {
    seen.path.ends_with(&image.layers[0].digest().to_string())
}

/// A bench whose docker configuration holds a password for `address`.
pub fn logged_in(address: &str, user: &str, password: &str) -> (Bench, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let config = serde_json::json!({"auths": {address: {"username": user, "password": password}}});
    std::fs::write(&path, config.to_string()).unwrap();
    (Bench::with(ClientOptions { credential_files: vec![path], ..quick_client() }, quick_fetch()), dir)
}

pub fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(text)
}

pub fn challenge(value: &str) -> Reply {
    Response::builder().status(401).header("www-authenticate", value).body(full("{}")).unwrap()
}
