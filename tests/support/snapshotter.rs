//! The snapshotter under test with an instance of its own, and the Go programs that are its real clients.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::containerd::{Containerd, PROXY};
use super::fixture::sha256;
use super::instance::{EXE, Lazyrun};
use super::server::Server;
use super::wait_for;

/// A running snapshotter.
pub struct Snapshotter {
    // Stopped before the instance is reset: fields drop in this order.
    server: Server,
    socket: PathBuf,
    options: Vec<String>,
    flags: Vec<String>,
    env: Vec<(String, PathBuf)>,
    /// Its instance.
    pub lazyrun: Lazyrun,
}

impl Snapshotter {
    /// Starts one and waits until it serves.
    pub fn start() -> Snapshotter {
        Snapshotter::start_as(&[], &[], &[])
    }

    /// Starts one with these global options.
    pub fn with_options(options: &[&str]) -> Snapshotter {
        Snapshotter::start_as(options, &[], &[])
    }

    /// Starts one with these flags of its command.
    pub fn with_flags(flags: &[&str]) -> Snapshotter {
        Snapshotter::start_as(&[], flags, &[])
    }

    /// Starts one with these in its environment.
    pub fn with_env(env: &[(&str, &Path)]) -> Snapshotter {
        Snapshotter::start_as(&[], &[], env)
    }

    fn start_as(options: &[&str], flags: &[&str], env: &[(&str, &Path)]) -> Snapshotter {
        let env: Vec<(String, PathBuf)> =
            env.iter().map(|(n, v)| ((*n).to_owned(), v.to_path_buf())).collect();
        let lazyrun = Lazyrun::new().with_options(options);
        let socket = lazyrun.scratch("socket").join("s");
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
        let (options, flags) = (owned(options), owned(flags));
        let server = spawn(&lazyrun, &options, &flags, &env, &socket);
        let mut snapshotter = Snapshotter { server, socket, options, flags, env, lazyrun };
        snapshotter.wait();
        snapshotter
    }

    fn wait(&mut self) {
        let daemon = wait_for("the snapshotter to serve", Duration::from_secs(60), || {
            self.server.assert_alive();
            self.lazyrun.daemon_pid()
        });
        assert!(daemon > 0 && self.socket.exists());
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process that was started: the daemon's keeper.
    pub fn pid(&self) -> i32 {
        self.server.pid() as i32
    }

    /// Kills the daemon; the keeper starts another one.
    pub fn kill_daemon(&self) {
        let pid = self.lazyrun.daemon_pid().expect("a running daemon");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill the daemon");
        wait_for("another daemon", Duration::from_secs(60), || {
            self.lazyrun.daemon_pid().filter(|new| *new != pid)
        });
    }

    /// Kills the daemon and its keeper, as a crash of the node would, and starts anew.
    pub fn kill_all_and_restart(&mut self) {
        let pid = self.lazyrun.daemon_pid().expect("a running daemon");
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL).expect("kill the snapshotter");
        // It ends with its keeper, and may have done so.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        // Until the last of their threads has gone the kernel takes connections for them.
        wait_for("both to end", Duration::from_secs(30), || {
            let refused = std::os::unix::net::UnixStream::connect(&self.socket).is_err();
            (self.server.ended().is_some() && refused).then_some(())
        });
        self.server = spawn(&self.lazyrun, &self.options, &self.flags, &self.env, &self.socket);
        self.wait();
    }

    /// Ends it with a signal and returns its exit code.
    pub fn end(mut self, signal: Signal) -> (Option<i32>, Lazyrun, PathBuf) {
        kill(Pid::from_raw(self.pid()), signal).expect("signal the snapshotter");
        let code = wait_for("the snapshotter to end", Duration::from_secs(60), || self.server.ended());
        (code, self.lazyrun, self.socket)
    }

    /// A containerd that uses it.
    pub fn containerd(&self) -> Containerd {
        Containerd::with_snapshotter(&self.socket)
    }

    /// A containerd that uses it, at the socket where it expects one to take its layers.
    pub fn containerd_with_diffs(&self) -> Containerd {
        Containerd::with_snapshotter_at(&self.socket, &containerd_socket(&self.lazyrun))
    }

    /// The same, from version 1.7.4 on, with its differ.
    pub fn containerd_with_differ(&self) -> Containerd {
        Containerd::with_differ_at(&self.socket, &containerd_socket(&self.lazyrun))
    }

