//! Index artifacts in a real registry, which knows no referrers API: pushing, finding, listing, deleting.

use crate::common::artifacts::{index_of, indexes, put_own, put_referrers};
use crate::common::registry::Registry;
use crate::common::{Bench, TestImage, TestLayer, tar};
use bytes::Bytes;
use lazyrun_fetcher::{
    FetchError, IndexPolicy, IndexSource, OriginKind, PushOptions, ResolvedImage, Trust, TrustMode,
    delete_index, discover, list_indexes, pull_index, push_indexes,
};
use lazyrun_index::{Digest, LayerIndex};
use serde_json::json;

const REPOSITORY: IndexPolicy = IndexPolicy { trust: TrustMode::Repository, pinned: None };

struct Scene {
    registry: Registry,
    bench: Bench,
    made: TestImage,
    image: ResolvedImage,
}

impl Scene {
    async fn new(seed: u64) -> Scene {
        let registry = Registry::start().await;
        let made = TestImage::small(seed);
        let name = registry.push(&made, "team/app", "v1").await;
        let bench = Bench::new();
        let image = bench.resolve(&name).await;
        Scene { registry, bench, made, image }
    }

    fn diff_ids(&self) -> Vec<Digest> {
        self.image.layers.iter().map(|l| l.diff_id).collect()
    }

    async fn push(&self, options: &PushOptions) -> lazyrun_fetcher::PushReport {
        push_indexes(&self.bench.client, &self.image, &indexes(&self.image, &self.made), options)
            .await
            .unwrap()
    }

    async fn discover(&self, policy: &IndexPolicy) -> lazyrun_fetcher::FoundIndexes {
        discover(&self.bench.client, &self.image, &self.diff_ids(), policy).await
    }
}

