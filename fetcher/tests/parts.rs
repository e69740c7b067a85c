//! Spans that lie apart by one request, and what is done where a registry does not do that.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::registry::Registry;
use crate::common::server::{Reply, Seen, Server, broken, full, serve, status};
use crate::common::{Bench, TestImage, TestLayer, no_progress, quick_client, quick_fetch, tar};
use bytes::Bytes;
use hyper::Response;
use lazyrun_fetcher::{ClientOptions, FetchError, FetchOptions, Layer};

/// Spans as a profile would name them: apart, and not in the blob's order.
const WANTED: [Range<usize>; 4] = [20..22, 3..4, 34..35, 9..10];

fn image(seed: u64) -> TestImage {
    TestImage::new(vec![TestLayer::gzip(tar(seed, 40, 60_000))])
}

/// A layer with an index and no data, and the bench that has it. Spans that nobody asked for are not fetched along.
async fn indexed(name: &str) -> (Bench, Arc<Layer>) {
    let client = ClientOptions { stall_timeout: Duration::from_secs(5), ..quick_client() };
    let stream =
        lazyrun_index::StreamOptions { span_size: 32 << 10, span_len: 32 << 10, ..quick_fetch().stream };
    let bench = Bench::with(client, FetchOptions { stream, ..quick_fetch() });
    let resolved = bench.resolve(name).await;
    let blobs = bench.client.blobs(&resolved.reference);
    let layer = bench.fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await.unwrap();
    layer.forget().unwrap();
    assert!(layer.index().span_count() > 35, "{} spans", layer.index().span_count());
    (bench, layer)
}

fn wanted() -> impl Iterator<Item = usize> {
    WANTED.iter().flat_map(Clone::clone)
}

/// Prefetches and checks that it is there, and right.
async fn prefetch(bench: &Bench, layer: &Arc<Layer>, tar: &[u8]) {
    bench.fetcher.prefetch(layer, &WANTED).await.unwrap();
    for number in wanted() {
        let span = layer.index().span(number);
        let mut buffer = vec![0; span.len as usize];
        assert_eq!(layer.read_local(span.offset, &mut buffer).unwrap(), Some(buffer.len()), "span {number}");
        let at = span.offset as usize;
        assert!(buffer == tar[at..at + buffer.len()], "span {number} is wrong");
    }
}

/// A registry with habits of its own where several ranges are asked for.
async fn serving(
    image: &TestImage,
    parts: impl Fn(&Seen, &Bytes) -> Reply + Send + Sync + 'static,
) -> Server {
    let image = image.clone();
    Server::start(move |seen| {
        if seen.header("range").is_some_and(|range| range.contains(',')) {
            return parts(seen, &image.layers[0].blob);
        }
        serve(&image, seen)
    })
    .await
}

fn several(seen: &Seen) -> bool {
    seen.header("range").is_some_and(|range| range.contains(','))
}

fn single(seen: &Seen) -> bool {
    seen.range().is_some()
}

/// What a good server sends for several ranges; `change` has its way with them.
fn multipart(seen: &Seen, blob: &Bytes, change: impl Fn(&mut Vec<(usize, usize)>)) -> Bytes {
    let list = seen.header("range").unwrap().strip_prefix("bytes=").unwrap();
    let pair = |range: &str| {
        let (first, last) = range.split_once('-').unwrap();
        (first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap() + 1)
    };
    let mut ranges = list.split(',').map(pair).collect();
    change(&mut ranges);
    let mut body = Vec::new();
    for (start, end) in ranges {
        let head = format!("\r\n--AbC\r\nContent-Range: bytes {start}-{}/{}\r\n\r\n", end - 1, blob.len());
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(&blob[start..end]);
    }
    body.extend_from_slice(b"\r\n--AbC--\r\n");
    body.into()
}

