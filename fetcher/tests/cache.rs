//! A store with a limit: layers larger than it, faults that evict, hydration that does not, and sources that are gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::server::{Seen, Server, serve, status};
use crate::common::{Bench, TestImage, TestLayer, no_progress, quick_client, quick_fetch, tar};
use lazyrun_fetcher::{CacheLimit, CacheLimits, FetchError, FetchOptions, Layer};
use lazyrun_index::StreamOptions;

const LIMIT: u64 = 8 << 20;

/// Spans so large that their index is small beside them.
fn bench() -> Bench {
    let stream = StreamOptions { span_size: 256 << 10, span_len: 1 << 20, ..StreamOptions::default() };
    Bench::with(quick_client(), FetchOptions { stream, ..quick_fetch() })
}

fn limit(bench: &Bench, bytes: u64) {
    let limits = CacheLimits { limit: Some(CacheLimit::Bytes(bytes)), reserve: 0 };
    bench.fetcher.store().set_limits(limits).unwrap();
}

/// Layers of some MB each.
fn image(layers: u64) -> TestImage {
    TestImage::new((0..layers).map(|i| TestLayer::gzip(tar(400 + i, 120, 100_000))).collect())
}

async fn ingest_all(bench: &Bench, server: &Server) -> Vec<Arc<Layer>> {
    let resolved = bench.resolve(&server.name("app:v1")).await;
    let blobs = bench.client.blobs(&resolved.reference);
    let mut layers = Vec::new();
    for layer in &resolved.layers {
        layers.push(bench.fetcher.ingest(layer, blobs.clone(), no_progress()).await.unwrap());
    }
    layers
}

async fn reads_right(bench: &Bench, layer: &Arc<Layer>, tar: &[u8], step: usize) {
    for from in (0..tar.len()).step_by(step) {
        let bytes = bench.fetcher.read(layer, from as u64, step).await.unwrap();
        assert!(bytes == tar[from..tar.len().min(from + step)], "wrong bytes at {from}");
        let used = bench.fetcher.store().disk_bytes().unwrap();
        assert!(used <= LIMIT, "the store takes {used} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_larger_than_the_limit_is_read_and_read_again() {
    let image = image(1);
    let made = image.layers[0].tar.clone();
    assert!(made.len() as u64 > LIMIT + (2 << 20));
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let bench = bench();
    limit(&bench, LIMIT);
    // Streamed without an index: what does not fit is indexed and not stored.
    let layer = ingest_all(&bench, &server).await.remove(0);
    let local = layer.local_bytes();
    assert!(!layer.is_hydrated() && local > LIMIT / 2 && local < LIMIT, "{local}");
    assert!(bench.fetcher.store().disk_bytes().unwrap() <= LIMIT);
    for round in 0..3 {
        let before = server.count(Seen::is_blob);
        reads_right(&bench, &layer, &made, 64 << 10).await;
        assert!(server.count(Seen::is_blob) > before, "nothing was fetched again in round {round}");
    }
    assert!(bench.fetcher.store().evictions().bytes > LIMIT, "{:?}", bench.fetcher.store().evictions());
    // Making it whole is refused in a sentence, for it would never be.
    let error = bench.fetcher.hydrate(&layer, no_progress()).await.unwrap_err();
    assert!(matches!(error, FetchError::CacheFull { .. }), "{error}");
    assert!(error.to_string().contains("limit"), "{error}");
    assert!(layer.check(false).unwrap().bad.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_share_little_room() {
    let image = image(2);
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let bench = Arc::new(bench());
    limit(&bench, LIMIT);
    let layers = ingest_all(&bench, &server).await;
    let mut readers = Vec::new();
    for seed in 0..6usize {
        let (bench, layers, image) = (Arc::clone(&bench), layers.clone(), image.clone());
        readers.push(tokio::spawn(async move {
            let mut state = seed as u64 * 77 + 1;
            for _ in 0..60 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let which = (state >> 33) as usize % 2;
                let made = &image.layers[which].tar;
                let from = state as usize % (made.len() - 100_000);
                let bytes = bench.fetcher.read(&layers[which], from as u64, 100_000).await.unwrap();
                assert!(bytes == made[from..from + 100_000], "wrong bytes at {from} of layer {which}");
            }
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    let used = bench.fetcher.store().disk_bytes().unwrap();
    assert!(used <= LIMIT, "the store takes {used} bytes");
    assert!(layers.iter().all(|layer| layer.check(false).unwrap().bad.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_has_lost_stays() {
    let image = image(2);
    let served = image.clone();
    let lost = Arc::new(AtomicBool::new(false));
    let (gone, digest) = (Arc::clone(&lost), image.layers[0].digest().to_string());
    let server = Server::start(move |seen| {
        if gone.load(Ordering::SeqCst) && seen.path.contains(&digest) {
            return status(404);
        }
        serve(&served, seen)
    })
    .await;
    let bench = bench();
    let layers = ingest_all(&bench, &server).await;
    // Some of it is missing, and the registry does not have it any more: what is left is all there will be.
    limit(&bench, LIMIT * 2);
    assert!(!layers[0].is_hydrated(), "it was the first to go");
    lost.store(true, Ordering::SeqCst);
    let missing = (0..layers[0].index().span_count()).find(|i| layers[0].lacks_span(*i)).unwrap();
    let at = layers[0].index().span(missing).offset;
    let error = bench.fetcher.read(&layers[0], at, 10).await.unwrap_err();
    assert!(matches!(error, FetchError::BlobNotFound { .. }), "{error}");
    assert!(layers[0].is_origin_gone());
    let left = layers[0].local_bytes();
    assert!(bench.fetcher.store().evict_idle() > 0);
    assert_eq!((layers[0].local_bytes(), layers[1].local_bytes()), (left, 0));
    // It is back, and what was kept may go again.
    lost.store(false, Ordering::SeqCst);
    bench.fetcher.read(&layers[0], at, 10).await.unwrap();
    // The reader is served before the request is over, and only then is this known.
    let known = async {
        while layers[0].is_origin_gone() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), known).await.expect("the registry has it again");
    bench.fetcher.store().evict_idle();
    assert_eq!(layers[0].local_bytes(), 0);
}
