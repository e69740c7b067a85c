//! Mirrors: asked first, never believed, never needed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::hosts::{HostsDir, nobody};
use crate::common::pull::one_layer;
use crate::common::server::{
    Reply, Seen, Server, blob_reply, broken, full, serve, stalled, status, with_body,
};
use crate::common::{Bench, TestImage, TestLayer, amd64, no_progress, quick_fetch, tar};
use base64::Engine as _;
use bytes::Bytes;
use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError, HostFiles, Layer};
use lazyrun_index::Digest;

async fn origin_of(image: &TestImage) -> Server {
    let served = image.clone();
    Server::start(move |seen| serve(&served, seen)).await
}

/// A client for `origin` that asks `mirrors` first.
fn bench(origin: &Server, mirrors: &[String]) -> (Bench, HostsDir) {
    let toml: String = mirrors.iter().map(|url| format!("[host.\"{url}\"]\n")).collect();
    let hosts = HostsDir::with(&origin.address.to_string(), &toml);
    (Bench::with(hosts.options(), quick_fetch()), hosts)
}

fn url(server: &Server) -> String {
    format!("http://{}", server.address)
}

/// Resolves, streams the layer, drops it, reads from its middle.
async fn everything(bench: &Bench, image: &TestImage, name: &str) -> Result<Arc<Layer>, FetchError> {
    let resolved = bench.client.resolve(&name.parse().unwrap(), &amd64()).await?;
    assert_eq!(resolved.manifest_digest, image.digest());
    assert!(bench.client.tag_digest(&resolved.reference).await?.is_some_and(|d| d == image.digest()));
    let blobs = bench.client.blobs(&resolved.reference);
    let layer = bench.fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await?;
    layer.forget().unwrap();
    read_middle(bench, image, &layer).await?;
    Ok(layer)
}

