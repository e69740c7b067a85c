//! Tables inside of layers, and beside them, found in a real registry.

use std::collections::HashMap;

use crate::common::artifacts::{MANIFEST, index_of};
use crate::common::registry::Registry;
use crate::common::{Bench, TestImage, TestLayer, filter, tar};
use bytes::Bytes;
use lazyrun_fetcher::{
    FoundIndexes, IndexPolicy, IndexSource, OriginKind, PushOptions, ResolvedImage, Trust, TrustMode,
    discover, push_indexes,
};
use lazyrun_index::{Digest, LayerIndex, Layout};
use serde::Deserialize;
use serde_json::{Value, json};

const BOUND: IndexPolicy = IndexPolicy { trust: TrustMode::Bound, pinned: None };

#[derive(Deserialize)]
struct Fixture {
    file: String,
    diff_id: Digest,
    annotations: HashMap<String, String>,
}

/// A layer that a real tool made, with the annotations the tool put into the manifest.
fn fixture(file: &str) -> (TestLayer, Value) {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../index/tests/data/tables");
    let list: Vec<Fixture> =
        serde_json::from_slice(&std::fs::read(format!("{dir}/tables.json")).unwrap()).unwrap();
    let told = list.into_iter().find(|f| f.file == file).unwrap();
    let layer = unpacked(std::fs::read(format!("{dir}/{file}")).unwrap());
    assert_eq!(layer.diff_id(), told.diff_id);
    (layer, json!(told.annotations))
}

fn unpacked(blob: Vec<u8>) -> TestLayer {
    let gzip = blob.starts_with(&[0x1f, 0x8b]);
    let tar = filter(if gzip { "gzip" } else { "zstd" }, &["-dcq"], &blob);
    let media_type = if gzip {
        "application/vnd.oci.image.layer.v1.tar+gzip"
    } else {
        "application/vnd.oci.image.layer.v1.tar+zstd"
    };
    TestLayer { tar, blob: blob.into(), media_type }
}

/// An image of these layers, pushed with these annotations.
async fn push(registry: &Registry, layers: &[(TestLayer, Value)]) -> (Bench, ResolvedImage) {
    let mut image = TestImage::new(layers.iter().map(|(l, _)| l.clone()).collect());
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    for (i, (_, annotations)) in layers.iter().enumerate() {
        manifest["layers"][i]["annotations"] = annotations.clone();
    }
    image.manifest = Bytes::from(manifest.to_string());
    let name = registry.push(&image, "app", "v1").await;
    let bench = Bench::new();
    let image = bench.resolve(&name).await;
    (bench, image)
}