fn answer(body: crate::common::server::Body) -> Reply {
    let kind = "multipart/byteranges; boundary=AbC";
    Response::builder().status(206).header("content-type", kind).body(body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_brings_what_lies_apart() {
    let registry = Registry::start().await;
    let image = image(1);
    let name = registry.push(&image, "app", "v1").await;
    let (bench, layer) = indexed(&name).await;
    let before = bench.client.stats();
    prefetch(&bench, &layer, &image.layers[0].tar).await;
    let after = bench.client.stats();
    assert_eq!(after.requests - before.requests, 1);
    let bytes: u64 = wanted().map(|i| layer.index().span(i).blob_len).sum();
    let got = after.bytes - before.bytes;
    assert!(got >= bytes - 8 && got < bytes + 2000, "{got} bytes came for {bytes}");
    let here = (0..layer.index().span_count()).filter(|&i| !layer.lacks_span(i)).count();
    assert_eq!(here, wanted().count(), "more came than was wanted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_refuses_is_asked_one_by_one() {
    let habits: [fn(&Seen, &Bytes) -> Reply; 4] = [
        |_, _| status(501),
        |_, _| status(416),
        |_, blob| Response::new(full(blob.clone())),
        // One range that holds them all, as RFC 9110 allows.
        |seen, blob| {
            let mut bounds = (usize::MAX, 0);
            for range in seen.header("range").unwrap()[6..].split(',') {
                let (first, last) = range.split_once('-').unwrap();
                bounds =
                    (bounds.0.min(first.parse().unwrap()), bounds.1.max(last.parse::<usize>().unwrap() + 1));
            }
            let (start, end) = bounds;
            Response::builder()
                .status(206)
                .header("content-range", format!("bytes {start}-{}/{}", end - 1, blob.len()))
                .body(full(blob.slice(start..end)))
                .unwrap()
        },
    ];
    for (seed, habit) in (10..).zip(habits) {
        let image = image(seed);
        let server = serving(&image, habit).await;
        let (bench, layer) = indexed(&server.name("app:v1")).await;
        prefetch(&bench, &layer, &image.layers[0].tar).await;
        assert_eq!((server.count(several), server.count(single) > 0), (1, true), "habit {seed}");
        // It is not tried again soon.
        layer.forget().unwrap();
        prefetch(&bench, &layer, &image.layers[0].tar).await;
        assert_eq!(server.count(several), 1, "habit {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_gone_is_no_refusal() {
    let image = image(15);
    let lost = Arc::new(AtomicBool::new(false));
    let (gone, served) = (Arc::clone(&lost), image.clone());
    let server = Server::start(move |seen| match (seen.is_blob(), several(seen)) {
        (true, _) if gone.load(Ordering::SeqCst) => status(404),
        (true, true) => answer(full(multipart(seen, &served.layers[0].blob, |_| ()))),
        _ => serve(&served, seen),
    })
    .await;
    let (bench, layer) = indexed(&server.name("app:v1")).await;
    lost.store(true, Ordering::SeqCst);
    let error = bench.fetcher.prefetch(&layer, &WANTED).await.unwrap_err();
    assert!(matches!(error, FetchError::BlobNotFound { .. }), "{error}");
    assert!(layer.is_origin_gone());
    lost.store(false, Ordering::SeqCst);
    // Requests for one run each, given up when another had failed, may still come in or hold their spans: only this kind
    // tells, and there may be two of it.
    let before = server.count(several);
    prefetch(&bench, &layer, &image.layers[0].tar).await;
    assert!(server.count(several) > before, "the registry was taken for one that refuses");
    assert!(!layer.is_origin_gone());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_parts_harm_nobody() {
    let habits: [fn(&Seen, &Bytes) -> Reply; 5] = [
        |seen, blob| answer(full(multipart(seen, blob, |ranges| ranges.reverse()))),
        |seen, blob| answer(full(multipart(seen, blob, |ranges| ranges.truncate(2)))),
        |seen, blob| answer(full(multipart(seen, blob, |ranges| ranges[1].1 -= 1))),
        |seen, blob| {
            let body = multipart(seen, blob, |_| ());
            answer(broken(&body, body.len() / 2))
        },
        // Right heads and wrong bytes: the digests tell.
        |seen, blob| {
            let mut body = multipart(seen, blob, |_| ()).to_vec();
            let middle = body.len() / 2;
            body[middle] ^= 1;
            answer(full(body))
        },
    ];
    for (seed, habit) in (20..).zip(habits) {
        let image = image(seed);
        let server = serving(&image, habit).await;
        let (bench, layer) = indexed(&server.name("app:v1")).await;
        prefetch(&bench, &layer, &image.layers[0].tar).await;
        let asked = (server.count(several), server.count(single));
        // The second try may well bring all that the first one left.
        assert!(matches!(asked, (1, 1..) | (2, _)), "habit {seed}: {asked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_takes_what_it_needs_from_a_request_that_hangs() {
    let image = image(30);
    let server = serving(&image, |seen, blob| {
        let body = multipart(seen, blob, |_| ());
        answer(crate::common::server::stalled(&body, 10))
    })
    .await;
    let (bench, layer) = indexed(&server.name("app:v1")).await;
    let (fetcher, ahead) = (bench.fetcher.clone(), Arc::clone(&layer));
    let prefetch = tokio::spawn(async move { fetcher.prefetch(&ahead, &WANTED).await });
    let asked = async {
        while server.count(several) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), asked).await.unwrap();
    let span = layer.index().span(9);
    let got = bench.fetcher.read(&layer, span.offset, 1000).await.unwrap();
    assert!(got[..] == image.layers[0].tar[span.offset as usize..][..1000]);
    assert!(!prefetch.is_finished(), "the fault waited until the request was given up");
    // After its patience the prefetch goes on without parts.
    prefetch.await.unwrap().unwrap();
    assert!(wanted().all(|number| layer.has_span(number)));
}
