//! SOCI indexes of both versions, found in a real registry and read.

#[path = "../../index/tests/common/ztoc.rs"]
#[allow(dead_code, unreachable_pub)]
mod ztoc;

use crate::common::artifacts::{INDEX, MANIFEST, index_of, put_artifact, put_referrers};
use crate::common::registry::Registry;
use crate::common::{Bench, TestImage, TestLayer, tar};
use bytes::Bytes;
use lazyrun_fetcher::{
    FoundIndexes, IndexPolicy, IndexSource, OriginKind, PushOptions, ResolvedImage, SOCI_V1_ARTIFACT_TYPE,
    SOCI_V2_ARTIFACT_TYPE, Trust, TrustMode, delete_index, discover, list_indexes, push_indexes,
};
use lazyrun_index::{Digest, DigestOf, LayerIndex, Layout};
use serde_json::{Value, json};
use ztoc::Ztoc;

const BOUND: IndexPolicy = IndexPolicy { trust: TrustMode::Bound, pinned: None };
const REPOSITORY: IndexPolicy = IndexPolicy { trust: TrustMode::Repository, pinned: None };

/// One layer with a SOCI index, one without, as SOCI leaves out small ones.
fn made(seed: u64) -> TestImage {
    TestImage::new(vec![TestLayer::gzip(tar(seed, 12, 60_000)), TestLayer::gzip(tar(seed + 1, 2, 100))])
}

/// Puts the SOCI index of the first layer and gives its descriptor.
async fn put_soci(registry: &Registry, made: &TestImage, kind: &str, ztoc: Vec<u8>) -> Value {
    let layer = &made.layers[0];
    let mut manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": kind, "digest": Digest::of(b"{}").to_string(), "size": 2},
        "layers": [{"mediaType": "application/octet-stream", "digest": Digest::of(&ztoc).to_string(), "size": ztoc.len(),
            "annotations": {"com.amazon.soci.image-layer-digest": layer.digest().to_string(),
                "com.amazon.soci.image-layer-mediaType": layer.media_type}}],
        "annotations": {"com.amazon.soci.build-tool-identifier": "AWS SOCI CLI v0.2"}});
    if kind == SOCI_V1_ARTIFACT_TYPE {
        manifest["subject"] =
            json!({"mediaType": MANIFEST, "digest": made.digest().to_string(), "size": made.manifest.len()});
    }
    registry.put_blob("app", Bytes::from_static(b"{}")).await;
    registry.put_blob("app", ztoc.into()).await;
    let mut descriptor = put_artifact(registry, "app", &manifest).await;
    descriptor["artifactType"] = json!(kind);
    descriptor
}

fn good_ztoc(made: &TestImage) -> Vec<u8> {
    Ztoc::gzip(&made.layers[0].blob, &made.layers[0].tar, 100_000, 2).bytes()
}

async fn find(bench: &Bench, image: &ResolvedImage, policy: &IndexPolicy) -> FoundIndexes {
    let want: Vec<Digest> = image.layers.iter().map(|l| l.diff_id).collect();
    discover(&bench.client, image, &want, policy).await
}

