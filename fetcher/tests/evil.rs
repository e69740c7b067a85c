//! Every misbehaviour that the evil registry knows, alone and mixed, during a first stream, lazy reads with hydration
//! and prefetch, and resolving. Bytes are right, possibly late, or there is an error within a bound; never anything
//! else.

mod common;

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::evil::Evil;
use common::server::{Server, serve, status};
use common::{Bench, TestImage, TestLayer, amd64, layout, no_progress, quick_client, quick_fetch, tar};
use lazyrun_fetcher::{ClientOptions, FetchError, FetchOptions, IndexPolicy, Layer, ResolvedImage, discover};

/// What has to come of a situation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Want {
    /// The right bytes.
    Right,
    /// An error whose text holds this.
    Fails(&'static str),
    /// Right bytes or an error: which one is the luck of who meets the fault.
    Either,
    /// Nothing of this situation need ask what this fault answers; the bytes are right.
    Unmet,
}
use Want::{Either, Fails, Right, Unmet};

/// Faults together, and what comes of a first stream, of lazy reads, and of resolving.
struct Case(&'static str, Want, Want, Want);

/// No situation takes longer, whatever happens.
const BOUND: Duration = Duration::from_secs(40);
/// Registries, each with its own cases, side by side.
const WORKERS: usize = 6;
/// Largest resident size of this process; the images are a few MiB.
const MAX_RESIDENT: u64 = 400 << 20;

const CASES: &[Case] = &[
    Case("norange", Unmet, Right, Unmet),
    Case("norange truncate:at=300000,first=3", Right, Right, Unmet),
    Case("range416", Unmet, Right, Unmet),
    Case("range:mode=shift", Unmet, Right, Unmet),
    Case("range:mode=shift,first=1", Unmet, Right, Unmet),
    Case("range:mode=total", Unmet, Right, Unmet),
    Case("range:mode=missing", Unmet, Right, Unmet),
    Case("range:mode=short", Unmet, Right, Unmet),
    Case("range:mode=long", Unmet, Right, Unmet),
    Case("range:mode=multipart", Unmet, Right, Unmet),
    Case("range:mode=star", Unmet, Right, Unmet),
    Case("rangedata:shift=7", Unmet, Fails("corrupt"), Unmet),
    Case("rangedata:shift=7,first=1", Unmet, Right, Unmet),
    Case("truncate:at=300000", Right, Right, Right),
    Case("truncate:at=10", Fails("broke"), Fails("broke"), Fails("broke")),
    Case("eoftrunc:at=300000", Right, Right, Right),
    Case("eoftrunc:at=10", Fails(""), Fails("truncated"), Fails("")),
    Case("chunktrunc:at=300000,skip=1", Right, Right, Unmet),
    Case("chunktrunc:at=10", Fails("broke"), Fails("broke"), Fails("broke")),
    Case("reset:at=100000,first=3", Right, Right, Right),
    Case("reset:at=10", Fails("broke"), Fails("broke"), Fails("broke")),
    Case("hdrreset:first=2", Right, Right, Right),
    Case("hdrreset", Fails("broke"), Fails("broke"), Fails("broke")),
    Case("slow:bps=2000000", Right, Right, Right),
    Case("stall:at=20,secs=2,first=2", Right, Right, Right),
    Case("stall:at=20,secs=2", Fails("sent nothing"), Fails("sent nothing"), Fails("sent nothing")),
    Case("hdrstall:secs=2,first=2", Right, Right, Right),
    Case("hdrstall:secs=2", Fails("sent nothing"), Fails("sent nothing"), Fails("sent nothing")),
    Case("drip:secs=0.2,first=2", Right, Right, Right),
    Case("status:code=503,retry_after=1,first=2", Right, Right, Right),
    Case("status:code=429,retry_after=2,date=1,first=2", Right, Right, Right),
    Case(
        "status:code=429,retry_after=3600",
        Fails("wait 3600 s"),
        Fails("wait 3600 s"),
        Fails("wait 3600 s"),
    ),
    Case("status:code=429", Fails("limits the rate"), Fails("limits the rate"), Fails("limits the rate")),
    Case("status:code=502,html=1,first=2", Right, Right, Right),
    Case("status:code=500,html=1", Fails("answered 500"), Fails("answered 500"), Fails("answered 500")),
    Case("status:code=403", Fails("denied"), Fails("denied"), Fails("denied")),
    Case("status:code=404", Fails("has no tag"), Fails("does not have blob"), Fails("has no tag")),
    Case("burst:code=500,len=1,gap=3", Right, Right, Right),
    Case("burst:code=503,len=2,gap=8", Right, Right, Right),
    Case("auth:user=ann,pass=s3cret", Right, Right, Right),
    Case("auth:user=ann,pass=other", Fails("denied"), Fails("denied"), Fails("denied")),
    Case("auth:badtoken=1", Fails("denied"), Fails("denied"), Fails("denied")),
    Case("auth:every=1", Right, Right, Right),
    Case("auth:every=3,noexp=1", Right, Right, Right),
    Case("auth:every=12", Right, Right, Right),
    Case("auth:ttl=0.3,field=access_token", Right, Right, Right),
    Case("auth:user=ann,pass=s3cret status:on=token,code=503,first=1", Right, Right, Right),
    Case("auth:user=ann,pass=s3cret,every=12 truncate:at=300000", Right, Right, Right),
    Case("redirect", Right, Right, Right),
    Case("redirect:code=302,strict=1 auth:user=ann,pass=s3cret", Right, Right, Right),
    Case("redirect:code=301,relative=1", Right, Right, Right),
    Case("redirect:code=308,cross=1 auth:user=ann,pass=s3cret", Right, Right, Right),
    Case("redirect:uses=1 truncate:at=300000", Right, Right, Right),
    Case("redirect:ttl=0.3 stall:at=200000,secs=2,first=2", Right, Right, Either),
    Case("redirect:loop=1", Fails("redirects"), Fails("redirects"), Fails("redirects")),
    Case("corrupt:at=1000,len=4", Fails("layer"), Fails("corrupt"), Right),
    Case("corrupt:at=1000,len=4,skip=1,first=1", Right, Right, Unmet),
    Case("corrupt:at=10,len=1", Fails("config"), Fails("corrupt"), Fails("config")),
    Case("badmanifest:mode=space", Fails("not what was asked for"), Unmet, Fails("not what was asked for")),
    Case("badmanifest:mode=swap", Fails("not what was asked for"), Unmet, Fails("not what was asked for")),
    Case("badmanifest:mode=type", Right, Unmet, Right),
    Case("badmanifest:mode=schema", Fails("manifest"), Unmet, Fails("manifest")),
    Case("badmanifest:mode=notjson", Fails("manifest"), Unmet, Fails("manifest")),
    Case(
        "badmanifest:mode=digesthdr",
        Fails("not what was asked for"),
        Unmet,
        Fails("not what was asked for"),
    ),
    Case("bigmanifest:mb=8", Fails("larger than"), Unmet, Fails("larger than")),
    // Nothing that is read is asked for by HEAD.
    Case("nohead", Unmet, Unmet, Unmet),
    Case("noreferrers", Unmet, Unmet, Right),
    Case("nolength", Right, Right, Right),
    Case("chunked", Right, Right, Right),
    Case("gzenc", Right, Right, Right),
    Case("wronglength:add=100,skip=1", Right, Right, Unmet),
    Case("wronglength:add=-10,first=2", Either, Right, Either),
    Case("silentclose", Right, Right, Right),
    Case("emptybody:on=blob,first=2", Either, Right, Either),
    Case("emptybody", Fails(""), Fails("truncated"), Fails("")),
    Case("html:on=blob,skip=1,first=1", Right, Right, Unmet),
    Case("html", Fails("captive portal"), Fails("captive portal"), Fails("captive portal")),
];

#[derive(Clone, Copy, Debug)]
enum Situation {
    Stream,
    Lazy,
    Resolve,
}

/// What is asked for, and where.
struct Scene {
    evil: Evil,
    image: TestImage,
    config: tempfile::TempDir,
    _layout: tempfile::TempDir,
}

impl Scene {
    async fn start(image: &TestImage) -> Scene {
        let layout = layout(&[image.clone(), TestImage::small(901)]);
        let evil = Evil::serve(layout.path()).await;
        let config = tempfile::tempdir().unwrap();
        let auths = serde_json::json!({"auths": {&evil.address: {"username": "ann", "password": "s3cret"}}});
        std::fs::write(config.path().join("config.json"), auths.to_string()).unwrap();
        Scene { evil, image: image.clone(), config, _layout: layout }
    }

    fn bench(&self) -> Bench {
        let credential_files = vec![self.config.path().join("config.json")];
        let client =
            ClientOptions { credential_files, stall_timeout: Duration::from_millis(600), ..quick_client() };
        Bench::with(client, FetchOptions { fault_timeout: Duration::from_secs(10), ..quick_fetch() })
    }

    async fn resolve(&self, bench: &Bench) -> Result<ResolvedImage, FetchError> {
        bench.client.resolve(&format!("{}/evil:v1", self.evil.address).parse().unwrap(), &amd64()).await
    }

    async fn play(&self, situation: Situation, faults: &[String]) -> Result<(), String> {
        let text = |e: FetchError| e.to_string();
        let bench = self.bench();
        match situation {
            Situation::Resolve => {
                self.evil.misbehave(faults).await;
                let image = self.resolve(&bench).await.map_err(text)?;
                let wanted: Vec<_> = image.layers.iter().map(|l| l.diff_id).collect();
                let policy = IndexPolicy::default_for(&image.reference);
                let found = discover(&bench.client, &image, &wanted, &policy).await;
                assert!(found.layers.is_empty(), "an index was found that nobody made");
                assert!(image.manifest == self.image.manifest && image.config == self.image.config);
                Ok(())
            }
            Situation::Stream => {
                self.evil.misbehave(faults).await;
                let image = self.resolve(&bench).await.map_err(text)?;
                let result = self.ingest(&bench, &image).await.map(drop);
                self.judge_store(&bench);
                result.map_err(text)
            }
            Situation::Lazy => {
                self.evil.misbehave(&[]).await;
                let image = self.resolve(&bench).await.unwrap();
                let layers = self.ingest(&bench, &image).await.unwrap();
                layers.iter().for_each(|layer| layer.forget().unwrap());
                self.evil.misbehave(faults).await;
                self.read_lazily(&bench, &layers).await
            }
        }
    }

    async fn ingest(&self, bench: &Bench, image: &ResolvedImage) -> Result<Vec<Arc<Layer>>, FetchError> {
        let blobs = bench.client.blobs(&image.reference);
        let layers = image.layers.iter().map(|l| bench.fetcher.ingest(l, blobs.clone(), no_progress()));
        futures_util::future::try_join_all(layers).await
    }

    /// What was published is right and whole; what failed left nothing.
    fn judge_store(&self, bench: &Bench) {
        for made in &self.image.layers {
            if let Some(layer) = bench.fetcher.store().get(made.diff_id()).unwrap() {
                assert!(std::fs::read(layer.data_path()).unwrap() == made.tar, "wrong bytes were published");
            }
        }
    }

    /// Readers, prefetch and hydration at once. An error is passed on only after everybody has ended.
    async fn read_lazily(&self, bench: &Bench, layers: &[Arc<Layer>]) -> Result<(), String> {
        // Alone, in the middle: everything at once may well be one request for all of a small layer, without a range.
        let (layer, tar) = (&layers[0], &self.image.layers[0].tar);
        let mut failure = match bench.fetcher.read(layer, 800_000, 9000).await {
            Ok(bytes) if bytes == tar[800_000..809_000] => Ok(()),
            Ok(_) => panic!("wrong bytes were read"),
            Err(error) => Err(error.to_string()),
        };
        let mut readers = tokio::task::JoinSet::new();
        for (layer, made) in layers.iter().zip(&self.image.layers) {
            let tar = Arc::new(made.tar.clone());
            for at in [0, tar.len() / 3, tar.len() / 2, tar.len() - 70_000] {
                let (fetcher, layer, tar) = (bench.fetcher.clone(), Arc::clone(layer), Arc::clone(&tar));
                readers.spawn(async move {
                    let bytes = fetcher.read(&layer, at as u64, 9000).await?;
                    assert!(bytes == tar[at..at + 9000], "wrong bytes were read at {at}");
                    Ok::<(), FetchError>(())
                });
            }
            let (fetcher, ahead) = (bench.fetcher.clone(), Arc::clone(layer));
            readers.spawn(async move { fetcher.prefetch(&ahead, &[2..3, 5..6, 3..4]).await });
            let (fetcher, whole) = (bench.fetcher.clone(), Arc::clone(layer));
            readers.spawn(async move { fetcher.hydrate(&whole, no_progress()).await });
        }
        while let Some(done) = readers.join_next().await {
            if let Err(error) = done.expect("a reader got wrong bytes") {
                failure = Err(error.to_string());
            }
        }
        for (layer, made) in layers.iter().zip(&self.image.layers) {
            if layer.is_hydrated() {
                assert!(std::fs::read(layer.data_path()).unwrap() == made.tar, "wrong bytes were stored");
            }
            let mut buffer = vec![0; made.tar.len()];
            if layer.read_local(0, &mut buffer).unwrap().is_some() {
                assert!(buffer == made.tar, "wrong bytes are here");
            }
        }
        failure
    }

    /// Plays, and says what was not as it should be.
    async fn check(&self, situation: Situation, faults: &[String], want: Want) -> Result<(), String> {
        let began = Instant::now();
        let result = tokio::time::timeout(BOUND, self.play(situation, faults)).await;
        let result = result.map_err(|_| format!("nothing happened within {BOUND:?}"))?;
        match (&result, want) {
            (Ok(()), Right | Unmet | Either) | (Err(_), Either) => {}
            (Err(error), Fails(part)) if error.contains(part) => {}
            _ => return Err(format!("{result:?} instead of {want:?} after {:?}", began.elapsed())),
        }
        if let Err(error) = &result {
            let one_line = !error.contains('\n') && error.len() < 600;
            if !one_line || error.contains("s3cret") || error.contains("sig=") {
                return Err(format!("such is no message for a user: {error:?}"));
            }
        }
        let stats = self.evil.stats().await;
        let met = stats.faults.get(&faults[0]).copied().unwrap_or_default();
        // One that spares the first answer is met where a busy machine was so slow that it was asked again.
        if met == 0 && !matches!(want, Unmet | Either) {
            return Err(format!("the fault was met {met} times in {} requests", stats.requests));
        }
        let log = self.evil.log().await;
        match log.iter().find(|r| r.port == self.evil.storage && r.auth) {
            Some(request) => Err(format!("credentials were shown to another host at {}", request.p)),
            None => Ok(()),
        }
    }
}

/// Looks for credentials in everything that is logged.
struct Eavesdropper;

/// Whether a secret was heard, and how many bytes of logs there were.
static SECRET_HEARD: AtomicBool = AtomicBool::new(false);
static HEARD: AtomicUsize = AtomicUsize::new(0);

impl io::Write for Eavesdropper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let secrets: [&[u8]; 3] = [b"s3cret", b"YW5uOnMzY3JldA", b"sig="];
        if secrets.iter().any(|secret| bytes.windows(secret.len()).any(|w| w == *secret)) {
            SECRET_HEARD.store(true, Ordering::SeqCst);
        }
        HEARD.fetch_add(bytes.len(), Ordering::SeqCst);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn image() -> TestImage {
    TestImage::new(vec![TestLayer::gzip(tar(900, 24, 60_000)), TestLayer::gzip(tar(902, 10, 50_000))])
}

/// Plays all of these side by side; panics with everything that went wrong.
async fn play_all(list: Vec<(Situation, Vec<String>, Want)>) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
        .with_writer(|| Eavesdropper)
        .finish();
    // Another test of this binary may have been first, with the same ear.
    let _ = tracing::subscriber::set_global_default(subscriber);
    let (list, next, image) = (Arc::new(list), Arc::new(AtomicUsize::new(0)), image());
    let workers = (0..WORKERS).map(|_| {
        let (list, next, image) = (Arc::clone(&list), Arc::clone(&next), image.clone());
        tokio::spawn(async move {
            let scene = Scene::start(&image).await;
            let mut wrong = String::new();
            while let Some((situation, faults, want)) = list.get(next.fetch_add(1, Ordering::SeqCst)) {
                if let Err(what) = scene.check(*situation, faults, *want).await {
                    let _ = writeln!(wrong, "{situation:?} with {}: {what}", faults.join(" "));
                }
            }
            wrong
        })
    });
    let mut wrong = String::new();
    for worker in workers.collect::<Vec<_>>() {
        wrong += &worker.await.unwrap();
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert!(HEARD.load(Ordering::SeqCst) > 0, "nothing was logged");
    assert!(!SECRET_HEARD.load(Ordering::SeqCst), "a secret was logged");
    let resident = peak_resident();
    assert!(resident < MAX_RESIDENT, "{} MiB were resident", resident >> 20);
}

/// The most memory that this process ever had resident, in bytes.
fn peak_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() << 10
}

