//! Against servers that misbehave: authentication, redirects, limits, broken and wrong bodies.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::server::{Reply, Seen, Server, blob_reply, broken, full, serve, stalled, status, with_body};
use common::{Bench, TestImage, TestLayer, amd64, no_progress, quick_client, quick_fetch, tar};
use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError, FetchOptions, Layer, ResolvedImage};
use lazyrun_index::{Digest, IndexError};

async fn ingest(bench: &Bench, name: &str) -> Result<Arc<Layer>, FetchError> {
    let image = bench.client.resolve(&name.parse().unwrap(), &amd64()).await?;
    ingest_first(bench, &image).await
}

async fn ingest_first(bench: &Bench, image: &ResolvedImage) -> Result<Arc<Layer>, FetchError> {
    bench.fetcher.ingest(&image.layers[0], bench.client.blobs(&image.reference), no_progress()).await
}

fn one_layer(seed: u64) -> TestImage {
    TestImage::new(vec![TestLayer::gzip(tar(seed, 30, 60_000))])
}

fn is_layer(image: &TestImage, seen: &Seen) -> bool {
    seen.path.ends_with(&image.layers[0].digest().to_string())
}

/// A bench whose docker configuration holds a password for `address`.
fn logged_in(address: &str, user: &str, password: &str) -> (Bench, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let config = serde_json::json!({"auths": {address: {"username": user, "password": password}}});
    std::fs::write(&path, config.to_string()).unwrap();
    (Bench::with(ClientOptions { credential_files: vec![path], ..quick_client() }, quick_fetch()), dir)
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(text)
}

