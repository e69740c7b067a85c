//! Against servers that misbehave: limits, broken and wrong bodies, ranges.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::pull::{ingest, ingest_first, is_layer, one_layer};
use crate::common::server::{Server, broken, full, serve, stalled, status, with_body};
use crate::common::{Bench, TestImage, TestLayer, no_progress, quick_client, quick_fetch, tar};
use bytes::Bytes;
use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError, FetchOptions};
use lazyrun_index::{Digest, IndexError};

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_manifest_is_told_as_what_is_known() {
    for (tags, missing_image) in
        [(404u16, true), (200, false), (401, false), (403, false), (500, false), (429, false)]
    {
        let server =
            Server::start(move |seen| if seen.path.contains("/tags/") { status(tags) } else { status(404) })
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
        blob: crate::common::gzip(&[7; 5000]).into(),
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
