//! A private containerd: own configuration, root, state and socket, nothing shared with one of the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use super::server::Server;
use super::wait_for;

/// Everything that is neither images, overlayfs snapshots nor runc tasks stays off.
const DISABLED: &[&str] = &[
    CRI,
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

const CRI: &str = "io.containerd.grpc.v1.cri";

/// The name of the snapshotter under test in containerd's configuration.
pub const PROXY: &str = "lazyrun";

/// A running containerd.
pub struct Containerd {
    socket: PathBuf,
    namespace: String,
    mounted: Vec<PathBuf>,
    command: fn() -> Command,
    // Stopped before its directory is removed: fields drop in this order.
    server: Server,
    dir: TempDir,
}

impl Containerd {
    /// Starts one and waits until it answers.
    pub fn start() -> Containerd {
        Containerd::start_as(|| Command::new("containerd"), "")
    }

    /// Starts one with the snapshotter that listens at `address` as [`PROXY`].
    pub fn with_snapshotter(address: &Path) -> Containerd {
        Containerd::with_snapshotter_as(|| Command::new("containerd"), address)
    }

    /// As [`Containerd::with_snapshotter`], started by another command, such as `unshare … containerd`.
    pub fn with_snapshotter_as(command: fn() -> Command, address: &Path) -> Containerd {
        Containerd::start_as(command, &proxy(address))
    }

    /// As [`Containerd::with_snapshotter`], with its own socket at `socket`.
    pub fn with_snapshotter_at(address: &Path, socket: &Path) -> Containerd {
        Containerd::start_at(|| Command::new("containerd"), &proxy(address), Some(socket))
    }

    /// As [`Containerd::with_snapshotter_at`], with the differ that serves beside the snapshotter; from version 1.7.4 on.
    pub fn with_differ_at(address: &Path, socket: &Path) -> Containerd {
        let differ = format!("{PROXY}-diff");
        let more = format!(
            "{}[proxy_plugins.{differ}]\ntype = \"diff\"\naddress = {address:?}\n\
             [plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"{differ}\", \"walking\"]\n",
            proxy(address)
        );
        Containerd::start_at(|| Command::new("containerd"), &more, Some(socket))
    }

    /// As [`Containerd::with_snapshotter`], told to pass on what a pull by its transfer service is for; from version 2.1
    /// on.
    pub fn with_annotations(address: &Path) -> Containerd {
        Containerd::start_at(|| Command::new("containerd"), &annotated_proxy(address), None)
    }

    /// As [`Containerd::with_snapshotter_at`], with CRI on it; `pause` is the image of a pod itself.
    pub fn with_cri_at(address: &Path, socket: &Path, pause: &str) -> Containerd {
        // As docs/OPERATIONS.md has it.
        let lazily = format!("snapshotter = \"{PROXY}\"\ndisable_snapshot_annotations = false\n");
        let inside = "disable_apparmor = true\nrestrict_oom_score_adj = true\n";
        let more = match version() {
            (1, _) => format!(
                "{}[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {pause:?}\n{inside}\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n{lazily}",
                proxy(address)
            ),
            _ => format!(
                "{}[plugins.\"io.containerd.cri.v1.runtime\"]\n{inside}\
                 [plugins.\"io.containerd.cri.v1.images\"]\n{lazily}\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {pause:?}\n",
                annotated_proxy(address)
            ),
        };
        Containerd::start_at(|| Command::new("containerd"), &more, Some(socket))
    }

    fn start_as(command: fn() -> Command, more: &str) -> Containerd {
        Containerd::start_at(command, more, None)
    }

    fn start_at(command: fn() -> Command, more: &str, socket: Option<&Path>) -> Containerd {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().expect("a directory for containerd");
        let socket = socket.map_or_else(|| dir.path().join("sock"), Path::to_owned);
        let cri = more.contains(".cri");
        let disabled: Vec<&str> = DISABLED.iter().copied().filter(|plugin| !cri || *plugin != CRI).collect();
        // CRI's two plugins of 2.x are known from the third version on.
        let version = if more.contains(".cri.v1.") { 3 } else { 2 };
        let text = format!(
            "version = {version}\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {disabled:?}\n\
             [grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {:?}\n{more}",
            dir.path().join("root"),
            dir.path().join("state"),
            dir.path().join("ttrpc"),
        );
        fs::write(dir.path().join("config.toml"), text).expect("write containerd's configuration");
        let server = Containerd::spawn(command, dir.path());
        // runc's state lies in /run/containerd/runc/<namespace>, which is the host's: hence a name of our own.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("lazyrun-test-{}-{number}", std::process::id());
        let mut containerd = Containerd { socket, namespace, mounted: Vec::new(), command, server, dir };
        containerd.wait();
        containerd
    }

    fn spawn(command: fn() -> Command, dir: &Path) -> Server {
        Server::start(command().arg("--config").arg(dir.join("config.toml")), &dir.join("log"))
    }

    fn wait(&mut self) {
        wait_for("containerd to answer", Duration::from_secs(30), || {
            self.server.assert_alive();
            let status = self.ctr(["version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success()).then_some(())
        });
    }

    /// Kills it as `kill -9` does and starts it again on the same state.
    pub fn kill_and_restart(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill containerd");
        self.server = Containerd::spawn(self.command, self.dir.path());
        self.wait();
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.server.pid() as i32
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    /// The namespace of containerd that this one's commands use.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Runs a `ctr` command that must succeed and returns its standard output.
    pub fn output<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> String {
        let output = self.ctr(args).output().expect("ctr is needed: run tests/tools/deps.sh");
        assert!(output.status.success(), "ctr: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A `ctr` command against it.
    pub fn ctr<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(["--namespace", &self.namespace]).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a `ctr` command; panics with its errors when it fails.
    pub fn run<'a>(&self, args: impl IntoIterator<Item = &'a str>) {
        let output = self.ctr(args).output().expect("ctr is needed: run tests/tools/deps.sh");
        assert!(output.status.success(), "ctr: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Pulls and unpacks an image over plain HTTP.
    pub fn pull(&self, reference: &str) {
        self.run(["images", "pull", "--plain-http", reference]);
    }

    /// Mounts a pulled image's tree, as containerd's overlayfs snapshotter makes it, read-only.
    pub fn mount(&mut self, reference: &str, dir: &Path) {
        let dir_text = dir.to_str().expect("a path in UTF-8");
        self.run(["images", "mount", reference, dir_text]);
        self.mounted.push(dir.to_owned());
    }

    /// The snapshot of [`PROXY`] that no other stands on: of an image, its topmost layer.
    pub fn top_snapshot(&self) -> String {
        let listed = self.output(["snapshots", "--snapshotter", PROXY, "ls"]);
        let rows: Vec<Vec<&str>> = listed.lines().skip(1).map(|l| l.split_whitespace().collect()).collect();
        let top = rows.iter().find(|row| !rows.iter().any(|other| other.get(1) == row.first()));
        (*top.and_then(|row| row.first()).expect("a snapshot")).to_owned()
    }

    /// As [`Containerd::top_snapshot`], where containers stand on it.
    pub fn top_committed(&self) -> String {
        let listed = self.output(["snapshots", "--snapshotter", PROXY, "ls"]);
        let rows: Vec<Vec<&str>> = listed.lines().skip(1).map(|l| l.split_whitespace().collect()).collect();
        let committed: Vec<_> = rows.iter().filter(|row| row.last() == Some(&"Committed")).collect();
        let top = committed.iter().find(|row| !committed.iter().any(|other| other.get(1) == row.first()));
        (*top.and_then(|row| row.first()).expect("a snapshot")).to_owned()
    }

    /// Makes a snapshot of [`PROXY`] (`prepare` or `view`) on another one and mounts it.
    pub fn mount_snapshot(&mut self, how: &str, key: &str, parent: &str, dir: &Path) {
        // What `images mount` of containerd 1.6 does with another snapshotter than overlayfs: it takes overlayfs.
        let target = dir.to_str().expect("a path in UTF-8");
        let commands =
            self.output(["snapshots", "--snapshotter", PROXY, how, "--target", target, key, parent]);
        let done = Command::new("sh").args(["-ec", &commands]).output().expect("run mount");
        assert!(done.status.success(), "{commands}: {done:?}");
        self.mounted.push(dir.to_owned());
    }

    /// Forgets an image, its content and its snapshots.
    pub fn remove(&self, reference: &str) {
        self.run(["images", "remove", "--sync", reference]);
    }
}

/// Major and minor version of the containerd that is found first.
pub fn version() -> (u32, u32) {
    let output = Command::new("containerd").arg("--version").output().expect("run containerd");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut numbers = version.expect("a version").split('.').map(|n| n.parse().expect("a number"));
    (numbers.next().expect("a number"), numbers.next().expect("a number"))
}

fn proxy(address: &Path) -> String {
    format!("[proxy_plugins.{PROXY}]\ntype = \"snapshot\"\naddress = {address:?}\n")
}

fn annotated_proxy(address: &Path) -> String {
    format!(
        "{}[proxy_plugins.{PROXY}.exports]\nenable_remote_snapshot_annotations = \"true\"\n\
         [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n\
         platform = \"linux/{}\"\nsnapshotter = \"{PROXY}\"\n",
        proxy(address),
        if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
    )
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for dir in self.mounted.drain(..) {
            let _ = nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(Path::new("/run/containerd/runc").join(&self.namespace));
        remove_cgroups(&self.namespace);
    }
}

/// containerd leaves the cgroup of a namespace behind, in each hierarchy where there are several.
fn remove_cgroups(namespace: &str) {
    let below = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in below.chain([PathBuf::from("/sys/fs/cgroup")]) {
        // One that somebody is still in stays.
        let _ = fs::remove_dir(hierarchy.join(namespace));
    }
}
