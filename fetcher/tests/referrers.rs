//! Registries with the referrers API, with logins, and with habits of their own.

use std::time::{Duration, Instant};

use crate::common::artifacts::{indexes, own_manifest};
use crate::common::fake::{Fake, Habits};
use crate::common::server::{Server, full, serve, status};
use crate::common::{Bench, TestImage, quick_client, quick_fetch};
use bytes::Bytes;
use hyper::Response;
use lazyrun_fetcher::{
    ClientOptions, DiscoverOptions, FetchError, IndexPolicy, PushOptions, ResolvedImage, TrustMode,
    delete_index, discover, discover_with, list_indexes, push_indexes,
};
use lazyrun_index::Digest;
use serde_json::{Value, json};

const REPOSITORY: IndexPolicy = IndexPolicy { trust: TrustMode::Repository, pinned: None };

async fn scene(habits: Habits, seed: u64) -> (Fake, Bench, TestImage, ResolvedImage) {
    let fake = Fake::start(habits).await;
    let made = TestImage::small(seed);
    let name = fake.add(&made, "v1");
    let bench = Bench::new();
    let image = bench.resolve(&name).await;
    (fake, bench, made, image)
}

fn want(image: &ResolvedImage) -> Vec<Digest> {
    image.layers.iter().map(|l| l.diff_id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_is_used_where_there_is_one() {
    for (filters, absolute_location) in [(true, false), (false, true)] {
        let habits = Habits { filters, absolute_location, ..Habits::default() };
        let (fake, bench, made, image) = scene(habits, 200).await;
        let given = indexes(&image, &made);
        let report = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
        let tag = format!("sha256-{}", image.manifest_digest.hex());
        assert!(!fake.has_manifest(&tag), "the registry has noted the subject itself");
        let found = discover(&bench.client, &image, &want(&image), &REPOSITORY).await;
        assert_eq!(found.warnings, [] as [String; 0]);
        assert_eq!(found.layers.len(), 2);
        // Once it is known that there is an API, the tag is not asked for.
        let asked = |f: &Fake| f.server.count(|s| s.path.contains(&tag));
        let before = asked(&fake);
        let (listed, _) = list_indexes(&bench.client, &image).await.unwrap();
        assert_eq!(listed[0].digest, report.artifact);
        assert_eq!(asked(&fake), before);
        assert!(delete_index(&bench.client, &image, report.artifact).await.unwrap());
        assert!(list_indexes(&bench.client, &image).await.unwrap().0.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_pages_are_read_up_to_a_bound() {
    for (habits, artifacts, seen) in
        [(Habits { page: 2, ..Habits::default() }, 5, 5), (Habits { page: 1, ..Habits::default() }, 12, 8)]
    {
        let (fake, bench, _, image) = scene(habits, 210).await;
        for n in 0..artifacts {
            let mut manifest = own_manifest(&image, &image.layers[0], b"x");
            manifest["annotations"]["n"] = json!(n.to_string());
            fake.add_manifest(&Bytes::from(manifest.to_string()), &format!("t{n}"));
        }
        let kind = lazyrun_fetcher::OWN_ARTIFACT_TYPE;
        let found = bench.client.referrers(&image.reference, image.manifest_digest, &[kind]).await.unwrap();
        assert_eq!(found.len(), seen);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_at_another_host_are_not_followed() {
    let image = TestImage::small(220);
    let made = image.clone();
    let server = Server::start(move |seen| {
        if seen.path.contains("/referrers/") {
            let list = json!({"schemaVersion": 2, "manifests": []}).to_string();
            let next = "<http://127.0.0.1:1/steal>; rel=\"next\"";
            return Response::builder().header("link", next).body(full(list)).unwrap();
        }
        if seen.path.contains("/manifests/sha256-") { status(404) } else { serve(&image, seen) }
    })
    .await;
    let bench = Bench::new();
    let image = bench.resolve(&server.name("app:v1")).await;
    // Falls back to the list under the tag, of which there is none.
    let found = bench.client.referrers(&image.reference, made.digest(), &[]).await.unwrap();
    assert!(found.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_answers_to_the_api_mean_that_there_is_none() {
    for code in [400, 403, 404, 405, 501, 200] {
        let image = TestImage::small(230);
        let listed = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
            "digest": Digest::of(b"a").to_string(), "artifactType": "t"});
        let list = json!({"schemaVersion": 2, "manifests": [listed]}).to_string();
        let server = Server::start(move |seen| {
            if seen.path.contains("/referrers/") && code == 200 {
                return Response::builder().header("content-type", "text/html").body(full("<html>")).unwrap();
            }
            if seen.path.contains("/referrers/") {
                return status(code);
            }
            if seen.path.contains("/manifests/sha256-") {
                return Response::new(full(list.clone()));
            }
            serve(&image, seen)
        })
        .await;
        let bench = Bench::new();
        let image = bench.resolve(&server.name("app:v1")).await;
        for (kinds, count) in [(&["t"][..], 1), (&["u"], 0), (&[], 1)] {
            let found = bench.client.referrers(&image.reference, image.manifest_digest, kinds).await.unwrap();
            assert_eq!(found.len(), count, "{code} {kinds:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pushing_asks_for_the_right_to_push() {
    for stingy_scope in [false, true] {
        let fake = Fake::start(Habits { login: true, stingy_scope, ..Habits::default() }).await;
        let made = TestImage::small(240);
        let name = fake.add(&made, "v1");
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        let auths = json!({"auths": {fake.server.address.to_string(): {"auth": "dTpw"}}});
        std::fs::write(&config, auths.to_string()).unwrap();
        let options = ClientOptions { credential_files: vec![config], ..quick_client() };
        let bench = Bench::with(options, quick_fetch());
        let image = bench.resolve(&name).await;
        let given = indexes(&image, &made);
        let report = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
        let found = discover(&bench.client, &image, &want(&image), &REPOSITORY).await;
        assert_eq!(found.layers.len(), 2, "{:?}", found.warnings);
        assert!(delete_index(&bench.client, &image, report.artifact).await.unwrap());

        // Without the password: denied, in words that say so.
        let stranger = Bench::new();
        let error =
            push_indexes(&stranger.client, &image, &given[..1], &PushOptions::default()).await.unwrap_err();
        assert!(matches!(error, FetchError::Denied { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_delete_says_so() {
    for code in [400, 405, 501] {
        let (_fake, bench, made, image) = scene(Habits { delete: code, ..Habits::default() }, 250).await;
        let given = indexes(&image, &made);
        let report = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
        let error = delete_index(&bench.client, &image, report.artifact).await.unwrap_err();
        assert!(matches!(error, FetchError::Undeletable { .. }), "{code}: {error}");
        assert_eq!(list_indexes(&bench.client, &image).await.unwrap().0.len(), 1);
    }
}

/// Debian's docker-registry does so when two clients put manifests that share a blob at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_digest_that_is_doubted_wrongly_is_put_again() {
    let (_fake, bench, made, image) = scene(Habits { doubts: 2, ..Habits::default() }, 270).await;
    let given = indexes(&image, &made);
    push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
    let (_fake, bench, made, image) = scene(Habits { doubts: 99, ..Habits::default() }, 280).await;
    let given = indexes(&image, &made);
    let error = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap_err();
    assert!(matches!(error, FetchError::Rejected { status: 400, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_uploads_begin_anew() {
    let (_fake, bench, made, image) = scene(Habits { lost_uploads: 1, ..Habits::default() }, 260).await;
    let given = indexes(&image, &made);
    push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap();
    assert_eq!(discover(&bench.client, &image, &want(&image), &REPOSITORY).await.layers.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_uploads_are_whole() {
    let (fake, bench, _, image) = scene(Habits::default(), 270).await;
    let bytes: Bytes = (0..3_000_001u32).map(|n| (n * 7 / 3) as u8).collect::<Vec<u8>>().into();
    let digest = Digest::of(&bytes);
    let first = bench.client.upload_blob(&image.reference, digest, bytes.clone()).await.unwrap();
    assert_eq!(first, lazyrun_fetcher::Uploaded::Sent);
    let again = bench.client.upload_blob(&image.reference, digest, bytes.clone()).await.unwrap();
    assert_eq!(again, lazyrun_fetcher::Uploaded::Existed);
    let got = bench.client.blob(&image.reference, digest, "blob", bytes.len() as u64).await.unwrap();
    assert!(got == bytes);
    let error = bench.client.blob(&image.reference, digest, "blob", 1000).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
    drop(fake);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_manifests_come_with_the_registrys_words() {
    let (_fake, bench, made, image) = scene(Habits::default(), 280).await;
    // The fake takes uploads but knows no blob of that digest when the manifest comes: HEAD says it is there.
    let server = Server::start({
        let made = made.clone();
        move |seen| match (seen.method.as_str(), seen.is_blob()) {
            ("HEAD", true) => status(200),
            ("PUT", _) => Response::builder()
                .status(400)
                .body(full(r#"{"errors":[{"code":"MANIFEST_INVALID","message":"no artifacts here"}]}"#))
                .unwrap(),
            _ => serve(&made, seen),
        }
    })
    .await;
    let image = ResolvedImage { reference: server.name("app:v1").parse().unwrap(), ..image };
    let given = indexes(&image, &made);
    let error = push_indexes(&bench.client, &image, &given, &PushOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("no artifacts here"), "{error}");
}

/// An own artifact of the image with one good index, added without pushing.
fn add_own(fake: &Fake, image: &ResolvedImage, made: &TestImage, n: usize) -> Digest {
    let blob = Bytes::from(crate::common::artifacts::index_of(&made.layers[n]));
    fake.add_blob(blob.clone());
    let manifest = Bytes::from(own_manifest(image, &image.layers[n], &blob).to_string());
    fake.add_manifest(&manifest, &format!("own{n}"));
    Digest::of(&manifest)
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_of_single_layers_add_up() {
    let (fake, bench, made, image) = scene(Habits::default(), 290).await;
    let artifacts = [add_own(&fake, &image, &made, 0), add_own(&fake, &image, &made, 1)];
    let found = discover(&bench.client, &image, &want(&image), &REPOSITORY).await;
    assert_eq!(found.layers.len(), 2);
    for (layer, artifact) in image.layers.iter().zip(artifacts) {
        assert_eq!(found.layers[&layer.diff_id].origin.artifact, Some(artifact));
    }
    // Who has lied is not asked again.
    let options = DiscoverOptions { refused: [artifacts[0]].into(), ..DiscoverOptions::default() };
    let found = discover_with(&bench.client, &image, &want(&image), &REPOSITORY, &options).await;
    assert_eq!(found.layers.keys().copied().collect::<Vec<_>>(), [image.layers[1].diff_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_registry_does_not_hold_up_a_start() {
    let image = TestImage::small(300);
    let made = image.clone();
    let server = Server::start(move |seen| {
        if seen.path.contains("/referrers/") || seen.path.contains("/manifests/sha256-") {
            let stalled = crate::common::server::stalled(&Bytes::from_static(b"{\"manifests\":"), 3);
            return Response::new(stalled);
        }
        serve(&image, seen)
    })
    .await;
    let client = ClientOptions { stall_timeout: Duration::from_secs(60), ..quick_client() };
    let bench = Bench::with(client, quick_fetch());
    let image = bench.resolve(&server.name("app:v1")).await;
    let options = DiscoverOptions { limit: Duration::from_millis(200), ..DiscoverOptions::default() };
    let began = Instant::now();
    let found = discover_with(&bench.client, &image, &want(&image), &REPOSITORY, &options).await;
    assert!(began.elapsed() < Duration::from_secs(20));
    assert!(found.layers.is_empty());
    assert!(found.warnings[0].contains("0.2 s"), "{:?}", found.warnings);
    drop(made);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_in_time_is_kept() {
    let made = TestImage::small(310);
    let plain = {
        let made = made.clone();
        Server::start(move |seen| serve(&made, seen)).await
    };
    let image = Bench::new().resolve(&plain.name("app:v1")).await;
    let blobs: Vec<Bytes> =
        made.layers.iter().map(|l| Bytes::from(crate::common::artifacts::index_of(l))).collect();
    let manifests: Vec<Bytes> =
        (0..2).map(|n| Bytes::from(own_manifest(&image, &image.layers[n], &blobs[n]).to_string())).collect();
    // The first artifact is the newer one and comes; the second one's blob gets stuck.
    let list: Vec<Value> = (0..2)
        .map(|n| {
            json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": manifests[n].len(),
                "digest": Digest::of(&manifests[n]).to_string(), "artifactType": lazyrun_fetcher::OWN_ARTIFACT_TYPE,
                "annotations": {"org.lazyrun.index.format": (9 - n).to_string()}})
        })
        .collect();
    let list = json!({"schemaVersion": 2, "manifests": list}).to_string();
    let server = Server::start({
        let made = made.clone();
        move |seen| {
            let name = seen.path.rsplit('/').next().unwrap();
            let is = |bytes: &&Bytes| Digest::of(bytes).to_string() == name;
            if seen.path.contains("/referrers/") {
                Response::new(full(list.clone()))
            } else if let Some(manifest) = manifests.iter().find(is) {
                Response::new(full(manifest.clone()))
            } else if let Some(blob) = blobs.iter().find(is) {
                let stuck = *blob == blobs[1];
                Response::new(if stuck {
                    crate::common::server::stalled(blob, 10)
                } else {
                    full(blob.clone())
                })
            } else if name.starts_with("sha256-") {
                status(404)
            } else {
                serve(&made, seen)
            }
        }
    })
    .await;
    let client = ClientOptions { stall_timeout: Duration::from_secs(60), ..quick_client() };
    let bench = Bench::with(client, quick_fetch());
    let image = bench.resolve(&server.name("app:v1")).await;
    let options = DiscoverOptions { limit: Duration::from_secs(2), ..DiscoverOptions::default() };
    let found = discover_with(&bench.client, &image, &want(&image), &REPOSITORY, &options).await;
    assert!(found.warnings.iter().any(|w| w.contains("ended after 2 s")), "{:?}", found.warnings);
    assert_eq!(found.layers.keys().copied().collect::<Vec<_>>(), [image.layers[0].diff_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_elsewhere_get_no_credentials() {
    let elsewhere = Server::start(|_| status(201)).await;
    let place = format!("http://{}/put?x=1", elsewhere.address);
    let server = Server::start(move |seen| match (seen.method.as_str(), seen.header("authorization")) {
        (_, None) => {
            let basic = Response::builder().status(401).header("www-authenticate", "Basic realm=\"r\"");
            basic.body(full("")).unwrap()
        }
        ("POST", _) => {
            Response::builder().status(202).header("location", place.as_str()).body(full("")).unwrap()
        }
        _ => status(404),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    let auths = json!({"auths": {server.address.to_string(): {"auth": "dTpw"}}});
    std::fs::write(&config, auths.to_string()).unwrap();
    let bench =
        Bench::with(ClientOptions { credential_files: vec![config], ..quick_client() }, quick_fetch());
    let bytes = Bytes::from_static(b"some bytes");
    let reference = server.name("app:v1").parse().unwrap();
    bench.client.upload_blob(&reference, Digest::of(&bytes), bytes.clone()).await.unwrap();
    let log = elsewhere.log();
    assert_eq!(log.len(), 1);
    assert_eq!(log[0].header("authorization"), None);
    assert_eq!(log[0].body, bytes);
    assert!(log[0].path.starts_with("/put?x=1&digest=sha256"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_nobody_reads_ends() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("http://{}/deaf", listener.local_addr().unwrap());
    let server = Server::start(move |seen| match seen.method.as_str() {
        "POST" => Response::builder().status(202).header("location", place.as_str()).body(full("")).unwrap(),
        _ => status(404),
    })
    .await;
    let client = ClientOptions { retries: 0, stall_timeout: Duration::from_millis(300), ..quick_client() };
    let bench = Bench::with(client, quick_fetch());
    let bytes = Bytes::from(vec![7; 32 << 20]);
    let reference = server.name("app:v1").parse().unwrap();
    let error = bench.client.upload_blob(&reference, Digest::of(&bytes), bytes).await.unwrap_err();
    assert!(matches!(error, FetchError::Stalled { .. }), "{error}");
    drop(listener);
}
