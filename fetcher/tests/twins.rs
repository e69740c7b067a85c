//! Files that layers share by content: what one layer lacks and another has comes without a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::claim::{Claim, Members};
use crate::common::pull::ingest;
use crate::common::registry::Registry;
use crate::common::server::{Server, serve};
use crate::common::{Bench, TestImage, TestLayer, no_progress, quick_client, quick_fetch, tar};
use lazyrun_fetcher::{CacheLimit, CacheLimits, FetchOptions, Layer, LayerStore, Origin, OriginKind, Trust};
use lazyrun_index::{Digest, DigestOf};

const SIZE: usize = 100_001;

/// A file of an image.
#[derive(Clone)]
struct Made {
    path: String,
    content: Vec<u8>,
    shared: bool,
}

/// `count` files; every tenth is the one of this image alone.
fn files(image: u64, count: u64) -> Vec<Made> {
    let made = |i| {
        let shared = i % 10 != 4;
        let seed = if shared { 7000 + i } else { 8000 + image * 1000 + i };
        let size = SIZE + 777 * i as usize;
        Made { path: format!("dir/file-{i}"), content: tar(seed, 1, size)[512..512 + size].to_vec(), shared }
    };
    (0..count).map(made).collect()
}

fn tar_of(files: &[Made], mtime: u64) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for file in files {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(file.content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(mtime);
        builder.append_data(&mut header, &file.path, file.content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Two images of one layer each in a registry, both whole.
struct Setting {
    registry: Registry,
    bench: Bench,
    first: Arc<Layer>,
    second: Arc<Layer>,
    files: Vec<Made>,
    tar: Vec<u8>,
}

impl Setting {
    /// `mtimes` are those of all files of the first and second image.
    async fn new(mtimes: [u64; 2]) -> Setting {
        let registry = Registry::start().await;
        let fetch = FetchOptions { fault_timeout: Duration::from_secs(3), ..quick_fetch() };
        let bench = Bench::with(quick_client(), fetch);
        let mut layers = Vec::new();
        for (image, mtime) in mtimes.into_iter().enumerate() {
            let made = TestImage::new(vec![TestLayer::gzip(tar_of(&files(image as u64, 30), mtime))]);
            let name = registry.push(&made, &format!("team/image{image}"), "v1").await;
            layers.push(ingest(&bench, &name).await.unwrap());
        }
        let [first, second] = <[Arc<Layer>; 2]>::try_from(layers).unwrap();
        let files = files(1, 30);
        let tar = tar_of(&files, mtimes[1]);
        assert!(first.is_hydrated() && second.is_hydrated() && first.diff_id() != second.diff_id());
        Setting { registry, bench, first, second, files, tar }
    }

    fn requests(&self) -> u64 {
        self.bench.client.stats().requests
    }

    /// Where a file is in the second layer.
    fn place(&self, file: &Made) -> u64 {
        let index = self.second.index();
        let entry = index.entries().find(|e| e.path() == file.path.as_bytes()).unwrap();
        entry.extents().next().unwrap().layer_offset
    }

    async fn reads_right(&self, offset: u64, len: usize) -> bool {
        let bytes = self.bench.fetcher.read(&self.second, offset, len).await.unwrap();
        bytes == self.tar[offset as usize..offset as usize + len]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_files_come_without_a_request_and_others_by_one() {
    let s = Setting::new([1_700_000_000; 2]).await;
    s.second.forget().unwrap();
    let before = s.requests();
    let mut shared = 0;
    for file in s.files.iter().filter(|file| file.shared) {
        assert!(s.reads_right(s.place(file), file.content.len()).await, "{}", file.path);
        shared += file.content.len() as u64;
    }
    assert_eq!(s.requests(), before);
    let stats = s.bench.fetcher.stats();
    assert_eq!((stats.fault_requests, stats.failed_faults), (0, 0));
    assert!(stats.shared_bytes >= shared, "{} of {shared}", stats.shared_bytes);
    // Most of it was filled by whole spans, which are here for the next reader.
    assert!(s.second.local_bytes() > s.second.index().layer_size() / 2, "{}", s.second.local_bytes());
    for file in s.files.iter().filter(|file| !file.shared) {
        let before = s.requests();
        assert!(s.reads_right(s.place(file), file.content.len()).await, "{}", file.path);
        assert!(s.requests() > before, "{} came from nowhere", file.path);
    }
    assert!(s.second.check(false).unwrap().bad.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_registry_gone_shared_files_are_still_there_after_a_restart() {
    let s = Setting::new([1_700_000_000; 2]).await;
    s.second.forget().unwrap();
    let id = s.second.id();
    let places: Vec<(u64, Made)> = s.files.iter().map(|file| (s.place(file), file.clone())).collect();
    let Setting { registry, bench, first, second, .. } = s;
    registry.stop();
    drop((first, second));
    // The new process has nothing open; the layer to copy from is found by what was written down.
    let store = LayerStore::open(bench.dir.path()).unwrap();
    let fetcher = lazyrun_fetcher::Fetcher::new(store, quick_fetch());
    let second = fetcher.store().by_id(id).unwrap().unwrap();
    for (place, file) in places {
        let read = fetcher.read(&second, place, file.content.len()).await;
        match file.shared {
            true => assert!(read.unwrap() == file.content, "{}", file.path),
            false => drop(read.unwrap_err()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_alone_are_answered_where_headers_differ() {
    let s = Setting::new([1_600_000_000, 1_700_000_000]).await;
    s.second.forget().unwrap();
    let before = s.requests();
    for file in s.files.iter().filter(|file| file.shared) {
        assert!(s.reads_right(s.place(file), file.content.len()).await, "{}", file.path);
        assert!(s.reads_right(s.place(file) + 5000, 4096).await, "{}", file.path);
    }
    assert_eq!(s.requests(), before);
    // The header itself is not what it is there.
    let file = s.files.iter().find(|file| file.shared).unwrap();
    assert!(s.reads_right(s.place(file) - 512, 1024).await);
    assert!(s.requests() > before);
    assert!(s.second.check(false).unwrap().bad.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn hydration_and_prefetch_ask_only_for_what_is_nowhere() {
    let s = Setting::new([1_700_000_000; 2]).await;
    let spans = s.second.index().span_count();
    for prefetch in [false, true] {
        s.second.forget().unwrap();
        let before = s.bench.client.stats().bytes;
        if prefetch {
            let all: Vec<_> = (0..spans).map(|span| span..span + 1).collect();
            s.bench.fetcher.prefetch(&s.second, &all).await.unwrap();
        } else {
            s.bench.fetcher.hydrate(&s.second, no_progress()).await.unwrap();
        }
        assert!(s.second.is_hydrated());
        let (came, blob) = (s.bench.client.stats().bytes - before, s.second.index().blob_size());
        assert!(came > 0 && came < blob * 2 / 5, "{came} of {blob} bytes came (prefetch: {prefetch})");
        assert!(std::fs::read(s.second.data_path()).unwrap() == s.tar);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_evicted_all_the_time_gives_right_bytes() {
    let s = Arc::new(Setting::new([1_700_000_000; 2]).await);
    let done = Arc::new(AtomicBool::new(false));
    let (other, stop) = (Arc::clone(&s), Arc::clone(&done));
    let evicting = tokio::spawn(async move {
        let mut rounds = 0;
        while !stop.load(Ordering::SeqCst) {
            let first = Arc::clone(&other.first);
            tokio::task::spawn_blocking(move || first.forget()).await.unwrap().unwrap();
            other.bench.fetcher.hydrate(&other.first, no_progress()).await.unwrap();
            rounds += 1;
        }
        rounds
    });
    for round in 0..6 {
        let second = Arc::clone(&s.second);
        tokio::task::spawn_blocking(move || second.forget()).await.unwrap().unwrap();
        for from in (0..s.tar.len() - 70_000).step_by(70_000) {
            assert!(s.reads_right(from as u64, 70_000).await, "wrong bytes at {from} in round {round}");
        }
    }
    done.store(true, Ordering::SeqCst);
    assert!(evicting.await.unwrap() > 0);
    assert!(s.first.check(false).unwrap().bad.is_empty() && s.second.check(false).unwrap().bad.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn room_for_shared_files_is_made_as_for_others() {
    let s = Setting::new([1_700_000_000; 2]).await;
    s.second.forget().unwrap();
    // Room for about one and a half of them: the source itself is evicted as it is copied from.
    let limit = s.first.index().layer_size() * 3 / 2;
    let limits = CacheLimits { limit: Some(CacheLimit::Bytes(limit)), reserve: 0 };
    s.bench.fetcher.store().set_limits(limits).unwrap();
    for from in (0..s.tar.len() - 60_000).step_by(60_000) {
        assert!(s.reads_right(from as u64, 60_000).await, "wrong bytes at {from}");
        assert!(s.bench.fetcher.store().disk_bytes().unwrap() <= limit);
    }
    assert!(s.bench.fetcher.stats().shared_bytes > 0);
}

fn origin() -> Origin {
    Origin { kind: OriginKind::Own, artifact: Some(Digest::of(b"artifact")), trust: Trust::Bound }
}

/// An image with a file that is not everybody's, local as a whole, and a layer whose index is claimed.
struct Claimed {
    bench: Bench,
    _servers: [Server; 2],
    made: Members,
    secret: Vec<u8>,
}

impl Claimed {
    async fn new() -> Claimed {
        let made = Members::new(600, 12, SIZE);
        let secret = tar(601, 1, SIZE)[512..512 + SIZE].to_vec();
        let file =
            |path: &str, content: &[u8]| Made { path: path.into(), content: content.into(), shared: true };
        // It also has what file 5 of the other layer truly is.
        let private = tar_of(&[file("secret", &secret), file("same", &made.files[5].1)], 1_700_000_000);
        let private = TestImage::new(vec![TestLayer::gzip(private)]);
        let public = TestImage::new(vec![made.layer.clone()]);
        let bench = Bench::new();
        let [private, public] = [private, public].map(|image| Server::start(move |seen| serve(&image, seen)));
        let servers = [private.await, public.await];
        ingest(&bench, &servers[0].name("private:v1")).await.unwrap();
        let image = bench.resolve(&servers[1].name("public:v1")).await;
        let blobs = bench.client.blobs(&image.reference);
        bench.fetcher.add_source(image.layers[0].diff_id, image.layers[0].clone(), blobs);
        Claimed { bench, _servers: servers, made, secret }
    }

    fn adopt(&self, claim: &Claim) -> Arc<Layer> {
        self.bench.fetcher.store().adopt(&claim.bytes(&self.made), &origin()).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claimed_index_gets_nothing_by_naming_a_digest() {
    let s = Claimed::new().await;
    let told = Digest::of(&s.secret);
    let claim = Claim { named: Some(told), ..Claim::tar(DigestOf::Decoded) };
    let layer = s.adopt(&claim);
    let entry = layer.index().entry(3);
    assert!(entry.content() == Some(told) && layer.index().spans().any(|span| span.digest == told));
    let at = claim.place_of(&s.made, &s.made.files[3].0);
    // The span's digest is that of the secret, so what the registry has is refused, and the proof finds the lie.
    let read = s.bench.fetcher.read(&layer, at, SIZE).await;
    assert!(read.is_err(), "{} bytes came, the secret: {}", SIZE, read.unwrap() == s.secret);
    assert_eq!(s.bench.fetcher.stats().shared_bytes, 0);
    let error = s.bench.fetcher.hydrate(&layer, no_progress()).await.unwrap_err();
    assert!(matches!(error, lazyrun_fetcher::FetchError::Lie { .. }), "{error}");
    assert!(layer.lie().is_some() && s.bench.fetcher.read(&layer, at, 10).await.is_err());
    assert_eq!(s.bench.fetcher.stats().shared_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claimed_index_shares_once_it_is_proven() {
    let s = Claimed::new().await;
    let claim = Claim::tar(DigestOf::Blob);
    let layer = s.adopt(&claim);
    let (path, content) = &s.made.files[5];
    let at = claim.place_of(&s.made, path);
    let before = s.bench.client.stats().requests;
    assert!(s.bench.fetcher.read(&layer, at, SIZE).await.unwrap() == *content);
    assert!(s.bench.client.stats().requests > before && s.bench.fetcher.stats().shared_bytes == 0);
    s.bench.fetcher.hydrate(&layer, no_progress()).await.unwrap();
    layer.forget().unwrap();
    let before = s.bench.client.stats().requests;
    assert!(s.bench.fetcher.read(&layer, at, SIZE).await.unwrap() == *content);
    assert_eq!(s.bench.client.stats().requests, before);
    assert!(s.bench.fetcher.stats().shared_bytes >= SIZE as u64);
    // What was learnt of the span is what it was verified by.
    assert!(layer.check(false).unwrap().bad.is_empty());
}