    /// The same, for the kubelet; `pause` is the image of a pod itself.
    pub fn containerd_with_cri(&self, pause: &str) -> Containerd {
        Containerd::with_cri_at(&self.socket, &containerd_socket(&self.lazyrun), pause)
    }

    /// What is mounted below its root.
    pub fn mounts(&self) -> Vec<String> {
        mounts_below(self.lazyrun.root())
    }
}

/// Mount points below a directory.
pub fn mounts_below(dir: &Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| Path::new(point).starts_with(dir)).map(str::to_owned).collect()
}

/// Where the containerd listens that it stores layers in.
fn containerd_socket(lazyrun: &Lazyrun) -> PathBuf {
    lazyrun.scratch("containerd").join("s")
}

fn spawn(
    lazyrun: &Lazyrun,
    options: &[String],
    flags: &[String],
    env: &[(String, PathBuf)],
    socket: &Path,
) -> Server {
    let mut command = Command::new(EXE);
    command.arg("--root").arg(lazyrun.root()).args(options).arg("snapshotter").args(flags);
    command.arg("--address").arg(socket);
    command.arg("--containerd-address").arg(containerd_socket(lazyrun)).envs(env.iter().cloned());
    Server::start(&mut command, &lazyrun.scratch("log").join("snapshotter"))
}

/// Pulls an image as CRI and nerdctl do, with the annotations that remote snapshotters need; returns what it said if
/// it failed.
pub fn try_pull(containerd: &Containerd, snapshotter: &str, image: &str) -> Result<(), String> {
    let output = pull_command(containerd, snapshotter, image).output().expect("run the client of containerd");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The command that pulls so.
pub fn pull_command(containerd: &Containerd, snapshotter: &str, image: &str) -> Command {
    let mut command = Command::new(go_program("pull"));
    command.arg(containerd.socket()).args([containerd.namespace(), snapshotter, image]);
    command
}

/// Pulls an image through the snapshotter under test.
pub fn pull(containerd: &Containerd, image: &str) {
    try_pull(containerd, PROXY, image).expect("pull the image");
}

/// Builds a Go program of `tests/snapsuite` with Debian's packages of containerd's sources, once: `suite` is
/// containerd's own tests of snapshotters.
pub fn go_program(name: &'static str) -> PathBuf {
    static SUITE: OnceLock<PathBuf> = OnceLock::new();
    static PULL: OnceLock<PathBuf> = OnceLock::new();
    let once = if name == "suite" { &SUITE } else { &PULL };
    once.get_or_init(|| build(name)).clone()
}

fn build(name: &str) -> PathBuf {
    let path = tempfile::tempdir().expect("a directory for Go");
    let src = path.path().join("src");
    std::fs::create_dir(&src).expect("a directory for Go");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapsuite");
    std::os::unix::fs::symlink(sources, src.join("snapsuite")).expect("link the sources");
    let program =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("snapsuite-{name}-{}", std::process::id()));
    let mut command = Command::new("go");
    match name {
        "suite" => command.args(["test", "-c", "-o"]).arg(&program).arg("snapsuite"),
        _ => command.args(["build", "-o"]).arg(&program).arg(format!("snapsuite/{name}")),
    };
    let gopath = format!("{}:/usr/share/gocode", path.path().display());
    command.env("GO111MODULE", "off").env("GOPATH", gopath).env("GOFLAGS", "").current_dir(&src);
    let output = command.output().expect("go is needed: run tests/tools/deps.sh");
    assert!(output.status.success(), "go: {}", String::from_utf8_lossy(&output.stderr));
    // Kept open, it is run by name of the descriptor's file and leaves nothing in the target directory.
    let kept = std::fs::File::open(&program).expect("open the program");
    std::fs::remove_file(&program).expect("unlink the program");
    let fd = std::os::fd::IntoRawFd::into_raw_fd(kept);
    PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()))
}

/// The chainIDs of an image's layers by its config, bottom first (OCI image-spec, "Layer ChainID").
pub fn chain_ids(config: &Value) -> Vec<String> {
    let mut chains: Vec<String> = Vec::new();
    for diff_id in config["rootfs"]["diff_ids"].as_array().expect("diffIDs") {
        let diff_id = diff_id.as_str().expect("a diffID");
        chains.push(match chains.last() {
            None => diff_id.to_owned(),
            Some(below) => format!("sha256:{}", sha256(format!("{below} {diff_id}").as_bytes())),
        });
    }
    chains
}
