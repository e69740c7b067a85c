//! Every misbehaviour that the evil registry knows, alone and mixed, while a container starts from its image and while a
//! mount of it is read. Bytes are right, possibly late; or a read fails within its bound; or a start fails with a
//! sentence. Never wrong bytes, a hang, or a credential where it does not belong.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::docker_registry::DockerRegistry;
use crate::support::evil::Evil;
use crate::support::fixture::{TAG, noise, sha256, with_files, write};
use crate::support::instance::{Finished, Lazyrun, finish_within};

/// The bound of a fault in these tests.
const BOUND: Duration = Duration::from_secs(4);
/// No start takes longer: it may ask for a few documents and try each several times.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Nor does reading a file and then all at once: each may find bytes missing in a few places, and only the last one fails.
const READ_LIMIT: Duration = Duration::from_secs(25);
/// When the registry is well again, everything can be read after no longer than this.
const RECOVERY: Duration = Duration::from_secs(20);
/// Files of the image, and the bytes of each.
const FILES: u64 = 20;
const FILE: usize = 300_000;
/// Instances and registries side by side.
const WORKERS: usize = 7;
/// Most memory that a daemon may have had resident; the image is a few MiB.
const MAX_RESIDENT: u64 = 200 << 20;

/// Reads a file alone, so that it comes by range, and then all at once; says for each its digest, or what went wrong.
const READ_ALL: &str = "cd \"$0\" && sha256sum 09 2>&1; for f in *; do sha256sum \"$f\" 2>&1 & done; wait";

/// What has to come of a situation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Want {
    /// The right bytes, all of them.
    Right,
    /// Some read, or the start as a whole, fails with words that hold this.
    Fails(&'static str),
    /// Either: which one is the luck of who meets the fault.
    Either,
}
use Want::{Either, Fails, Right};

/// What a read says that fails.
const EIO: Want = Fails("Input/output error");

