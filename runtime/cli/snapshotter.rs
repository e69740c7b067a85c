//! `lazyrun snapshotter`: the keeper in the foreground, with a socket for containerd.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use sd_notify::NotifyState;

use super::{Context, system};
use crate::failure::Failure;
use crate::keeper::manager::{self, Manager};
use crate::keeper::{self, Given, start};
use crate::snapshotter::{DEFAULT_ADDRESS, KeepBlobs, SnapshotterOptions};

/// The flags of `lazyrun snapshotter`.
#[derive(Debug, Args)]
pub struct SnapshotterArgs {
    /// Unix socket for containerd; a socket that systemd passes is used instead [default:
    /// /run/lazyrun/snapshotter.sock]
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Unix socket of containerd itself, where layers of commits and downloaded layers are stored [default:
    /// /run/containerd/containerd.sock]
    #[arg(long, env = "CONTAINERD_ADDRESS", value_name = "SOCKET")]
    containerd_address: Option<PathBuf>,
    /// Download the layers of lazily pulled images into containerd's content store as well, so that images can be
    /// exported and pushed
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    keep_blobs: KeepBlobs,
    /// Serve CRI's image service at the same socket, forwarded to containerd, and pull lazily with the pull secrets that
    /// pass; the kubelet needs `--image-service-endpoint` for that
    #[arg(long)]
    cri_keychain: bool,
}

pub(super) fn serve(context: &Context, args: SnapshotterArgs) -> Result<ExitCode, Failure> {
    system::log_to_stderr(context);
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::daemon("the snapshotter mounts images, which needs root; run it with sudo"));
    }
    system::store_limits(context)?;
    let options = SnapshotterOptions {
        registry: context.registry(),
        index: context.index.clone(),
        containerd: args.containerd_address.as_deref().map(crate::containerd::socket),
        keep_blobs: args.keep_blobs,
        cri: args.cri_keychain,
    };
    let options = serde_json::to_string(&options).map_err(|e| Failure::daemon(e.to_string()))?;
    let passed = manager::passed()
        .map_err(|e| Failure::daemon(format!("the sockets of systemd can't be used: {e}")))?;
    let (listener, bound) = match passed.sockets.into_iter().next() {
        Some(listener) => (listener.into(), None),
        None => {
            let address = args.address.unwrap_or_else(|| DEFAULT_ADDRESS.into());
            (bind(&address)?, Some(address))
        }
    };
    let told = tell_when_ready()?;
    let code = keeper::main(
        &context.paths,
        &context.settings,
        Some(told.0),
        Given {
            snapshotter: Some(keeper::Snapshotter { listener, options, bound: bound.clone() }),
            manager: Manager::of_this_process(),
            kept: passed.kept,
        },
    );
    if let Some(address) = bound {
        let _ = std::fs::remove_file(address);
    }
    match told.1.join() {
        Ok(Ok(())) => Ok(code),
        // What went wrong in the keeper itself it has said.
        Ok(Err(said)) if said.is_empty() => Ok(code),
        Ok(Err(said)) => Err(Failure::daemon(format!("the snapshotter can't be started: {said}"))),
        Err(_) => Err(Failure::daemon("the snapshotter can't be started: its own thread failed")),
    }
}

fn bind(address: &Path) -> Result<UnixListener, Failure> {
    let failed =
        |e: io::Error| Failure::daemon(format!("the snapshotter can't listen at {}: {e}", address.display()));
    if let Some(dir) = address.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    match std::fs::symlink_metadata(address) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, "something else is there")));
        }
        Ok(_) if is_served(address) => {
            return Err(failed(io::Error::new(io::ErrorKind::AddrInUse, "somebody else serves there")));
        }
        // Left by one that was killed.
        Ok(_) => std::fs::remove_file(address).map_err(failed)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(address).map_err(failed)?;
    std::fs::set_permissions(address, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Whether somebody listens there, other than a daemon that is just ending because its keeper was killed.
fn is_served(address: &Path) -> bool {
    let began = Instant::now();
    while UnixStream::connect(address).is_ok() {
        if began.elapsed() > Duration::from_secs(1) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

type Told = std::thread::JoinHandle<Result<(), String>>;

/// Where the daemon says that it is ready, which systemd is told, and what it said if it is not.
fn tell_when_ready() -> Result<(OwnedFd, Told), Failure> {
    let failed = |e: io::Error| Failure::daemon(format!("the snapshotter can't be started: {e}"));
    keeper::block_signals().map_err(failed)?;
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
    let wait = move || {
        let mut said = String::new();
        let _ = File::from(read).take(4096).read_to_string(&mut said);
        if said != start::READY {
            return Err(said.trim().to_owned());
        }
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            tracing::warn!(%error, "systemd can't be told that the snapshotter is ready");
        }
        Ok(())
    };
    let thread = std::thread::Builder::new().name("ready".into()).spawn(wait).map_err(failed)?;
    Ok((write, thread))
}
