//! What is in the page cache after a burst of reads, and how fast cold small files are: per mode of `--page-cache`, read
//! through FUSE (of layers whose index is not proven) and from local layer files, against overlay2 on the same files.
//!
//! `cargo bench --bench page_cache -- [--rounds N] [--dir DIR] [--big-mib N]`; needs root and an idle machine, because
//! the whole machine's page cache is measured. DIR must lie on a disk.

#[path = "common/small_and_big.rs"]
mod small_and_big;
#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use lazyrun::bench::instance::Instance;
use lazyrun::bench::measure::{drop_page_cache, median, timed};
use nix::mount::{MntFlags, umount2};
use small_and_big::{Native, SMALL_FILES, read_sequentially, read_small_files, write_layout};
use support::docker_registry::DockerRegistry;

const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");
/// As long must the cache have stayed as it is to be called settled, of all the time that is waited at most.
const SETTLED: Duration = Duration::from_secs(12);
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Size of the big file in MiB.
    #[arg(long, default_value_t = 256)]
    big_mib: usize,
    /// Where everything is put.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A root to read from.
struct Way<'a> {
    name: String,
    root: PathBuf,
    /// Whether something is let go of later.
    settles: bool,
    _mounted: Option<Mounted<'a>>,
}

struct Mounted<'a> {
    instance: &'a Instance,
    dir: PathBuf,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = self.instance.run(["umount", &self.dir.display().to_string()]);
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

/// What one round of a way gave.
struct Sample {
    small: f64,
    big: f64,
    /// Cached per byte read: when the reads were over, and when nothing changed any more.
    peak: f64,
    settled: f64,
}

fn main() {
    support::need_root();
    let options = Options::parse();
    fs::create_dir_all(&options.dir).expect("create the directory");
    let dir = tempfile::Builder::new().prefix("page-cache-").tempdir_in(&options.dir).expect("a directory");
    eprintln!("making {SMALL_FILES} small files and one of {} MiB", options.big_mib);
    let layers = write_layout(&dir.path().join("layout"), options.big_mib).expect("write the image");
    let native = Native::new(dir.path(), &layers).expect("mount overlay2");
    let registry = DockerRegistry::start();
    let image = registry.push(&dir.path().join("layout"), "latest", "cached");
    let fresh = || Instance::fresh(Path::new(EXE), Some(dir.path()), &[]).expect("an instance");
    let indexer = fresh();
    indexer.run(["pull", "--quiet", &image]).expect("pull the image");
    indexer.run(["index", "build", &image]).expect("index the image");
    indexer.run(["index", "push", "--no-profile", &image]).expect("push its index");
    drop(indexer);

    let mut settings = Vec::new();
    for (mode, plan) in
        [("drop", "erofs"), ("keep", "erofs"), ("direct", "erofs"), ("drop", "overlay"), ("keep", "overlay")]
    {
        for local in [false, true] {
            // Plan overlay always reads by FUSE.
            if plan == "erofs" || !local {
                settings.push((mode, plan, local, fresh()));
            }
        }
    }
    let mut ways = vec![Way {
        name: "overlay2 on disk".into(),
        root: native.root.clone(),
        settles: false,
        _mounted: None,
    }];
    for (i, (mode, plan, local, instance)) in settings.iter().enumerate() {
        let at = dir.path().join(format!("root-{i}"));
        ways.push(mounted(instance, &image, (mode, plan, *local), at));
    }
    let mut samples: Vec<Vec<Sample>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 1..=options.rounds {
        for (way, samples) in ways.iter().zip(&mut samples) {
            samples.push(sample(way));
        }
        // Afterwards: a machine that has waited is not as fast as one that has not.
        for (way, samples) in ways.iter().zip(&mut samples) {
            if let Some(sample) = samples.last_mut().filter(|_| way.settles) {
                sample.settled = settled_of(way);
            }
        }
        eprintln!("round {round} of {}", options.rounds);
    }
    report(&ways, &samples);
}

/// The image mounted with everything local, read through FUSE or not.
fn mounted<'a>(
    instance: &'a Instance,
    image: &str,
    (mode, plan, local): (&str, &str, bool),
    at: PathBuf,
) -> Way<'a> {
    fs::create_dir(&at).expect("create the mount point");
    let command = |args: &[&str]| {
        let mut command = instance.command(["--page-cache", mode]);
        command.args(args);
        command
    };
    if local {
        timed(&mut command(&["pull", "--quiet", image])).expect("pull the image");
    }
    let mut mount = command(&["mount", "--rw", "--hydrate", "never", "--union", plan, image]);
    timed(mount.arg(&at)).expect("mount the image");
    read(&at);
    let by = if local { "local" } else { "FUSE" };
    Way {
        name: format!("{plan}, {by}, {mode}"),
        root: at.clone(),
        settles: mode == "drop",
        _mounted: Some(Mounted { instance, dir: at }),
    }
}

/// Reads everything; returns the bytes, and the seconds of small files and the big one.
fn read(root: &Path) -> (u64, f64, f64) {
    let began = Instant::now();
    let small = read_small_files(root).expect("read the small files");
    let between = Instant::now();
    let big = read_sequentially(root).expect("read the big file");
    (black_box(small + big), (between - began).as_secs_f64(), between.elapsed().as_secs_f64())
}

fn sample(way: &Way) -> Sample {
    drop_page_cache().expect("drop the page cache");
    let before = cached();
    let (bytes, small, big) = read(&way.root);
    let per_byte = |now: u64| now.saturating_sub(before) as f64 / bytes as f64;
    let peak = per_byte(cached());
    Sample { small, big, peak, settled: peak }
}

fn settled_of(way: &Way) -> f64 {
    drop_page_cache().expect("drop the page cache");
    let before = cached();
    let (bytes, ..) = read(&way.root);
    settled().saturating_sub(before) as f64 / bytes as f64
}

/// Bytes in the machine's page cache.
fn cached() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
    };
    field("Cached:") + field("Buffers:")
}

fn settled() -> u64 {
    let began = Instant::now();
    let (mut last, mut since) = (cached(), Instant::now());
    while since.elapsed() < SETTLED && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(500));
        let now = cached();
        // Others on the machine read and write a little, too.
        if now.abs_diff(last) > 4 << 20 {
            (last, since) = (now, Instant::now());
        }
    }
    cached()
}

fn report(ways: &[Way], samples: &[Vec<Sample>]) {
    println!("{:28}{:>14}{:>14}{:>16}{:>14}", "", "small files", "big file", "cached at once", "settled");
    for (way, samples) in ways.iter().zip(samples) {
        let of = |field: fn(&Sample) -> f64| {
            median(&samples.iter().map(field).collect::<Vec<_>>()).unwrap_or(f64::NAN)
        };
        println!(
            "{:28}{:>12.0} ms{:>12.0} ms{:>15.2}x{:>13.2}x",
            way.name,
            of(|s| s.small) * 1e3,
            of(|s| s.big) * 1e3,
            of(|s| s.peak),
            of(|s| s.settled)
        );
    }
}
