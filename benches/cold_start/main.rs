//! Cold start against containerd, and against what the network allows.
//!
//! `ctr images pull` + `ctr run` (overlayfs) versus `lazyrun run` in every state a node can be in, from the same
//! docker-registry over the same shaped link, interleaved; medians, ratios, and beside them the *network bound*: the
//! round trips that depend on each other and the compressed bytes of the spans that hold touched pages, over the
//! bandwidth. What a start touches is measured, not guessed: see `touched`.
//!
//! `cargo bench --bench cold_start -- [--rounds N] [--link RTT_MS:MBIT]… [--layout DIR[:TAG]] [--read-all] [-- COMMAND…]`;
//! the image is one of the host's own files unless a layout is given. `--read-all` reads every file instead of running
//! the command. Needs root; starts its own containerd and registry.

#[path = "../../tests/support/mod.rs"]
mod support;

mod bound;
mod report;
mod touched;
mod ways;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Parser;
use lazyrun::bench::report::megabytes;
use lazyrun::demo::image::{self, HostImageOptions, TAG};
use lazyrun::demo::shaper::{Shape, Shaper};
use report::Report;
use support::containerd::Containerd;
use support::docker_registry::DockerRegistry;
use ways::{Bench, Way};

const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");

/// Reads every regular file of the image once, several at a time as a busy start would, and prints what is counted.
const READ_ALL: &str = "find / -xdev -type f -print0 | xargs -0 -n 64 -P 4 cat | wc -c";

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Round-trip time in milliseconds and bandwidth in 10^6 bits per second, 0 for no limit. May be repeated.
    #[arg(long, value_name = "RTT_MS:MBIT", default_value = "20:200")]
    link: Vec<Link>,
    /// An OCI layout to use, with its tag, instead of an image of the host's files.
    #[arg(long, value_name = "DIR[:TAG]")]
    layout: Option<String>,
    /// Only these ways of starting.
    #[arg(long, value_enum, value_delimiter = ',')]
    ways: Vec<Way>,
    /// Reads all files of the image, which must have a shell, instead of running a command.
    #[arg(long)]
    read_all: bool,
    /// Lists the requests of each start of the first round on standard error.
    #[arg(long)]
    requests: bool,
    /// Prints JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// The command to run in the image; needed with --layout unless all is read.
    #[arg(last = true)]
    command: Vec<String>,
}

/// A link to imitate.
#[derive(Clone, Copy, Debug)]
struct Link(Shape);

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Link, String> {
        let (rtt, mbit) = text.split_once(':').ok_or("a link is RTT_MS:MBIT, such as 20:200")?;
        let number = |text: &str| {
            let parsed = text.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0);
            parsed.ok_or_else(|| format!("{text:?} is no number"))
        };
        Ok(Link(Shape { rtt_ms: number(rtt)?, mbit: number(mbit)? }))
    }
}

impl fmt::Display for Link {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.mbit == 0.0 && self.0.rtt_ms == 0.0 {
            return out.write_str("loopback, unshaped");
        }
        write!(out, "{} Mbit/s, {} ms round trip", self.0.mbit, self.0.rtt_ms)
    }
}

fn main() {
    support::need_root();
    let options = Options::parse();
    let (layout, tag, args) = find_image(&options);
    let ways = if options.ways.is_empty() { Way::all(options.read_all) } else { options.ways.clone() };
    let registry = DockerRegistry::start();
    registry.push(&layout, &tag, "bench");
    registry.push(&layout, &tag, "bare");
    let containerd = Containerd::start();
    let starts = bound::measure(Path::new(EXE), &format!("{}/bench:{tag}", registry.addr()), &args);
    eprintln!("{}", starts.plain);
    eprintln!("with spans along the profile, their spans are {}", megabytes(starts.along.spans));
    let mut reports = Vec::new();
    for link in &options.link {
        let shaper = Shaper::start(registry.addr(), link.0).expect("start the shaper");
        let image = format!("{}/bench:{tag}", shaper.addr());
        let bare = format!("{}/bare:{tag}", shaper.addr());
        let bench = Bench { shaper: &shaper, containerd: &containerd, image, bare, args: &args };
        bench.publish();
        let mut samples = Vec::new();
        for round in 1..=options.rounds {
            eprintln!("{link}: round {round} of {}", options.rounds);
            for &way in &ways {
                samples.push((way, bench.start(way)));
                if options.requests && round == 1 {
                    bench.tell_requests(way);
                }
            }
        }
        reports.push(Report { link: *link, rounds: options.rounds, starts: &starts, ways: &ways, samples });
    }
    if options.json {
        let all: Vec<_> = reports.iter().map(Report::json).collect();
        println!("{}", serde_json::json!(all));
    } else {
        reports.iter().for_each(|report| println!("{report}"));
    }
}

fn find_image(options: &Options) -> (PathBuf, String, Vec<String>) {
    let read_all = || vec!["/bin/sh".to_owned(), "-c".to_owned(), READ_ALL.to_owned()];
    if let Some(layout) = &options.layout {
        let (dir, tag) = layout.rsplit_once(':').unwrap_or((layout, "latest"));
        let args = if options.read_all { read_all() } else { options.command.clone() };
        assert!(!args.is_empty(), "--layout needs a command: … -- COMMAND");
        return (dir.into(), tag.into(), args);
    }
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-image");
    let image = image::build(&cache, &HostImageOptions::default()).expect("make an image");
    eprintln!("{} layers, {} compressed", image.layers.len(), megabytes(image.compressed()));
    let args = if options.read_all { read_all() } else { image.args.clone() };
    (image.layout, TAG.into(), args)
}
