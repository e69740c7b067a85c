//! Against a real registry: resolving, first streams, faults, hydration.

use std::sync::Arc;

use crate::common::registry::Registry;
use crate::common::{Bench, LastProgress, TestImage, TestLayer, amd64, no_progress, tar};
use lazyrun_fetcher::{ClientStats, FetchError, Layer, Reference, ResolvedImage};
use lazyrun_index::Digest;
use serde_json::json;

async fn ingest_all(bench: &Bench, image: &ResolvedImage) -> Vec<Arc<Layer>> {
    let blobs = bench.client.blobs(&image.reference);
    let mut layers = Vec::new();
    for layer in &image.layers {
        layers.push(bench.fetcher.ingest(layer, blobs.clone(), no_progress()).await.unwrap());
    }
    layers
}

#[tokio::test(flavor = "multi_thread")]
async fn resolves_by_tag_digest_and_list() {
    let registry = Registry::start().await;
    let image = TestImage::small(10);
    let name = registry.push(&image, "team/app", "v1").await;
    let bench = Bench::new();

    let resolved = bench.resolve(&name).await;
    assert_eq!(resolved.manifest_digest, image.digest());
    assert_eq!(resolved.manifest, image.manifest);
    assert_eq!(resolved.config, image.config);
    let diff_ids: Vec<Digest> = resolved.layers.iter().map(|l| l.diff_id).collect();
    assert_eq!(diff_ids, [image.layers[0].diff_id(), image.layers[1].diff_id()]);

    let pinned = format!("{}/team/app@{}", registry.address, image.digest());
    assert_eq!(bench.resolve(&pinned).await.config_digest, resolved.config_digest);

    let entry = |arch: &str, digest: &Digest| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest.to_string(),
               "size": image.manifest.len(), "platform": {"os": "linux", "architecture": arch}})
    };
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry("amd64", &image.digest())]});
    let index = bytes::Bytes::from(index.to_string());
    registry.put_manifest("team/app", "multi", index, "application/vnd.oci.image.index.v1+json").await;
    let multi = format!("{}/team/app:multi", registry.address);
    assert_eq!(bench.resolve(&multi).await.manifest_digest, image.digest());
    let other =
        bench.client.resolve(&multi.parse().unwrap(), &"linux/arm64".parse().unwrap()).await.unwrap_err();
    assert!(
        matches!(&other, FetchError::NoPlatform { available, .. } if available == "linux/amd64"),
        "{other}"
    );

    let again = ResolvedImage::from_parts(resolved.reference, resolved.manifest, resolved.config).unwrap();
    assert_eq!(again.layers, resolved.layers);
}

