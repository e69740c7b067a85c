//! Running the bundle with another OCI runtime (runc, crun) in place of the built-in runner.

use super::io::{ChildStreams, nonblocking};
use super::start::Child;
use crate::container::config::ShimConfig;
use crate::container::error::{
    Attempt, ContainerError, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_RUNNER, Result,
};
use crate::container::sys;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A container that another runtime made.
#[derive(Debug)]
pub(super) struct Foreign {
    runtime: PathBuf,
    id: String,
    dir: PathBuf,
    terminal: bool,
}

impl Foreign {
    /// `runtime create`. The network namespace is handed over by a path to the shim's own descriptor.
    pub(super) fn create(
        runtime: &Path,
        config: &ShimConfig,
        spec: &Spec,
        netns: Option<&OwnedFd>,
        stdio: &ChildStreams,
    ) -> Result<(Self, Child, Option<OwnedFd>)> {
        let this = Self {
            runtime: runtime.to_path_buf(),
            id: config.id.clone(),
            dir: config.dir.clone(),
            terminal: config.terminal,
        };
        let mut spec = spec.clone();
        if let Some(netns) = netns {
            point_to_netns(&mut spec, netns);
        }
        if let (Some(path), Some(linux)) = (&config.cgroup, spec.linux_mut().as_mut()) {
            linux.set_cgroups_path(Some(path.into()));
        }
        // The bundle's config.json stays free of this process' descriptors: the runtime gets its own copy.
        let bundle = this.dir.join("runtime");
        std::fs::create_dir_all(&bundle).attempt(|| format!("create {}", bundle.display()))?;
        if let Some(root) = spec.root_mut() {
            let path = this.dir.join(root.path());
            root.set_path(path);
        }
        let json = serde_json::to_vec(&spec).attempt(|| "encode the spec")?;
        std::fs::write(bundle.join("config.json"), json).attempt(|| "write the runtime's config.json")?;
        let pid_file = this.dir.join("runtime/init.pid");
        let mut command = this.command("create");
        command.arg("--bundle").arg(&bundle).arg("--pid-file").arg(&pid_file);
        let made = this.launch(command, &pid_file, this.terminal, stdio);
        let (child, console) = made.inspect_err(|_| this.delete())?;
        Ok((this, child, console))
    }