/// A slow request of a fault gets a second one beside it, and only one.
#[tokio::test(flavor = "multi_thread")]
async fn slow_faults_are_hedged() {
    let scene = Scene::start(&image()).await;
    let client = ClientOptions { stall_timeout: Duration::from_secs(60), ..quick_client() };
    let bench = Bench::with(client, FetchOptions { fault_timeout: Duration::from_secs(20), ..quick_fetch() });
    let image = scene.resolve(&bench).await.unwrap();
    let layer = scene.ingest(&bench, &image).await.unwrap().remove(0);
    let tar = &scene.image.layers[0].tar;
    let mut sent = 0;
    for fault in ["hdrstall:secs=30,first=1", "stall:at=10,secs=30,first=1", "stall:at=50000,secs=30,first=1"]
    {
        layer.forget().unwrap();
        scene.evil.misbehave(&words(fault)).await;
        let began = Instant::now();
        assert_eq!(bench.fetcher.read(&layer, 800_000, 100_000).await.unwrap(), tar[800_000..900_000]);
        assert!(began.elapsed() < Duration::from_secs(15), "{fault}: {:?}", began.elapsed());
        assert_eq!(scene.evil.stats().await.faults[fault], 1, "{fault}");
        sent += 1;
        let stats = bench.client.stats();
        assert_eq!((stats.hedges, stats.hedges_won), (sent, sent), "{fault}");
    }
    // Where everything is slow there is no third request.
    let bounded = FetchOptions { fault_timeout: Duration::from_secs(2), ..quick_fetch() };
    let client = ClientOptions { stall_timeout: Duration::from_secs(60), ..quick_client() };
    let bench = Bench::with(client, bounded);
    scene.evil.misbehave(&[]).await;
    let layer = scene.ingest(&bench, &image).await.unwrap().remove(0);
    layer.forget().unwrap();
    scene.evil.misbehave(&words("hdrstall:secs=30")).await;
    let error = bench.fetcher.read(&layer, 800_000, 10).await.unwrap_err();
    assert!(matches!(error, FetchError::FaultTimeout { .. }), "{error}");
    assert_eq!(bench.client.stats().hedges, 1);
}

