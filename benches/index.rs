//! Building a layer's index: speed against `gzip -dc` pinned to one core and against erofs-utils' `mkfs.erofs
//! --tar=i --ungzip`, over all layers of an image, one after the other and all at once; the index's size; the most
//! memory an indexing process has. Interleaved rounds, medians and ratios.
//!
//! `cargo bench --bench index -- [--rounds N] [--layout DIR[:TAG]] [--erofs DIR] [--big GIB]`; the image is one of the
//! host's own files unless a layout is given. `--big` indexes one made-up layer of that many GiB, which is on no disk.

mod common;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Parser;
use common::{LocalImage, memory, size};
use lazyrun::bench::measure::{median, output};
use lazyrun_index::{StreamOptions, index_layer};
use serde_json::{Value, json};

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// An OCI layout to use, with its tag, instead of an image of the host's files.
    #[arg(long, value_name = "DIR[:TAG]")]
    layout: Option<String>,
    /// Where mkfs.erofs lies (tests/tools/erofs-utils.sh prints it); left out if there is none.
    #[arg(long, value_name = "DIR")]
    erofs: Option<PathBuf>,
    /// Indexes a made-up layer of so many GiB instead.
    #[arg(long, value_name = "GIB")]
    big: Option<u64>,
    /// Indexes these blobs in this process, all at once with `--parallel`, and prints what it took.
    #[arg(long, hide = true, num_args = 1..)]
    child: Vec<PathBuf>,
    #[arg(long, hide = true)]
    parallel: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    if !options.child.is_empty() {
        println!("{}", child(&options.child, options.parallel));
    } else if let Some(gib) = options.big {
        println!("{}", big(gib));
    } else {
        compare(&options);
    }
}

/// Indexes blobs; seconds, bytes of layers and of indexes, and peak memory.
fn child(blobs: &[PathBuf], parallel: bool) -> Value {
    let began = Instant::now();
    let sums: Vec<_> = if parallel {
        std::thread::scope(|scope| {
            let all: Vec<_> = blobs.iter().map(|blob| scope.spawn(|| index_file(blob))).collect();
            all.into_iter().map(|one| one.join().expect("index a layer")).collect()
        })
    } else {
        blobs.iter().map(|blob| index_file(blob)).collect()
    };
    let seconds = began.elapsed().as_secs_f64();
    let (peak, _) = memory("self").expect("this process's status");
    let (layer, index) = sums.iter().fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    json!({ "seconds": seconds, "layer": layer, "index": index, "peak": peak })
}

fn index_file(blob: &Path) -> (u64, u64) {
    let out = tempfile::tempfile().expect("a file for the index");
    let file = File::open(blob).expect("open a blob");
    let summary = index_layer(file, &mut (), out, &StreamOptions::default()).expect("index a layer");
    (summary.layer_size, summary.index_size)
}

/// What one way of going over all layers took.
struct Way {
    name: &'static str,
    seconds: Vec<f64>,
    peak: u64,
    layer: u64,
}

fn compare(options: &Options) {
    let blobs = LocalImage::find(options.layout.as_deref()).blobs();
    let largest = vec![blobs.iter().max_by_key(|blob| size(blob)).expect("a layer").clone()];
    let mkfs = options.erofs.as_ref().map(|dir| dir.join("mkfs.erofs"));
    let mut ways = ["gzip -dc, one core", "index, one layer after the other", "index, all layers at once"]
        .map(|name| Way { name, seconds: Vec::new(), peak: 0, layer: 0 });
    let mut largest_ways = ["gzip -dc, one core", "index", "mkfs.erofs --tar=i --ungzip"].map(|name| Way {
        name,
        seconds: Vec::new(),
        peak: 0,
        layer: 0,
    });
    let mut index = 0;
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        ways[0].seconds.push(gzip(&blobs));
        index = ways[1].run(&blobs, false);
        ways[2].run(&blobs, true);
        largest_ways[0].seconds.push(gzip(&largest));
        largest_ways[1].run(&largest, false);
        if let Some(mkfs) = &mkfs {
            largest_ways[2].seconds.push(erofs(mkfs, &largest[0]));
        }
    }
    let layer = ways[1].layer;
    println!("medians of {}; speeds in uncompressed bytes", options.rounds);
    println!("\nall {} layers, {:.1} MB uncompressed", blobs.len(), layer as f64 / 1e6);
    print(&ways, layer);
    println!("\nthe largest layer, {:.1} MB uncompressed", largest_ways[1].layer as f64 / 1e6);
    print(&largest_ways, largest_ways[1].layer);
    println!(
        "\nindexes: {index} bytes, {:.2} % of the uncompressed layers",
        index as f64 * 100.0 / layer as f64
    );
}

