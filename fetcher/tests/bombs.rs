//! Layers that unpack to far more than they are.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;

use crate::common::server::{Server, serve};
use crate::common::{Bench, TestImage, TestLayer, no_progress, quick_fetch};
use lazyrun_fetcher::{FetchError, FetchOptions, Fetcher, LayerStore, Origin, OriginKind, Trust};
use lazyrun_index::{
    Compression, Digest, DigestOf, IndexBuilder, IndexError, LayerFacts, Layout, NewEntrance, NewSpan,
};

/// A tar with one file of zeros.
fn zeros(len: usize) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_size(len as u64);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, "zeros", std::io::repeat(0).take(len as u64)).unwrap();
    archive.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_refused_at_its_bound_and_leaves_nothing() {
    let image = TestImage::new(vec![TestLayer::gzip(zeros(16 << 20))]);
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let bench = Bench::new();
    let resolved = bench.resolve(&server.name("app:v1")).await;
    let mut options: FetchOptions = quick_fetch();
    options.stream.max_layer_len = 4 << 20;
    let root = tempfile::tempdir().unwrap();
    let fetcher = Fetcher::new(LayerStore::open(root.path()).unwrap(), options);
    let blobs = bench.client.blobs(&resolved.reference);
    let error = fetcher.ingest(&resolved.layers[0], blobs.clone(), no_progress()).await.unwrap_err();
    let FetchError::Layer { source, .. } = &error else { panic!("{error}") };
    assert!(matches!(**source, IndexError::TooLong { limit } if limit == 4 << 20), "{error}");
    assert!(error.to_string().contains(&resolved.layers[0].digest.to_string()), "{error}");
    assert_eq!(std::fs::read_dir(root.path().join("layers")).unwrap().count(), 0);
    assert_eq!(
        server.count(|seen| seen.path.contains(&resolved.layers[0].digest.to_string())),
        1,
        "no second try"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn zeros_cost_no_disk() {
    let image = TestImage::new(vec![TestLayer::gzip(zeros(48 << 20))]);
    let served = image.clone();
    let server = Server::start(move |seen| serve(&served, seen)).await;
    let bench = Bench::new();
    let resolved = bench.resolve(&server.name("app:v1")).await;
    let root = tempfile::tempdir().unwrap();
    let fetcher = Fetcher::new(LayerStore::open(root.path()).unwrap(), quick_fetch());
    let blobs = bench.client.blobs(&resolved.reference);
    let layer = fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await.unwrap();
    assert!(layer.is_hydrated());
    let used = std::fs::metadata(layer.data_path()).unwrap().blocks() * 512;
    assert!(used < 1 << 20, "{used} bytes on disk");
    let (at, len) = (20 << 20, 1 << 20);
    assert_eq!(fetcher.read(&layer, at, len).await.unwrap(), image.layers[0].tar[at as usize..][..len]);
}

#[test]
fn an_index_that_claims_a_bomb_is_not_adopted() {
    let digest = Digest::of(b"bomb");
    let facts =
        LayerFacts { blob_digest: digest, blob_size: 1000, diff_id: digest, compression: Compression::Gzip };
    let mut builder = IndexBuilder::new(&facts, Layout::Tar);
    let (digest_of, entrance) = (DigestOf::Decoded, NewEntrance::None);
    builder
        .span(&NewSpan { blob_offset: 0, blob_len: 1000, len: 1 << 40, pad: 0, digest, digest_of, entrance })
        .unwrap();
    let index = builder.finish().unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = LayerStore::open(root.path()).unwrap();
    let origin = Origin { kind: OriginKind::Own, artifact: None, trust: Trust::Repository };
    let error = store.adopt(&index, &origin).map(|_| ()).unwrap_err();
    let FetchError::BadClaim { source, .. } = &error else { panic!("{error}") };
    assert!(matches!(**source, IndexError::TooLong { .. }), "{error}");
}