fn digest(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_is_a_referrer() {
    let registry = Registry::start().await;
    let made = made(400);
    let name = registry.push(&made, "app", "v1").await;
    let bench = Bench::new();
    let image = bench.resolve(&name).await;
    let soci = put_soci(&registry, &made, SOCI_V1_ARTIFACT_TYPE, good_ztoc(&made)).await;
    put_referrers(&registry, &image, std::slice::from_ref(&soci)).await;

    assert!(find(&bench, &image, &BOUND).await.layers.is_empty());
    let found = find(&bench, &image, &REPOSITORY).await;
    assert_eq!(found.warnings, [] as [String; 0]);
    let claimed = &found.layers[&image.layers[0].diff_id];
    assert_eq!((claimed.origin.kind, claimed.origin.trust), (OriginKind::SociV1, Trust::Repository));
    assert_eq!(claimed.origin.artifact, Some(digest(&soci)));
    let index = LayerIndex::from_bytes(claimed.bytes.clone()).unwrap();
    assert_eq!((index.layout(), index.entry_count()), (Layout::Tar, 12));
    assert!(index.spans().all(|s| s.digest_of == DigestOf::Blob));
    assert_eq!(found.layers.len(), 1);

    // Ours is preferred where both are, and both are listed.
    let own: Vec<_> = image
        .layers
        .iter()
        .cloned()
        .zip(made.layers.iter().map(|l| IndexSource::from(index_of(l))))
        .collect();
    let report = push_indexes(&bench.client, &image, &own, &PushOptions::default()).await.unwrap();
    let found = find(&bench, &image, &REPOSITORY).await;
    assert!(found.layers.values().all(|c| c.origin.artifact == Some(report.artifact)));
    let (listed, warnings) = list_indexes(&bench.client, &image).await.unwrap();
    assert_eq!(warnings, [] as [String; 0]);
    assert_eq!(listed.iter().map(|l| l.kind).collect::<Vec<_>>(), [OriginKind::Own, OriginKind::SociV1]);
    assert!(delete_index(&bench.client, &image, digest(&soci)).await.unwrap());
    assert_eq!(list_indexes(&bench.client, &image).await.unwrap().0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn version_2_is_part_of_the_image() {
    let registry = Registry::start().await;
    let plain = made(410);
    registry.push(&plain, "app", "plain").await;
    let soci = put_soci(&registry, &plain, SOCI_V2_ARTIFACT_TYPE, good_ztoc(&plain)).await;

    // As `soci convert` does: the manifest names the index, the image index names both, with the same platform.
    let mut manifest: Value = serde_json::from_slice(&plain.manifest).unwrap();
    manifest["annotations"] = json!({"com.amazon.soci.index-digest": soci["digest"]});
    let converted = TestImage { manifest: Bytes::from(manifest.to_string()), ..plain.clone() };
    registry.push(&converted, "app", "converted").await;
    let platform = json!({"os": "linux", "architecture": "amd64"});
    let list = |image: &TestImage, annotate: bool| {
        let mut entry = soci.clone();
        entry["platform"] = platform.clone();
        if annotate {
            entry["annotations"] =
                json!({"com.amazon.soci.image-manifest-digest": image.digest().to_string()});
        }
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry, {"mediaType": MANIFEST,
            "digest": image.digest().to_string(), "size": image.manifest.len(), "platform": platform}]})
    };
    let bench = Bench::new();
    let put =
        |tag: &'static str, list: Value| registry.put_manifest("app", tag, list.to_string().into(), INDEX);
    put("both", list(&converted, true)).await;
    put("annotated-manifest", list(&converted, false)).await;
    put("annotated-entry", list(&plain, true)).await;
    put("neither", list(&plain, false)).await;
    for (tag, found_there) in [
        ("both", true),
        ("annotated-manifest", true),
        ("annotated-entry", true),
        ("converted", true),
        ("neither", false),
    ] {
        let image = bench.resolve(&format!("{}/app:{tag}", registry.address)).await;
        let found = find(&bench, &image, &BOUND).await;
        assert_eq!(found.warnings, [] as [String; 0], "{tag}");
        assert_eq!(found.layers.len(), usize::from(found_there), "{tag}");
        for claimed in found.layers.values() {
            assert_eq!(
                (claimed.origin.kind, claimed.origin.trust),
                (OriginKind::SociV2, Trust::Bound),
                "{tag}"
            );
        }
        if found_there {
            let error = delete_index(&bench.client, &image, digest(&soci)).await.unwrap_err();
            assert!(error.to_string().contains("part of the image"), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_ztocs_are_skipped_by_name() {
    let registry = Registry::start().await;
    let made = made(420);
    let name = registry.push(&made, "app", "v1").await;
    let bench = Bench::new();
    let image = bench.resolve(&name).await;
    let other = Ztoc::gzip(&made.layers[1].blob, &made.layers[1].tar, 100_000, 2).bytes();
    for ztoc in [b"not a zTOC".to_vec(), other] {
        let soci = put_soci(&registry, &made, SOCI_V1_ARTIFACT_TYPE, ztoc).await;
        put_referrers(&registry, &image, std::slice::from_ref(&soci)).await;
        let found = find(&bench, &image, &REPOSITORY).await;
        assert!(found.layers.is_empty());
        assert_eq!(found.warnings.len(), 1);
        assert!(found.warnings[0].contains(&digest(&soci).to_string()), "{:?}", found.warnings);
    }
}

/// The bytes of a file in the index's test data.
fn data(file: &str) -> Bytes {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../index/tests/data").join(file);
    Bytes::from(std::fs::read(path).unwrap())
}

/// An image that the real tool made indexes of: as it was, or as the tool converted it.
fn real_image(manifest: &str) -> TestImage {
    let layer = |file: &str| {
        let blob = data(file);
        let tar = crate::common::filter("gzip", &["-dcq"], &blob);
        TestLayer { tar, blob, media_type: "application/vnd.oci.image.layer.v1.tar+gzip" }
    };
    let layers = vec![layer("ztocs/layer.tar.gz"), layer("ztocs/bytes.tar.gz")];
    let documents = |file: &str| data(&format!("soci-image/{file}.json"));
    TestImage { manifest: documents(manifest), config: documents("config"), ..TestImage::new(layers) }
}

async fn put_real(registry: &Registry, document: &str) -> Value {
    registry.put_blob("app", Bytes::from_static(b"{}")).await;
    registry.put_blob("app", data("ztocs/gzip-40k.ztoc")).await;
    let bytes = data(&format!("soci-image/{document}.json"));
    registry.put_manifest("app", &Digest::of(&bytes).to_string(), bytes.clone(), MANIFEST).await;
    let manifest: Value = serde_json::from_slice(&bytes).unwrap();
    json!({"mediaType": MANIFEST, "digest": Digest::of(&bytes).to_string(), "size": bytes.len(),
        "artifactType": manifest["config"]["mediaType"]})
}

fn is_of_the_first_layer(found: &FoundIndexes, image: &ResolvedImage, kind: OriginKind, trust: Trust) {
    assert_eq!(found.warnings, [] as [String; 0]);
    assert_eq!(found.layers.len(), 1, "the tool left the small layer out");
    let claimed = &found.layers[&image.layers[0].diff_id];
    assert_eq!((claimed.origin.kind, claimed.origin.trust), (kind, trust));
    let index = LayerIndex::from_bytes(claimed.bytes.clone()).unwrap();
    assert_eq!((index.layout(), index.span_count()), (Layout::Tar, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_the_real_tool_are_found() {
    let registry = Registry::start().await;
    let bench = Bench::new();
    let plain = real_image("image");
    let name = registry.push(&plain, "app", "plain").await;
    let soci = put_real(&registry, "index-v1").await;
    let image = bench.resolve(&name).await;
    put_referrers(&registry, &image, std::slice::from_ref(&soci)).await;
    let found = find(&bench, &image, &REPOSITORY).await;
    is_of_the_first_layer(&found, &image, OriginKind::SociV1, Trust::Repository);

    put_real(&registry, "index-v2").await;
    let converted = real_image("converted");
    let alone = registry.push(&converted, "app", "converted").await;
    registry.put_manifest("app", "list", data("soci-image/converted-list.json"), INDEX).await;
    for name in [alone, format!("{}/app:list", registry.address)] {
        let image = bench.resolve(&name).await;
        assert_eq!(image.manifest_digest, converted.digest(), "{name}");
        let found = find(&bench, &image, &BOUND).await;
        is_of_the_first_layer(&found, &image, OriginKind::SociV2, Trust::Bound);
    }
}
