//! The local copies of layers under a limit: what is read is right, the limit holds, and what may not go stays.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{BIG, Fixture, NEXT_TAG, TAG, big, sha256, two_versions};
use crate::support::instance::Lazyrun;
use crate::support::server::Server;
use crate::support::wait_for;

/// Half of the image.
const LIMIT: u64 = 12 << 20;
/// The same, as it is typed.
const LIMITED: [&str; 2] = ["--cache-limit", "12MiB"];
/// Bytes that a request may bring beyond what was looked at.
const SLACK: u64 = 2 << 20;

/// Bytes of disk that all below a directory takes.
fn disk_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let of = |path: &Path| match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => disk_bytes(path),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(|entry| of(&entry.path())).sum()
}

/// What the kernel has read of files goes, so that the next read reaches the daemon.
fn drop_caches() {
    // SAFETY: sync takes nothing and touches no memory.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "1").expect("drop the page cache: these tests need root");
}

fn json(lazyrun: &Lazyrun, args: &[&str]) -> Value {
    let text = lazyrun.ok(&[args, &["--format", "json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?} is no JSON ({error}): {text}"))
}

fn usage(lazyrun: &Lazyrun) -> Value {
    json(lazyrun, &["system", "df", "-v"])
}

/// A row of `system df`.
fn row(lazyrun: &Lazyrun, kind: &str) -> Value {
    let rows = lazyrun.ok(&["system", "df", "--format", "json"]);
    let mut rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    rows.find(|row| row["Type"] == kind).unwrap_or_else(|| panic!("no {kind}"))
}

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {value}"))
}

/// Every local span is what its index says.
fn all_is_right(lazyrun: &Lazyrun) {
    let report = json(lazyrun, &["system", "check"]);
    assert_eq!(report["Bad"], Value::Array(Vec::new()), "{report}");
}

/// Runs `work` while the most that the store takes is looked at all the time.
fn most_taken(lazyrun: &Lazyrun, work: impl FnOnce()) -> u64 {
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let layers = lazyrun.root().join("layers");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(disk_bytes(&layers), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let guard = Done(&done);
        work();
        drop(guard);
    });
    most.into_inner()
}

/// Says so also when the work panics.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn larger_than_the_limit(plan: &str) {
    let fixture = Fixture::new();
    let lazyrun = Lazyrun::new().with_options(&LIMITED);
    let expected = format!("{}  /data/big.bin\n", sha256(&big()));
    let read = ["exec", "reader", "sha256sum", "/data/big.bin"];
    let most = most_taken(&lazyrun, || {
        let start = ["run", "-d", "--name", "reader", "--union", plan, &fixture.image(), "sleep", "1000"];
        lazyrun.ok(&start);
        for _ in 0..4 {
            drop_caches();
            fixture.registry.reset();
            assert_eq!(lazyrun.ok(&read), expected);
            let fetched = fixture.registry.stats().bytes_down;
            assert!(fetched as usize > BIG / 4, "only {fetched} bytes were fetched again");
        }
        let all = "find /data /bin /usr /etc -type f | sort | xargs cat | sha256sum";
        let first = lazyrun.ok(&["exec", "reader", "sh", "-c", all]);
        drop_caches();
        assert_eq!(lazyrun.ok(&["exec", "reader", "sh", "-c", all]), first);
    });
    assert!(most <= LIMIT + SLACK, "the store took {most} bytes");
    assert!(most > LIMIT / 2, "only {most} bytes were ever taken, so nothing was tried");
    all_is_right(&lazyrun);
    let cache = &usage(&lazyrun)["Cache"];
    assert_eq!(number(cache, "LimitBytes"), LIMIT);
    assert!(number(cache, "Evicted") > LIMIT && number(cache, "Used") <= LIMIT, "{cache}");
    // Making all of it local is refused in a sentence, without losing what runs.
    let why = lazyrun.fails(125, &["pull", "--quiet", &fixture.image()]);
    assert!(why.contains("limit"), "{why}");
    drop_caches();
    assert_eq!(lazyrun.ok(&read), expected);
}

#[test]
fn an_image_larger_than_the_limit_runs_by_plan_erofs() {
    larger_than_the_limit("erofs");
}

#[test]
fn an_image_larger_than_the_limit_runs_by_plan_overlay() {
    larger_than_the_limit("overlay");
}