/// Faults together, and what comes of a start, with nothing local, and of reading a mount that has only its index.
struct Case(&'static str, Want, Want);

const CASES: &[Case] = &[
    // What takes longest comes first.
    Case("drip:secs=0.2,first=1", Right, Right),
    Case("chunktrunc:at=300000,skip=1", Either, Either),
    Case("hdrreset", Fails("broke"), EIO),
    Case("status:code=500,html=1", Fails("answered 500"), EIO),
    Case("truncate:at=10", Fails("broke"), EIO),
    Case("norange", Right, Right),
    Case("norange truncate:at=300000,first=3", Right, Either),
    Case("range416", Right, Right),
    Case("range:mode=shift", Right, Right),
    Case("range:mode=total", Right, Right),
    Case("range:mode=missing", Right, Right),
    Case("range:mode=short", Right, Right),
    Case("range:mode=long", Right, Right),
    Case("range:mode=star", Right, Right),
    Case("range:mode=multipart", Right, Right),
    Case("rangedata:shift=7", Either, Either),
    Case("rangedata:shift=7,first=1", Right, Right),
    Case("truncate:at=300000", Either, Either),
    Case("eoftrunc:at=300000", Either, Either),
    Case("eoftrunc:at=10", Fails("not what was asked for"), EIO),
    Case("reset:at=100000,first=3", Right, Right),
    Case("hdrreset:first=2", Right, Right),
    Case("slow:bps=2000000", Right, Right),
    Case("stall:at=20,secs=1,first=2", Right, Right),
    Case("stall:at=20,secs=60,minrange=1", Either, EIO),
    Case("hdrstall:secs=1,first=2", Right, Right),
    Case("hdrstall:on=blob,minrange=1,secs=60", Either, EIO),
    Case("status:code=503,retry_after=1,first=1", Right, Right),
    Case("status:code=429,retry_after=1,date=1,first=1", Right, Right),
    Case("status:code=429,retry_after=3600", Fails("wait 3600 s"), EIO),
    Case("status:code=403", Fails("denied"), EIO),
    Case("status:code=404", Fails("has no tag"), EIO),
    Case("burst:code=500,len=1,gap=3", Right, Right),
    Case("auth:user=ann,pass=s3cret", Right, Right),
    Case("auth:user=ann,pass=other", Fails("denied"), EIO),
    Case("auth:badtoken=1", Fails("denied"), EIO),
    Case("auth:user=ann,pass=s3cret,every=1", Right, Right),
    Case("auth:every=3,noexp=1", Right, Right),
    Case("auth:ttl=0.3,field=access_token", Right, Right),
    Case("auth:user=ann,pass=s3cret,every=12 truncate:at=300000", Either, Either),
    Case("redirect:code=302,strict=1 auth:user=ann,pass=s3cret", Right, Right),
    Case("redirect:code=301,relative=1 auth:every=1", Right, Right),
    Case("redirect:code=308,cross=1 auth:user=ann,pass=s3cret", Right, Right),
    Case("redirect:uses=1", Right, Right),
    Case("redirect:ttl=0.3 stall:at=200000,secs=1,first=2", Right, Right),
    Case("redirect:loop=1", Fails("too many redirects"), EIO),
    Case("corrupt:at=1000,len=4", Fails("cannot be used"), EIO),
    Case("corrupt:at=10,len=1", Fails("not what was asked for"), EIO),
    Case("corrupt:at=1000,len=4,skip=4,first=1", Right, Right),
    Case("badmanifest:mode=space", Fails("not what was asked for"), Right),
    Case("badmanifest:mode=swap", Fails("not what was asked for"), Right),
    Case("badmanifest:mode=type", Right, Right),
    Case("badmanifest:mode=schema", Fails("not what was asked for"), Right),
    Case("badmanifest:mode=notjson", Fails("not what was asked for"), Right),
    Case("badmanifest:mode=digesthdr", Fails("not what was asked for"), Right),
    Case("bigmanifest:mb=8", Fails("larger than"), Right),
    // The one that nobody meets: nothing that is read is asked for by HEAD.
    Case("nohead", Right, Right),
    Case("noreferrers", Right, Right),
    Case("nolength", Right, Right),
    Case("chunked", Right, Right),
    Case("gzenc", Right, Right),
    Case("wronglength:add=100", Fails("broke"), Either),
    Case("wronglength:add=-10,first=2", Fails("not what was asked for"), Right),
    Case("silentclose", Right, Right),
    Case("emptybody:on=blob,first=2", Fails("not what was asked for"), Right),
    Case("emptybody", Fails("invalid"), EIO),
    Case("html:on=blob,skip=1,first=1", Right, Right),
    Case("html", Fails("captive portal"), EIO),
];

/// The image with its index in a layout, and the digests of its files.
struct Made {
    layout: TempDir,
    truth: Vec<(String, String)>,
}

impl Made {
    fn new() -> Made {
        let files: Vec<_> = (0..FILES).map(|i| (format!("{i:02}"), noise(7000 + i, FILE))).collect();
        let (layout, registry) = (with_files(&files), DockerRegistry::start());
        let image = registry.push(layout.path(), TAG, "evil");
        let artifact = Lazyrun::new().ok(&["index", "push", &image]).trim().to_owned();
        put_beside(layout.path(), &registry, &artifact);
        Made { layout, truth: files.into_iter().map(|(name, bytes)| (name, sha256(&bytes))).collect() }
    }
}

/// Copies an artifact from a registry into a layout.
fn put_beside(layout: &std::path::Path, registry: &DockerRegistry, artifact: &str) {
    let blobs = layout.join("blobs/sha256");
    let put = |digest: &str| {
        let bytes = registry.blob(digest);
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), &bytes).expect("store a blob");
        bytes
    };
    let bytes = put(artifact);
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).expect("a manifest");
    let layers = manifest["layers"].as_array().into_iter().flatten();
    for descriptor in layers.chain([&manifest["config"]]) {
        put(descriptor["digest"].as_str().expect("a digest"));
    }
    let index = layout.join("index.json");
    let mut list: serde_json::Value =
        serde_json::from_slice(&fs::read(&index).expect("read the index")).expect("the layout's index");
    list["manifests"].as_array_mut().expect("a list").push(json!({
        "mediaType": manifest["mediaType"], "digest": artifact, "size": bytes.len(),
    }));
    fs::write(index, list.to_string()).expect("write the layout's index");
}

/// A registry, and how it is told what to do.
struct Scene {
    made: Arc<Made>,
    evil: Evil,
    runtime: Runtime,
}

/// What came of a situation, if it was allowed.
#[derive(Debug)]
enum Came {
    AllRight,
    Failed(String),
}

impl Scene {
    fn start(made: &Arc<Made>) -> Scene {
        let runtime = Runtime::new().expect("a runtime");
        let evil = runtime.block_on(Evil::serve(made.layout.path()));
        Scene { made: Arc::clone(made), evil, runtime }
    }

    fn misbehave(&self, faults: &[String]) {
        self.runtime.block_on(self.evil.misbehave(faults));
    }

    /// An instance with a password for the registry, that logs all it can.
    fn instance(&self) -> Lazyrun {
        let lazyrun = Lazyrun::new()
            .with_env("LAZYRUN_FAULT_TIMEOUT", &format!("{}s", BOUND.as_secs()))
            .with_env("LAZYRUN_LOG", "trace");
        let config = lazyrun.scratch("docker");
        let auths = json!({"auths": {&self.evil.address: {"auth": "YW5uOnMzY3JldA=="}}});
        write(&config.join("config.json"), &auths.to_string());
        lazyrun.with_env("DOCKER_CONFIG", config.to_str().expect("UTF-8"))
    }

