//! Without the registry: what is local works, what is not fails in time, and everything goes on when it is back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lazyrun::demo::shaper::Shape;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{BIG, Fixture, TAG, big, noise, sha256};
use crate::support::instance::{EXE, Lazyrun};
use crate::support::{leaks, wait_for};

const MINUTE: Duration = Duration::from_secs(60);
/// The bound of a fault in these tests.
const BOUND: Duration = Duration::from_secs(3);
/// What a busy machine may add. Less than the bound: waiting for two bounds would be seen.
const MARGIN: Duration = Duration::from_millis(2500);

/// An instance that has the image's index but none of its data.
fn index_only(lazyrun: Lazyrun, image: &str) -> Lazyrun {
    lazyrun.ok(&["pull", "--quiet", image]);
    lazyrun.ok(&["cache", "drop", image]);
    lazyrun
}

/// What a reset or power cut does: daemon and keeper are gone at once, and so is what lies in `/run`.
fn cut_power(lazyrun: &Lazyrun) {
    let root = lazyrun.root().to_string_lossy().into_owned();
    for (pid, _) in leaks::processes(&root) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    wait_for("all processes to be gone", MINUTE, || leaks::processes(&root).is_empty().then_some(()));
}

/// A command that is started on a machine without any network, with a resolver that is nowhere, after a reboot as far as
/// anybody can tell.
fn elsewhere(lazyrun: &Lazyrun, args: &[&str]) -> Command {
    let dir = lazyrun.scratch("elsewhere");
    fs::write(dir.join("boot_id"), "01234567-89ab-cdef-0123-456789abcdef\n").expect("write a boot id");
    fs::write(dir.join("resolv.conf"), "nameserver 192.0.2.1\n").expect("write a resolv.conf");
    let script = r#"
        set -e
        mount --bind "$1/boot_id" /proc/sys/kernel/random/boot_id
        mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)"
        shift
        exec "$@"
    "#;
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "sh", "-c", script, "sh"]).arg(&dir);
    command.arg(EXE).arg("--root").arg(lazyrun.root()).args(args);
    command
}

fn output_of(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.stdin(Stdio::null()).output().expect("unshare");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_hydrated_image_starts_with_no_network_after_a_reboot() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let digest = lazyrun.ok(&["pull", "--quiet", &image]);
    let by_digest = format!("{}@{}", image.trim_end_matches(&format!(":{TAG}")), digest.trim());
    wait_for("the image to be durable", MINUTE, || {
        lazyrun.ok(&["images", "--lazy", "--format", "{{.State}}"]).contains("hydrated").then_some(())
    });
    drop(fixture);
    cut_power(&lazyrun);
    let want = sha256(&big());
    for (reference, policy) in [(&image, "missing"), (&by_digest, "missing"), (&image, "never")] {
        let pull = format!("--pull={policy}");
        let args = ["run", "--rm", &pull, "--network", "none", reference, "sha256sum", "/data/big.bin"];
        let (code, stdout, stderr) = output_of(&mut elsewhere(&lazyrun, &args));
        assert_eq!(code, Some(0), "{reference}: {stderr}");
        assert!(stdout.starts_with(&want), "{reference}: {stdout}");
    }
    let args = ["run", "--rm", &image, "cat", "/data/last"];
    let (code, stdout, stderr) = output_of(&mut elsewhere(&lazyrun, &args));
    assert_eq!((code, stdout.as_str()), (Some(0), "behind the big file\n"), "with a bridge: {stderr}");
    // Not one attempt, so none that could have taken time.
    assert_eq!(lazyrun.info()["registry_requests"], Value::from(0));
    let states = lazyrun.ok(&["images", "--lazy", "--format", "{{.State}}"]);
    assert!(states.lines().all(|state| state == "hydrated"), "{states}");
}

