//! Warm speed of a container's root (`lazyrun mount --rw` of a hydrated image) against kernel overlay2 on the same
//! files unpacked beside it: medians of interleaved rounds, and the FUSE requests made meanwhile.
//!
//! `cargo bench --bench warm -- [--rounds N] [--dir DIR] [--union PLAN]`; DIR must lie on ext4 for the figures.

#[path = "common/small_and_big.rs"]
mod small_and_big;
#[path = "../tests/support/mod.rs"]
mod support;

use std::fmt;
use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use lazyrun::bench::instance::Instance;
use lazyrun::bench::measure::median;
use lazyrun::bench::report::table;
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use nix::mount::{MntFlags, umount2};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use serde_json::Value;
use small_and_big::{Native, SMALL_FILES, read_sequentially, read_small_files, write_layout};

const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");
const RANDOM_READS: usize = 50_000;

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Size of the big file in MiB.
    #[arg(long, default_value_t = 1024)]
    big_mib: usize,
    /// Where everything is put.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// The mount plan to measure; lazyrun's own choice when not given.
    #[arg(long)]
    union: Option<String>,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Reads something below a root; returns a number, so that nothing can be left out.
type Workload = fn(&Path) -> io::Result<u64>;

const WORKLOADS: [(&str, Workload); 5] = [
    ("find + stat", find_and_stat),
    ("20k small files", read_small_files),
    ("sequential", read_sequentially),
    ("random 4 KiB pread", read_at_random),
    ("mmap scan", scan_mapped),
];

fn main() {
    support::need_root();
    let options = Options::parse();
    fs::create_dir_all(&options.dir).expect("create the directory");
    let dir = tempfile::Builder::new().prefix("warm-").tempdir_in(&options.dir).expect("a directory");
    eprintln!("making {SMALL_FILES} small files and one of {} MiB", options.big_mib);
    let layers = write_layout(&dir.path().join("layout"), options.big_mib).expect("write the image");
    let native = Native::new(dir.path(), &layers).expect("mount overlay2");
    let registry = Registry::serve(&dir.path().join("layout"), Shape::default()).expect("serve the image");
    let instance = Instance::fresh(Path::new(EXE), Some(dir.path()), &[]).expect("an instance");
    let ours = Ours::mount(&instance, &registry, dir.path(), options.union.as_deref());

    let before = fuse_requests(&instance);
    let mut samples: Vec<Vec<[f64; 2]>> = vec![Vec::new(); WORKLOADS.len()];
    let mut warm_requests = None;
    for round in 0..=options.rounds {
        // The first round fills the caches of both and is not counted; the order alternates.
        for (i, (name, workload)) in WORKLOADS.iter().enumerate() {
            let order = if round % 2 == 0 { [&native.root, &ours.dir] } else { [&ours.dir, &native.root] };
            let mut seconds = order.map(|root| measure(name, root, *workload));
            if round % 2 == 1 {
                seconds.reverse();
            }
            if round > 0 {
                samples[i].push(seconds);
            }
        }
        if round == 0 {
            warm_requests = fuse_requests(&instance);
        }
    }
    let requests = fuse_requests(&instance).zip(warm_requests).map(|(after, before)| after - before);
    let report =
        Report { samples, requests, filled: warm_requests.zip(before).map(|(after, before)| after - before) };
    if options.json {
        println!("{}", report.json());
    } else {
        println!("{report}");
    }
}

fn measure(name: &str, root: &Path, workload: Workload) -> f64 {
    let start = Instant::now();
    let result = workload(root).unwrap_or_else(|error| panic!("{name} in {}: {error}", root.display()));
    black_box(result);
    start.elapsed().as_secs_f64()
}

/// The image, hydrated and mounted read-write as a container's root is.
struct Ours<'a> {
    instance: &'a Instance,
    dir: PathBuf,
}

impl<'a> Ours<'a> {
    fn mount(instance: &'a Instance, registry: &Registry, dir: &Path, union: Option<&str>) -> Ours<'a> {
        let (image, dir) = (registry.reference("warm", "latest"), dir.join("ours"));
        fs::create_dir(&dir).expect("create the mount point");
        instance.run(["pull", "--quiet", &image]).expect("pull the image");
        let mut command = instance.command(["mount", "--rw"]);
        if let Some(union) = union {
            command.args(["--union", union]);
        }
        command.arg(&image).arg(&dir);
        lazyrun::bench::measure::timed(&mut command).expect("mount the image");
        Ours { instance, dir }
    }
}

impl Drop for Ours<'_> {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.to_str() {
            let _ = self.instance.run(["umount", dir]);
        }
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

/// What the daemon counts; `None` when it does not tell.
fn fuse_requests(instance: &Instance) -> Option<u64> {
    instance.info().ok()?.pointer("/fuse_requests").and_then(Value::as_u64)
}

fn find_and_stat(root: &Path) -> io::Result<u64> {
    let mut total = 0;
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            total += metadata.len();
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(total)
}

fn read_at_random(root: &Path) -> io::Result<u64> {
    let file = File::open(root.join("big"))?;
    let pages = file.metadata()?.len() / 4096;
    let mut buffer = [0; 4096];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..RANDOM_READS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.read_exact_at(&mut buffer, (state % pages) * 4096)?;
    }
    Ok(buffer[0].into())
}

fn scan_mapped(root: &Path) -> io::Result<u64> {
    let file = File::open(root.join("big"))?;
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidData)?;
    // SAFETY: a fresh read-only mapping of a file that nothing changes while it is mapped.
    let map = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: the mapping has this length and lives until it is unmapped below.
    let bytes = unsafe { std::slice::from_raw_parts(map.as_ptr().cast::<u8>(), len) };
    let sum = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
    let sum = sum.fold(0, u64::wrapping_add);
    // SAFETY: the slice is not used any more.
    unsafe { munmap(map, len) }?;
    Ok(sum)
}

struct Report {
    /// Per workload and round: seconds of overlay2 and of ours.
    samples: Vec<Vec<[f64; 2]>>,
    requests: Option<u64>,
    filled: Option<u64>,
}

impl Report {
    /// Median seconds of overlay2, of ours, and how many times faster ours is.
    fn medians(&self, i: usize) -> [f64; 3] {
        let of = |side: usize| {
            let values: Vec<f64> = self.samples[i].iter().map(|pair| pair[side]).collect();
            median(&values).unwrap_or(f64::NAN)
        };
        [of(0), of(1), of(0) / of(1)]
    }

    fn json(&self) -> Value {
        let one = |i: usize| {
            let [native, ours, speed] = self.medians(i);
            serde_json::json!({ "workload": WORKLOADS[i].0, "overlay2": native, "lazyrun": ours, "speed": speed })
        };
        let workloads: Vec<Value> = (0..WORKLOADS.len()).map(one).collect();
        serde_json::json!({ "workloads": workloads, "fuse_requests_warm": self.requests })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["", "overlay2", "lazyrun", "speed"].map(str::to_owned)];
        for (i, (name, _)) in WORKLOADS.iter().enumerate() {
            let [native, ours, speed] = self.medians(i);
            let milliseconds = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
            rows.push([(*name).into(), milliseconds(native), milliseconds(ours), format!("{speed:.2} x")]);
        }
        table(out, &rows)?;
        let told = |count: Option<u64>| count.map_or_else(|| "not told".into(), |count| count.to_string());
        writeln!(
            out,
            "\nFUSE requests: {} to fill the caches, {} while warm",
            told(self.filled),
            told(self.requests)
        )
    }
}
