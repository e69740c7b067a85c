//! Redirects: what is remembered of them, and what is not shown to whom they lead to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::pull::{base64, challenge, ingest, is_layer, logged_in, one_layer};
use crate::common::server::{Server, blob_reply, full, serve, stalled, status, with_body};
use crate::common::{Bench, TestImage, quick_client, quick_fetch};
use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError};

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
    // It stalls: the registry is asked anew, and leads elsewhere, to somebody who is gone soon after.
    let gone = relay(second.address).await;
    stalls.store(true, Ordering::SeqCst);
    *place.lock().unwrap() = gone.address;
    read().await;
    assert!(second.log().len() == 1, "{:?}", second.log());
    stalls.store(false, Ordering::SeqCst);
    *place.lock().unwrap() = first.address;
    gone.end().await;
    let asked = first.log().len();
    read().await;
    assert!(first.log().len() > asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_request_asks_for_another_place() {
    let image = one_layer(126);
    let cdn_for = |image: &TestImage| {
        let stored = image.clone();
        Server::start(move |seen| {
            blob_reply(seen, &stored.blob(seen.path.split('/').nth(1).unwrap()).unwrap())
        })
    };
    let (first, second) = (cdn_for(&image).await, cdn_for(&image).await);
    let silent = relay(first.address).await;
    let place = Arc::new(std::sync::Mutex::new(silent.address));
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
    let client = ClientOptions { stall_timeout: Duration::from_secs(60), ..quick_client() };
    let bench = Bench::with(client, quick_fetch());
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    // As a host that drops all packets: it is up for whoever connects, and says nothing for longer than a fault may take.
    *place.lock().unwrap() = second.address;
    silent.fall_silent();
    for _ in 0..2 {
        layer.forget().unwrap();
        let bytes = bench.fetcher.read(&layer, 900_000, 10).await.unwrap();
        assert_eq!(bytes, image.layers[0].tar[900_000..900_010]);
    }
    assert_eq!(server.count(|s| is_layer(&image, s)), 2, "the new place is remembered");
    assert_eq!((second.log().len(), bench.client.stats().hedges_won), (2, 1));
}

/// Passes connections on until it ends, and they with it.
struct Relay {
    address: std::net::SocketAddr,
    silent: Arc<tokio::sync::Notify>,
    task: tokio::task::JoinHandle<()>,
}

async fn relay(target: std::net::SocketAddr) -> Relay {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let silent = Arc::new(tokio::sync::Notify::new());
    let told = Arc::clone(&silent);
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (mut from, _) = tokio::select! {
                accepted = listener.accept() => accepted.unwrap(),
                () = told.notified() => break,
            };
            let mut to = tokio::net::TcpStream::connect(target).await.unwrap();
            connections.spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
        drop(connections);
        let mut held = Vec::new();
        while let Ok(connection) = listener.accept().await {
            held.push(connection);
        }
    });
    Relay { address, silent, task }
}

impl Relay {
    /// Ends all connections and takes new ones without a word.
    fn fall_silent(&self) {
        self.silent.notify_one();
    }

    async fn end(self) {
        self.task.abort();
        let _ = self.task.await;
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
