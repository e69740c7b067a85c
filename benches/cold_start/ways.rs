//! The ways of starting that are compared.

use std::fmt;
use std::path::Path;

use clap::ValueEnum;
use lazyrun::bench::instance::Instance;
use lazyrun::bench::measure::{drop_page_cache, timed};
use lazyrun::demo::shaper::Shaper;

use crate::EXE;
use crate::support::containerd::{Containerd, PROXY};
use crate::support::snapshotter::{Snapshotter, pull_command};

/// One way of starting. All are cold: neither bytes nor page cache are here, except where it is said.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Way {
    /// `ctr images pull` and `ctr run` with overlayfs: the reference.
    Containerd,
    /// `lazyrun pull`, then `run`.
    Pull,
    /// Nothing of the image is here, and no index may be taken from the registry.
    NoIndex,
    /// Nothing is here; the index of an image that nobody started comes from the registry.
    Index,
    /// Nothing is here; index and profile come from the registry.
    Shared,
    /// The same under containerd, whose snapshotter is lazyrun: its client pulls as CRI does, then `ctr run`.
    Snapshotter,
    /// Index and profile of an earlier start on this node.
    Kept,
    /// All bytes are here and in the page cache: the program's own time.
    Warm,
}

impl Way {
    /// All ways; reading everything knows no profile that would help.
    pub(crate) fn all(read_all: bool) -> Vec<Way> {
        if read_all {
            return vec![Way::Containerd, Way::Pull, Way::NoIndex, Way::Index];
        }
        Way::value_variants().to_vec()
    }

    /// Round trips that have to follow one another before the first byte of a span is here, without a token: connect;
    /// manifest; config and referrers at once; the artifact; the index; the span. `None` when the bound says nothing.
    pub(crate) fn round_trips(self) -> Option<u32> {
        match self {
            Way::Index | Way::Shared | Way::Snapshotter => Some(6),
            Way::Kept => Some(2),
            Way::Containerd | Way::Pull | Way::NoIndex | Way::Warm => None,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Way::Containerd => "containerd: pull, run",
            Way::Pull => "lazyrun: pull, run",
            Way::NoIndex => "lazy, no index",
            Way::Index => "lazy, index in the registry",
            Way::Shared => "lazy, index and profile in the registry",
            Way::Snapshotter => "the same under containerd",
            Way::Kept => "lazy, index and profile kept",
            Way::Warm => "warm",
        })
    }
}

/// What one start took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Seconds to the first output: the program is ready.
    pub(crate) first: f64,
    /// Seconds to the end of the command.
    pub(crate) total: f64,
    /// Bytes that came over the link until then.
    pub(crate) bytes: f64,
    /// Requests that were sent until then.
    pub(crate) requests: f64,
}

/// One image behind one link.
pub(crate) struct Bench<'a> {
    pub(crate) shaper: &'a Shaper,
    pub(crate) containerd: &'a Containerd,
    pub(crate) image: String,
    /// The same image in another repository, where only an index lies beside it.
    pub(crate) bare: String,
    pub(crate) args: &'a [String],
}

