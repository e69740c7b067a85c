//! Cold start against containerd: `ctr images pull` + `ctr run` (overlayfs) versus `lazyrun run` without an index,
//! with an index of an image that was never started here, and with an index and the profile of an earlier start;
//! from the same docker-registry over the same shaped link, interleaved, medians and ratios.
//!
//! `cargo bench --bench cold_start -- [--rounds N] [--mbit B] [--rtt-ms R] [--layout DIR[:TAG]] [-- COMMAND…]`; the
//! image is one of the host's own files unless a layout is given. Needs root; starts its own containerd and registry.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Parser;
use lazyrun::bench::instance::Instance;
use lazyrun::bench::measure::{drop_page_cache, median, timed};
use lazyrun::bench::report::{megabytes, table};
use lazyrun::demo::image::{self, HostImageOptions, TAG};
use lazyrun::demo::shaper::{Shape, Shaper};
use support::containerd::Containerd;
use support::docker_registry::DockerRegistry;

const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Bandwidth in 10^6 bits per second; 0 for no limit.
    #[arg(long, default_value_t = 200.0)]
    mbit: f64,
    /// Round-trip time in milliseconds.
    #[arg(long, default_value_t = 20.0)]
    rtt_ms: f64,
    /// An OCI layout to use, with its tag, instead of an image of the host's files.
    #[arg(long, value_name = "DIR[:TAG]")]
    layout: Option<String>,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// The command to run in the image; needed with --layout.
    #[arg(last = true)]
    command: Vec<String>,
}

/// One way of starting; the first is the reference.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Containerd,
    NoIndex,
    Index,
    Profile,
}

const WAYS: [Way; 4] = [Way::Containerd, Way::NoIndex, Way::Index, Way::Profile];

impl fmt::Display for Way {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Way::Containerd => "containerd: pull, run",
            Way::NoIndex => "lazyrun, no index",
            Way::Index => "lazyrun, index",
            Way::Profile => "lazyrun, index and profile",
        })
    }
}

/// Seconds to first output, seconds in all, bytes, requests.
type Sample = [f64; 4];

struct Bench {
    _registry: DockerRegistry,
    shaper: Shaper,
    containerd: Containerd,
    image: String,
    args: Vec<String>,
}

fn main() {
    support::need_root();
    let options = Options::parse();
    let (layout, tag, args) = find_image(&options);
    let registry = DockerRegistry::start();
    registry.push(&layout, &tag, "bench");
    let shape = Shape { mbit: options.mbit, rtt_ms: options.rtt_ms };
    let shaper = Shaper::start(registry.addr(), shape).expect("start the shaper");
    let image = format!("{}/bench:{tag}", shaper.addr());
    let bench = Bench { _registry: registry, shaper, containerd: Containerd::start(), image, args };

    let mut samples: Vec<(Way, Sample)> = Vec::new();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        samples.push((Way::Containerd, bench.containerd()));
        let instance = Instance::fresh(Path::new(EXE), None, &[]).expect("an instance");
        samples.push((Way::NoIndex, bench.lazyrun(&instance)));
        instance.run(["pull", "--quiet", &bench.image]).expect("complete the image");
        instance.run(["cache", "drop", &bench.image]).expect("drop its data");
        samples.push((Way::Profile, bench.lazyrun(&instance)));
        drop(instance);
        let instance = Instance::fresh(Path::new(EXE), None, &[]).expect("an instance");
        instance.run(["index", "build", &bench.image]).expect("build its index");
        instance.run(["cache", "drop", &bench.image]).expect("drop its data");
        samples.push((Way::Index, bench.lazyrun(&instance)));
    }
    let report = Report { samples, options: &options };
    if options.json {
        println!("{}", report.json());
    } else {
        println!(
            "{} Mbit/s, {} ms round trip, medians of {}\n\n{report}",
            options.mbit, options.rtt_ms, options.rounds
        );
    }
}

fn find_image(options: &Options) -> (PathBuf, String, Vec<String>) {
    if let Some(layout) = &options.layout {
        let (dir, tag) = layout.rsplit_once(':').unwrap_or((layout, "latest"));
        assert!(!options.command.is_empty(), "--layout needs a command: … -- COMMAND");
        return (dir.into(), tag.into(), options.command.clone());
    }
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-image");
    let image = image::build(&cache, &HostImageOptions::default()).expect("make an image");
    eprintln!("{} layers, {} compressed", image.layers.len(), megabytes(image.compressed()));
    (image.layout, TAG.into(), image.args)
}

impl Bench {
    fn sample(&self, first: f64, total: f64) -> Sample {
        let traffic = self.shaper.traffic();
        [first, total, traffic.bytes_down as f64, traffic.requests as f64]
    }

    fn reset(&self) {
        drop_page_cache().expect("root may empty the page cache");
        // The registry's own files stay in memory for everyone: the link is what is measured.
        self.shaper.reset();
    }

    fn containerd(&self) -> Sample {
        self.reset();
        let pull = timed(&mut self.containerd.ctr(["images", "pull", "--plain-http", &self.image]));
        let pull = pull.expect("pull with ctr").total.as_secs_f64();
        let mut run = self.containerd.ctr(["run", "--rm", &self.image, "bench"]);
        run.args(&self.args);
        let timing = timed(&mut run).expect("run with ctr");
        let first = timing.require_output(&run).expect("output").as_secs_f64();
        let sample = self.sample(pull + first, pull + timing.total.as_secs_f64());
        self.containerd.remove(&self.image);
        sample
    }

    /// As `ctr run` does by default, without a network of the container's own beyond loopback.
    fn lazyrun(&self, instance: &Instance) -> Sample {
        self.reset();
        let mut run = instance.command(["run", "--rm", "--network", "none", &self.image]);
        run.args(&self.args);
        let timing = timed(&mut run).expect("run with lazyrun");
        let first = timing.require_output(&run).expect("output").as_secs_f64();
        self.sample(first, timing.total.as_secs_f64())
    }
}

struct Report<'a> {
    samples: Vec<(Way, Sample)>,
    options: &'a Options,
}

impl Report<'_> {
    fn median(&self, way: Way, field: usize) -> f64 {
        let values: Vec<f64> =
            self.samples.iter().filter(|(each, _)| *each == way).map(|(_, sample)| sample[field]).collect();
        median(&values).unwrap_or(f64::NAN)
    }

    fn json(&self) -> serde_json::Value {
        let way = |way: Way| {
            serde_json::json!({
                "way": way.to_string(),
                "first_output": self.median(way, 0),
                "total": self.median(way, 1),
                "bytes": self.median(way, 2),
                "requests": self.median(way, 3),
                "ratio": self.median(way, 0) / self.median(Way::Containerd, 0),
                "samples": self.samples.iter().filter(|(each, _)| *each == way).map(|(_, s)| s).collect::<Vec<_>>(),
            })
        };
        let (mbit, rtt_ms) = (self.options.mbit, self.options.rtt_ms);
        serde_json::json!({ "mbit": mbit, "rtt_ms": rtt_ms, "ways": WAYS.map(way) })
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["", "first output", "total", "fetched", "requests", "ratio"].map(str::to_owned)];
        for way in WAYS {
            rows.push([
                way.to_string(),
                format!("{:.2} s", self.median(way, 0)),
                format!("{:.2} s", self.median(way, 1)),
                megabytes(self.median(way, 2) as u64),
                format!("{:.0}", self.median(way, 3)),
                format!("{:.2} x", self.median(way, 0) / self.median(Way::Containerd, 0)),
            ]);
        }
        table(out, &rows)
    }
}
