//! Containers under load: their own small programs, and readers of pages that nobody has cached, with every byte
//! compared.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::fixture::{BIG, Fixture, big, noise, sha256};
use super::instance::Lazyrun;
use super::{leaks, wait_for};

/// What each container runs until it is told to stop: programs of its own, on files of the image and of its own.
const WORK: &str = r#"
n=0; bad=0
fail() { bad=$((bad + 1)); echo "round $n: $*"; }
while [ ! -e /tmp/stop ]; do
  n=$((n + 1))
  (cd /data/small && sha256sum -c /tmp/sums) > /tmp/checked 2>&1 || fail "$(grep -v OK /tmp/checked)"
  mkdir -p /tmp/build/obj || fail mkdir
  for i in 1 2 3 4 5 6 7 8; do
    cp /data/small/10$i /tmp/build/$i.c || fail cp
    sort /tmp/build/$i.c | md5sum > /tmp/build/obj/$i.o || fail sort
  done
  cat /tmp/build/obj/* > /tmp/build/linked || fail cat
  [ "$(hello)" = "hello from a script" ] || fail script
  rm -r /tmp/build || fail rm
done
echo "rounds $n bad $bad"
"#;
/// Files below `/data/small` whose sums the work compares.
const SMALL: std::ops::Range<u64> = 0..40;
const PAGE: usize = 4096;

/// What the load came to.
#[derive(Debug)]
pub struct Outcome {
    /// Reads by the readers, of which each reached the daemon.
    pub reads: u64,
    /// Rounds of the containers' own work.
    pub rounds: u64,
    /// Everything that went wrong, a line each.
    pub failures: Vec<String>,
    /// The longest that one read has taken since [`Load::take_longest`].
    pub longest: Duration,
}

struct Shared {
    stop: AtomicBool,
    reads: AtomicU64,
    longest: Mutex<Duration>,
    failures: Mutex<Vec<String>>,
    big: Vec<u8>,
    // Mounts in the keeper's hands, through which pages of the layer files and views are thrown away.
    below: Vec<PathBuf>,
}

/// Containers at work and the readers of their files.
pub struct Load<'a> {
    lazyrun: &'a Lazyrun,
    names: Vec<String>,
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

/// The keeper's process id.
pub fn keeper_pid(lazyrun: &Lazyrun) -> i32 {
    wait_for("the keeper", Duration::from_secs(30), || {
        let all = leaks::processes(&lazyrun.root().to_string_lossy());
        all.into_iter()
            .find(|(_, command)| command.split(' ').any(|word| word == "keeper"))
            .map(|(pid, _)| pid)
    })
}

/// The daemon's process id as the kernel knows it, without asking the daemon.
pub fn child_of(keeper: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

impl<'a> Load<'a> {
    /// Starts `count` containers of the fixture's image with these options, each with its work and its reader.
    pub fn start(lazyrun: &'a Lazyrun, fixture: &Fixture, count: usize, options: &[&str]) -> Self {
        let names: Vec<String> = (0..count).map(|i| format!("load-{i}")).collect();
        for name in &names {
            let run = ["run", "-d", "--name", name, "--network", "none"];
            let command = ["sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; eval \"$(cat /tmp/go)\""];
            lazyrun.ok(&[&run, options, &[&fixture.image()], &command].concat());
        }
        let roots: Vec<PathBuf> = names.iter().map(|name| root_of(lazyrun, name)).collect();
        for root in &roots {
            fs::write(root.join("tmp/sums"), sums()).expect("write the sums");
            fs::write(root.join("tmp/go.new"), WORK).expect("write the work");
            fs::rename(root.join("tmp/go.new"), root.join("tmp/go")).expect("begin the work");
        }
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            longest: Mutex::default(),
            failures: Mutex::default(),
            big: big(),
            below: below(lazyrun),
        });
        let start = |(seed, root): (usize, PathBuf)| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.read_on(&root, seed as u64 + 1))
        };
        let readers = roots.into_iter().enumerate().map(start).collect();
        Load { lazyrun, names, shared, readers }
    }

    /// Reads so far.
    pub fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::Relaxed)
    }

    /// The longest that a read has taken since this was asked last.
    pub fn take_longest(&self) -> Duration {
        std::mem::take(&mut *self.shared.longest.lock().expect("no reader panics"))
    }

    /// Ends readers and work and says how they went.
    pub fn stop(self) -> Outcome {
        self.shared.stop.store(true, Ordering::Relaxed);
        for reader in self.readers {
            reader.join().expect("a reader");
        }
        let mut failures = std::mem::take(&mut *self.shared.failures.lock().expect("failures"));
        let mut rounds = 0;
        for name in &self.names {
            fs::write(root_of(self.lazyrun, name).join("tmp/stop"), "").expect("stop the work");
            wait_for("the work to end", Duration::from_secs(120), || {
                let running = self.lazyrun.ok(&["inspect", "--format", "{{.State.Running}}", name]);
                (running.trim() == "false").then_some(())
            });
            for line in self.lazyrun.ok(&["logs", name]).lines() {
                match line.strip_prefix("rounds ").and_then(|line| line.split_once(" bad ")) {
                    Some((done, "0")) => rounds += done.parse::<u64>().expect("a number"),
                    _ => failures.push(format!("{name}: {line}")),
                }
            }
        }
        let longest = *self.shared.longest.lock().expect("longest");
        Outcome { reads: self.shared.reads.load(Ordering::Relaxed), rounds, failures, longest }
    }
}

/// The root of a container as its first process sees it.
pub fn root_of(lazyrun: &Lazyrun, name: &str) -> PathBuf {
    let pid = lazyrun.ok(&["inspect", "--format", "{{.State.Pid}}", name]);
    Path::new("/proc").join(pid.trim()).join("root")
}

fn sums() -> String {
    SMALL.map(|i| format!("{}  {i:03}\n", sha256(&small(i)))).collect()
}

fn small(i: u64) -> Vec<u8> {
    noise(1000 + i, 64 + 37 * i as usize)
}

/// Whatever the keeper's mounts have of the files that are read. To be asked while there is a daemon, which may be
/// needed to look them up.
pub fn below(lazyrun: &Lazyrun) -> Vec<PathBuf> {
    let fds = PathBuf::from(format!("/proc/{}/fd", keeper_pid(lazyrun)));
    let mounts: Vec<PathBuf> =
        fs::read_dir(&fds).expect("the keeper's descriptors").flatten().map(|fd| fd.path()).collect();
    let layers = fs::read_dir(lazyrun.root().join("layers")).expect("the layers").flatten();
    let names: Vec<PathBuf> = layers.map(|layer| layer.file_name().into()).collect();
    let names = names.iter().map(PathBuf::as_path).chain([Path::new("data/big.bin")]);
    let found: Vec<PathBuf> = names
        .flat_map(|name| mounts.iter().map(move |mount| mount.join(name)))
        .filter(|p| p.exists())
        .collect();
    assert!(!found.is_empty(), "the keeper holds no mount of a layer");
    found
}

/// Has the kernel forget what it has of a file of a container, and of the layers below it.
pub fn forget_everywhere(below: &[PathBuf], file: &File) {
    forget(file);
    below.iter().filter_map(|path| File::open(path).ok()).for_each(forget);
}

/// Has the kernel forget what it has of a file.
pub fn forget(file: impl AsFd) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

impl Shared {
    fn read_on(&self, root: &Path, mut seed: u64) {
        let below: Vec<File> = self.below.iter().filter_map(|path| File::open(path).ok()).collect();
        let file = File::open(root.join("data/big.bin")).expect("open the big file");
        while !self.stop.load(Ordering::Relaxed) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (seed >> 33) as usize % (BIG / PAGE) * PAGE;
            forget(&file);
            below.iter().for_each(forget);
            let mut page = vec![0; PAGE];
            let started = Instant::now();
            let read = file.read_exact_at(&mut page, at as u64);
            self.count(started.elapsed());
            match read {
                Err(error) => self.failed(format!("{}: offset {at}: {error}", root.display())),
                Ok(()) if page != self.big[at..at + PAGE] => {
                    self.failed(format!("{}: offset {at}: wrong bytes", root.display()));
                }
                Ok(()) => {}
            }
            if seed >> 60 == 0 {
                self.read_small(root, (seed >> 33) % SMALL.end);
            }
        }
    }

    // The work reads these too, so it finds them missing from the cache now and then.
    fn read_small(&self, root: &Path, i: u64) {
        let path = root.join(format!("data/small/{i:03}"));
        let read = File::open(&path).and_then(|file| {
            forget(&file);
            fs::read(&path)
        });
        match read {
            Ok(bytes) if bytes == small(i) => {}
            Ok(_) => self.failed(format!("{}: wrong bytes", path.display())),
            Err(error) => self.failed(format!("{}: {error}", path.display())),
        }
    }

    fn count(&self, took: Duration) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut longest = self.longest.lock().expect("no reader panics");
        *longest = took.max(*longest);
    }

    fn failed(&self, line: String) {
        let mut failures = self.failures.lock().expect("no reader panics");
        // What goes wrong once mostly goes wrong for ever.
        if failures.len() < 100 {
            failures.push(line);
        }
    }
}
