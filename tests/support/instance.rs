//! One separate instance of the program under test: a root of its own, reset and searched for leftovers at the
//! end of the test, however it ends.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::{leaks, need_root};

/// No command of a test takes longer, however slow the machine.
const LIMIT: Duration = Duration::from_secs(180);

/// The program under test.
pub const EXE: &str = env!("CARGO_BIN_EXE_lazyrun");

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// An instance with a root directory of its own.
pub struct Lazyrun {
    root: PathBuf,
    dir: TempDir,
    /// Global options, after `--root`.
    options: Vec<String>,
    /// What every command finds in its environment.
    environment: Vec<(String, String)>,
}

impl Lazyrun {
    /// An instance that has done nothing yet.
    pub fn new() -> Lazyrun {
        Lazyrun::below("root")
    }

    /// The same with a root so deep that no socket path below it fits the kernel's 108 bytes.
    pub fn deep() -> Lazyrun {
        Lazyrun::below(&["a-rather-long-directory-name-for-a-root"; 5].join("/"))
    }

    /// An instance whose root is at this path below a directory of its own.
    pub fn below(path: &str) -> Lazyrun {
        need_root();
        let dir = tempfile::Builder::new().prefix("lazyrun-test-").tempdir().expect("a temporary directory");
        let root = dir.path().join(path);
        fs::create_dir_all(root.parent().expect("a parent")).expect("create the root's parents");
        Lazyrun { root, dir, options: Vec::new(), environment: Vec::new() }
    }

    /// Adds global options, such as `--insecure-registry HOST`.
    pub fn with_options(mut self, options: &[&str]) -> Lazyrun {
        self.options.extend(options.iter().map(|option| (*option).to_owned()));
        self
    }

    /// Sets an environment variable for all commands.
    pub fn with_env(mut self, name: &str, value: &str) -> Lazyrun {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory for the test's own files, outside the root, gone with the instance.
    pub fn scratch(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("scratch").join(name);
        fs::create_dir_all(&path).expect("create a scratch directory");
        path
    }

    /// A command of this instance.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(EXE);
        command.arg("--root").arg(&self.root).args(&self.options).args(args).stdin(Stdio::null());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, args: &[&str]) -> Finished {
        finish(&mut self.command(args), args)
    }

    /// Runs a command that may hang: killed, and nothing, when it does not end within `limit`.
    pub fn run_within(&self, limit: Duration, args: &[&str]) -> Option<Finished> {
        finish_within(&mut self.command(args), limit)
    }

    /// Runs a command with this standard input.
    pub fn run_with_input(&self, args: &[&str], input: &str) -> Finished {
        let path = self.scratch("input").join("stdin");
        fs::write(&path, input).expect("write the input");
        finish(self.command(args).stdin(File::open(&path).expect("open the input")), args)
    }

