//! Hydration: whole images in the background, paused, limited, stopped, resumed, and what is shown of it.

use std::fs;
use std::time::{Duration, Instant};

use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::{Shape, Shaper};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::containerd::PROXY;
use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{BIG, Fixture, TAG, big, sha256};
use crate::support::instance::Lazyrun;
use crate::support::snapshotter::{Snapshotter, pull};
use crate::support::{bulk, wait_for};

/// The big file takes about five seconds.
const SLOW: Shape = Shape { mbit: 40.0, rtt_ms: 5.0 };
const MINUTE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// What may be on the way when hydration is cut off: two requests of half a second each.
const IN_FLIGHT: u64 = 7 * MIB;

/// An instance that has the image's index but none of its data.
fn with_index_only(image: &str) -> Lazyrun {
    index_only(Lazyrun::new(), image)
}

fn index_only(lazyrun: Lazyrun, image: &str) -> Lazyrun {
    lazyrun.ok(&["pull", "--quiet", image]);
    lazyrun.ok(&["cache", "drop", image]);
    lazyrun
}

fn wait_for_bytes(registry: &Registry, bytes: u64) {
    wait_for("bytes to come", MINUTE, || (registry.stats().bytes_down > bytes).then_some(()));
}

/// Asserts that nothing is asked for any more, once what was on the way has come.
fn assert_silent(registry: &Registry) {
    let mut last = (registry.stats(), Instant::now());
    wait_for("the registry to be left alone", Duration::from_secs(20), || {
        let now = registry.stats();
        if now.bytes_down != last.0.bytes_down || now.requests != last.0.requests {
            last = (now, Instant::now());
        }
        // Hydration that goes on asks for something every half second.
        (last.1.elapsed() > Duration::from_secs(3)).then_some(())
    });
}

#[test]
fn hydrate_makes_an_image_whole_that_nobody_uses() {
    let fixture = Fixture::shaped(SLOW);
    let lazyrun = with_index_only(&fixture.image());
    assert_eq!(lazyrun.lazy_state(), "lazy");
    let finished = lazyrun.run(&["--progress=json", "hydrate", "--wait", &fixture.image()]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(finished.stdout.starts_with("sha256:") && finished.stdout.lines().count() == 1, "{finished:#?}");
    let lines: Vec<Value> = finished.stderr.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert!(
        lines.iter().any(|l| l["done"].as_u64() > Some(0) && l["total"].as_u64() > Some(0)),
        "{finished:#?}"
    );
    let row = lazyrun.lazy_image();
    assert_eq!((row["State"].as_str(), row["Percent"].as_u64()), (Some("hydrated"), Some(100)), "{row}");
    assert!(
        row["Local"].as_u64() == row["Total"].as_u64() && row["Total"].as_u64() > Some(24 * MIB),
        "{row}"
    );
    let image = fixture.image();
    drop(fixture);
    let sum = lazyrun.ok(&["run", "--rm", &image, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    // Once more costs nothing and needs nobody.
    lazyrun.ok(&["hydrate", "--wait", &image]);
}

#[test]
fn hydrate_takes_an_image_that_is_not_here() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["hydrate", "--wait", &fixture.image()]);
    assert_eq!(lazyrun.lazy_state(), "hydrated");
    let line = lazyrun.fails(125, &["hydrate", &fixture.registry.reference("fixture", "nope")]);
    assert!(line.contains("nope"), "{line}");
    for args in [&["hydrate"][..], &["hydrate", "--wait"], &["hydrate", "--limit", "fast"]] {
        assert_eq!(lazyrun.run(args).code, Some(125), "{args:?}");
    }
}

#[test]
fn an_index_from_the_registry_is_proven_by_hydration() {
    let (fixture, registry) = (Fixture::new(), DockerRegistry::start());
    let image = registry.push(fixture.layout(), TAG, "fixture");
    Lazyrun::new().ok(&["index", "push", &image]);
    let lazyrun = Lazyrun::new();
    lazyrun.ok(&["pull", "--hydrate=never", &image]);
    let row = lazyrun.lazy_image();
    assert_eq!((row["State"].as_str(), row["Local"].as_u64()), (Some("lazy"), Some(0)), "{row}");
    lazyrun.ok(&["hydrate", "--wait", &image]);
    let inspected: Value =
        serde_json::from_str(&lazyrun.ok(&["index", "inspect", "--format", "json", &image])).expect("JSON");
    let layers = inspected["Layers"].as_array().expect("layers");
    assert!(layers.iter().all(|layer| layer["Index"]["Proven"] == Value::Bool(true)), "{inspected}");
    assert_eq!(lazyrun.lazy_state(), "hydrated");
}

#[test]
fn an_interrupted_command_leaves_hydration_going() {
    // So slow that it goes on for seconds after the interruption, however late that comes.
    let fixture = Fixture::shaped(Shape { mbit: 8.0, ..SLOW });
    let lazyrun = with_index_only(&fixture.image());
    fixture.registry.reset();
    // Whoever runs the tests may have it ignored, as a shell does for what it puts into the background.
    // SAFETY: no handler is involved.
    unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }.expect("take interruptions as usual");
    let waiting = lazyrun.spawn(&["hydrate", "--wait", &fixture.image()]);
    wait_for_bytes(&fixture.registry, MIB);
    kill(Pid::from_raw(waiting.pid()), Signal::SIGINT).expect("interrupt the command");
    let (code, _) = waiting.wait();
    assert_ne!(code, Some(0), "it was not done yet");
    assert_ne!(lazyrun.lazy_state(), "hydrated");
    lazyrun.wait_for_state("hydrated", MINUTE);
}

