//! The way from indexes to a mounted tree: merging the layers of a large image, writing the EROFS view and mounting it
//! with `lazyrun mount`, by the release binary, and the daemon's memory meanwhile. Medians of rounds; in each the
//! daemon is a new one.
//!
//! `cargo bench --bench view -- [--rounds N] [--entries N] [--layout DIR[:TAG]]`; without a layout the image is made up,
//! of three layers. Needs root.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use common::{LocalImage, memory};
use lazyrun::bench::instance::Instance;
use lazyrun::bench::measure::{median, timed};
use lazyrun::demo::layout::{Encoding, ImageSettings, LayerBlob, LayerWriter, Layout};
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Entries of the made-up image.
    #[arg(long, default_value_t = 60_000)]
    entries: usize,
    /// An OCI layout to use, with its tag, instead.
    #[arg(long, value_name = "DIR[:TAG]")]
    layout: Option<String>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    support::need_root();
    let options = Options::parse();
    let made = options.layout.is_none().then(|| make(options.entries));
    let image = match &made {
        Some(dir) => LocalImage { layout: dir.path().into(), tag: "latest".into() },
        None => LocalImage::find(options.layout.as_deref()),
    };
    let registry = Registry::serve(&image.layout, Shape::default()).expect("serve the image");
    let reference = registry.reference("view", &image.tag);
    let instance = Instance::fresh(Path::new(EXE), None, &[]).expect("an instance");
    instance.run(["pull", "--quiet", &reference]).expect("pull the image");
    // From here on only indexes are there: the mount must not wait for data.
    instance.run(["cache", "drop", &reference]).expect("drop its data");
    let target = tempfile::tempdir().expect("a directory to mount at");

    let bench = Bench { instance, reference, target };
    let mut samples: [Vec<f64>; 6] = Default::default();
    let mut files = 0;
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        bench.stop();
        bench.forget_views();
        bench.instance.run(["images", "--quiet"]).expect("start a daemon");
        let idle = bench.daemon_memory().1;
        let built = bench.mount();
        let (peak, resident) = bench.daemon_memory();
        files = files.max(count(bench.target.path()));
        bench.unmount();
        let again = bench.mount();
        bench.unmount();
        bench.stop();
        let started = bench.mount();
        bench.unmount();
        for (all, value) in samples.iter_mut().zip([built, again, started, idle, resident, peak]) {
            all.push(value);
        }
    }
    let [built, again, started, idle, resident, peak] = samples.map(|all| median(&all).unwrap_or(f64::NAN));
    println!("medians of {}; {files} files, directories and links", options.rounds);
    println!("mount, view made                        {:6.0} ms", built * 1e3);
    println!("mount, view mounted before              {:6.0} ms", again * 1e3);
    println!("mount, view there but no daemon running {:6.0} ms", started * 1e3);
    println!("daemon before the mount                 {idle:6.1} MiB resident");
    println!("daemon after the mount that made it     {resident:6.1} MiB resident, {peak:.1} MiB at most");
}

struct Bench {
    instance: Instance,
    reference: String,
    target: TempDir,
}

impl Bench {
    /// Seconds that `lazyrun mount` takes.
    fn mount(&self) -> f64 {
        let mut command = self.instance.command(["mount", &self.reference]);
        timed(command.arg(self.target.path())).expect("mount the image").total.as_secs_f64()
    }

    fn unmount(&self) {
        timed(self.instance.command(["umount"]).arg(self.target.path())).expect("unmount the image");
    }

    /// Peak and present memory of the daemon in MiB.
    fn daemon_memory(&self) -> (f64, f64) {
        let pid = self.instance.info().expect("info")["daemon_pid"].to_string();
        let (peak, resident) = memory(&pid).expect("the daemon's status");
        (peak as f64 / 1024.0, resident as f64 / 1024.0)
    }

    /// Ends keeper and daemon, and with them all mounts they hold.
    fn stop(&self) {
        let info = self.instance.info().expect("info");
        let daemon = info["daemon_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let Some(daemon) = daemon.filter(|pid| *pid > 0) else { return };
        // The keeper first: it would start another daemon.
        for pid in [parent(daemon), daemon] {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            support::wait_for("a process to end", Duration::from_secs(10), || {
                (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
            });
        }
    }

    fn forget_views(&self) {
        let views = self.instance.root().join("root/views");
        let Ok(all) = fs::read_dir(&views) else { return };
        for view in all {
            fs::remove_file(view.expect("read a directory").path()).expect("delete a view");
        }
    }
}

fn parent(pid: i32) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the daemon's state");
    // The name before it may hold anything, also spaces and brackets.
    let (_, rest) = stat.rsplit_once(')').expect("a name");
    rest.split_ascii_whitespace().nth(1).and_then(|pid| pid.parse().ok()).expect("the keeper's process id")
}

fn count(dir: &Path) -> usize {
    let began = Instant::now();
    let found = Command::new("find").arg(dir).output().expect("find");
    eprintln!("find over it took {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    found.stdout.split(|byte| *byte == b'\n').count() - 2
}

/// An image of three layers: a large one of small files, one that replaces and deletes some, one of links.
fn make(entries: usize) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let files = entries * 8 / 10;
    let path = |i: usize| {
        format!(
            "usr/lib/python3/dist-packages/package-{:03}/module_{:02}/file_{i:05}.py",
            i / 240,
            i / 24 % 10
        )
    };
    let layers = [
        layer(&layout, |tar| (0..files).for_each(|i| file(tar, &path(i), &[b'x'; 300][..i % 300]))),
        layer(&layout, |tar| {
            (0..files).step_by(20).for_each(|i| file(tar, &path(i), b"replaced\n"));
            (7..files).step_by(400).for_each(|i| file(tar, &path(i).replace("/file_", "/.wh.file_"), b""));
        }),
        layer(&layout, |tar| {
            (0..entries - files)
                .for_each(|i| link(tar, &format!("usr/share/links/{:02}/link-{i}", i % 50), &path(i)));
        }),
    ];
    layout.add_image("latest", &layers, &ImageSettings::default()).expect("write the manifest");
    dir
}

fn layer(layout: &Layout, fill: impl FnOnce(&mut tar::Builder<LayerWriter>)) -> LayerBlob {
    let mut tar = tar::Builder::new(layout.layer(Encoding::Gzip(4)).expect("start a layer"));
    fill(&mut tar);
    tar.into_inner().and_then(LayerWriter::finish).expect("finish a layer")
}

fn file(tar: &mut tar::Builder<LayerWriter>, path: &str, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, path, content).expect("write a layer");
}

fn link(tar: &mut tar::Builder<LayerWriter>, path: &str, target: &str) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    header.set_mode(0o777);
    tar.append_link(&mut header, path, format!("/{target}")).expect("write a layer");
}