fn challenge(value: &str) -> Reply {
    Response::builder().status(401).header("www-authenticate", value).body(full("{}")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bearer_tokens_are_fetched_shared_and_renewed() {
    let image = TestImage::small(100);
    let served = image.clone();
    let valid = Arc::new(AtomicUsize::new(1));
    let current = Arc::clone(&valid);
    let server = Server::start(move |seen| {
        if seen.path.starts_with("/token") {
            if seen.header("authorization") != Some(&format!("Basic {}", base64("ann:s3cret"))) {
                return status(401);
            }
            let token = format!("t{}", current.load(Ordering::SeqCst));
            return Response::new(full(format!("{{\"token\":\"{token}\",\"expires_in\":300}}")));
        }
        let wanted = format!("Bearer t{}", current.load(Ordering::SeqCst));
        if seen.header("authorization") != Some(&wanted) {
            let host = seen.header("host").unwrap();
            return challenge(&format!(
                "Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"repository:app:pull\""
            ));
        }
        serve(&served, seen)
    })
    .await;
    let (bench, _dir) = logged_in(&server.address.to_string(), "ann", "s3cret");
    let name = server.name("app:v1");
    let layer = ingest(&bench, &name).await.unwrap();
    assert_eq!(server.count(|s| s.path.starts_with("/token")), 1);
    assert!(server.log().iter().any(|s| s.path.contains("service=reg&scope=repository%3Aapp%3Apull")));

    // The token is taken back: one more is fetched, by however many requests.
    valid.store(2, Ordering::SeqCst);
    layer.forget().unwrap();
    let readers: Vec<_> = (0..6u64)
        .map(|i| {
            let (fetcher, layer) = (bench.fetcher.clone(), Arc::clone(&layer));
            tokio::spawn(async move { fetcher.read(&layer, i * 80_000, 10).await })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    assert_eq!(server.count(|s| s.path.starts_with("/token")), 2);

    // Wrong password: denied, in words without it.
    let (bench, _dir) = logged_in(&server.address.to_string(), "ann", "wr0ng");
    let error = ingest(&bench, &name).await.unwrap_err();
    assert!(matches!(error, FetchError::Denied { .. }), "{error}");
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("wr0ng") && !shown.contains(&base64("ann:wr0ng")), "{shown}");
    // No password: denied too.
    let error = ingest(&Bench::new(), &name).await.unwrap_err();
    assert!(matches!(error, FetchError::Denied { .. }), "{error}");
}

/// A registry whose tokens are good for one request each; `slow` names the repository whose tokens take long.
async fn churning(image: &TestImage, slow: &'static str, pause: Duration) -> Server {
    let served = image.clone();
    let given = Arc::new(AtomicUsize::new(0));
    let unused = Arc::new(std::sync::Mutex::new(std::collections::HashSet::new()));
    Server::start(move |seen| {
        if seen.path.starts_with("/token") {
            if !slow.is_empty() && seen.path.contains(slow) {
                std::thread::sleep(pause);
            }
            let token = format!("t{}", given.fetch_add(1, Ordering::SeqCst));
            unused.lock().unwrap().insert(format!("Bearer {token}"));
            return Response::new(full(format!("{{\"token\":\"{token}\"}}")));
        }
        if !seen.header("authorization").is_some_and(|a| unused.lock().unwrap().remove(a)) {
            let host = seen.header("host").unwrap();
            return challenge(&format!("Bearer realm=\"http://{host}/token\",service=\"reg\""));
        }
        serve(&served, seen)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_good_for_one_request_are_got_for_each() {
    let image = one_layer(105);
    let server = churning(&image, "", Duration::ZERO).await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    // Many at once, each of which uses up what the others have got.
    let readers: Vec<_> = (0..12usize)
        .map(|i| {
            let (fetcher, layer) = (bench.fetcher.clone(), Arc::clone(&layer));
            tokio::spawn(async move { (i, fetcher.read(&layer, i as u64 * 140_000, 10).await) })
        })
        .collect();
    for reader in readers {
        let (i, bytes) = reader.await.unwrap();
        assert_eq!(bytes.unwrap(), image.layers[0].tar[i * 140_000..i * 140_000 + 10]);
    }
    // Bounded: a registry that accepts no token at all is asked for a few.
    let server = Server::start(|seen| {
        if seen.path.starts_with("/token") {
            return Response::new(full("{\"token\":\"x\"}"));
        }
        challenge(&format!("Bearer realm=\"http://{}/token\"", seen.header("host").unwrap()))
    })
    .await;
    let error = ingest(&Bench::new(), &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::Denied { .. }), "{error}");
    let tokens = server.count(|s| s.path.starts_with("/token"));
    assert!((2..=8).contains(&tokens), "{tokens} tokens were asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_slow_token_service_holds_up_no_other_repository() {
    let image = one_layer(106);
    let slow = churning(&image, "slow", Duration::from_millis(1500)).await;
    let fast = churning(&image, "", Duration::ZERO).await;
    let bench = Bench::with(ClientOptions { stall_timeout: Duration::from_secs(5), ..quick_client() }, quick_fetch());
    let client = bench.client.clone();
    let name = slow.name("slow:v1").parse().unwrap();
    let waiting = tokio::spawn(async move { client.resolve(&name, &amd64()).await });
    while slow.count(|s| s.path.starts_with("/token")) == 0 && slow.log().is_empty() {
        tokio::task::yield_now().await;
    }
    bench.client.resolve(&fast.name("app:v1").parse().unwrap(), &amd64()).await.unwrap();
    assert!(!waiting.is_finished(), "the slow one was done first: nothing is shown");
    waiting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_works_and_identity_tokens_are_posted() {
    let image = TestImage::small(110);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if seen.header("authorization") == Some(&format!("Basic {}", base64("ann:s3cret"))) {
            serve(&served, seen)
        } else {
            challenge("Basic realm=\"x\"")
        }
    })
    .await;
    let (bench, _dir) = logged_in(&server.address.to_string(), "ann", "s3cret");
    ingest(&bench, &server.name("app:v1")).await.unwrap();

    let server = Server::start(move |seen| {
        if seen.path == "/token" {
            let form = String::from_utf8_lossy(&seen.body);
            let good = seen.method == "POST"
                && form.contains("refresh_token=id-tok")
                && form.contains("service=reg");
            return if good { Response::new(full("{\"access_token\":\"abc\"}")) } else { status(401) };
        }
        if seen.header("authorization") == Some("Bearer abc") {
            return serve(&image, seen);
        }
        challenge(&format!("Bearer realm=\"http://{}/token\",service=\"reg\"", seen.header("host").unwrap()))
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let auths = serde_json::json!({"auths": {server.address.to_string(): {"identitytoken": "id-tok"}}});
    std::fs::write(&path, auths.to_string()).unwrap();
    let bench = Bench::with(ClientOptions { credential_files: vec![path], ..quick_client() }, quick_fetch());
    ingest(&bench, &server.name("app:v1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_lose_credentials_and_are_remembered_until_they_expire() {
    let image = one_layer(120);
    let expired = Arc::new(AtomicBool::new(false));
    let (stored, gone) = (image.clone(), Arc::clone(&expired));
    let cdn = Server::start(move |seen| {
        if seen.header("authorization").is_some() {
            return status(400);
        }
        if gone.load(Ordering::SeqCst) && seen.path.contains("signature=1") {
            return status(403);
        }
        let digest = seen.path.split(['/', '?']).nth(1).unwrap();
        blob_reply(seen, &stored.blob(digest).unwrap())
    })
    .await;
    let (served, cdn_address) = (image.clone(), cdn.address);
    let server = Server::start(move |seen| {
        if seen.header("authorization") != Some(&format!("Basic {}", base64("ann:s3cret"))) {
            return challenge("Basic realm=\"x\"");
        }
        if !seen.is_blob() {
            return serve(&served, seen);
        }
        let digest = seen.path.rsplit('/').next().unwrap();
        let place = format!("http://{cdn_address}/{digest}?signature={}", seen.before + 1);
        Response::builder().status(307).header("location", place).body(full("")).unwrap()
    })
    .await;
    let (bench, _dir) = logged_in(&server.address.to_string(), "ann", "s3cret");
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    let asked = |server: &Server| server.count(|s| is_layer(&image, s));
    assert_eq!(asked(&server), 1);
    bench.fetcher.read(&layer, 0, 10).await.unwrap();
    assert_eq!(asked(&server), 1, "the signed URL was not reused");
    expired.store(true, Ordering::SeqCst);
    let bytes = bench.fetcher.read(&layer, 900_000, 10).await.unwrap();
    assert_eq!(bytes, image.layers[0].tar[900_000..900_010]);
    assert_eq!(asked(&server), 2);
    assert!(cdn.log().iter().all(|s| s.header("authorization").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_a_host_that_is_gone_is_forgotten() {
    let image = one_layer(125);
    let cdn_for = |image: &TestImage, stalls: Arc<AtomicBool>| {
        let stored = image.clone();
        Server::start(move |seen| {
            let blob = stored.blob(seen.path.split('/').nth(1).unwrap()).unwrap();
            if stalls.load(Ordering::SeqCst) {
                return with_body(seen, &blob, |b| stalled(b, 0));
            }
            blob_reply(seen, &blob)
        })
    };
    let stalls = Arc::new(AtomicBool::new(false));
    let first = cdn_for(&image, Arc::clone(&stalls)).await;
    let second = cdn_for(&image, Arc::new(AtomicBool::new(false))).await;
    let place = Arc::new(std::sync::Mutex::new(first.address));
    let (served, leads_to) = (image.clone(), Arc::clone(&place));
    let server = Server::start(move |seen| {
        if !seen.is_blob() {
            return serve(&served, seen);
        }
        let digest = seen.path.rsplit('/').next().unwrap();
        let place = format!("http://{}/{digest}", leads_to.lock().unwrap());
        Response::builder().status(307).header("location", place).body(full("")).unwrap()
    })
    .await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    let read = async || {
        layer.forget().unwrap();
        let bytes = bench.fetcher.read(&layer, 900_000, 10).await.unwrap();
        assert_eq!(bytes, image.layers[0].tar[900_000..900_010]);
    };
    // It stalls: the registry is asked anew, and leads elsewhere.
    stalls.store(true, Ordering::SeqCst);
    *place.lock().unwrap() = second.address;
    read().await;
    assert!(second.log().len() == 1, "{:?}", second.log());
    // Nobody listens there any more.
    stalls.store(false, Ordering::SeqCst);
    *place.lock().unwrap() = first.address;
    drop(second);
    let asked = first.log().len();
    read().await;
    assert!(first.log().len() > asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_manifest_is_told_as_what_is_known() {
    for (tags, missing_image) in [(404u16, true), (200, false), (401, false), (403, false), (500, false), (429, false)] {
        let server = Server::start(move |seen| {
            if seen.path.contains("/tags/") { status(tags) } else { status(404) }
        })
        .await;
        let options = ClientOptions { retries: 1, ..quick_client() };
        let bench = Bench::with(options, quick_fetch());
        let error = ingest(&bench, &server.name("app:v1")).await.unwrap_err();
        match error {
            FetchError::ImageNotFound { .. } => assert!(missing_image, "{tags}"),
            FetchError::TagNotFound { .. } => assert!(!missing_image, "{tags}"),
            other => panic!("{tags}: {other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_loops_end() {
    let image = one_layer(130);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if is_layer(&served, seen) {
            return Response::builder().status(302).header("location", &seen.path).body(full("")).unwrap();
        }
        serve(&served, seen)
    })
    .await;
    let bench = Bench::new();
    let error = ingest(&bench, &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::Protocol { .. }), "{error}");
    assert!(bench.left_behind().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_as_long_as_the_server_asks() {
    let image = one_layer(140);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if seen.path.contains("/manifests/") && seen.before == 0 {
            return Response::builder().status(429).header("retry-after", "1").body(full("")).unwrap();
        }
        if seen.is_blob() && seen.before == 0 {
            return status(503);
        }
        serve(&served, seen)
    })
    .await;
    let began = Instant::now();
    ingest(&Bench::new(), &server.name("app:v1")).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1));

    let server = Server::start(|_| {
        Response::builder().status(429).header("retry-after", "315360000").body(full("")).unwrap()
    })
    .await;
    let began = Instant::now();
    let error = ingest(&Bench::new(), &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::RateLimited { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_and_stalled_bodies_are_resumed_by_range() {
    let image = one_layer(150);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if !is_layer(&served, seen) {
            return serve(&served, seen);
        }
        match seen.before {
            0 => with_body(seen, &served.layers[0].blob, |b| broken(b, 100_000)),
            1 => with_body(seen, &served.layers[0].blob, |b| stalled(b, 50_000)),
            _ => serve(&served, seen),
        }
    })
    .await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    assert!(std::fs::read(layer.data_path()).unwrap() == image.layers[0].tar);
    let log: Vec<_> = server.log().into_iter().filter(|s| is_layer(&image, s)).collect();
    assert_eq!(log.len(), 3);
    assert_eq!(log[0].range(), None);
    let (second, third) = (log[1].range().unwrap().0, log[2].range().unwrap().0);
    assert!(second <= 100_000 && third <= second + 50_000 && third > 0, "{second} {third}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_always_ends_early_is_an_error_and_leaves_nothing() {
    let image = one_layer(160);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if is_layer(&served, seen) {
            return with_body(seen, &served.layers[0].blob, |b| broken(b, 10.min(b.len())));
        }
        serve(&served, seen)
    })
    .await;
    let bench = Bench::new();
    let error = ingest(&bench, &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::Broken { .. } | FetchError::Truncated { .. }), "{error}");
    assert!(bench.left_behind().is_empty());
    assert!(bench.fetcher.store().list().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_is_streamed() {
    let image = TestImage::new(vec![TestLayer::plain(tar(170, 12, 1_000_000))]);
    let served = image.clone();
    let server = Server::start(move |seen| {
        let mut plain = seen.clone();
        plain.headers.remove("range");
        serve(&served, &plain)
    })
    .await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    // Near the start the bytes before are skipped; far inside the layer is streamed.
    let made = &image.layers[0].tar;
    assert_eq!(bench.fetcher.read(&layer, 1_000_000, 10).await.unwrap(), made[1_000_000..1_000_010]);
    assert!(!layer.is_hydrated());
    assert_eq!(bench.fetcher.read(&layer, 11_500_000, 10).await.unwrap(), made[11_500_000..11_500_010]);
    bench.fetcher.hydrate(&layer, no_progress()).await.unwrap();
    assert!(std::fs::read(layer.data_path()).unwrap() == *made);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_tried_again_after_a_while() {
    let image = TestImage::new(vec![TestLayer::plain(tar(175, 12, 1_000_000))]);
    let served = image.clone();
    let without = Arc::new(AtomicBool::new(true));
    let ignores = Arc::clone(&without);
    let server = Server::start(move |seen| {
        let mut plain = seen.clone();
        if ignores.load(Ordering::SeqCst) {
            plain.headers.remove("range");
        }
        serve(&served, &plain)
    })
    .await;
    let fetch = FetchOptions { ranges_again: Duration::from_millis(300), ..quick_fetch() };
    let bench = Bench::with(quick_client(), fetch);
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    let made = &image.layers[0].tar;
    layer.forget().unwrap();
    assert_eq!(bench.fetcher.read(&layer, 11_500_000, 10).await.unwrap(), made[11_500_000..11_500_010]);
    without.store(false, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        layer.forget().unwrap();
        assert_eq!(bench.fetcher.read(&layer, 6_000_000, 10).await.unwrap(), made[6_000_000..6_000_010]);
        if layer.local_bytes() < made.len() as u64 / 2 {
            break;
        }
        assert!(Instant::now() < deadline, "everything is streamed for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_ranges_are_never_believed() {
    let image = one_layer(180);
    let served = image.clone();
    let server = Server::start(move |seen| {
        let Some((start, end)) = seen.range() else { return serve(&served, seen) };
        let blob = &served.layers[0].blob;
        let header = format!("bytes {}-{}/{}", start + 1, end, blob.len());
        Response::builder()
            .status(206)
            .header("content-range", header)
            .body(full(blob.slice(start..end)))
            .unwrap()
    })
    .await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    // Ranges are given up for this layer and the stream, which has none, brings it.
    let bytes = bench.fetcher.read(&layer, 900_000, 10).await.unwrap();
    assert_eq!(bytes, image.layers[0].tar[900_000..900_010]);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_spans_are_fetched_again_and_never_served() {
    let image = one_layer(190);
    let served = image.clone();
    let always = Arc::new(AtomicBool::new(false));
    let bad = Arc::clone(&always);
    let once = AtomicBool::new(true);
    let server = Server::start(move |seen| {
        let spoil =
            seen.range().is_some() && (bad.load(Ordering::SeqCst) || once.swap(false, Ordering::SeqCst));
        if !spoil {
            return serve(&served, seen);
        }
        with_body(seen, &served.layers[0].blob, |b| {
            let mut bytes = b.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
            full(bytes)
        })
    })
    .await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    let made = &image.layers[0].tar;
    assert_eq!(bench.fetcher.read(&layer, 500_000, 100).await.unwrap(), made[500_000..500_100]);
    assert!(bench.fetcher.stats().corrupt_spans >= 1);
    layer.forget().unwrap();
    always.store(true, Ordering::SeqCst);
    let error = bench.fetcher.read(&layer, 500_000, 100).await.unwrap_err();
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    assert_eq!(layer.read_local(500_000, &mut [0; 100]).unwrap(), None);
    assert_eq!(bench.fetcher.stats().failed_faults, 1);
    // The next reader gets a new chance.
    always.store(false, Ordering::SeqCst);
    assert_eq!(bench.fetcher.read(&layer, 500_000, 100).await.unwrap(), made[500_000..500_100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_digests_are_refused() {
    // The blob is another one (of the same length); bytes may break on the way, so it is asked twice.
    let image = one_layer(200);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if !is_layer(&served, seen) {
            return serve(&served, seen);
        }
        with_body(seen, &served.layers[0].blob, |b| {
            let mut bytes = b.to_vec();
            bytes[4] ^= 1; // the gzip header's time: content and checksum stay right
            full(bytes)
        })
    })
    .await;
    let bench = Bench::new();
    let error = ingest(&bench, &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::WrongDigest { what: "layer blob", .. }), "{error}");
    assert_eq!(server.count(|s| is_layer(&image, s)), 2);
    assert!(bench.left_behind().is_empty());

    // The config's diffID is another one.
    let mut lying = one_layer(201);
    let config = String::from_utf8(lying.config.to_vec()).unwrap();
    let config = config.replace(&lying.layers[0].diff_id().hex(), &Digest::of(b"x").hex());
    let manifest = String::from_utf8(lying.manifest.to_vec()).unwrap();
    let manifest =
        manifest.replace(&Digest::of(&lying.config).to_string(), &Digest::of(config.as_bytes()).to_string());
    (lying.config, lying.manifest) = (config.into(), manifest.into());
    let server = Server::start(move |seen| serve(&lying, seen)).await;
    let error = ingest(&bench, &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::WrongDiffId { .. }), "{error}");
    assert!(bench.left_behind().is_empty());

    // The manifest is not what the digest says, or is huge.
    let image = one_layer(202);
    let (served, pinned) = (image.clone(), Digest::of(b"other"));
    let server = Server::start(move |seen| {
        if seen.path.ends_with("/huge") {
            return Response::new(full(Bytes::from(vec![b' '; 5 << 20])));
        }
        serve(&served, seen)
    })
    .await;
    let error = ingest(&bench, &server.name(&format!("app@{pinned}"))).await.unwrap_err();
    assert!(matches!(error, FetchError::WrongDigest { what: "manifest", .. }), "{error}");
    let error = ingest(&bench, &server.name("app:huge")).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_documents_stop_at_their_bound() {
    use futures_util::{StreamExt as _, stream};
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let server = Server::start(move |_| {
        let count = Arc::clone(&count);
        let piece = Bytes::from(vec![b' '; 64 << 10]);
        let pieces = stream::repeat(piece).map(move |piece| {
            count.fetch_add(piece.len(), Ordering::SeqCst);
            Ok::<_, std::io::Error>(hyper::body::Frame::data(piece))
        });
        Response::new(http_body_util::BodyExt::boxed(http_body_util::StreamBody::new(pieces)))
    })
    .await;
    let error = ingest(&Bench::new(), &server.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
    // What sockets hold comes on top of the 4 MiB.
    assert!(sent.load(Ordering::SeqCst) < 32 << 20, "{} bytes were taken", sent.load(Ordering::SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_no_tar_is_named_as_such() {
    let layer = TestLayer {
        tar: vec![7; 5000],
        blob: common::gzip(&[7; 5000]).into(),
        ..one_layer(210).layers[0].clone()
    };
    let image = TestImage::new(vec![layer]);
    let server = Server::start(move |seen| serve(&image, seen)).await;
    let bench = Bench::new();
    let error = ingest(&bench, &server.name("app:v1")).await.unwrap_err();
    let FetchError::Layer { source, .. } = &error else { panic!("{error}") };
    assert!(matches!(**source, IndexError::TarHeader { .. }), "{error}");
    assert!(bench.left_behind().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_ends_within_its_bound() {
    let image = one_layer(220);
    let served = image.clone();
    let dead = Arc::new(AtomicBool::new(false));
    let silent = Arc::clone(&dead);
    let server = Server::start(move |seen| {
        if silent.load(Ordering::SeqCst) && seen.is_blob() {
            return with_body(seen, &served.layers[0].blob, |b| stalled(b, 0));
        }
        serve(&served, seen)
    })
    .await;
    let fetch = FetchOptions { fault_timeout: Duration::from_millis(700), ..quick_fetch() };
    let client = ClientOptions { stall_timeout: Duration::from_secs(30), ..quick_client() };
    let bench = Bench::with(client, fetch);
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    dead.store(true, Ordering::SeqCst);
    let began = Instant::now();
    let error = bench.fetcher.read(&layer, 0, 10).await.unwrap_err();
    assert!(matches!(error, FetchError::FaultTimeout { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_stream_leaves_nothing() {
    let image = one_layer(230);
    let served = image.clone();
    let server = Server::start(move |seen| {
        if is_layer(&served, seen) {
            return with_body(seen, &served.layers[0].blob, |b| stalled(b, 200_000));
        }
        serve(&served, seen)
    })
    .await;
    let client = ClientOptions { stall_timeout: Duration::from_secs(30), ..quick_client() };
    let bench = Bench::with(client, quick_fetch());
    let resolved = bench.resolve(&server.name("app:v1")).await;
    let begun = tokio::time::timeout(Duration::from_millis(500), ingest_first(&bench, &resolved)).await;
    assert!(begun.is_err(), "the stream ended");
    // The decoder's thread notices as soon as it asks for more.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !bench.left_behind().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", bench.left_behind());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_trouble_is_told_apart() {
    // A name that is not loopback, so https is spoken; the other side is no TLS server.
    let server = Server::start(|_| status(200)).await;
    let Some(address) = own_address() else { panic!("this test needs an address that is not loopback") };
    let listener = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let target = server.address;
    let relay = tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let mut to = tokio::net::TcpStream::connect(target).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
    let bench = Bench::with(ClientOptions { retries: 0, ..quick_client() }, quick_fetch());
    let error = ingest(&bench, &format!("{address}:{port}/app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::Tls { .. }), "{error}");
    relay.abort();
}

/// An IPv4 address of this machine that is not loopback: the one that packets to the world would carry.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}