/// Waits until nothing uses any layer, which is a little after a container's end.
fn idle(lazyrun: &Lazyrun) -> Value {
    wait_for("the layers to be idle", Duration::from_secs(30), || {
        let usage = usage(lazyrun);
        let idle = usage["Layers"].as_array().expect("layers").iter().all(|layer| layer["InUse"] == "");
        idle.then_some(usage)
    })
}

/// A container that reads the layer files directly, from the second start of a hydrated image on.
fn direct_container(lazyrun: &Lazyrun, image: &str) {
    lazyrun.ok(&["pull", "--quiet", image]);
    lazyrun.ok(&["run", "--rm", "--network", "none", image, "cat", "/data/last"]);
    // The first start is recorded, so it reads through FUSE.
    wait_for("the start to be recorded", Duration::from_secs(30), || {
        (number(&idle(lazyrun)["Profiles"], "Count") > 0).then_some(())
    });
    lazyrun.ok(&["run", "-d", "--name", "direct", "--network", "none", image, "sleep", "1000"]);
}

#[test]
fn what_is_read_directly_is_never_evicted() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    direct_container(&lazyrun, &fixture.image());
    let expected = format!("{}  /data/big.bin\n", sha256(&big()));
    let before = number(&row(&lazyrun, "Layer cache"), "Local");
    // From now on nothing can be fetched: a hole would stay one.
    let image = fixture.image();
    drop(fixture);
    for life in 0..3 {
        let fuse = number(&lazyrun.info(), "fuse_requests");
        lazyrun.ok(&["system", "prune", "--force", "--cache"]);
        lazyrun.ok(&["--cache-limit", "8MiB", "system", "df"]);
        assert!(number(&usage(&lazyrun)["Cache"], "Used") > BIG as u64, "life {life}: nothing else is here");
        assert_eq!(number(&row(&lazyrun, "Layer cache"), "Local"), before, "life {life}");
        drop_caches();
        assert_eq!(lazyrun.ok(&["exec", "direct", "sha256sum", "/data/big.bin"]), expected, "life {life}");
        assert_eq!(number(&lazyrun.info(), "fuse_requests"), fuse, "it was to be read without FUSE");
        // The record of the image goes before the last life.
        if life == 1 {
            lazyrun.ok(&["rmi", "--force", &image]);
        }
        let old = lazyrun.daemon_pid().expect("a daemon");
        kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
        wait_for("a new daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|pid| *pid != old));
    }
    lazyrun.ok(&["rm", "-f", "direct"]);
}