    fn image(&self) -> String {
        format!("{}/evil:{TAG}", self.evil.address)
    }

    /// A start with nothing local.
    fn cold_start(&self, lazyrun: &Lazyrun) -> Result<Came, String> {
        let image = self.image();
        let args = ["run", "--rm", "--network", "none", &image, "sh", "-c", READ_ALL, "/data"];
        let finished = lazyrun.run_within(START_LIMIT, &args);
        let finished = finished.ok_or_else(|| format!("the start hangs for {START_LIMIT:?}"))?;
        if finished.code == Some(125) {
            return sentence(&finished).map(Came::Failed);
        }
        self.judge(&finished)
    }

    /// A mount that has its index and none of its data; `faults` begin when it is there, and end after the first reading.
    fn read_mount(&self, lazyrun: &Lazyrun, faults: &[String]) -> Result<(Came, u64), String> {
        let (image, dir) = (self.image(), lazyrun.scratch("mount"));
        let at = dir.to_str().expect("UTF-8");
        lazyrun.ok(&["pull", "--quiet", &image]);
        lazyrun.ok(&["cache", "drop", &image]);
        lazyrun.ok(&["mount", "--hydrate=never", &image, at]);
        self.misbehave(faults);
        let read = || {
            let mut command = Command::new("sh");
            command.args(["-c", READ_ALL]).arg(dir.join("data"));
            let finished = finish_within(&mut command, READ_LIMIT);
            self.judge(&finished.ok_or_else(|| format!("reads hang for {READ_LIMIT:?}"))?)
        };
        let came = read()?;
        let met = self.met(faults);
        self.heard_elsewhere()?;
        // Nothing of what went wrong stays; but who asked to be left alone for an hour is.
        self.misbehave(&[]);
        let ended = Instant::now();
        while !faults.iter().any(|fault| fault.contains("3600")) && !matches!(read()?, Came::AllRight) {
            if ended.elapsed() > RECOVERY {
                return Err(format!("not all can be read {RECOVERY:?} after the faults ended"));
            }
        }
        lazyrun.ok(&["umount", at]);
        Ok((came, met))
    }

    /// How often the first fault was met.
    fn met(&self, faults: &[String]) -> u64 {
        let stats = self.runtime.block_on(self.evil.stats());
        faults.first().and_then(|fault| stats.faults.get(fault)).copied().unwrap_or_default()
    }

    /// Compares what the reader said with the truth. A file that could not be read is missing, with words.
    fn judge(&self, finished: &Finished) -> Result<Came, String> {
        let mut right = 0;
        let mut failures: Vec<&str> = Vec::new();
        for line in finished.stdout.lines() {
            match line.split_once("  ").filter(|(sum, _)| sum.len() == 64) {
                Some(said) if self.made.truth.iter().any(|(n, s)| said == (s.as_str(), n.as_str())) => {
                    right += 1;
                }
                Some(_) => return Err(format!("WRONG BYTES: {line}")),
                None => failures.push(line),
            }
        }
        if right == self.made.truth.len() + 1 && finished.code == Some(0) && failures.is_empty() {
            return Ok(Came::AllRight);
        }
        let words = failures.first().copied().or(finished.stderr.lines().last()).unwrap_or("not a word");
        Ok(Came::Failed(format!("{right} right, code {:?}, {words}", finished.code)))
    }

    /// No credential at another host since the faults began.
    fn heard_elsewhere(&self) -> Result<(), String> {
        let log = self.runtime.block_on(self.evil.log());
        match log.iter().find(|r| r.port == self.evil.storage && r.auth) {
            Some(request) => Err(format!("credentials were shown to another host at {}", request.p)),
            None => Ok(()),
        }
    }

    /// Both situations with these faults; what was not as it should be.
    fn play(&self, faults: &[String], start: Want, reads: Want) -> Result<(), String> {
        let lazyrun = self.instance();
        self.misbehave(faults);
        let came = self.cold_start(&lazyrun).and_then(|came| self.heard_elsewhere().map(|()| came));
        is_wanted("a start", &came, start)?;
        audit(&lazyrun)?;
        let met = self.met(faults);
        // What this daemon has learnt about the registry is no longer so.
        self.misbehave(&[]);
        lazyrun.replace_daemon();
        let (came, again) = self.read_mount(&lazyrun, faults)?;
        is_wanted("a mount", &Ok(came), reads)?;
        audit(&lazyrun)?;
        if met + again == 0 && start != Either && faults[0] != "nohead" {
            return Err("nothing met it, so nothing is shown".into());
        }
        Ok(())
    }
}