    /// Runs a command that must exit with 0 and returns its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let finished = self.run(args);
        assert_eq!(finished.code, Some(0), "lazyrun {args:?}: {finished:#?}");
        finished.stdout
    }

    /// Runs a command that must exit with this code and say why in one line; returns that line.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let finished = self.run(args);
        assert_eq!(finished.code, Some(code), "lazyrun {args:?}: {finished:#?}");
        assert_eq!(finished.stdout, "", "an error belongs on standard error only: {finished:#?}");
        assert!(!finished.stderr.contains("panicked"), "{finished:#?}");
        let line = finished.stderr.lines().rfind(|line| !line.trim().is_empty());
        line.unwrap_or_else(|| panic!("lazyrun {args:?} failed without a word")).to_owned()
    }

    /// Starts a command and leaves it running; it is killed when the guard drops.
    pub fn spawn(&self, args: &[&str]) -> Running {
        let output = tempfile::tempfile().expect("a temporary file");
        let child = self
            .command(args)
            .stdout(output.try_clone().expect("share a file"))
            .stderr(Stdio::null())
            .spawn()
            .expect("start lazyrun");
        Running { child, output }
    }

    /// `info --format json`.
    pub fn info(&self) -> Value {
        let text = self.ok(&["info", "--format", "json"]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("info is no JSON ({error}): {text}"))
    }

    /// Sends the daemon a signal; its process id.
    pub fn signal_daemon(&self, signal: nix::sys::signal::Signal) -> i32 {
        let pid = self.daemon_pid().expect("a daemon runs");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("signal the daemon");
        pid
    }

    /// Kills the daemon; returns once the keeper has started another.
    pub fn replace_daemon(&self) {
        let old = self.signal_daemon(nix::sys::signal::Signal::SIGKILL);
        super::wait_for("a new daemon", Duration::from_secs(30), || {
            self.daemon_pid().filter(|pid| *pid != old)
        });
    }

    /// The row of `images --lazy` for the only image.
    pub fn lazy_image(&self) -> Value {
        let text = self.ok(&["images", "--lazy", "--format", "json"]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not one row of JSON ({error}): {text}"))
    }

    /// What hydration does with the only image.
    pub fn lazy_state(&self) -> String {
        self.lazy_image()["State"].as_str().expect("a state").to_owned()
    }

    /// Waits until the only image is in this state.
    pub fn wait_for_state(&self, state: &str, limit: Duration) {
        super::wait_for(&format!("state {state:?}"), limit, || (self.lazy_state() == state).then_some(()));
    }

    /// The daemon's process id, when one runs.
    pub fn daemon_pid(&self) -> Option<i32> {
        let finished = self.run(&["info", "--format", "json"]);
        // One that was killed a moment ago may still have taken the call.
        let lost =
            ["the connection to the lazyrun daemon broke", "the lazyrun daemon ended before it answered"];
        if finished.code == Some(125) && lost.iter().any(|lost| finished.stderr.contains(lost)) {
            return None;
        }
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let info: Value = serde_json::from_str(&finished.stdout).expect("JSON");
        let pid = info.get("daemon_pid").and_then(Value::as_i64)?;
        i32::try_from(pid).ok().filter(|pid| *pid > 0)
    }

    /// Stops everything and deletes the root; panics when anything is left.
    pub fn reset(&self) {
        self.ok(&["system", "reset", "--force"]);
        let left = self.leftovers();
        assert!(left.is_empty(), "left after a reset:\n{}", left.join("\n"));
        assert!(!self.root.exists(), "the root is still there after a reset");
    }

    fn leftovers(&self) -> Vec<String> {
        // A process that was told to end may need a moment to be gone.
        let start = Instant::now();
        loop {
            let left = leaks::of_root(&self.root);
            if left.is_empty() || start.elapsed() > Duration::from_secs(5) {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Lazyrun {
    fn drop(&mut self) {
        let finished = self.run(&["system", "reset", "--force"]);
        let left = self.leftovers();
        self.clean_up_by_force();
        if std::thread::panicking() {
            return;
        }
        assert_eq!(finished.code, Some(0), "the reset failed: {finished:#?}");
        assert!(left.is_empty(), "left after a reset:\n{}", left.join("\n"));
    }
}

impl Lazyrun {
    /// So that one broken test does not spoil the others.
    fn clean_up_by_force(&self) {
        let root = self.root.to_string_lossy();
        for (pid, _) in leaks::processes(&root) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let below = self.dir.path().to_string_lossy().into_owned();
        for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
            if point.starts_with(&below) {
                let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
            }
        }
    }
}

/// A command that is still running.
pub struct Running {
    child: Child,
    output: File,
}

impl Running {
    /// The command's process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it wrote so far.
    pub fn output(&self) -> String {
        read_back(&self.output)
    }

    /// Kills it at once, as a user with `kill -9` would.
    pub fn kill(mut self) {
        self.child.kill().expect("kill lazyrun");
        self.child.wait().expect("reap lazyrun");
    }

    /// Waits for its end; the exit code and what it wrote.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let code = wait(&mut self.child, LIMIT).unwrap_or_else(|| panic!("no end within {LIMIT:?}"));
        (code, self.output())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn finish(command: &mut Command, args: &[&str]) -> Finished {
    let finished = finish_within(command, LIMIT);
    finished.unwrap_or_else(|| panic!("lazyrun {args:?} did not end within {LIMIT:?}"))
}

/// Runs a command to its end, unless that takes longer than `limit`.
pub fn finish_within(command: &mut Command, limit: Duration) -> Option<Finished> {
    // Files, not pipes: a daemon left behind may hold them open, and nobody must wait for it.
    let (stdout, stderr) = (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
    command.stdout(stdout.try_clone().expect("share a file"));
    command.stderr(stderr.try_clone().expect("share a file"));
    let began = Instant::now();
    let mut child = loop {
        match command.spawn() {
            // A program that was just written: what another test is starting has its descriptor until it is executed.
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy && began.elapsed() < LIMIT => {
                std::thread::yield_now();
            }
            other => break other.expect("start a command"),
        }
    };
    let code = wait(&mut child, limit)?;
    Some(Finished { code, stdout: read_back(&stdout), stderr: read_back(&stderr) })
}

/// The exit code, if there is one; nothing when the process had to be killed.
fn wait(child: &mut Child, limit: Duration) -> Option<Option<i32>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("wait for a command") {
            return Some(status.code());
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            // Not for ever: what hangs in the kernel can't be killed.
            while start.elapsed() < limit + Duration::from_secs(5) && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(20));
            }
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read_back(file: &File) -> String {
    use std::os::unix::fs::FileExt;
    let len = file.metadata().expect("a file's length").len();
    let mut bytes = vec![0; usize::try_from(len).expect("a short file")];
    file.read_exact_at(&mut bytes, 0).expect("read a command's output");
    String::from_utf8_lossy(&bytes).into_owned()
}
