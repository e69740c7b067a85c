//! What the shim does before the container exists: its own surroundings, and the last touches to the spec.

use crate::container::config::ShimConfig;
use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::init::root_path;
use crate::container::spec::user;
use crate::container::sys;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Session leader, reaper of the container's orphans, own mount namespace that sends nothing to the host.
pub(super) fn surroundings() -> Result<SignalFd> {
    // Fails only for a process that already leads a group, which is as good.
    let _ = nix::unistd::setsid();
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).attempt(|| "become the container's reaper")?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        signals.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).attempt(|| "block signals")?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .attempt(|| "receive signals")?;
    unshare(CloneFlags::CLONE_NEWNS).attempt(|| "make a mount namespace")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .attempt(|| "keep the container's mounts from the host")?;
    Ok(fd)
}

/// Attaches the inherited root mount at `rootfs/`, here where only this container sees it.
pub(super) fn attach_root(config: &ShimConfig) -> Result<()> {
    let Some(number) = config.rootfs_fd else { return Ok(()) };
    let path = config.dir.join("rootfs");
    let what = || format!("attach the container's root at {}", path.display());
    let tree = sys::adopt(number).attempt(what)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let target = open(&path, flags, Mode::empty()).attempt(what)?;
    sys::move_mount(tree.as_fd(), target.as_fd()).attempt(what)
}

/// The bundle's spec, the user that was named in it resolved against the image's files.
pub(super) fn load_spec(config: &ShimConfig) -> Result<Spec> {
    let path = config.dir.join("config.json");
    let json = std::fs::read(&path).attempt(|| format!("read {}", path.display()))?;
    let mut spec: Spec =
        serde_json::from_slice(&json).attempt(|| format!("understand {}", path.display()))?;
    let terminal = spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
    if terminal != config.terminal {
        return Err(ContainerError::invalid(
            "the spec and the shim's configuration disagree about a terminal",
        ));
    }
    let root = open_root(&spec, &config.dir)?;
    if user::complete(&mut spec, root.as_fd())? {
        let json = serde_json::to_vec(&spec).attempt(|| "encode the spec")?;
        let temp = config.dir.join(".config.json.new");
        std::fs::write(&temp, json)
            .and_then(|()| std::fs::rename(&temp, &path))
            .attempt(|| format!("write {}", path.display()))?;
    }
    Ok(spec)
}

/// The container's root directory as the shim sees it.
pub(super) fn open_root(spec: &Spec, dir: &Path) -> Result<OwnedFd> {
    let path = root_path(spec, dir)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(&path, flags, Mode::empty()).attempt(|| format!("open the container's root {}", path.display()))
}

/// The attach socket, reachable only by root.
pub(super) fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).attempt(what),
        _ => {}
    }
    let old = nix::sys::stat::umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(old);
    let listener = listener.attempt(what)?;
    listener.set_nonblocking(true).attempt(what)?;
    Ok(listener)
}