fn at(time: &str) -> PushOptions {
    PushOptions { created: Some(time.to_owned()), span_size: Some(1 << 19), profile: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_found_listed_and_deleted() {
    let scene = Scene::new(100).await;
    let report = scene.push(&PushOptions::default()).await;
    assert_eq!(report.layers, 2);
    assert!(report.sent > 0 && report.sent < report.size);

    let found = scene.discover(&REPOSITORY).await;
    assert_eq!(found.warnings, [] as [String; 0]);
    for (layer, made) in scene.image.layers.iter().zip(&scene.made.layers) {
        let claimed = &found.layers[&layer.diff_id];
        assert_eq!(claimed.origin.kind, OriginKind::Own);
        assert_eq!(claimed.origin.artifact, Some(report.artifact));
        assert_eq!(claimed.origin.trust, Trust::Repository);
        assert!(claimed.bytes == index_of(made));
        assert_eq!(LayerIndex::from_bytes(claimed.bytes.clone()).unwrap().diff_id(), layer.diff_id);
    }

    let (listed, warnings) = list_indexes(&scene.bench.client, &scene.image).await.unwrap();
    assert_eq!((listed.len(), warnings.len()), (1, 0));
    assert_eq!(listed[0].digest, report.artifact);
    assert_eq!(listed[0].size, report.size);
    assert_eq!(listed[0].created, None);
    assert_eq!(listed[0].layers.len(), 2);
    assert_eq!(listed[0].layers[0].layer, scene.image.layers[0].digest);

    assert!(delete_index(&scene.bench.client, &scene.image, report.artifact).await.unwrap());
    assert!(!delete_index(&scene.bench.client, &scene.image, report.artifact).await.unwrap());
    let (listed, warnings) = list_indexes(&scene.bench.client, &scene.image).await.unwrap();
    assert_eq!((listed.len(), warnings.len()), (0, 0));
    let found = scene.discover(&REPOSITORY).await;
    assert!(found.layers.is_empty() && found.warnings.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_indexes_are_one_artifact() {
    let scene = Scene::new(110).await;
    let first = scene.push(&PushOptions::default()).await;
    let mut turned = indexes(&scene.image, &scene.made);
    turned.reverse();
    turned.push(turned[0].clone());
    let again =
        push_indexes(&scene.bench.client, &scene.image, &turned, &PushOptions::default()).await.unwrap();
    assert_eq!(again.artifact, first.artifact);
    assert_eq!(again.sent, 0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    std::fs::write(&path, index_of(&scene.made.layers[1])).unwrap();
    let one = [(scene.image.layers[1].clone(), IndexSource::from(path))];
    let part = push_indexes(&scene.bench.client, &scene.image, &one, &PushOptions::default()).await.unwrap();
    assert_ne!(part.artifact, first.artifact);
    let (listed, _) = list_indexes(&scene.bench.client, &scene.image).await.unwrap();
    assert_eq!(listed.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_choice_among_several_is_the_same_everywhere() {
    let scene = Scene::new(120).await;
    let old = scene.push(&at("2026-01-01T00:00:00Z")).await;
    let new = scene.push(&at("2026-02-01T00:00:00Z")).await;
    scene.push(&PushOptions::default()).await;
    let (listed, _) = list_indexes(&scene.bench.client, &scene.image).await.unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[0].digest, new.artifact);
    assert_eq!(listed[1].digest, old.artifact);
    assert_eq!(listed[0].created.as_deref(), Some("2026-02-01T00:00:00Z"));
    assert_eq!(listed[0].span_size, Some(1 << 19));
    let found = scene.discover(&REPOSITORY).await;
    assert!(found.layers.values().all(|c| c.origin.artifact == Some(new.artifact)));

    let pinned = IndexPolicy { trust: TrustMode::Bound, pinned: Some(old.artifact) };
    let found = scene.discover(&pinned).await;
    assert_eq!(found.layers.len(), 2);
    let bound = |c: &lazyrun_fetcher::ClaimedIndex| {
        c.origin.artifact == Some(old.artifact) && c.origin.trust == Trust::Bound
    };
    assert!(found.layers.values().all(bound));
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_says_what_is_looked_at() {
    let scene = Scene::new(130).await;
    let report = scene.push(&PushOptions::default()).await;
    let before = scene.bench.client.stats().requests;
    for trust in [TrustMode::Proven, TrustMode::Bound] {
        let found = scene.discover(&IndexPolicy { trust, pinned: None }).await;
        assert!(found.layers.is_empty() && found.warnings.is_empty(), "{trust}");
    }
    let pinned = IndexPolicy { trust: TrustMode::Proven, pinned: Some(report.artifact) };
    let found = scene.discover(&pinned).await;
    assert!(found.layers.is_empty());
    assert_eq!(found.warnings.len(), 1);
    assert_eq!(scene.bench.client.stats().requests, before);

    // Nothing missing: nothing asked.
    let found = discover(&scene.bench.client, &scene.image, &[], &REPOSITORY).await;
    assert!(found.layers.is_empty());
    assert_eq!(scene.bench.client.stats().requests, before);

    // A pin is that artifact or nothing.
    let missing = Digest::of(b"no such thing");
    let pinned = IndexPolicy { trust: TrustMode::Repository, pinned: Some(missing) };
    let found = scene.discover(&pinned).await;
    assert!(found.layers.is_empty());
    assert!(found.warnings[0].contains(&missing.to_string()), "{:?}", found.warnings);
    let error = pull_index(&scene.bench.client, &scene.image, missing, &scene.diff_ids()).await.unwrap_err();
    assert!(matches!(error, FetchError::Artifact { .. }), "{error}");
    let pulled = pull_index(&scene.bench.client, &scene.image, report.artifact, &scene.diff_ids()).await;
    assert_eq!(pulled.unwrap().layers.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_artifacts_are_skipped_by_name() {
    let scene = Scene::new(140).await;
    let good = scene.push(&PushOptions::default()).await;
    let layer = &scene.image.layers[0];
    let index = index_of(&scene.made.layers[0]);
    let other = index_of(&TestLayer::gzip(tar(999, 1, 10)));
    let mut damaged = index.clone();
    damaged[200] ^= 1;
    // Newer than the good one, so each is tried before it.
    let spoil = [
        ("of another blob", put_own(&scene.registry, &scene.image, layer, other, |_| {}).await),
        ("checksum", put_own(&scene.registry, &scene.image, layer, damaged, |_| {}).await),
        (
            "which the image does not have",
            put_own(&scene.registry, &scene.image, layer, index.clone(), |m| {
                m["layers"][0]["annotations"]["org.lazyrun.index.layer"] =
                    json!(Digest::of(b"x").to_string());
            })
            .await,
        ),
        (
            "diffID",
            put_own(&scene.registry, &scene.image, layer, index.clone(), |m| {
                m["layers"][0]["annotations"]["org.lazyrun.index.diff-id"] =
                    json!(Digest::of(b"x").to_string());
            })
            .await,
        ),
        (
            "another image or platform",
            put_own(&scene.registry, &scene.image, layer, index.clone(), |m| {
                m["subject"]["digest"] = json!(Digest::of(b"x").to_string());
            })
            .await,
        ),
        (
            "instead of",
            put_own(&scene.registry, &scene.image, layer, index.clone(), |m| {
                m["layers"][0]["size"] = json!(index.len() + 7);
            })
            .await,
        ),
        (
            "cannot have",
            put_own(&scene.registry, &scene.image, layer, index.clone(), |m| {
                m["layers"][0]["size"] = json!(1u64 << 60);
            })
            .await,
        ),
    ];
    for (word, bad) in &spoil {
        // Each alone with the good one.
        put_referrers(&scene.registry, &scene.image, &[bad.clone(), good_entry(good.artifact)]).await;
        let found = scene.discover(&REPOSITORY).await;
        let digest = bad["digest"].as_str().unwrap();
        assert_eq!(found.warnings.len(), 1, "{word}: {:?}", found.warnings);
        assert!(
            found.warnings[0].contains(digest) && found.warnings[0].contains(word),
            "{:?}",
            found.warnings
        );
        assert_eq!(found.layers.len(), 2, "{word}");
        assert!(found.layers.values().all(|c| c.origin.artifact == Some(good.artifact)), "{word}");
    }
}

fn good_entry(digest: Digest) -> serde_json::Value {
    json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest.to_string(), "size": 1,
        "artifactType": lazyrun_fetcher::OWN_ARTIFACT_TYPE})
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_under_the_tag_keeps_what_others_wrote() {
    let scene = Scene::new(150).await;
    let other = put_own(&scene.registry, &scene.image, &scene.image.layers[0], vec![1, 2, 3], |m| {
        m["artifactType"] = json!("application/vnd.example.signature");
    })
    .await;
    let mut other = other;
    other["artifactType"] = json!("application/vnd.example.signature");
    other["x-unknown"] = json!({"a": 1});
    put_referrers(&scene.registry, &scene.image, std::slice::from_ref(&other)).await;
    let report = scene.push(&PushOptions::default()).await;
    let all =
        scene.bench.client.referrers(&scene.image.reference, scene.image.manifest_digest, &[]).await.unwrap();
    assert_eq!(all.len(), 2);
    delete_index(&scene.bench.client, &scene.image, report.artifact).await.unwrap();
    let list = scene.registry.manifest("team/app", &tag(&scene.image)).await;
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    assert_eq!(list["manifests"], json!([other]));
}

fn tag(image: &ResolvedImage) -> String {
    format!("sha256-{}", image.manifest_digest.hex())
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_at_the_same_time_all_get_listed() {
    let scene = Scene::new(160).await;
    let mut pushes = Vec::new();
    for n in 0..4 {
        // Clients of their own: nothing but the registry is shared.
        let client = Bench::new().client;
        let (image, given) = (scene.image.clone(), indexes(&scene.image, &scene.made));
        pushes.push(tokio::spawn(async move {
            push_indexes(&client, &image, &given, &at(&format!("2026-01-0{}T00:00:00Z", n + 1)))
                .await
                .unwrap()
        }));
    }
    let mut artifacts = Vec::new();
    for push in pushes {
        artifacts.push(push.await.unwrap().artifact);
    }
    let (listed, warnings) = list_indexes(&scene.bench.client, &scene.image).await.unwrap();
    assert_eq!(warnings, [] as [String; 0]);
    for artifact in artifacts {
        assert!(listed.iter().any(|l| l.digest == artifact), "{artifact} is not listed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_indexes_of_the_image_are_deleted() {
    let scene = Scene::new(170).await;
    let client = &scene.bench.client;
    let error = delete_index(client, &scene.image, scene.image.manifest_digest).await.unwrap_err();
    assert!(matches!(error, FetchError::Artifact { .. }), "{error}");
    let foreign = put_own(&scene.registry, &scene.image, &scene.image.layers[0], vec![1], |m| {
        m["subject"]["digest"] = json!(Digest::of(b"x").to_string());
    })
    .await;
    let foreign: Digest = foreign["digest"].as_str().unwrap().parse().unwrap();
    let error = delete_index(client, &scene.image, foreign).await.unwrap_err();
    assert!(error.to_string().contains("another image"), "{error}");
    scene.bench.resolve(&format!("{}/team/app:v1", scene.registry.address)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_indexes_are_not_pushed() {
    let scene = Scene::new(180).await;
    let other = index_of(&TestLayer::gzip(tar(998, 1, 10)));
    for bytes in [other, vec![0; 500], Vec::new()] {
        let given = [(scene.image.layers[0].clone(), IndexSource::Memory(Bytes::from(bytes)))];
        let error = push_indexes(&scene.bench.client, &scene.image, &given, &PushOptions::default())
            .await
            .unwrap_err();
        let layer = scene.image.layers[0].digest.to_string();
        assert!(error.to_string().contains(&layer), "{error}");
    }
    let none =
        push_indexes(&scene.bench.client, &scene.image, &[], &PushOptions::default()).await.unwrap_err();
    assert!(matches!(none, FetchError::Invalid { .. }), "{none}");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_it_can_be_spawned() {
    let scene = Scene::new(190).await;
    let report = scene.push(&PushOptions::default()).await;
    let (client, image, want) = (scene.bench.client.clone(), scene.image.clone(), scene.diff_ids());
    let task = tokio::spawn(async move {
        let listed = list_indexes(&client, &image).await.unwrap().0.len();
        let found = discover(&client, &image, &want, &REPOSITORY).await.layers.len();
        (listed, found, delete_index(&client, &image, report.artifact).await.unwrap())
    });
    assert_eq!(task.await.unwrap(), (1, 2, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_longer_than_their_layer_are_left_out() {
    let registry = Registry::start().await;
    // Empty files: a tar of headers packs well, records of entries do not.
    let made = TestImage::new(vec![TestLayer::gzip(tar(195, 45_000, 0)), TestLayer::gzip(tar(196, 3, 5000))]);
    let name = registry.push(&made, "team/app", "v1").await;
    let bench = Bench::new();
    let image = bench.resolve(&name).await;
    let given = indexes(&image, &made);
    let report = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
    assert_eq!(report.layers, 1);
    assert_eq!(report.left_out, [image.layers[0].digest]);
    // And are not taken from others.
    let long = index_of(&made.layers[0]);
    assert!(long.len() > 4 << 20);
    let long = put_own(&registry, &image, &image.layers[0], long, |_| {}).await;
    put_referrers(&registry, &image, &[long]).await;
    let want: Vec<Digest> = image.layers.iter().map(|l| l.diff_id).collect();
    let found = discover(&bench.client, &image, &want, &REPOSITORY).await;
    assert!(found.layers.is_empty());
    assert!(found.warnings[0].contains("cannot have"), "{:?}", found.warnings);
}