fn is_wanted(situation: &str, came: &Result<Came, String>, want: Want) -> Result<(), String> {
    match (came, want) {
        (Ok(_), Either) | (Ok(Came::AllRight), Right) => Ok(()),
        (Ok(Came::Failed(words)), Fails(part)) if words.contains(part) => Ok(()),
        _ => Err(format!("{situation}: {came:?} instead of {want:?}")),
    }
}

/// No credential is in the log, and the daemon's memory is bounded.
fn audit(lazyrun: &Lazyrun) -> Result<(), String> {
    for entry in fs::read_dir(lazyrun.root()).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("daemon.log") {
            continue;
        }
        let log = fs::read_to_string(entry.path()).map_err(|e| e.to_string())?;
        if let Some(line) = log.lines().find(|line| holds_secret(line)) {
            return Err(format!("a secret is in {name}: {line}"));
        }
    }
    let pid = lazyrun.daemon_pid().ok_or("the daemon is gone")?;
    let resident = peak_resident(pid);
    if resident > MAX_RESIDENT { Err(format!("{} MiB were resident", resident >> 20)) } else { Ok(()) }
}

/// The sentence that a failed start ends with; notes about indexes that could not be used may come before.
fn sentence(finished: &Finished) -> Result<String, String> {
    let last = finished.stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    let clear = last.starts_with("lazyrun: ") && last.len() < 500 && !repeats_itself(last);
    if clear && !holds_secret(&finished.stderr) && !finished.stderr.contains("panicked") {
        return Ok(last.to_owned());
    }
    Err(format!("such is no message for a user: {:?}", finished.stderr))
}

fn repeats_itself(sentence: &str) -> bool {
    let parts: Vec<&str> = sentence.split(": ").collect();
    parts.iter().enumerate().any(|(i, part)| part.len() > 8 && parts[..i].contains(part))
}

fn holds_secret(text: &str) -> bool {
    ["s3cret", "YW5uOnMzY3JldA", "sig=", "Bearer "].iter().any(|secret| text.contains(secret))
}

/// The most memory that a process ever had resident, in bytes.
fn peak_resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") << 10
}

/// Plays all of these side by side; panics with everything that went wrong.
fn play_all(list: &[(Vec<String>, Want, Want)]) {
    let (made, next) = (Arc::new(Made::new()), AtomicUsize::new(0));
    let work = || {
        let (scene, mut wrong) = (Scene::start(&made), String::new());
        while let Some((faults, start, reads)) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(what) = scene.play(faults, *start, *reads) {
                let _ = writeln!(wrong, "{}: {what}", faults.join(" "));
            }
        }
        wrong
    };
    let wrong: String = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("a worker")).collect()
    });
    assert!(wrong.is_empty(), "\n{wrong}");
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn the_table_has_every_fault() {
    let missing = Evil::missing_in(CASES.iter().map(|Case(faults, ..)| *faults));
    assert!(missing.is_empty(), "the table lacks {missing:?}");
}

#[test]
fn every_fault_alone() {
    let list: Vec<_> =
        CASES.iter().map(|Case(faults, start, reads)| (words(faults), *start, *reads)).collect();
    play_all(&list);
}

/// Pairs and triples that a seed chooses: right bytes or an error, whatever they do to each other.
fn mixed(seeds: std::ops::Range<u64>) {
    // What takes 20 seconds alone says nothing new beside another.
    let quick = |faults: &&str| !faults.contains(' ') && !faults.starts_with("drip") && *faults != "nohead";
    let faults: Vec<&str> = CASES.iter().map(|Case(faults, ..)| *faults).filter(quick).collect();
    let list: Vec<_> = seeds
        .map(|seed| {
            let mut draws = noise(seed, 40).into_iter().map(usize::from);
            let mut draw =
                |below: usize| (draws.next().unwrap_or(0) << 8 | draws.next().unwrap_or(0)) % below;
            let mix: Vec<String> = (0..2 + draw(2)).map(|_| faults[draw(faults.len())].to_owned()).collect();
            (mix, Either, Either)
        })
        .collect();
    play_all(&list);
}

#[test]
fn faults_mixed() {
    mixed(1..13);
}

/// `make evil SEEDS=…`
#[test]
#[ignore = "longer than a test may be: make evil"]
fn faults_mixed_at_length() {
    let seeds = std::env::var("EVIL_SEEDS").map_or(100, |text| text.parse().expect("EVIL_SEEDS is a number"));
    mixed(1000..1000 + seeds);
}