/// Where the view is not in use any more, it does not keep anything here.
#[test]
fn an_idle_image_goes_whole_before_one_that_runs() {
    let (idle, running) = (Fixture::new(), two_versions());
    let registry = DockerRegistry::start();
    let running = registry.push(running.path(), NEXT_TAG, "running");
    let lazyrun = Lazyrun::new();
    direct_container(&lazyrun, &running);
    // The other image shares the base with it, and that counts as in use.
    lazyrun.ok(&["pull", "--quiet", &idle.image()]);
    lazyrun.ok(&["run", "--rm", "--network", "none", &idle.image(), "true"]);
    let layer = |state: &str| -> Vec<u64> {
        let usage = usage(&lazyrun);
        let layers = usage["Layers"].as_array().expect("layers").iter();
        layers.filter(|l| l["InUse"] == state).map(|l| number(l, "Local")).collect()
    };
    let in_use = layer("running");
    assert!(layer("").iter().sum::<u64>() > 0, "{:?}", layer(""));
    let pruned = json(&lazyrun, &["system", "prune", "--force", "--cache"]);
    assert!(number(&pruned, "Evicted") > 0, "{pruned}");
    assert_eq!(layer("").iter().sum::<u64>(), 0);
    assert_eq!(layer("running"), in_use);
    // What was evicted comes back by itself.
    let sum = lazyrun.ok(&["run", "--rm", "--network", "none", &idle.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

/// Kills the daemon again and again while it fills and evicts.
fn kills_leave_only_right_spans(rounds: u32) {
    let fixture = Fixture::new();
    let lazyrun = Lazyrun::new().with_options(&LIMITED);
    let script = "while :; do for f in /data/big.bin /data/small/*; do sha256sum $f; done; done";
    lazyrun.ok(&["run", "-d", "--name", "reader", "--network", "none", &fixture.image(), "sh", "-c", script]);
    let mut seed = u64::from(std::process::id());
    let mut born = Instant::now();
    for round in 0..rounds {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let life = Duration::from_millis(40 + seed % 400);
        while born.elapsed() < life {
            drop_caches();
            std::thread::sleep(Duration::from_millis(40));
        }
        let old = lazyrun.daemon_pid().expect("a daemon");
        kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
        wait_for("a new daemon", Duration::from_secs(60), || lazyrun.daemon_pid().filter(|pid| *pid != old));
        born = Instant::now();
        all_is_right(&lazyrun);
        let taken = disk_bytes(&lazyrun.root().join("layers"));
        assert!(taken <= LIMIT + SLACK, "round {round}: the store takes {taken} bytes");
    }
    lazyrun.ok(&["stop", "-t", "0", "reader"]);
    let logs = lazyrun.ok(&["logs", "reader"]);
    let mut big_reads = 0;
    let mut sums = std::collections::HashMap::new();
    for line in logs.lines() {
        let (sum, path) = line.split_once("  ").unwrap_or_else(|| panic!("no checksum: {line}"));
        assert_eq!(*sums.entry(path).or_insert(sum), sum, "{path} has two contents");
        if path == "/data/big.bin" {
            big_reads += 1;
            assert_eq!(sum, sha256(&big()), "wrong bytes");
        }
    }
    assert!(big_reads >= 2, "the big file was read {big_reads} times only");
    all_is_right(&lazyrun);
}

#[test]
fn a_daemon_killed_while_it_evicts_leaves_only_right_spans() {
    kills_leave_only_right_spans(30);
}

/// `make soak-fills`: as many rounds as `FILL_ROUNDS` says, or 200.
#[test]
#[ignore = "takes many minutes: make soak-fills"]
fn soak_fills() {
    let rounds = std::env::var("FILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    kills_leave_only_right_spans(rounds.unwrap_or(200));
}

/// An instance on a tmpfs of this size, which goes with it.
fn on_small_disk(size: &str) -> Lazyrun {
    let lazyrun = Lazyrun::below("disk/root");
    let disk = lazyrun.root().parent().expect("a parent");
    let none: Option<&str> = None;
    let options = format!("size={size}");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(none, disk, Some("tmpfs"), flags, Some(options.as_str())).expect("mount a tmpfs");
    lazyrun
}

#[test]
fn a_full_disk_is_an_input_output_error_and_never_wrong_bytes() {
    let fixture = Fixture::new();
    let lazyrun = on_small_disk("64m");
    let disk = lazyrun.root().parent().expect("a parent").to_owned();
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    lazyrun.ok(&["run", "-d", "--name", "reader", "--network", "none", &fixture.image(), "sleep", "1000"]);
    lazyrun.ok(&["exec", "reader", "cat", "/data/last"]);
    lazyrun.ok(&["--cache-limit", "8MiB", "images"]);
    lazyrun.ok(&["--cache-limit", "none", "images"]);
    let free = || {
        let disk = nix::sys::statvfs::statvfs(&disk).expect("statvfs");
        disk.blocks_available() * disk.fragment_size()
    };
    let ballast = disk.join("ballast");
    let content = big();
    let pid = lazyrun.ok(&["inspect", "--format", "{{.State.Pid}}", "reader"]);
    let path = Path::new("/proc").join(pid.trim()).join("root/data/big.bin");
    // So little is left that the reserve of such a disk, a twentieth, is touched. What is evicted for the reader makes
    // room, which is taken away again, until nothing is left to evict.
    let mut right = 0;
    let failed = wait_for("the disk to be full", Duration::from_secs(120), || {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&ballast).expect("the ballast");
        let spare = free().saturating_sub(2 << 20) as usize;
        std::io::Write::write_all(&mut file, &vec![1; spare]).expect("fill the disk");
        drop_caches();
        // By this process: one in the container would need room for its own program as well.
        match fs::read(&path) {
            Err(error) => Some(error),
            Ok(bytes) => {
                assert!(bytes == content, "wrong bytes");
                right += 1;
                None
            }
        }
    });
    assert!(right > 0, "nothing was evicted for the reader: {failed}");
    assert_eq!(failed.raw_os_error(), Some(libc::EIO), "{failed}");
    let log = fs::read_to_string(lazyrun.root().join("daemon.log")).expect("the daemon's log");
    let said =
        log.lines().find(|line| line.contains("could not be satisfied") && line.contains("free space"));
    assert!(said.is_some(), "nothing of space in: {log}");
    // The container lives on; with room it reads what it could not.
    let expected = format!("{}  /data/big.bin\n", sha256(&content));
    fs::remove_file(&ballast).expect("make room");
    assert_eq!(lazyrun.ok(&["exec", "reader", "sha256sum", "/data/big.bin"]), expected);
    all_is_right(&lazyrun);
    lazyrun.ok(&["rm", "-f", "reader"]);
}

#[test]
fn a_second_image_takes_the_place_of_the_first_on_a_small_disk() {
    let (fixture, layout) = (Fixture::new(), two_versions());
    let registry = DockerRegistry::start();
    let lazyrun = on_small_disk("56m");
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    let newer = registry.push(layout.path(), NEXT_TAG, "newer");
    lazyrun.ok(&["pull", "--quiet", &newer]);
    let images = usage(&lazyrun);
    let local = |name: &str| {
        let images = images["Images"].as_array().expect("images");
        let image = images.iter().find(|i| i["Reference"].as_str().is_some_and(|r| r.contains(name)));
        let image = image.unwrap_or_else(|| panic!("no {name} in {images:?}"));
        (number(image, "Local"), number(image, "Full"))
    };
    assert_eq!(local("newer").0, local("newer").1, "what was pulled is whole");
    assert!(local("fixture").0 < local("fixture").1, "the older one gave way");
    let sum = lazyrun.ok(&["run", "--rm", "--network", "none", &newer, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn images_share_layers_until_the_last_one_goes() {
    let layout = two_versions();
    let registry = DockerRegistry::start();
    let lazyrun = Lazyrun::new();
    let [old, new] = [TAG, NEXT_TAG].map(|tag| registry.push(layout.path(), tag, "versions"));
    lazyrun.ok(&["pull", "--quiet", &old]);
    let alone = number(&row(&lazyrun, "Layer cache"), "Size");
    lazyrun.ok(&["pull", "--quiet", &new]);
    let both = usage(&lazyrun);
    assert_eq!(both["Layers"].as_array().map(Vec::len), Some(3), "the base is here once");
    let shared: Vec<u64> =
        both["Images"].as_array().expect("images").iter().map(|i| number(i, "SharedSize")).collect();
    assert!(shared.len() == 2 && shared[0] > 0 && shared[0] == shared[1], "{both:#}");
    lazyrun.ok(&["rmi", &new]);
    assert_eq!(number(&row(&lazyrun, "Layer cache"), "Size"), alone, "all that only the other had is gone");
    drop(registry);
    let sum = lazyrun.ok(&["run", "--rm", "--network", "none", &old, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "the shared layer is whole: {sum}");
    idle(&lazyrun);
    lazyrun.ok(&["rmi", &old]);
    assert_eq!(number(&row(&lazyrun, "Layer cache"), "Size"), 0);
}

#[test]
fn prune_removes_what_is_not_needed_and_says_so_before() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    assert_eq!(number(&row(&lazyrun, "Images"), "TotalCount"), 0, "asking makes nothing");
    assert!(!lazyrun.root().exists());
    lazyrun.ok(&["run", "--name", "done", "--network", "none", &fixture.image(), "sh", "-c", "echo x >/x"]);
    lazyrun.ok(&["run", "-d", "--name", "up", "--network", "none", &fixture.image(), "sleep", "1000"]);
    fs::create_dir(lazyrun.root().join("layers/.tmp-left-1-1")).expect("a leftover");
    let [containers, images] = ["Containers", "Images"].map(|kind| row(&lazyrun, kind));
    assert_eq!([number(&containers, "TotalCount"), number(&containers, "Active")], [2, 1]);
    assert_eq!([number(&images, "TotalCount"), number(&images, "Active")], [1, 1]);
    for text in [lazyrun.ok(&["system", "df"]), lazyrun.ok(&["system", "df", "-v"])] {
        assert!(text.contains("without a limit"), "{text}");
    }
    // Without an answer nothing is done, and neither by looking.
    let why = lazyrun.fails(1, &["system", "prune"]);
    assert!(why.contains("--force"), "{why}");
    let all = ["system", "prune", "--all", "--cache", "--dry-run"];
    let told = json(&lazyrun, &all);
    assert!(lazyrun.ok(&["ps", "-a"]).contains("done"));
    assert_eq!(
        (told["Containers"].as_array().map(Vec::len), &told["Images"]),
        (Some(1), &Value::Array(vec![]))
    );
    assert!(lazyrun.run_with_input(&["system", "prune"], "n\n").stdout.is_empty());
    assert!(lazyrun.ok(&["ps", "-a"]).contains("done"));
    let text = lazyrun.run_with_input(&["system", "prune"], "y\n").stdout;
    assert!(text.contains("Deleted containers") && text.contains("Total reclaimed space"), "{text}");
    let left = lazyrun.ok(&["ps", "-a"]);
    assert!(!left.contains("done") && left.contains("up"), "{left}");
    assert!(!lazyrun.root().join("layers/.tmp-left-1-1").exists());
    // What runs is untouched by all of it.
    let pruned = json(&lazyrun, &["system", "prune", "-f", "--all", "--cache"]);
    assert_eq!(pruned["Images"], Value::Array(Vec::new()), "{pruned}");
    assert_eq!(lazyrun.ok(&["exec", "up", "cat", "/data/last"]), "behind the big file\n");
    lazyrun.ok(&["rm", "-f", "up"]);
    let told = json(&lazyrun, &["system", "prune", "--all", "--dry-run"]);
    assert!(lazyrun.ok(&["images"]).contains("fixture"));
    let pruned = json(&lazyrun, &["system", "prune", "-f", "--all"]);
    let reclaimed = [&told, &pruned].map(|p| number(p, "SpaceReclaimed"));
    assert!(reclaimed[0] > BIG as u64 && reclaimed[0].abs_diff(reclaimed[1]) < 100_000, "{reclaimed:?}");
    assert_eq!(pruned["Images"].as_array().map(Vec::len), Some(1), "{pruned}");
    assert!(!lazyrun.ok(&["images"]).contains("fixture"));
    let taken = number(&row(&lazyrun, "Layer cache"), "Size") + number(&row(&lazyrun, "Views"), "Size");
    assert_eq!(taken, 0);
}

#[test]
fn a_check_finds_wrong_bytes_and_a_repair_brings_right_ones() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    all_is_right(&lazyrun);
    let largest = usage(&lazyrun)["Layers"][0]["ID"].as_str().expect("a name").to_owned();
    crate::support::fixture::corrupt(&lazyrun.root().join("layers").join(&largest).join("data"));
    let found = lazyrun.run(&["system", "check"]);
    assert_eq!(found.code, Some(1), "{found:#?}");
    assert!(found.stdout.contains(&largest) && found.stderr.contains("--repair"), "{found:#?}");
    let report = json(&lazyrun, &["system", "check", "--repair"]);
    assert_eq!(report["Bad"].as_array().map(Vec::len), Some(1), "{report}");
    all_is_right(&lazyrun);
    let sum =
        lazyrun.ok(&["run", "--rm", "--network", "none", &fixture.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn a_snapshotter_sets_the_limits_that_it_is_started_with() {
    let lazyrun = Lazyrun::new();
    let mut command = lazyrun.command(&["--cache-limit", "50%", "snapshotter", "--address"]);
    command.arg(lazyrun.scratch("socket").join("s"));
    let mut server = Server::start(&mut command, &lazyrun.scratch("log").join("snapshotter"));
    wait_for("the snapshotter to serve", Duration::from_secs(60), || {
        server.assert_alive();
        lazyrun.daemon_pid()
    });
    assert_eq!(usage(&lazyrun)["Cache"]["Limit"], "50%");
}

#[test]
fn limits_are_kept_for_the_root() {
    let lazyrun = Lazyrun::new();
    let fixture = Fixture::new();
    lazyrun.ok(&["--cache-limit", "50%", "--disk-reserve", "5MiB", "pull", "--quiet", &fixture.image()]);
    let kept = |limit: &str, reserve: u64| {
        let cache = usage(&lazyrun)["Cache"].clone();
        assert_eq!((cache["Limit"].as_str(), number(&cache, "Reserve")), (Some(limit), reserve), "{cache}");
        if limit == "50%" {
            assert!(number(&cache, "LimitBytes").abs_diff(number(&cache, "DiskSize") / 2) < 200, "{cache}");
        }
    };
    kept("50%", 5 << 20);
    let old = lazyrun.daemon_pid().expect("a daemon");
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
    wait_for("a new daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|pid| *pid != old));
    kept("50%", 5 << 20);
    lazyrun.ok(&["--cache-limit", "none", "images"]);
    kept("", 5 << 20);
    // A smaller one is kept to at once.
    lazyrun.ok(&["--cache-limit", "12MiB", "images"]);
    assert!(disk_bytes(&lazyrun.root().join("layers")) <= LIMIT);
    for bad in ["much", "1MiB", "0%", "101%"] {
        let refused = lazyrun.run(&["--cache-limit", bad, "images"]);
        assert_eq!(refused.code, Some(125), "{refused:#?}");
    }
}
