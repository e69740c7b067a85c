//! `lazyrun bench`: pull versus lazy start, measured on the commands a user types.
//!
//! Every phase runs the program itself as a child process on a root directory of its own, so that start-up,
//! daemon and clean-up are in the figures. Phases alternate within each round; medians are told.

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

pub mod instance;
pub mod measure;
pub mod report;

use crate::demo::registry::Registry;
use crate::demo::shaper::Shaper;
use instance::Instance;
use measure::{MeasureError, Timing, timed};
pub use report::{PhaseReport, Report, Sample};

/// Why a bench ended early.
#[derive(Debug, Error)]
pub enum BenchError {
    /// A command failed.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// No root directory for an instance.
    #[error("cannot create a root directory for the bench: {source}")]
    Root {
        /// Why.
        source: io::Error,
    },
    /// `lazyrun info` printed something else than JSON.
    #[error("`lazyrun info --format json` printed no JSON: {source}")]
    Info {
        /// Why.
        source: serde_json::Error,
    },
}

/// One way of starting an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// `pull`, then `run`, nothing local before.
    FullPull,
    /// `run`, nothing local before, no index anywhere.
    LazyBare,
    /// `run`, no data local, but the index is.
    LazyIndexed,
    /// `run`, everything local and in memory.
    Warm,
}

impl Phase {
    /// All phases in the order they are run.
    pub const ALL: [Phase; 4] = [Phase::FullPull, Phase::LazyBare, Phase::LazyIndexed, Phase::Warm];
}

impl fmt::Display for Phase {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Phase::FullPull => "full pull, then run",
            Phase::LazyBare => "lazy, no index",
            Phase::LazyIndexed => "lazy, with index",
            Phase::Warm => "warm",
        })
    }
}

/// Counts what comes over the network. Without one, the program's own counters are used.
pub trait Meter {
    /// Bytes and requests so far.
    fn read(&self) -> (u64, u64);
}

impl Meter for Registry {
    fn read(&self) -> (u64, u64) {
        self.shaper().read()
    }
}

impl Meter for Shaper {
    fn read(&self) -> (u64, u64) {
        let traffic = self.traffic();
        (traffic.bytes_down, traffic.requests)
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// The lazyrun program.
    pub exe: PathBuf,
    /// The image's reference.
    pub image: String,
    /// The command to run in it; empty means the image's own. It must print something and end.
    pub args: Vec<String>,
    /// Rounds; medians are taken over them.
    pub rounds: usize,
    /// `--network` of the containers; the default when `None`.
    pub network: Option<String>,
    /// Registries to be spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// Directories with registries' settings; the usual ones when empty.
    pub hosts_dirs: Vec<PathBuf>,
    /// Where the instances' root directories are made; the temporary directory when `None`.
    pub parent: Option<PathBuf>,
    /// Compressed bytes of the image, for the report.
    pub compressed: Option<u64>,
}

/// Measures all phases. `progress` is told in a word what is under way.
///
/// # Errors
/// When a command fails; instances are reset all the same.
pub fn bench(
    options: &BenchOptions,
    meter: Option<&dyn Meter>,
    progress: &dyn Fn(&str),
) -> Result<Report, BenchError> {
    let cold_page_cache = measure::drop_page_cache().is_ok();
    let mut samples = Vec::new();
    for round in 1..=options.rounds {
        let say = |phase: Phase| progress(&format!("round {round} of {}: {phase}", options.rounds));
        say(Phase::FullPull);
        samples.push((Phase::FullPull, full_pull(&Bench::fresh(options, meter)?)?));
        say(Phase::LazyBare);
        let bench = Bench::fresh(options, meter)?;
        samples.push((Phase::LazyBare, bench.cold_run()?));
        say(Phase::LazyIndexed);
        samples.push((Phase::LazyIndexed, indexed(&bench)?));
        say(Phase::Warm);
        samples.push((Phase::Warm, warm(&bench)?));
    }
    Ok(Report {
        image: options.image.clone(),
        args: options.args.clone(),
        compressed: options.compressed,
        rounds: options.rounds,
        cold_page_cache,
        phases: Report::phases(&samples),
    })
}

/// One instance under measurement.
struct Bench<'a> {
    options: &'a BenchOptions,
    instance: Instance,
    meter: Option<&'a dyn Meter>,
}

impl<'a> Bench<'a> {
    fn fresh(options: &'a BenchOptions, meter: Option<&'a dyn Meter>) -> Result<Bench<'a>, BenchError> {
        let parent = options.parent.as_deref();
        let instance = Instance::fresh(&options.exe, parent, &options.insecure_registries)?
            .with_hosts_dirs(&options.hosts_dirs);
        Ok(Bench { options, instance, meter })
    }

    fn traffic(&self) -> (u64, u64) {
        self.meter.map_or_else(|| own_counters(&self.instance), Meter::read)
    }

    /// One `run`; its traffic counts from `since`, its times on top of what was spent before.
    fn run(&self, since: (u64, u64), before: Option<Timing>) -> Result<Sample, BenchError> {
        let mut command = self.instance.command(["run", "--rm"]);
        if let Some(network) = &self.options.network {
            command.args(["--network", network]);
        }
        command.arg(&self.options.image).args(&self.options.args);
        let timing = timed(&mut command)?;
        let first = timing.require_output(&command)?;
        let (bytes, requests) = self.traffic();
        let before = before.map(|timing| timing.total).unwrap_or_default();
        Ok(Sample::new(
            before + first,
            before + timing.total,
            bytes.saturating_sub(since.0),
            requests.saturating_sub(since.1),
        ))
    }

    fn cold_run(&self) -> Result<Sample, BenchError> {
        // Told once for the whole bench whether this works.
        let _ = measure::drop_page_cache();
        self.run(self.traffic(), None)
    }

    /// Waits until every byte of the image is local.
    fn hydrate(&self) -> Result<(), BenchError> {
        Ok(self.instance.run(["pull", "--quiet", &self.options.image])?)
    }
}

fn full_pull(bench: &Bench<'_>) -> Result<Sample, BenchError> {
    let _ = measure::drop_page_cache();
    let since = bench.traffic();
    let mut pull = bench.instance.command(["pull", "--quiet", &bench.options.image]);
    let pull = timed(&mut pull)?;
    let _ = measure::drop_page_cache();
    bench.run(since, Some(pull))
}

fn indexed(bench: &Bench<'_>) -> Result<Sample, BenchError> {
    bench.hydrate()?;
    bench.instance.run(["cache", "drop", &bench.options.image])?;
    bench.cold_run()
}

fn warm(bench: &Bench<'_>) -> Result<Sample, BenchError> {
    bench.hydrate()?;
    // The first start fills the page cache; the second is the warm one.
    bench.run((0, 0), None)?;
    bench.run(bench.traffic(), None)
}

/// Bytes and requests by the instance's own account; zero as long as it has no daemon.
fn own_counters(instance: &Instance) -> (u64, u64) {
    let info = instance.info().unwrap_or(Value::Null);
    let get = |name: &str| info.pointer(&format!("/registry_{name}")).and_then(Value::as_u64).unwrap_or(0);
    (get("bytes"), get("requests"))
}
