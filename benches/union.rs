//! The writable union against fuse-overlayfs over the same directories: medians of interleaved rounds, each on fresh
//! mounts.
//!
//! `cargo bench --bench union -- [--rounds N] [--dir DIR] [--files N] [--volatile]`; needs root and fuse-overlayfs.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Parser;
use lazyrun::bench::measure::median;
use nix::mount::{MntFlags, umount2};

const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");
const PER_DIRECTORY: usize = 100;
const COPIED_UP: usize = 1000;
const BIG: usize = 256 << 20;
const RANDOM: u64 = 20_000;

#[derive(Parser)]
struct Options {
    /// Rounds; medians are taken over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Files of the lower tree, and of the archive that is unpacked.
    #[arg(long, default_value_t = 50_000)]
    files: usize,
    /// Mounts both with `volatile`: copied-up files need not be on the disk before they appear.
    #[arg(long)]
    volatile: bool,
    /// Where everything is put.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one round does, in this order, and the archive that it unpacks.
type Workload = fn(&Path, &[u8]) -> io::Result<u64>;

const WORKLOADS: [(&str, Workload); 14] = [
    ("stat walk of the lower, cold", |root, _| walk(&root.join("lower-tree"))),
    ("stat walk of the lower, warm", |root, _| walk(&root.join("lower-tree"))),
    ("read every file of the lower", |root, _| read_all(&root.join("lower-tree"))),
    // Inode numbers are not those of the index: everything is read, and the index written.
    ("git status, first", |root, _| git(&root.join("lower-tree"), &["status", "--porcelain"])),
    ("git status, again", |root, _| git(&root.join("lower-tree"), &["status", "--porcelain"])),
    ("untar", |root, archive| tar::Archive::new(archive).unpack(root.join("new")).map(|()| 0)),
    ("stat walk of the upper", |root, _| walk(&root.join("new"))),
    ("copy-up of 1,000 files", |root, _| copy_up(&root.join("lower-tree"))),
    ("rm -rf of the upper", |root, _| fs::remove_dir_all(root.join("new")).map(|()| 0)),
    ("rm -rf of the lower", |root, _| fs::remove_dir_all(root.join("lower-tree")).map(|()| 0)),
    ("sequential write", |root, _| write_sequentially(&root.join("big"))),
    ("sequential read", |root, _| read_sequentially(&root.join("big"))),
    ("random 4 KiB write", |root, _| at_random(&root.join("big"), true)),
    ("random 4 KiB read", |root, _| at_random(&root.join("big"), false)),
];

fn main() {
    assert!(nix::unistd::geteuid().is_root(), "this bench mounts filesystems and must run as root");
    let options = Options::parse();
    fs::create_dir_all(&options.dir).expect("create the directory");
    let dir = tempfile::Builder::new().prefix("union-").tempdir_in(&options.dir).expect("a directory");
    let archive = archive(options.files).expect("an archive");
    let lower = dir.path().join("lower");
    let tree = lower.join("lower-tree");
    tar::Archive::new(archive.as_slice()).unpack(&tree).expect("unpack the lower tree");
    for args in [&["init", "-q"][..], &["add", "."], &["-c", "gc.auto=0", "commit", "-q", "-m", "all"]] {
        git(&tree, args).expect("a repository of the lower tree: apt-get install git");
    }
    let programs: [(&str, &[&str]); 2] = [(EXE, &["union"]), ("fuse-overlayfs", &[])];
    let more = if options.volatile { ",volatile" } else { "" };
    let mut samples = vec![[Vec::new(), Vec::new()]; WORKLOADS.len()];
    for round in 0..options.rounds {
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for program in order {
            let mounted = Mounted::new(programs[program], dir.path(), &lower, more);
            for (i, (name, workload)) in WORKLOADS.iter().enumerate() {
                let start = Instant::now();
                let done = workload(&mounted.at, &archive);
                black_box(done.unwrap_or_else(|e| panic!("{name} with {}: {e}", programs[program].0)));
                samples[i][program].push(start.elapsed().as_secs_f64());
            }
            eprintln!("round {} of {}: {}", round + 1, options.rounds, programs[program].0);
        }
    }
    print!("{}", report(&samples));
}

fn report(samples: &[[Vec<f64>; 2]]) -> String {
    let mut text = format!("{:32}{:>10}{:>16}{:>8}\n", "", "lazyrun", "fuse-overlayfs", "ratio");
    for ((name, _), samples) in WORKLOADS.iter().zip(samples) {
        let [ours, theirs] = samples.each_ref().map(|seconds| median(seconds).unwrap_or(f64::NAN));
        let _ = writeln!(text, "{name:32}{ours:>8.3} s{theirs:>14.3} s{:>8.2}", theirs / ours);
    }
    text
}

/// A fresh mount, gone with its upper directory when this is dropped.
struct Mounted {
    at: PathBuf,
    _site: tempfile::TempDir,
}

impl Mounted {
    fn new((program, args): (&str, &[&str]), dir: &Path, lower: &Path, more: &str) -> Mounted {
        let site = tempfile::tempdir_in(dir).expect("a directory");
        // What the one before wrote is not to be waited for here.
        nix::unistd::sync();
        let path = |name: &str| site.path().join(name);
        for name in ["upper", "work", "merged"] {
            fs::create_dir(path(name)).expect("a directory");
        }
        let (lower, upper, work) = (lower.display(), path("upper"), path("work"));
        let options =
            format!("lowerdir={lower},upperdir={},workdir={}{more}", upper.display(), work.display());
        let status = Command::new(program).args(args).args(["-o", &options]).arg(path("merged")).status();
        assert!(status.expect("apt-get install fuse-overlayfs").success(), "{program} mounts nothing");
        Mounted { at: path("merged"), _site: site }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

/// Small files, as of a source tree.
fn archive(files: usize) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let bytes: Vec<u8> = (0..8200u32).map(|i| (i * 7 % 251) as u8).collect();
    for i in 0..files {
        let mut header = tar::Header::new_ustar();
        let size = 200 + i * 37 % 8000;
        header.set_mode(0o644);
        header.set_size(size as u64);
        header.set_mtime(1_700_000_000);
        let path = format!("{:03}/{:02}", i / PER_DIRECTORY, i % PER_DIRECTORY);
        tar.append_data(&mut header, path, &bytes[..size])?;
    }
    tar.into_inner()
}

fn walk(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = fs::symlink_metadata(entry.path())?;
        sum += meta.len();
        if meta.is_dir() {
            sum += walk(&entry.path())?;
        }
    }
    Ok(sum)
}

fn read_all(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() {
            sum += if name == ".git" { 0 } else { read_all(&path)? };
        } else {
            sum += fs::read(&path)?.len() as u64;
        }
    }
    Ok(sum)
}