fn print(ways: &[Way], layer: u64) {
    let reference = median(&ways[0].seconds).unwrap_or(f64::NAN);
    for way in ways {
        let Some(seconds) = median(&way.seconds) else { continue };
        let peak =
            if way.peak > 0 { format!("  peak {:.1} MiB", way.peak as f64 / 1024.0) } else { String::new() };
        let speed = layer as f64 / 1e6 / seconds;
        println!("{:34} {seconds:7.2} s {speed:7.0} MB/s  {:.2} x{peak}", way.name, reference / seconds);
    }
}

impl Way {
    /// Indexes in a process of its own, so that its peak memory is that of indexing. Returns the indexes' length.
    fn run(&mut self, blobs: &[PathBuf], parallel: bool) -> u64 {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg("--child").args(blobs);
        if parallel {
            command.arg("--parallel");
        }
        let said: Value =
            serde_json::from_slice(&output(&mut command).expect("index in a child")).expect("JSON");
        self.seconds.push(said["seconds"].as_f64().unwrap_or(f64::NAN));
        self.peak = self.peak.max(said["peak"].as_u64().unwrap_or(0));
        self.layer = said["layer"].as_u64().unwrap_or(0);
        said["index"].as_u64().unwrap_or(0)
    }
}

/// Seconds that gzip on one core takes for all blobs.
fn gzip(blobs: &[PathBuf]) -> f64 {
    let began = Instant::now();
    for blob in blobs {
        let status =
            Command::new("taskset").args(["-c", "0", "gzip", "-dc"]).arg(blob).stdout(Stdio::null()).status();
        assert!(status.expect("taskset and gzip are needed").success());
    }
    began.elapsed().as_secs_f64()
}

/// Seconds that erofs-utils take to make their index of a layer: the metadata and the uncompressed tar beside it.
fn erofs(mkfs: &Path, blob: &Path) -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let began = Instant::now();
    let tar = dir.path().join("tar");
    let output = Command::new(mkfs)
        .arg("--tar=i")
        .arg(format!("--ungzip={}", tar.display()))
        .arg(dir.path().join("erofs"))
        .arg(blob)
        .output()
        .expect("mkfs.erofs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seconds = began.elapsed().as_secs_f64();
    assert!(fs::metadata(tar).is_ok_and(|tar| tar.len() > 0), "mkfs.erofs wrote the tar");
    seconds
}

/// Indexes a layer of many GiB that is made as it is read: speed, size, peak memory.
fn big(gib: u64) -> String {
    let index = tempfile::NamedTempFile::new().expect("a file for the index");
    let began = Instant::now();
    let summary = index_layer(Made::new(gib << 30), &mut (), index.as_file(), &StreamOptions::default())
        .expect("index a made-up layer");
    let seconds = began.elapsed().as_secs_f64();
    let (peak, _) = memory("self").expect("this process's status");
    format!(
        "{} entries, {:.2} GB uncompressed from {:.2} GB of gzip, {} spans: {seconds:.1} s, {:.0} MB/s, \
         index {:.1} MB ({:.2} %), peak {:.1} MiB",
        summary.entries,
        summary.layer_size as f64 / 1e9,
        summary.blob_size as f64 / 1e9,
        summary.spans,
        summary.layer_size as f64 / 1e6 / seconds,
        summary.index_size as f64 / 1e6,
        summary.index_size as f64 * 100.0 / summary.layer_size as f64,
        peak as f64 / 1024.0,
    )
}

/// A gzip blob of many files, made as it is read: members of an archive part each, compressed once.
struct Made {
    member: Vec<u8>,
    at: usize,
    left: u64,
}

impl Made {
    /// Files in a member, and bytes in a file.
    const FILES: usize = 256;
    const SIZE: usize = 64 << 10;

    fn new(bytes: u64) -> Made {
        let mut archive = tar::Builder::new(Vec::new());
        let mut state = 1u64;
        for i in 0..Self::FILES {
            let mut header = tar::Header::new_ustar();
            header.set_size(Self::SIZE as u64);
            header.set_mode(0o644);
            let mut content = Vec::with_capacity(Self::SIZE + 8);
            while content.len() < Self::SIZE {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                content.extend_from_slice(format!("{:x} ", (state >> 33) % 50_000).as_bytes());
            }
            content.truncate(Self::SIZE);
            archive
                .append_data(&mut header, format!("usr/lib/file-{i:05}"), &content[..])
                .expect("write to memory");
        }
        // Without the end of the archive: the next member goes on.
        let part = Self::FILES * (Self::SIZE + 512);
        let mut archive = archive.into_inner().expect("write to memory");
        archive.truncate(part);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        io::copy(&mut &archive[..], &mut gzip).expect("write to memory");
        Made { member: gzip.finish().expect("write to memory"), at: 0, left: bytes / part as u64 }
    }
}

impl Read for Made {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.member.len() {
            self.at = 0;
            self.left -= 1;
        }
        if self.left == 0 {
            return Ok(0);
        }
        let n = out.len().min(self.member.len() - self.at);
        out[..n].copy_from_slice(&self.member[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
