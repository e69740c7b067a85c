//! Real containers, from a root of one static busybox. These need root, /bin/busybox (Debian:
//! busybox-static) and, where they say so, runc; without them they fail and say why.
//!
//! The shim and init are this very test binary: see [`DISPATCH`].

mod attach;
mod isolation;
mod lifecycle;
mod limits;
mod runc;

use super::cgroup::{Cgroup, Hierarchies};
use super::client::{self, Ending, SessionOptions};
use super::config::{ExitRecord, ShimConfig, StatusLine};
use super::proto::ExecProcess;
use super::spec::{BundlePaths, RunOptions, generate};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Runs before main: when the test binary is started as a shim or as init, it is one.
#[used]
#[unsafe(link_section = ".init_array")]
static DISPATCH: extern "C" fn() = {
    extern "C" fn dispatch() {
        let args: Vec<_> = std::env::args_os().collect();
        let word = |i: usize| args.get(i).and_then(|a| a.to_str());
        let code = match (word(0), word(1), word(2)) {
            (Some("lazyrun"), Some("shim"), Some("--config")) => super::shim::main(Path::new(&args[3])),
            (Some("lazyrun"), Some("init"), None) => super::init::main(),
            _ => return,
        };
        // ExitCode keeps its number to itself; the tests look at exit.json, not at this.
        std::process::exit(i32::from(
            format!("{code:?}") != format!("{:?}", std::process::ExitCode::SUCCESS),
        ));
    }
    dispatch
};

/// Fails the test unless it runs as root with busybox at hand.
fn require_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test starts containers and must run as root");
    assert!(
        Path::new("/bin/busybox").exists(),
        "this test needs /bin/busybox (apt-get install busybox-static)"
    );
}

/// One container: its bundle, and everything that must be gone when the test is over.
struct Container {
    tmp: tempfile::TempDir,
    config: ShimConfig,
    shim: Option<Child>,
    status: Option<StatusLine>,
}

const APPLETS: [&str; 30] = [
    "sh", "ls", "id", "true", "false", "sleep", "cat", "ps", "mount", "umount", "env", "echo", "grep",
    "head", "tail", "yes", "dd", "touch", "mkdir", "hostname", "stty", "tty", "kill", "wc", "unshare",
    "readlink", "pwd", "stat", "nproc", "ip",
];

impl Container {
    /// A bundle with a fresh root; nothing is started.
    fn new() -> Self {
        require_root();
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("rootfs");
        for dir in ["bin", "etc", "tmp", "home/web", "proc", "sys", "dev"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/home/web:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(root.join("etc/group"), "root:x:0:\nweb:x:34:\naudio:x:29:web\n").unwrap();
        let id = format!("t{}", tmp.path().file_name().unwrap().to_string_lossy().trim_start_matches('.'));
        let config = ShimConfig {
            id: id.clone(),
            dir: tmp.path().to_path_buf(),
            socket: tmp.path().join("s"),
            terminal: false,
            open_stdin: false,
            wait_attach: false,
            stop_signal: None,
            log: Some(tmp.path().join("log.json")),
            runtime: None,
            rootfs_fd: None,
            netns_fd: None,
            status_fd: None,
            cgroup: Some(format!("/lazyrun-test/{id}")),
        };
        Self { tmp, config, shim: None, status: None }
    }

    fn dir(&self) -> &Path {
        self.tmp.path()
    }

    fn root(&self) -> PathBuf {
        self.dir().join("rootfs")
    }

    /// Writes config.json for a shell command line.
    fn sh(self, script: &str, mut run: RunOptions) -> Self {
        if run.args.is_empty() {
            run.args = ["sh", "-c", script].map(str::to_owned).to_vec();
        }
        self.spec(&run)
    }

    fn spec(self, run: &RunOptions) -> Self {
        let image =
            r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[]}"#;
        let image = serde_json::from_str(image).unwrap();
        let paths =
            BundlePaths { rootfs: "rootfs".into(), cgroup: self.config.cgroup.clone(), ..Default::default() };
        let spec = generate(&image, run, &paths).unwrap();
        std::fs::write(self.dir().join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        self
    }

    /// Starts the shim and waits for its status line.
    fn start(&mut self) -> StatusLine {
        let (read, write) = nix::unistd::pipe().unwrap();
        self.config.status_fd = Some(50);
        let file = self.dir().join("shim.json");
        std::fs::write(&file, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg0("lazyrun").args(["shim", "--config"]).arg(&file);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let number = write.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(number, 50) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            })
        };
        self.shim = Some(command.spawn().unwrap());
        drop(write);
        let mut line = String::new();
        BufReader::new(std::fs::File::from(read)).read_line(&mut line).unwrap();
        let status: StatusLine =
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("status {line:?}: {e}"));
        self.status = Some(status.clone());
        status
    }

    /// Starts, and returns the first process' pid.
    fn started(&mut self) -> i32 {
        match self.start() {
            StatusLine::Started { pid } => pid,
            StatusLine::Failed { error, .. } => panic!("the container did not start: {error}"),
        }
    }

    /// Starts, expects a failure, and returns its sentence and code.
    fn refused(&mut self) -> (String, u8) {
        let StatusLine::Failed { error, code } = self.start() else { panic!("the container started") };
        self.shim.take().unwrap().wait().unwrap();
        self.assert_gone();
        (error, code)
    }

    /// Waits for the container's end.
    fn ended(&mut self) -> ExitRecord {
        self.shim.take().unwrap().wait().unwrap();
        self.assert_gone();
        ExitRecord::load(self.dir()).unwrap().expect("exit.json exists")
    }

    /// Starts, waits for the end, and returns (exit code, stdout, stderr).
    fn run(mut self) -> (i32, String, String) {
        self.started();
        let record = self.ended();
        let (out, err) = self.output();
        (record.exit_code, out, err)
    }

    fn output(&self) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        client::read_logs(&self.dir().join("log.json"), &Default::default(), &|| true, &mut out, &mut err)
            .unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    fn exec(
        &self,
        process: &ExecProcess,
        stdin: Option<&OwnedFd>,
    ) -> Result<(Ending, String), super::ContainerError> {
        let options =
            SessionOptions { stdin: stdin.map(AsFd::as_fd), terminal: process.terminal, signal_proxy: false };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let ending = client::exec(&self.config.socket, process, &options, &mut out, &mut err)?;
        out.extend(err);
        Ok((ending, String::from_utf8_lossy(&out).into_owned()))
    }

    /// Runs a shell line in the running container.
    fn exec_sh(&self, script: &str) -> (Ending, String) {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        self.exec(&ExecProcess { args, ..Default::default() }, None).unwrap()
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup::new(Hierarchies::detect().unwrap(), self.config.cgroup.as_deref().unwrap()).unwrap()
    }

    /// No group, mount or socket of the container is left.
    fn assert_gone(&self) {
        for dir in self.cgroup().dirs() {
            assert!(!dir.exists(), "{} is left behind", dir.display());
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*self.dir().to_string_lossy()), "a mount is left behind:\n{mounts}");
        assert!(!self.config.socket.exists(), "the socket is left behind");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(mut shim) = self.shim.take() {
            let _ = shim.kill();
            let _ = shim.wait();
        }
        let group = self.cgroup();
        group.kill_all();
        eventually(|| group.remove().is_ok());
    }
}

/// Waits (bounded) until something becomes true, and says whether it did.
fn eventually(check: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !check() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn options() -> RunOptions {
    RunOptions { hostname: Some("box".to_owned()), ..Default::default() }
}