#[test]
fn hydration_goes_on_after_a_reboot() {
    let fixture = Fixture::shaped(Shape { mbit: 40.0, rtt_ms: 5.0 });
    let lazyrun = index_only(Lazyrun::new(), &fixture.image());
    fixture.registry.reset();
    lazyrun.ok(&["hydrate", &fixture.image()]);
    wait_for("bytes to come", MINUTE, || (fixture.registry.stats().bytes_down > 12 << 20).then_some(()));
    cut_power(&lazyrun);
    // Any command starts a daemon; none starts a container. The boot is another one, so what was written without having
    // been synced is looked at again, but not fetched again.
    let dir = lazyrun.scratch("boot");
    fs::write(dir.join("id"), "fedcba98-7654-3210-fedc-ba9876543210\n").expect("write a boot id");
    let script = r#"mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(dir.join("id")).arg(EXE).arg("--root");
    let (code, _, stderr) = output_of(command.arg(lazyrun.root()).args(["images"]));
    assert_eq!(code, Some(0), "{stderr}");
    lazyrun.wait_for_state("hydrated", MINUTE);
    let (bytes, all) = (fixture.registry.stats().bytes_down, fixture.compressed());
    assert!(bytes < all + (7 << 20), "{bytes} of {all}");
    let sum = lazyrun.ok(&["run", "--rm", &fixture.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

/// The fixture in a registry that can be stopped, mounted lazily, with a bound that a test can wait for.
struct HalfLocal {
    registry: DockerRegistry,
    lazyrun: Lazyrun,
    dir: std::path::PathBuf,
    _fixture: Fixture,
}

impl HalfLocal {
    fn new() -> HalfLocal {
        let (fixture, registry) = (Fixture::new(), DockerRegistry::start());
        let image = registry.push(fixture.layout(), TAG, "fixture");
        let lazyrun = Lazyrun::new().with_env("LAZYRUN_FAULT_TIMEOUT", &format!("{}s", BOUND.as_secs()));
        let lazyrun = index_only(lazyrun, &image);
        let dir = lazyrun.scratch("mount");
        lazyrun.ok(&["mount", "--hydrate=never", &image, dir.to_str().expect("UTF-8")]);
        let half = HalfLocal { registry, lazyrun, dir, _fixture: fixture };
        assert!(read(&half.big(), 0, 100_000).expect("a first read") == big()[..100_000]);
        half
    }

    fn big(&self) -> std::path::PathBuf {
        self.dir.join("data/big.bin")
    }

    fn end(self) {
        self.lazyrun.ok(&["umount", self.dir.to_str().expect("UTF-8")]);
    }
}

fn read(path: &Path, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    File::open(path)?.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// Reads what cannot be had; how long that took until EIO.
fn fails(path: &Path, at: u64) -> Duration {
    let began = Instant::now();
    let error = read(path, at, 5000).expect_err("there is nothing to read from");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    began.elapsed()
}

fn in_time(what: &str, took: Duration) {
    assert!(took >= BOUND - Duration::from_millis(300), "{what} failed early: {took:?}");
    assert!(took < BOUND + MARGIN, "{what} failed late: {took:?}");
}

/// Reads a byte of a mapping in a process of its own, which dies of it.
fn dies_of_mapping(path: &Path, at: u64) -> Duration {
    let script = "import mmap, sys\n\
                  f = open(sys.argv[1], 'rb')\n\
                  m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n\
                  m[int(sys.argv[2])]";
    let began = Instant::now();
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(path)
        .arg(at.to_string())
        .status()
        .expect("python3 is needed: run tests/tools/deps.sh");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    began.elapsed()
}

/// Everything that may read, at once, while the registry is away.
fn all_fail_in_time(half: &HalfLocal) {
    let big_file = half.big();
    let mib = |n: u64| n << 20;
    thread::scope(|scope| {
        let early = scope.spawn(|| fails(&big_file, mib(20)));
        let mapped = scope.spawn(|| dies_of_mapping(&big_file, mib(14)));
        let scattered: Vec<_> = (0..12)
            .map(|i| {
                scope.spawn({
                    let file = &big_file;
                    move || fails(file, mib(3) + i * 70_000)
                })
            })
            .collect();
        // What is local comes at once meanwhile, past everybody who waits; dropped from the page cache, so that the
        // daemon is asked.
        thread::sleep(BOUND / 3);
        let began = Instant::now();
        let file = File::open(&big_file).expect("open");
        let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        assert!(read(&big_file, 0, 100_000).expect("what is local") == big()[..100_000]);
        assert!(began.elapsed() < BOUND / 2, "local bytes took {:?}", began.elapsed());
        // Joins what the first reader waits for, at another page, later: it has a bound of its own.
        let late = scope.spawn(|| fails(&big_file, mib(20) + 40_000));
        in_time("a read", early.join().expect("a reader"));
        in_time("a mapping", mapped.join().expect("a reader"));
        in_time("a late read", late.join().expect("a reader"));
        for reader in scattered {
            in_time("one of many reads", reader.join().expect("a reader"));
        }
    });
}

/// Reads by itself again soon, with neither a restart nor a new mount.
fn recovers(half: &HalfLocal) {
    let began = Instant::now();
    let bytes = wait_for("reads to work again", MINUTE, || read(&half.big(), 20 << 20, 300_000).ok());
    assert!(bytes == big()[20 << 20..(20 << 20) + 300_000], "wrong bytes");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(sha256(&fs::read(half.big()).expect("read all")), sha256(&big()));
    assert!(fs::read(half.dir.join("data/small/007")).expect("a small file") == noise(1007, 64 + 37 * 7));
}

#[test]
fn a_registry_that_says_nothing_fails_reads_in_time() {
    let half = HalfLocal::new();
    half.registry.signal(Signal::SIGSTOP);
    all_fail_in_time(&half);
    half.registry.signal(Signal::SIGCONT);
    recovers(&half);
    half.end();
}

#[test]
fn a_registry_that_is_gone_fails_reads_in_time() {
    let mut half = HalfLocal::new();
    half.registry.stop();
    all_fail_in_time(&half);
    // Tasks and requests do not pile up: a second crowd fares no worse, and the daemon stays small.
    all_fail_in_time(&half);
    let resident = half.lazyrun.info()["daemon_rss"].as_u64().expect("a number");
    assert!(resident < 80 << 20, "{resident} bytes are resident");
    half.registry.start_again();
    recovers(&half);
    half.end();
}

#[test]
fn a_short_outage_is_waited_out() {
    let (fixture, mut registry) = (Fixture::new(), DockerRegistry::start());
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let lazyrun = index_only(Lazyrun::new(), &image);
    let dir = lazyrun.scratch("mount");
    lazyrun.ok(&["mount", "--hydrate=never", &image, dir.to_str().expect("UTF-8")]);
    registry.stop();
    let path = dir.join("data/big.bin");
    let reader = thread::spawn(move || read(&path, (BIG / 2) as u64, 9000));
    // Longer than all retries of one request.
    thread::sleep(Duration::from_secs(6));
    registry.start_again();
    let bytes = reader.join().expect("a reader").expect("no error for an outage within the bound");
    assert!(bytes == big()[BIG / 2..BIG / 2 + 9000], "wrong bytes");
    lazyrun.ok(&["umount", dir.to_str().expect("UTF-8")]);
}

#[test]
fn hydration_waits_for_the_registry() {
    let (fixture, mut registry) = (Fixture::new(), DockerRegistry::start());
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let builder = Lazyrun::new();
    builder.ok(&["index", "push", &image]);
    // By ranges, and by a stream that proves an index.
    let proving = Lazyrun::new().with_env("LAZYRUN_HYDRATE_LIMIT", "3MiB/s");
    proving.ok(&["pull", "--hydrate=never", &image]);
    builder.ok(&["cache", "drop"]);
    builder.ok(&["hydrate", "--limit", "3MiB/s"]);
    for lazyrun in [&builder, &proving] {
        lazyrun.ok(&["hydrate", &image]);
        wait_for("some bytes", MINUTE, || {
            (lazyrun.lazy_image()["Local"].as_u64() > Some(4 << 20)).then_some(())
        });
    }
    registry.stop();
    for lazyrun in [&builder, &proving] {
        lazyrun.wait_for_state("waiting for registry", MINUTE);
        let row = lazyrun.lazy_image();
        assert!(row["Reason"].as_str().is_some_and(|reason| reason.contains("127.0.0.1")), "{row}");
    }
    let waiting = builder.spawn(&["hydrate", "--wait", &image]);
    registry.start_again();
    for lazyrun in [&builder, &proving] {
        lazyrun.wait_for_state("hydrated", Duration::from_secs(100));
    }
    assert_eq!(waiting.wait().0, Some(0));
    // The proof went on where it broke off: the stream was not begun again.
    let bytes = proving.info()["registry_bytes"].as_u64().expect("a number");
    assert!(bytes < fixture.compressed() + (8 << 20), "{bytes} of {}", fixture.compressed());
}