async fn read_middle(bench: &Bench, image: &TestImage, layer: &Arc<Layer>) -> Result<(), FetchError> {
    let bytes = bench.fetcher.read(layer, 900_000, 5000).await?;
    assert!(bytes == image.layers[0].tar[900_000..905_000], "wrong bytes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_for_everything_and_told_for_whom() {
    let image = one_layer(1000);
    let (origin, mirror) = (origin_of(&image).await, origin_of(&image).await);
    let (bench, _hosts) = bench(&origin, &[url(&mirror)]);
    everything(&bench, &image, &origin.name("team/app:v1")).await.unwrap();
    assert_eq!(origin.log().len(), 0, "the registry was asked");
    let ns = format!("?ns=127.0.0.1%3A{}", origin.address.port());
    assert!(mirror.log().iter().all(|s| s.path.ends_with(&ns)), "{:?}", mirror.log());
    assert!(mirror.log().iter().any(|s| s.path == format!("/v2/team/app/manifests/v1{ns}")));
    assert!(mirror.log().iter().any(|s| s.range().is_some()));
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_paths_and_headers_are_kept_to() {
    let image = one_layer(1010);
    let origin = origin_of(&image).await;
    let (with_path, plain) = (origin_of(&image).await, origin_of(&image).await);
    let toml = format!(
        "[host.\"{}/own/root\"]\ncapabilities = [\"pull\"]\noverride_path = true\n\
         [host.\"{0}/own/root\".header]\nx-token = \"s3cret\"\nx-two = [\"a\", \"b\"]\n\
         [host.\"{}\"]\ncapabilities = [\"push\"]\n",
        url(&with_path),
        url(&plain)
    );
    let hosts = HostsDir::with(&origin.address.to_string(), &toml);
    let bench = Bench::with(hosts.options(), quick_fetch());
    everything(&bench, &image, &origin.name("app:v1")).await.unwrap();
    // Tags only where `resolve` is, content from the mirror.
    assert!(origin.log().iter().all(|s| s.path.starts_with("/v2/app/manifests/v1")), "{:?}", origin.log());
    assert!(!origin.log().is_empty() && plain.log().is_empty());
    assert!(with_path.log().iter().all(|s| s.path.starts_with("/own/root/app/blobs/")));
    assert!(with_path.log().iter().all(|s| s.header("x-token") == Some("s3cret")));
    assert!(with_path.log().iter().all(|s| s.headers.get_all("x-two").iter().count() == 2));
    assert!(origin.log().iter().all(|s| s.header("x-token").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_at_a_mirror_comes_from_the_next_host() {
    let image = one_layer(1020);
    let challenge = || {
        Response::builder()
            .status(401)
            .header("www-authenticate", "Basic realm=\"m\"")
            .body(full(""))
            .unwrap()
    };
    let limited = || Response::builder().status(429).header("retry-after", "3000").body(full("")).unwrap();
    let html = || Response::builder().header("content-type", "text/html").body(full("<p>")).unwrap();
    type Answer = Box<dyn Fn() -> Reply + Send + Sync>;
    let answers: Vec<(&str, Answer)> = vec![
        ("404", Box::new(|| status(404))),
        ("500", Box::new(|| status(500))),
        ("403", Box::new(|| status(403))),
        ("401", Box::new(challenge)),
        ("429", Box::new(limited)),
        ("a portal", Box::new(html)),
        ("silence", Box::new(|| Response::new(stalled(&Bytes::from_static(b"x"), 1)))),
    ];
    for (what, answer) in answers {
        let origin = origin_of(&image).await;
        let mirror = Server::start(move |_| answer()).await;
        let (bench, _hosts) = bench(&origin, &[url(&mirror)]);
        let began = Instant::now();
        everything(&bench, &image, &origin.name("app:v1")).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        assert!(!mirror.log().is_empty() && !origin.log().is_empty(), "{what}");
    }
    // If nobody has it, the registry's word counts.
    let none = Server::start(|_| status(404)).await;
    let denied = Server::start(|_| status(403)).await;
    let (bench, _hosts) = bench(&none, &[url(&denied)]);
    let error = everything(&bench, &image, &none.name("app:v1")).await.unwrap_err();
    assert!(matches!(error, FetchError::ImageNotFound { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_breaks_in_the_middle_is_left_there() {
    let image = one_layer(1030);
    let served = image.clone();
    let mirror = Server::start(move |seen| {
        if seen.path.contains(&image_layer(&served)) {
            return with_body(seen, &served.layers[0].blob, |b| broken(b, 100_000.min(b.len() / 2)));
        }
        serve(&served, seen)
    })
    .await;
    let origin = origin_of(&image).await;
    let (bench, _hosts) = bench(&origin, &[url(&mirror)]);
    let layer = everything(&bench, &image, &origin.name("app:v1")).await.unwrap();
    let log = origin.log();
    let first = log.iter().find(|s| s.path.contains(&image_layer(&image))).unwrap();
    assert!(first.range().is_some_and(|(start, _)| start > 0), "what the mirror gave was asked for again");
    bench.fetcher.hydrate(&layer, no_progress()).await.unwrap();
}

fn image_layer(image: &TestImage) -> String {
    image.layers[0].digest().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_mirror_is_remembered_and_tried_again() {
    let image = one_layer(1040);
    let origin = origin_of(&image).await;
    let dead = nobody();
    let hosts = HostsDir::with(&origin.address.to_string(), &format!("[host.\"http://{dead}\"]"));
    let options = ClientOptions { mirror_rest: Duration::from_millis(300), ..hosts.options() };
    let bench = Bench::with(options, quick_fetch());
    let before = bench.client.stats().requests;
    let layer = everything(&bench, &image, &origin.name("app:v1")).await.unwrap();
    let to_dead = bench.client.stats().requests - before - origin.log().len() as u64;
    assert!(to_dead <= 3, "{to_dead} requests went to a dead mirror");
    let reference = origin.name("app:v1").parse().unwrap();
    let report = bench.client.hosts(&reference).await.unwrap();
    assert_eq!((report.len(), report[0].role.as_str()), (2, "mirror"));

    // It comes to life: found out by itself, after a while.
    let listener = tokio::net::TcpListener::bind(dead).await.unwrap();
    let (target, relayed) = (origin.address, Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&relayed);
    let relay = tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let mut to = tokio::net::TcpStream::connect(target).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while relayed.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "the mirror is never tried again");
        layer.forget().unwrap();
        read_middle(&bench, &image, &layer).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    relay.abort();
}

/// A server that answers with other bytes of the right length wherever `spoil` says so.
async fn liar(image: &TestImage, spoil: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Server {
    let served = image.clone();
    Server::start(move |seen| {
        if !spoil(seen) {
            return serve(&served, seen);
        }
        let change = |bytes: &Bytes| {
            let mut bytes = bytes.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
            bytes
        };
        if seen.path.contains("/manifests/") {
            return Response::new(full(change(&served.manifest)));
        }
        let digest = seen.path.rsplit('/').next().unwrap().split('?').next().unwrap();
        let blob: Bytes = change(&served.blob(digest).unwrap()).into();
        blob_reply(seen, &blob)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_a_mirror_are_fetched_from_the_next_host() {
    let image = one_layer(1050);
    let config = Digest::of(&image.config).to_string();
    let layer = image_layer(&image);
    let origin = origin_of(&image).await;

    // The config, and the layer as a stream: each mirror is found out once.
    let (first, second) = (liar(&image, move |s| s.path.contains(&config)).await, {
        let layer = layer.clone();
        liar(&image, move |s| s.path.contains(&layer)).await
    });
    let (bench1, _h1) = bench(&origin, &[url(&first), url(&second)]);
    everything(&bench1, &image, &origin.name("app:v1")).await.unwrap();

    // Two liars before the registry, and spans only.
    let spoil = Arc::new(AtomicBool::new(false));
    let mut liars = Vec::new();
    for _ in 0..2 {
        let spoil = Arc::clone(&spoil);
        liars.push(liar(&image, move |_| spoil.load(Ordering::SeqCst)).await);
    }
    let (bench2, _h2) = bench(&origin, &[url(&liars[0]), url(&liars[1])]);
    let read = everything(&bench2, &image, &origin.name("app:v1")).await.unwrap();
    spoil.store(true, Ordering::SeqCst);
    read.forget().unwrap();
    read_middle(&bench2, &image, &read).await.unwrap();
    assert!(bench2.fetcher.stats().corrupt_spans >= 2);
    // From now on they are not asked for this blob.
    let asked = |s: &Server| s.count(|s| s.path.contains(&layer));
    let before = (asked(&liars[0]), asked(&liars[1]));
    read.forget().unwrap();
    read_middle(&bench2, &image, &read).await.unwrap();
    bench2.fetcher.hydrate(&read, no_progress()).await.unwrap();
    assert_eq!((asked(&liars[0]), asked(&liars[1])), before);
    assert!(std::fs::read(read.data_path()).unwrap() == image.layers[0].tar);

    // Whole streams by a first start.
    let (bench3, _h3) = bench(&origin, &[url(&liars[0]), url(&liars[1])]);
    let pinned = format!("{}/app@{}", origin.address, image.digest());
    let resolved = bench3.resolve(&pinned).await;
    let blobs = bench3.client.blobs(&resolved.reference);
    bench3.fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await.unwrap();
    // What a tag leads to is a matter of trust: who may not be asked for that cannot lie about it.
    let toml = format!("[host.\"{}\"]\ncapabilities = [\"pull\"]", url(&liars[0]));
    let hosts = HostsDir::with(&origin.address.to_string(), &toml);
    let bench4 = Bench::with(hosts.options(), quick_fetch());
    everything(&bench4, &image, &origin.name("app:v1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_without_ranges_is_not_asked_for_parts_again() {
    let image = TestImage::new(vec![TestLayer::plain(tar(1060, 12, 1_000_000))]);
    let served = image.clone();
    let mirror = Server::start(move |seen| {
        let mut plain = seen.clone();
        plain.headers.remove("range");
        serve(&served, &plain)
    })
    .await;
    let origin = origin_of(&image).await;
    let (bench, _hosts) = bench(&origin, &[url(&mirror)]);
    let resolved = bench.resolve(&origin.name("app:v1")).await;
    let blobs = bench.client.blobs(&resolved.reference);
    let layer = bench.fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await.unwrap();
    layer.forget().unwrap();
    for at in [11_500_000u64, 10_000_000, 9_500_000] {
        let bytes = bench.fetcher.read(&layer, at, 10).await.unwrap();
        assert_eq!(bytes, image.layers[0].tar[at as usize..at as usize + 10]);
    }
    let parts = |s: &Server| s.count(|s| s.is_blob() && s.range().is_some());
    assert_eq!(parts(&mirror), 1);
    assert!(parts(&origin) >= 1);
    assert!(!layer.is_hydrated(), "one mirror's weakness made a stream of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_only_where_they_belong() {
    let image = one_layer(1070);
    let basic = |pair: &str| format!("Basic {}", base64::prelude::BASE64_STANDARD.encode(pair));
    let guarded = |image: &TestImage, wanted: String| {
        let served = image.clone();
        move |seen: &Seen| {
            if seen.header("authorization") == Some(&wanted) {
                return serve(&served, seen);
            }
            let realm = "Basic realm=\"r\"";
            Response::builder().status(401).header("www-authenticate", realm).body(full("")).unwrap()
        }
    };
    let origin = Server::start(guarded(&image, basic("ann:origin"))).await;
    let mirror = Server::start(guarded(&image, basic("bob:mirror"))).await;
    let nosy = Server::start(guarded(&image, basic("nobody:knows"))).await;
    let hosts = HostsDir::with(
        &origin.address.to_string(),
        &format!("[host.\"{}\"]\n[host.\"{}\"]\ncapabilities = [\"pull\"]", url(&nosy), url(&mirror)),
    );
    let file = hosts.dir.path().join("config.json");
    let auths = serde_json::json!({"auths": {
        origin.address.to_string(): {"username": "ann", "password": "origin"},
        mirror.address.to_string(): {"username": "bob", "password": "mirror"}}});
    std::fs::write(&file, auths.to_string()).unwrap();
    let options = ClientOptions { credential_files: vec![file], ..hosts.options() };
    let bench = Bench::with(options, quick_fetch());
    everything(&bench, &image, &origin.name("app:v1")).await.unwrap();
    let shown = |s: &Server| -> Vec<String> {
        let log = s.log();
        let mut values: Vec<String> =
            log.iter().filter_map(|s| s.header("authorization").map(str::to_owned)).collect();
        values.dedup();
        values
    };
    assert_eq!(shown(&nosy), Vec::<String>::new());
    assert_eq!(shown(&mirror), [basic("bob:mirror")]);
    assert_eq!(shown(&origin), [basic("ann:origin")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_conf_leads_elsewhere() {
    let image = one_layer(1080);
    let (origin, mirror) = (origin_of(&image).await, origin_of(&image).await);
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("registries.conf");
    let text = format!(
        "[[registry]]\nprefix = \"made-up.example/team\"\nlocation = \"{}/there\"\n\
         [[registry.mirror]]\nlocation = \"{}/cache\"\npull-from-mirror = \"digest-only\"\n",
        origin.address, mirror.address
    );
    std::fs::write(&conf, text).unwrap();
    let files = HostFiles { registries_conf: vec![conf.clone()], ..HostFiles::default() };
    let bench = Bench::with(ClientOptions { hosts: files, ..crate::common::quick_client() }, quick_fetch());
    everything(&bench, &image, "made-up.example/team/app:v1").await.unwrap();
    assert!(origin.log().iter().all(|s| s.path.starts_with("/v2/there/app/manifests/v1")));
    assert!(mirror.log().iter().all(|s| s.path.starts_with("/v2/cache/app/blobs/")), "{:?}", mirror.log());
    std::fs::write(&conf, "[[registry]]\nlocation = [").unwrap();
    let error = Bench::with(
        ClientOptions {
            hosts: HostFiles { registries_conf: vec![conf], ..HostFiles::default() },
            ..crate::common::quick_client()
        },
        quick_fetch(),
    );
    let error = everything(&error, &image, "made-up.example/team/app:v1").await.unwrap_err();
    assert!(error.to_string().contains("registries.conf, line 2"), "{error}");
}