#[tokio::test(flavor = "multi_thread")]
async fn tells_what_is_missing() {
    let registry = Registry::start().await;
    registry.push(&TestImage::small(20), "app", "v1").await;
    let bench = Bench::new();
    let resolve = |name: String| {
        let reference: Reference = name.parse().unwrap();
        let client = bench.client.clone();
        async move { client.resolve(&reference, &amd64()).await.unwrap_err() }
    };
    let error = resolve(format!("{}/nothing:v1", registry.address)).await;
    assert!(matches!(error, FetchError::ImageNotFound { .. }), "{error}");
    let error = resolve(format!("{}/app:v2", registry.address)).await;
    assert!(matches!(&error, FetchError::TagNotFound { tag, .. } if tag == "v2"), "{error}");
    let address = registry.address.clone();
    registry.stop();
    let error = resolve(format!("{address}/app:v1")).await;
    assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_layers_once_and_serves_them() {
    let registry = Registry::start().await;
    let image = TestImage::new(vec![
        TestLayer::gzip(tar(30, 8, 200_000)),
        TestLayer::zstd(tar(31, 4, 100_000)),
        TestLayer::plain(tar(32, 4, 100_000)),
    ]);
    let name = registry.push(&image, "app", "v1").await;
    let bench = Bench::new();
    let resolved = bench.resolve(&name).await;
    let blobs = bench.client.blobs(&resolved.reference);

    // Many ask for the same layer at once; it is streamed once.
    let progress = Arc::new(LastProgress::default());
    let mut tasks = Vec::new();
    for layer in resolved.layers.iter().cycle().take(12) {
        let (fetcher, layer, blobs) = (bench.fetcher.clone(), layer.clone(), blobs.clone());
        let progress = Arc::clone(&progress);
        tasks.push(tokio::spawn(async move { fetcher.ingest(&layer, blobs, progress).await.unwrap() }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let total: usize = image.layers.iter().map(|l| l.blob.len()).sum();
    assert_eq!(bench.fetcher.stats().streams, 3);
    assert_eq!(bench.fetcher.stats().stream_bytes, total as u64);
    let (done, of) = *progress.0.lock().unwrap();
    assert_eq!(done, of);

    registry.stop();
    for layer in &image.layers {
        let local = bench.fetcher.store().get(layer.diff_id()).unwrap().unwrap();
        assert!(local.is_hydrated());
        assert_eq!(local.local_bytes(), layer.tar.len() as u64);
        assert_eq!(std::fs::read(local.data_path()).unwrap(), layer.tar);
        let middle = bench.fetcher.read(&local, 70_000, 5000).await.unwrap();
        assert_eq!(middle, layer.tar[70_000..75_000]);
        assert!(bench.fetcher.read(&local, layer.tar.len() as u64, 10).await.unwrap().is_empty());
    }
    assert_eq!(bench.fetcher.store().list().unwrap().len(), 3);
    assert_eq!(bench.left_behind().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_fetch_only_what_is_touched() {
    let registry = Registry::start().await;
    let image = TestImage::new(vec![TestLayer::gzip(tar(40, 80, 100_000))]);
    let name = registry.push(&image, "app", "v1").await;
    let bench = Bench::new();
    let resolved = bench.resolve(&name).await;
    let layer = ingest_all(&bench, &resolved).await.remove(0);
    assert!(layer.index().span_count() > 30, "{} spans", layer.index().span_count());
    layer.forget().unwrap();
    assert_eq!(layer.local_bytes(), 0);
    assert_eq!(layer.read_local(0, &mut [0; 10]).unwrap(), None);

    let tar = &image.layers[0].tar;
    let before = bench.client.stats();
    let at = 2_000_000;
    assert_eq!(bench.fetcher.read(&layer, at, 4096).await.unwrap(), tar[at as usize..at as usize + 4096]);
    let after = bench.client.stats();
    assert_eq!(after.requests - before.requests, 1);
    assert!(after.bytes - before.bytes < image.layers[0].blob.len() as u64 / 10);
    // Now it is local.
    bench.fetcher.read(&layer, at, 4096).await.unwrap();
    let counts = |stats: ClientStats| (stats.requests, stats.bytes);
    assert_eq!(counts(bench.client.stats()), counts(after));

    // Many readers of one place: one request.
    let mut readers = Vec::new();
    for _ in 0..20 {
        let (fetcher, layer) = (bench.fetcher.clone(), Arc::clone(&layer));
        readers.push(tokio::spawn(async move { fetcher.read(&layer, 1_000_000, 100).await.unwrap() }));
    }
    for reader in readers {
        assert_eq!(reader.await.unwrap(), tar[1_000_000..1_000_100]);
    }
    assert_eq!(bench.client.stats().requests, after.requests + 1);

    // Reading on costs fewer requests than spans.
    let before = bench.client.stats().requests;
    let mut all = Vec::new();
    while all.len() < tar.len() {
        all.extend_from_slice(&bench.fetcher.read(&layer, all.len() as u64, 64 << 10).await.unwrap());
    }
    assert!(all == *tar);
    let spent = bench.client.stats().requests - before;
    assert!(spent <= 12, "{spent} requests for {} spans", layer.index().span_count());
    assert!(layer.is_hydrated());
}

#[tokio::test(flavor = "multi_thread")]
async fn hydrates_what_is_missing_and_nothing_else() {
    let registry = Registry::start().await;
    let image =
        TestImage::new(vec![TestLayer::gzip(tar(50, 40, 100_000)), TestLayer::zstd(tar(51, 20, 100_000))]);
    let name = registry.push(&image, "app", "v1").await;
    let bench = Bench::new();
    let resolved = bench.resolve(&name).await;
    for (layer, made) in ingest_all(&bench, &resolved).await.into_iter().zip(&image.layers) {
        layer.forget().unwrap();
        let before = bench.client.stats();
        bench.fetcher.read(&layer, 1_500_000, 1).await.unwrap();
        let progress = Arc::new(LastProgress::default());
        bench.fetcher.hydrate(&layer, progress.clone()).await.unwrap();
        assert!(layer.is_hydrated());
        assert_eq!(*progress.0.lock().unwrap(), (made.blob.len() as u64, made.blob.len() as u64));
        assert!(std::fs::read(layer.data_path()).unwrap() == made.tar);
        let bytes = bench.client.stats().bytes - before.bytes;
        assert!(bytes < made.blob.len() as u64 * 11 / 10 + 40_000, "{bytes} of {}", made.blob.len());
        // Once more costs nothing.
        let before = bench.client.stats();
        bench.fetcher.hydrate(&layer, no_progress()).await.unwrap();
        assert_eq!(bench.client.stats(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_and_hydration_together_are_right() {
    let registry = Registry::start().await;
    let image = TestImage::new(vec![TestLayer::gzip(tar(60, 60, 100_000))]);
    let name = registry.push(&image, "app", "v1").await;
    let bench = Bench::new();
    let resolved = bench.resolve(&name).await;
    let layer = ingest_all(&bench, &resolved).await.remove(0);
    layer.forget().unwrap();
    let hydration = {
        let (fetcher, layer) = (bench.fetcher.clone(), Arc::clone(&layer));
        tokio::spawn(async move { fetcher.hydrate(&layer, no_progress()).await })
    };
    let tar = Arc::new(image.layers[0].tar.clone());
    let mut readers = Vec::new();
    for r in 0..8u64 {
        let (fetcher, layer, tar) = (bench.fetcher.clone(), Arc::clone(&layer), Arc::clone(&tar));
        readers.push(tokio::spawn(async move {
            let mut at = r * 7919 * 97;
            for _ in 0..40 {
                at = (at * 31 + 12_345) % (tar.len() as u64 - 9000);
                let got = fetcher.read(&layer, at, 9000).await.unwrap();
                assert!(got == tar[at as usize..at as usize + 9000]);
            }
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    hydration.await.unwrap().unwrap();
    assert!(layer.is_hydrated());
    assert!(std::fs::read(layer.data_path()).unwrap() == *tar);
}