#[test]
fn a_pause_outlives_the_daemon() {
    let fixture = Fixture::shaped(SLOW);
    let lazyrun = with_index_only(&fixture.image());
    fixture.registry.reset();
    lazyrun.ok(&["hydrate", &fixture.image()]);
    wait_for_bytes(&fixture.registry, 2 * MIB);
    assert_eq!(lazyrun.lazy_state(), "hydrating");
    lazyrun.ok(&["hydrate", "--pause", &fixture.image()]);
    assert_eq!(lazyrun.lazy_state(), "paused");
    assert_silent(&fixture.registry);
    lazyrun.replace_daemon();
    assert_eq!(lazyrun.lazy_state(), "paused");
    assert_silent(&fixture.registry);
    // All images, while this one is paused by itself as well.
    lazyrun.ok(&["hydrate", "--pause"]);
    let line = lazyrun.fails(1, &["hydrate", &fixture.image()]);
    assert!(line.contains("--resume"), "{line}");
    lazyrun.replace_daemon();
    lazyrun.ok(&["hydrate", "--resume"]);
    lazyrun.wait_for_state("hydrated", MINUTE);
    let bytes = fixture.registry.stats().bytes_down;
    assert!(bytes < fixture.compressed() + IN_FLIGHT, "{bytes} of {}", fixture.compressed());
    let line = lazyrun.fails(1, &["hydrate", "--pause", "no-such-image"]);
    assert!(line.contains("no such image"), "{line}");
}