fn git(tree: &Path, args: &[&str]) -> io::Result<u64> {
    let identity = ["-c", "user.name=bench", "-c", "user.email=bench@example.org", "-c", "safe.directory=*"];
    let output = Command::new("git").arg("-C").arg(tree).args(identity).args(args).output()?;
    if !output.status.success() || !output.stdout.is_empty() {
        return Err(io::Error::other(String::from_utf8_lossy(&[output.stdout, output.stderr].concat())));
    }
    Ok(0)
}

fn copy_up(tree: &Path) -> io::Result<u64> {
    for i in 0..COPIED_UP {
        let path = tree.join(format!("{:03}/{:02}", i / PER_DIRECTORY, i % PER_DIRECTORY));
        OpenOptions::new().append(true).open(path)?.write_all(b"x")?;
    }
    Ok(0)
}

fn write_sequentially(path: &Path) -> io::Result<u64> {
    let mut file = File::create(path)?;
    let block = vec![0x5a; 1 << 20];
    for _ in 0..BIG / block.len() {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(0)
}

fn read_sequentially(path: &Path) -> io::Result<u64> {
    let mut block = vec![0; 1 << 20];
    let mut file = File::open(path)?;
    let mut total = 0;
    loop {
        match file.read(&mut block)? {
            0 => return Ok(total),
            n => total += n as u64,
        }
    }
}

fn at_random(path: &Path, write: bool) -> io::Result<u64> {
    let file = OpenOptions::new().read(true).write(write).open(path)?;
    let mut block = [0x17; 4096];
    let mut state = 1u64;
    for _ in 0..RANDOM {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (state >> 33) % (BIG as u64 / 4096) * 4096;
        if write {
            file.write_all_at(&block, offset)?;
        } else {
            file.read_exact_at(&mut block, offset)?;
        }
    }
    Ok(state)
}