impl Bench<'_> {
    /// Puts an index, and in one of the repositories the profile of one start, beside the image.
    pub(crate) fn publish(&self) {
        let instance = fresh();
        timed(&mut self.command(&instance, &self.image, &[])).expect("a first start");
        instance.run(["index", "push", "--no-profile", &self.bare]).expect("push its index");
        instance
            .run(["index", "build", "--profile", &self.image])
            .expect("build its index along the profile");
        instance.run(["index", "push", &self.image]).expect("push index and profile");
    }

    /// One start.
    pub(crate) fn start(&self, way: Way) -> Sample {
        match way {
            Way::Containerd => self.containerd(),
            Way::Pull => self.pull(),
            Way::NoIndex => self.lazyrun(&fresh(), &self.bare, &["--index-trust", "proven"]),
            Way::Index => self.lazyrun(&fresh(), &self.bare, &[]),
            Way::Shared => self.lazyrun(&fresh(), &self.image, &[]),
            Way::Snapshotter => self.snapshotter(),
            Way::Kept => {
                let instance = self.complete();
                timed(&mut self.command(&instance, &self.bare, &[])).expect("a first start");
                instance.run(["cache", "drop", &self.bare]).expect("drop its data");
                self.lazyrun(&instance, &self.bare, &[])
            }
            Way::Warm => {
                let instance = self.complete();
                // The second start no longer records a profile, the third finds what it needs in memory.
                for _ in 0..2 {
                    timed(&mut self.command(&instance, &self.bare, &[])).expect("a start");
                }
                self.shaper.reset();
                self.measure(&mut self.command(&instance, &self.bare, &[]), 0.0)
            }
        }
    }

    /// Lists the requests of the latest start.
    pub(crate) fn tell_requests(&self, way: Way) {
        eprintln!("{way}:");
        for request in self.shaper.log() {
            let range = request.range.unwrap_or_default();
            eprintln!(
                "  {:.3} s  #{:<3} {} {} {range}",
                request.at, request.connection, request.method, request.target
            );
        }
    }

    fn complete(&self) -> Instance {
        let instance = fresh();
        instance.run(["pull", "--quiet", &self.bare]).expect("pull the image");
        instance
    }

    /// As `ctr run` does by default, without a network of the container's own beyond loopback.
    fn command(&self, instance: &Instance, image: &str, options: &[&str]) -> std::process::Command {
        let mut run = instance.command(["run", "--rm", "--network", "none"]);
        run.args(options).arg(image).args(self.args);
        run
    }

    fn measure(&self, command: &mut std::process::Command, before: f64) -> Sample {
        let timing = timed(command).expect("a start");
        let first = timing.require_output(command).expect("output").as_secs_f64();
        let traffic = self.shaper.traffic();
        Sample {
            first: before + first,
            total: before + timing.total.as_secs_f64(),
            bytes: traffic.bytes_down as f64,
            requests: traffic.requests as f64,
        }
    }

    fn reset(&self) {
        drop_page_cache().expect("root may empty the page cache");
        // The registry's own files stay in memory for everyone: the link is what is measured.
        self.shaper.reset();
    }

    fn lazyrun(&self, instance: &Instance, image: &str, options: &[&str]) -> Sample {
        self.reset();
        self.measure(&mut self.command(instance, image, options), 0.0)
    }

    fn pull(&self) -> Sample {
        let instance = fresh();
        self.reset();
        let pull = timed(&mut instance.command(["pull", "--quiet", "--index-trust", "proven", &self.bare]));
        let pull = pull.expect("pull").total.as_secs_f64();
        self.measure(&mut self.command(&instance, &self.bare, &[]), pull)
    }

    fn snapshotter(&self) -> Sample {
        let snapshotter = Snapshotter::start();
        let containerd = snapshotter.containerd();
        let mut pull = pull_command(&containerd, PROXY, &self.image);
        self.reset();
        let pull = timed(&mut pull).expect("pull through the snapshotter").total.as_secs_f64();
        let mut run = containerd.ctr(["run", "--rm", "--snapshotter", PROXY, &self.image, "bench"]);
        run.args(self.args);
        self.measure(&mut run, pull)
    }

    fn containerd(&self) -> Sample {
        self.reset();
        let pull = timed(&mut self.containerd.ctr(["images", "pull", "--plain-http", &self.image]));
        let pull = pull.expect("pull with ctr").total.as_secs_f64();
        let mut run = self.containerd.ctr(["run", "--rm", &self.image, "bench"]);
        run.args(self.args);
        let sample = self.measure(&mut run, pull);
        self.containerd.remove(&self.image);
        sample
    }
}

/// An instance that has nothing yet but its daemon: containerd runs already, too.
fn fresh() -> Instance {
    let instance = Instance::fresh(Path::new(EXE), None, &[]).expect("an instance");
    instance.run(["cache", "drop"]).expect("start its daemon");
    instance
}