async fn find(bench: &Bench, image: &ResolvedImage, policy: &IndexPolicy) -> FoundIndexes {
    let want: Vec<Digest> = image.layers.iter().map(|l| l.diff_id).collect();
    discover(&bench.client, image, &want, policy).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_real_layers_are_taken() {
    let registry = Registry::start().await;
    let layers = [
        fixture("estargz.tar.gz"),
        fixture("chunked.tar.zst"),
        fixture("estargz-zstd.tar.zst"),
        (TestLayer::gzip(tar(1, 2, 100)), json!({})),
    ];
    let (bench, image) = push(&registry, &layers).await;
    let before = bench.client.stats().requests;
    let found = find(&bench, &image, &BOUND).await;
    assert_eq!(found.warnings, [] as [String; 0]);
    assert_eq!(found.layers.len(), 3);
    // The tail of an eStargz layer holds its table already; annotations say where that of the others is.
    assert_eq!(bench.client.stats().requests - before, 3);
    let kinds = [OriginKind::Estargz, OriginKind::ZstdChunked, OriginKind::ZstdChunked];
    for (layer, kind) in image.layers.iter().zip(kinds) {
        let claimed = &found.layers[&layer.diff_id];
        assert_eq!((claimed.origin.kind, claimed.origin.trust), (kind, Trust::Bound));
        assert_eq!(claimed.origin.artifact, None);
        let index = LayerIndex::from_bytes(claimed.bytes.clone()).unwrap();
        assert_eq!(index.layout(), Layout::Table);
        assert_eq!((index.blob_digest(), index.diff_id()), (layer.digest, layer.diff_id));
        assert!(index.entry_count() > 5);
    }
    let proven = IndexPolicy { trust: TrustMode::Proven, pinned: None };
    assert!(find(&bench, &image, &proven).await.layers.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_table_is_fetched_for_itself() {
    let registry = Registry::start().await;
    let (mut layer, annotations) = fixture("estargz.tar.gz");
    // The table reaches up to the footer. Empty members behind it change nothing of it, but make it longer than
    // what is asked for at first.
    let footer = layer.blob.split_off(layer.blob.len() - 51);
    let padded = [layer.blob.as_ref(), &crate::common::gzip(b"").repeat(15_000), footer.as_ref()].concat();
    layer.blob = padded.into();
    let (bench, image) = push(&registry, &[(layer, annotations)]).await;
    let found = find(&bench, &image, &BOUND).await;
    assert_eq!(found.layers.len(), 1, "{:?}", found.warnings);
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_do_not_fit_their_digest_are_skipped_by_name() {
    let registry = Registry::start().await;
    let wrong = Digest::of(b"x").to_string();
    for (file, key) in [
        ("estargz.tar.gz", "containerd.io/snapshot/stargz/toc.digest"),
        ("chunked.tar.zst", "io.containers.zstd-chunked.manifest-checksum"),
    ] {
        for value in [wrong.as_str(), "sha512:00"] {
            let (layer, mut annotations) = fixture(file);
            annotations[key] = json!(value);
            let good = fixture("estargz-prefetch.tar.gz");
            let (bench, image) = push(&registry, &[(layer, annotations), good]).await;
            let found = find(&bench, &image, &BOUND).await;
            assert_eq!(found.layers.keys().collect::<Vec<_>>(), [&image.layers[1].diff_id]);
            assert_eq!(found.warnings.len(), 1);
            let warning = &found.warnings[0];
            assert!(warning.contains(&image.layers[0].digest.to_string()), "{warning}");
        }
    }
    // Not covered by the manifest: not used.
    let (layer, mut annotations) = fixture("chunked.tar.zst");
    annotations.as_object_mut().unwrap().remove("io.containers.zstd-chunked.manifest-checksum");
    let (bench, image) = push(&registry, &[(layer, annotations)]).await;
    let found = find(&bench, &image, &BOUND).await;
    assert!(found.layers.is_empty());
    assert!(found.warnings[0].contains("digest"), "{:?}", found.warnings);
    // An annotation on a layer that is no eStargz.
    let plain = (TestLayer::gzip(tar(2, 2, 100)), json!({"containerd.io/snapshot/stargz/toc.digest": wrong}));
    let (bench, image) = push(&registry, &[plain]).await;
    let found = find(&bench, &image, &BOUND).await;
    assert!(found.layers.is_empty());
    assert!(found.warnings[0].contains("footer"), "{:?}", found.warnings);
}

#[tokio::test(flavor = "multi_thread")]
async fn external_tables_are_found_by_tag() {
    let registry = Registry::start().await;
    let (layer, annotations) = fixture("estargz-external.tar.gz");
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../index/tests/data/tables");
    let table = Bytes::from(std::fs::read(format!("{dir}/estargz-external-toc.tar.gz")).unwrap());
    let (bench, image) = push(&registry, &[(layer, annotations)]).await;

    let found = find(&bench, &image, &BOUND).await;
    assert!(found.layers.is_empty());
    assert!(found.warnings[0].contains("v1-esgztoc"), "{:?}", found.warnings);

    registry.put_blob("app", table.clone()).await;
    let config = Bytes::from_static(b"{}");
    registry.put_blob("app", config.clone()).await;
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config).to_string(), "size": 2},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": Digest::of(&table).to_string(),
            "size": table.len(), "annotations": {"containerd.io/snapshot/stargz/layer.digest": image.layers[0].digest.to_string()}}]});
    registry.put_manifest("app", "v1-esgztoc", manifest.to_string().into(), MANIFEST).await;
    let found = find(&bench, &image, &BOUND).await;
    assert_eq!(found.layers.len(), 1, "{:?}", found.warnings);
    assert_eq!(found.layers[&image.layers[0].diff_id].origin.kind, OriginKind::Estargz);
}

#[tokio::test(flavor = "multi_thread")]
async fn bound_tables_come_before_what_lies_beside_the_image() {
    let registry = Registry::start().await;
    let layers = [fixture("estargz.tar.gz"), (TestLayer::gzip(tar(3, 4, 1000)), json!({}))];
    let (bench, image) = push(&registry, &layers).await;
    let given: Vec<_> = image
        .layers
        .iter()
        .zip(&layers)
        .map(|(layer, (made, _))| (layer.clone(), IndexSource::from(index_of(made))))
        .collect();
    let report = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
    let both = IndexPolicy { trust: TrustMode::Repository, pinned: None };
    let found = find(&bench, &image, &both).await;
    assert_eq!(found.warnings, [] as [String; 0]);
    let kind = |i: usize| found.layers[&image.layers[i].diff_id].origin.kind;
    assert_eq!((kind(0), kind(1)), (OriginKind::Estargz, OriginKind::Own));
    // Pinned, it is bound itself, and the only one.
    let pinned = IndexPolicy { trust: TrustMode::Bound, pinned: Some(report.artifact) };
    let found = find(&bench, &image, &pinned).await;
    assert!(found.layers.values().all(|c| c.origin.artifact == Some(report.artifact)));
    assert_eq!(found.layers.len(), 2);
}