#[test]
fn hydration_goes_on_after_the_daemon_was_killed() {
    let fixture = Fixture::shaped(SLOW);
    let lazyrun = with_index_only(&fixture.image());
    fixture.registry.reset();
    lazyrun.ok(&["hydrate", &fixture.image()]);
    for part in 1..4 {
        wait_for_bytes(&fixture.registry, part * 5 * MIB);
        lazyrun.replace_daemon();
    }
    lazyrun.wait_for_state("hydrated", MINUTE);
    // What was on the way each time is all that came twice.
    let (bytes, all) = (fixture.registry.stats().bytes_down, fixture.compressed());
    assert!(bytes < all + 3 * IN_FLIGHT, "{bytes} of {all}");
    lazyrun.ok(&["index", "verify", &fixture.image()]);
    let sum = lazyrun.ok(&["run", "--rm", &fixture.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn a_start_that_was_cut_off_is_hydrated_by_the_next_daemon() {
    let fixture = Fixture::shaped(SLOW);
    let lazyrun = with_index_only(&fixture.image());
    lazyrun.ok(&["run", "-d", "--name", "brief", &fixture.image(), "sleep", "1000"]);
    lazyrun.replace_daemon();
    lazyrun.wait_for_state("hydrated", MINUTE);
    let rows = lazyrun.ok(&["ps", "--lazy", "--format", "{{.Names}} {{.Percent}} {{.State}}"]);
    assert_eq!(rows, "brief 100 hydrated\n");
    let table = lazyrun.ok(&["ps", "--lazy"]);
    assert!(table.contains("LOCAL") && table.contains("100%") && table.contains("hydrated"), "{table}");
    lazyrun.ok(&["rm", "-f", "brief"]);
}

#[test]
fn a_container_may_keep_its_image_lazy() {
    let fixture = Fixture::new();
    let lazyrun = with_index_only(&fixture.image());
    let lazy = ["run", "-d", "--name", "lazy", "--hydrate=never", &fixture.image(), "sleep", "1000"];
    lazyrun.ok(&lazy);
    assert_silent(&fixture.registry);
    assert_eq!(lazyrun.lazy_state(), "kept lazy");
    assert!(lazyrun.lazy_image()["Local"].as_u64() < Some(20 * MIB));
    // Neither another start nor a new daemon changes that.
    lazyrun.ok(&["run", "-d", "--name", "other", &fixture.image(), "sleep", "1000"]);
    lazyrun.replace_daemon();
    assert_silent(&fixture.registry);
    assert_eq!(lazyrun.ok(&["ps", "--lazy", "--format", "{{.State}}"]), "kept lazy\nkept lazy\n");
    // With its end, what the other start wanted is done.
    lazyrun.ok(&["rm", "-f", "lazy"]);
    lazyrun.wait_for_state("hydrated", MINUTE);
    lazyrun.ok(&["rm", "-f", "other"]);
}

#[test]
fn a_mount_may_keep_its_image_lazy_until_the_user_asks() {
    let fixture = Fixture::new();
    let lazyrun = with_index_only(&fixture.image());
    let dir = lazyrun.scratch("mount");
    let dir_text = dir.to_str().expect("UTF-8");
    lazyrun.ok(&["mount", "--hydrate=never", &fixture.image(), dir_text]);
    assert_eq!(fs::read_to_string(dir.join("data/last")).expect("read"), "behind the big file\n");
    lazyrun.replace_daemon();
    assert_eq!(lazyrun.lazy_state(), "kept lazy");
    lazyrun.ok(&["hydrate", "--wait", &fixture.image()]);
    lazyrun.ok(&["umount", dir_text]);
}

#[test]
fn what_the_cache_has_no_room_for_is_not_tried_again() {
    let fixture = Fixture::new();
    let lazyrun = with_index_only(&fixture.image());
    lazyrun.ok(&["--cache-limit", "8MiB", "images"]);
    let failed = lazyrun.run(&["hydrate", "--wait", &fixture.image()]);
    assert_ne!(failed.code, Some(0), "{failed:#?}");
    assert!(failed.stderr.contains("the cache is full"), "{failed:#?}");
    assert_silent(&fixture.registry);
    fixture.registry.reset();
    lazyrun.replace_daemon();
    assert_eq!(lazyrun.lazy_state(), "lazy");
    assert_silent(&fixture.registry);
    assert_eq!(fixture.registry.stats().requests, 0);
}

#[test]
fn removal_ends_all_requests() {
    let fixture = Fixture::shaped(SLOW);
    let lazyrun = with_index_only(&fixture.image());
    fixture.registry.reset();
    lazyrun.ok(&["hydrate", &fixture.image()]);
    wait_for_bytes(&fixture.registry, MIB);
    lazyrun.ok(&["rmi", &fixture.image()]);
    assert_silent(&fixture.registry);
    assert!(fixture.registry.stats().bytes_down < fixture.compressed());
    lazyrun.replace_daemon();
    assert_silent(&fixture.registry);

    // With a container that still runs from it, only what that reads is asked for.
    let lazyrun = with_index_only(&fixture.image());
    fixture.registry.reset();
    lazyrun.ok(&["run", "-d", "--name", "orphan", &fixture.image(), "sleep", "1000"]);
    lazyrun.ok(&["rmi", "--force", &fixture.image()]);
    assert_silent(&fixture.registry);
    assert!(fixture.registry.stats().bytes_down < fixture.compressed());
    let sum = lazyrun.ok(&["exec", "orphan", "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    lazyrun.ok(&["rm", "-f", "orphan"]);
}

/// Bytes per second of all ranged requests but the last, from the first to the last.
fn rate_of(registry: &Registry) -> f64 {
    let log = registry.log();
    let ranged: Vec<(f64, u64)> = log
        .iter()
        .filter_map(|request| {
            let (first, last) = request.range.as_ref()?.strip_prefix("bytes=")?.split_once('-')?;
            Some((request.at, last.parse::<u64>().ok()? + 1 - first.parse::<u64>().ok()?))
        })
        .collect();
    let (Some((begin, _)), Some((end, last))) = (ranged.first(), ranged.last()) else { panic!("{log:?}") };
    let bytes: u64 = ranged.iter().map(|(_, bytes)| bytes).sum();
    (bytes - last) as f64 / (end - begin)
}

#[test]
fn the_limit_holds_for_hydration_and_for_nothing_else() {
    let fixture = Fixture::new();
    let lazyrun = Lazyrun::new().with_env("LAZYRUN_HYDRATE_LIMIT", "3MiB/s");
    let lazyrun = index_only(lazyrun, &fixture.image());
    fixture.registry.reset();
    lazyrun.ok(&["hydrate", "--wait", &fixture.image()]);
    let rate = rate_of(&fixture.registry) / (3 * MIB) as f64;
    assert!((0.9..1.1).contains(&rate), "{rate} of the limit");

    // A limit that is set outlives the daemon, and no reader feels it.
    lazyrun.ok(&["cache", "drop"]);
    lazyrun.ok(&["hydrate", "--limit", "64KiB/s"]);
    lazyrun.replace_daemon();
    fixture.registry.reset();
    lazyrun.ok(&["hydrate", &fixture.image()]);
    wait_for_bytes(&fixture.registry, 100 << 10);
    let began = Instant::now();
    let sum = lazyrun.ok(&["run", "--rm", &fixture.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    // At the limit it would have been six minutes.
    assert!(began.elapsed() < MINUTE, "{:?}", began.elapsed());

    lazyrun.ok(&["cache", "drop"]);
    lazyrun.ok(&["hydrate", &fixture.image()]);
    assert_ne!(lazyrun.lazy_state(), "hydrated");
    lazyrun.ok(&["hydrate", "--limit", "none"]);
    lazyrun.wait_for_state("hydrated", MINUTE);
}

#[test]
fn the_limit_holds_for_a_proof() {
    let (fixture, registry) = (Fixture::new(), DockerRegistry::start());
    let image = registry.push(fixture.layout(), TAG, "fixture");
    Lazyrun::new().ok(&["index", "push", &image]);
    let shaper = Shaper::start(registry.addr(), Shape::default()).expect("start the shaper");
    let image = image.replace(&registry.addr().to_string(), &shaper.addr().to_string());
    let lazyrun = Lazyrun::new().with_options(&["--hydrate-limit", "3MiB/s"]);
    lazyrun.ok(&["pull", "--hydrate=never", &image]);
    let began = Instant::now();
    lazyrun.ok(&["hydrate", "--wait", &image]);
    let rate = fixture.compressed() as f64 / began.elapsed().as_secs_f64() / (3 * MIB) as f64;
    // The end is known by looking a few times a second.
    assert!((0.85..1.1).contains(&rate), "{rate} of the limit");
}

/// What a process has resident, in KiB.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    /// The most since it started.
    peak: u64,
    all: u64,
    anonymous: u64,
    file: u64,
}

impl Resident {
    fn of(pid: i32) -> Resident {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon's status");
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        Resident {
            peak: field("VmHWM:"),
            all: field("VmRSS:"),
            anonymous: field("RssAnon:"),
            file: field("RssFile:"),
        }
    }
}

fn memory_while_hydrating(mib: usize) {
    const BOUND: u64 = 64 << 10;
    let layout = bulk::image(mib);
    let registry = DockerRegistry::start();
    let image = registry.push(layout.path(), bulk::TAG, "bulk");
    let first = Lazyrun::new();
    first.ok(&["index", "push", &image]);
    first.ok(&["cache", "drop"]);
    let proving = Lazyrun::new();
    proving.ok(&["pull", "--hydrate=never", &image]);
    // By ranges, with an index of its own; by streams that prove somebody else's.
    for (lazyrun, what) in [(&first, "ranges"), (&proving, "streams")] {
        // A daemon that has done nothing else.
        lazyrun.replace_daemon();
        let pid = lazyrun.daemon_pid().expect("a daemon");
        let (idle, began) = (Resident::of(pid), Instant::now());
        let waiting = lazyrun.spawn(&["hydrate", "--wait", &image]);
        let mut seen = vec![idle];
        wait_for("the image to be hydrated", Duration::from_secs(170), || {
            seen.push(Resident::of(pid));
            waiting.output().starts_with("sha256:").then_some(())
        });
        let took = began.elapsed();
        let most = seen.iter().max_by_key(|seen| seen.all).expect("a look");
        let peak = Resident::of(pid).peak;
        let (idle, anonymous, file) = (idle.all, most.anonymous, most.file);
        eprintln!(
            "{mib} MiB by {what} in {took:?}: {peak} KiB at the peak (about {anonymous} anonymous, {file} of files), {idle} when idle"
        );
        assert!(peak <= BOUND, "hydrating {mib} MiB by {what} took {peak} KiB of memory");
    }
}

#[test]
fn hydration_takes_little_memory() {
    memory_while_hydrating(300);
}

#[test]
#[ignore = "longer than a test may be: make memory"]
fn hydration_of_a_gigabyte_takes_little_memory() {
    memory_while_hydrating(1024);
}

#[test]
fn a_pause_is_for_what_containerd_has_pulled_too() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    // Its indexes are here, its bytes are not.
    let lazyrun = &snapshotter.lazyrun;
    lazyrun.ok(&["pull", "--quiet", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    lazyrun.ok(&["hydrate", "--pause"]);
    pull(&containerd, &image);
    fixture.registry.reset();
    containerd.run(["run", "--rm", "--snapshotter", PROXY, &image, "short", "cat", "/data/first"]);
    let is_whole = || fixture.registry.stats().bytes_down > BIG as u64;
    assert_silent(&fixture.registry);
    assert!(!is_whole(), "{:?}", fixture.registry.stats());
    lazyrun.ok(&["hydrate", "--resume"]);
    wait_for("all of it to come", MINUTE, || is_whole().then_some(()));
}