    /// `runtime start`.
    pub(super) fn start(&self) -> Result<()> {
        let mut command = self.command("start");
        command.arg(&self.id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.wait(command)
    }

    /// `runtime exec --detach`.
    pub(super) fn exec(&self, spec: &Spec, stdio: &ChildStreams) -> Result<(Child, Option<OwnedFd>)> {
        let process = spec.process().as_ref();
        let terminal = process.is_some_and(|p| p.terminal() == Some(true));
        let file = self.dir.join("runtime/process.json");
        let json = serde_json::to_vec(&process).attempt(|| "encode the process")?;
        std::fs::write(&file, json).attempt(|| format!("write {}", file.display()))?;
        let pid_file = self.dir.join("runtime/exec.pid");
        let mut command = self.command("exec");
        command.arg("--detach").arg("--process").arg(&file).arg("--pid-file").arg(&pid_file);
        self.launch(command, &pid_file, terminal, stdio)
    }

    /// `runtime delete --force`; a container that is gone already is fine.
    pub(super) fn delete(&self) {
        let mut command = self.command("delete");
        command.arg("--force").arg(&self.id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // The cgroup and processes are the shim's to clean up in any case.
        let _ = self.wait(command);
        let _ = std::fs::remove_dir_all(self.dir.join("runtime"));
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(self.dir.join("runtime/state"));
        command.arg("--log").arg(self.log()).arg("--log-format").arg("json").arg(verb);
        // SAFETY: sigprocmask is async-signal-safe; the runtime must not inherit the shim's blocked signals.
        unsafe {
            command.pre_exec(|| {
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(Into::into)
            })
        };
        command
    }

    fn log(&self) -> PathBuf {
        self.dir.join("runtime/log.json")
    }

    /// Runs create or exec with the container's streams, and takes over the process it leaves behind.
    fn launch(
        &self,
        mut command: Command,
        pid_file: &Path,
        terminal: bool,
        stdio: &ChildStreams,
    ) -> Result<(Child, Option<OwnedFd>)> {
        let socket = self.dir.join("runtime/tty.sock");
        let listener = if terminal {
            let _ = std::fs::remove_file(&socket);
            command.arg("--console-socket").arg(&socket);
            Some(UnixListener::bind(&socket).attempt(|| format!("listen on {}", socket.display()))?)
        } else {
            None
        };
        command.arg(&self.id);
        let [stdin, stdout, stderr] = &stdio.0;
        let copy = |fd: &OwnedFd| fd.try_clone().map(Stdio::from).attempt(|| "pass on a stream");
        command.stdin(copy(stdin)?).stdout(copy(stdout)?).stderr(copy(stderr)?);
        self.wait(command)?;
        let console = listener.map(|l| receive_console(&l)).transpose()?;
        let text = std::fs::read_to_string(pid_file).attempt(|| format!("read {}", pid_file.display()))?;
        let pid: i32 = text
            .trim()
            .parse()
            .map_err(|_| ContainerError::Invalid(format!("{} holds no pid", pid_file.display())))?;
        let pidfd = sys::pidfd_open(pid).attempt(|| format!("watch process {pid}"))?;
        // There is no init of ours to talk to; any descriptor does.
        let control = pidfd.try_clone().attempt(|| "watch the container")?;
        Ok((Child { pid, pidfd, control }, console))
    }

    fn wait(&self, mut command: Command) -> Result<()> {
        let what = || format!("run {}", self.runtime.display());
        let status = command.status().attempt(what)?;
        if status.success() {
            return Ok(());
        }
        let message =
            self.last_error().unwrap_or_else(|| format!("{} failed: {status}", self.runtime.display()));
        let code = if message.contains("executable file not found")
            || message.contains("no such file or directory")
        {
            EXIT_NOT_FOUND
        } else if message.contains("permission denied") || message.contains("exec format error") {
            EXIT_NOT_EXECUTABLE
        } else {
            EXIT_RUNNER
        };
        Err(ContainerError::Failed { code, message })
    }

    /// The message of the last error line in the runtime's log.
    fn last_error(&self) -> Option<String> {
        let mut text = String::new();
        File::open(self.log()).ok()?.take(1 << 20).read_to_string(&mut text).ok()?;
        let error = |line: &str| -> Option<String> {
            let value: serde_json::Value = serde_json::from_str(line).ok()?;
            (value.get("level")?.as_str()? == "error")
                .then(|| value.get("msg")?.as_str().map(str::to_owned))?
        };
        text.lines().rev().find_map(error)
    }
}

fn point_to_netns(spec: &mut Spec, netns: &OwnedFd) {
    let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
    let namespaces = spec.linux_mut().as_mut().and_then(|l| l.namespaces_mut().as_mut());
    for ns in namespaces.into_iter().flatten().filter(|n| n.typ() == LinuxNamespaceType::Network) {
        ns.set_path(Some(PathBuf::from(&path)));
    }
}

/// The master side of the terminal, as the runtime sends it.
fn receive_console(listener: &UnixListener) -> Result<OwnedFd> {
    let what = || "receive the terminal";
    let (stream, _) = listener.accept().attempt(what)?;
    let mut buffer = [0u8; 4096];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .attempt(what)?;
    for cmsg in message.cmsgs().attempt(what)? {
        if let ControlMessageOwned::ScmRights(fds) = cmsg
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel just installed this descriptor for us.
            return nonblocking(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(ContainerError::invalid("the runtime sent no terminal"))
}