/// Many readers of many layers settle at what a limiting registry bears.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_is_kept_by_all_layers_together() {
    const EVERY: Duration = Duration::from_millis(20);
    let layers = (0..8).map(|i| TestLayer::gzip(tar(950 + i, 10, 60_000))).collect();
    let made = TestImage::new(layers);
    let (served, limited) = (made.clone(), Arc::new(AtomicBool::new(false)));
    let (limit, refused) = (Arc::clone(&limited), Arc::new(AtomicUsize::new(0)));
    let (count, last) = (Arc::clone(&refused), std::sync::Mutex::new(Instant::now()));
    let server = Server::start(move |seen| {
        let mut last = last.lock().unwrap();
        if limit.load(Ordering::SeqCst) && last.elapsed() < EVERY {
            count.fetch_add(1, Ordering::SeqCst);
            return status(429);
        }
        *last = Instant::now();
        serve(&served, seen)
    })
    .await;
    let bench = Bench::with(ClientOptions { retries: 12, ..quick_client() }, quick_fetch());
    let image = bench.resolve(&server.name("app:v1")).await;
    let mut readers = tokio::task::JoinSet::new();
    for (descriptor, made) in image.layers.iter().zip(&made.layers) {
        let layer = bench
            .fetcher
            .ingest(descriptor, bench.client.blobs(&image.reference), no_progress())
            .await
            .unwrap();
        layer.forget().unwrap();
        for at in [0, 200_000, 400_000] {
            let (fetcher, layer, tar) = (bench.fetcher.clone(), Arc::clone(&layer), made.tar.clone());
            let limited = Arc::clone(&limited);
            readers.spawn(async move {
                while !limited.load(Ordering::SeqCst) {
                    tokio::task::yield_now().await;
                }
                let bytes = fetcher.read(&layer, at as u64, 5000).await.unwrap();
                assert!(bytes == tar[at..at + 5000], "wrong bytes");
            });
        }
    }
    let before = server.log().len();
    limited.store(true, Ordering::SeqCst);
    while let Some(done) = readers.join_next().await {
        done.unwrap();
    }
    let (refused, asked) = (refused.load(Ordering::SeqCst), server.log().len() - before);
    assert_eq!(bench.client.stats().throttled, refused as u64);
    assert!(refused > 0, "the limit was not met in {asked} requests");
    assert!(refused <= 3 * (asked - refused), "{refused} of {asked} requests were too many");
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn the_table_has_every_fault() {
    let missing = Evil::missing_in(CASES.iter().map(|Case(faults, ..)| *faults));
    assert!(missing.is_empty(), "the table lacks {missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_alone() {
    let mut list = Vec::new();
    for Case(faults, stream, lazy, resolve) in CASES {
        list.push((Situation::Stream, words(faults), *stream));
        list.push((Situation::Lazy, words(faults), *lazy));
        list.push((Situation::Resolve, words(faults), *resolve));
    }
    play_all(list).await;
}

/// Pairs and triples that a seed chooses: right bytes or an error, whatever they do to each other.
async fn mixed(seeds: std::ops::Range<u64>) {
    let faults: Vec<&str> =
        CASES.iter().map(|Case(faults, ..)| *faults).filter(|faults| !faults.contains(' ')).collect();
    let list = seeds.map(|seed| {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut draw = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize % below
        };
        let count = 2 + draw(2);
        let mix: Vec<String> = (0..count).map(|_| faults[draw(faults.len())].to_owned()).collect();
        let situation = [Situation::Stream, Situation::Lazy, Situation::Lazy, Situation::Resolve][draw(4)];
        (situation, mix, Either)
    });
    play_all(list.collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_mixed() {
    mixed(1..60).await;
}

/// `make evil SEEDS=…`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "longer than a test may be: make evil"]
async fn faults_mixed_at_length() {
    let seeds =
        std::env::var("EVIL_SEEDS").map_or(1000, |text| text.parse().expect("EVIL_SEEDS is a number"));
    mixed(1000..1000 + seeds).await;
}
