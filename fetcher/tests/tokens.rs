//! Logging in: tokens of all sorts, and who waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::pull::{base64, challenge, ingest, logged_in, one_layer};
use crate::common::server::{Server, full, serve, status};
use crate::common::{Bench, TestImage, amd64, quick_client, quick_fetch};
use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError};

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

/// Where each hop of a redirect within the registry wants a token of its own.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_good_for_one_request_outlast_a_redirect() {
    let image = one_layer(107);
    let served = image.clone();
    let unused = std::sync::Mutex::new(std::collections::HashSet::new());
    let server = Server::start(move |seen| {
        let mut unused = unused.lock().unwrap();
        if seen.path.starts_with("/token") {
            let token = format!("t{}", seen.before);
            unused.insert(format!("Bearer {token}"));
            return Response::new(full(format!("{{\"token\":\"{token}\"}}")));
        }
        if !seen.header("authorization").is_some_and(|a| unused.remove(a)) {
            let host = seen.header("host").unwrap();
            return challenge(&format!("Bearer realm=\"http://{host}/token\",service=\"reg\""));
        }
        if seen.path.starts_with("/v2/app/blobs/") {
            let there = seen.path.replace("/v2/app/", "/v2/moved/app/");
            return Response::builder().status(307).header("location", there).body(full("")).unwrap();
        }
        serve(&served, seen)
    })
    .await;
    let bench = Bench::new();
    let layer = ingest(&bench, &server.name("app:v1")).await.unwrap();
    layer.forget().unwrap();
    assert_eq!(bench.fetcher.read(&layer, 700_000, 10).await.unwrap(), image.layers[0].tar[700_000..700_010]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_slow_token_service_holds_up_no_other_repository() {
    let image = one_layer(106);
    let slow = churning(&image, "slow", Duration::from_millis(1500)).await;
    let fast = churning(&image, "", Duration::ZERO).await;
    let bench =
        Bench::with(ClientOptions { stall_timeout: Duration::from_secs(5), ..quick_client() }, quick_fetch());
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
