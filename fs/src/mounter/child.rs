//! The helper's side.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{Answer, Device, Request, wire};
use crate::mount::{self as mounts, MountError, fd_path};
use crate::plan;

/// Where a lower is attached in the helper's own mount namespace if the kernel wants it attached: a
/// directory that every system has and that no overlay is made of.
const SCRATCH: &str = "/sys";

/// Serves one request from the socket that is standard input, and returns the exit code of the process.
pub fn main() -> ExitCode {
    let Ok(stdin) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    let mut socket = UnixStream::from(stdin);
    let Ok((request, fds)) = wire::receive::<Request>(&mut socket) else { return ExitCode::FAILURE };
    let (answer, mount) = match (enter_namespace(), request) {
        // Also says that there is no right to mount.
        (_, Request::Probe { root }) => (Answer::Probed(plan::probe(&root)), None),
        (Ok(()), Request::LetGo { layers }) => (done(let_go(layers, fds.first())), None),
        (_, Request::Invalidate { inodes }) => (done(invalidate(&inodes, fds.first())), None),
        (Ok(()), request) => match perform(request, fds) {
            Ok(mount) => (Answer::Mounted, Some(mount)),
            Err(e) => (Answer::Failed(e.to_string()), None),
        },
        (Err(e), _) => (Answer::Failed(e.to_string()), None),
    };
    let fds: Vec<BorrowedFd<'_>> = mount.iter().map(AsFd::as_fd).collect();
    match wire::send(&mut socket, &answer, &fds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// What is attached from here on is seen by this process only and ends with it.
fn enter_namespace() -> Result<(), MountError> {
    let fail = |e: nix::Error| MountError::tree("make a private mount namespace", e.into());
    unshare(CloneFlags::CLONE_NEWNS).map_err(fail)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(fail)
}

fn perform(request: Request, fds: Vec<OwnedFd>) -> Result<OwnedFd, MountError> {
    let first = fds.into_iter().next();
    match request {
        Request::Erofs { image, devices, directio } => {
            let path = |device| device_path(device, first.as_ref());
            let flat_one = devices.iter().position(|device| matches!(device, Device::Flat(_)));
            let devices = devices.into_iter().map(path).collect::<Result<Vec<_>, _>>()?;
            // The kernel asks about open and flush until it is told once that there is nothing to ask. Learnt
            // here, the close of a file never waits for a server that is gone: in execve such a wait
            // would stop everybody who looks at the process in /proc.
            if let Some(path) = flat_one.and_then(|i| devices.get(i)) {
                drop(File::open(path).map_err(|e| MountError::at("open the layer file", path, e))?);
            }
            mounts::erofs(&image, &devices, directio)
        }
        Request::Overlay { upper, work, options } => {
            let lower = first.ok_or_else(|| MountError::Helper("got no view to mount".into()))?;
            overlay(&lower, &upper, &work, &options)
        }
        Request::Idmap { map } => {
            let tree = first.ok_or_else(|| MountError::Helper("got no view to mount".into()))?;
            mounts::idmapped(tree.as_fd(), &map)
        }
        Request::LetGo { .. } | Request::Invalidate { .. } | Request::Probe { .. } => {
            Err(MountError::Helper("was to mount what is no mount".into()))
        }
    }
}

fn done(result: Result<(), MountError>) -> Answer {
    result.map_or_else(|e| Answer::Failed(e.to_string()), |()| Answer::Done)
}

fn invalidate(inodes: &[u64], dev: Option<&OwnedFd>) -> Result<(), MountError> {
    let dev = dev.ok_or_else(|| MountError::Helper("got no FUSE connection".into()))?;
    for ino in inodes {
        crate::fuse::invalidate(dev, *ino)
            .map_err(|e| MountError::tree("drop the cached contents of a layer file", e))?;
    }
    Ok(())
}

fn let_go(layers: Vec<String>, flat: Option<&OwnedFd>) -> Result<(), MountError> {
    for layer in layers {
        let path = device_path(Device::Flat(layer), flat)?;
        let fail = |e| MountError::at("drop cached pages of the layer file", &path, e);
        let file = File::open(&path).map_err(fail)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|e| fail(e.into()))?;
    }
    Ok(())
}

fn device_path(device: Device, flat: Option<&OwnedFd>) -> Result<PathBuf, MountError> {
    match device {
        Device::Local(path) => Ok(path),
        Device::Flat(name) => {
            let flat = flat.ok_or_else(|| MountError::Helper("got no FUSE mount of layer files".into()))?;
            if name.is_empty() || name.starts_with('.') || name.contains('/') {
                return Err(MountError::Helper(format!("was given an invalid layer name {name:?}")));
            }
            Ok(Path::new(&fd_path(flat.as_fd())).join(name))
        }
    }
}

fn overlay(
    lower: &OwnedFd,
    upper: &Path,
    work: &Path,
    options: &mounts::OverlayOptions,
) -> Result<OwnedFd, MountError> {
    let refused = match mounts::overlay(lower.as_fd(), upper, work, options) {
        Ok(mount) => return Ok(mount),
        Err(e) => e,
    };
    // Before Linux 6.15 overlayfs takes only mounts attached in the caller's namespace. That spends the
    // detached mount (it ends with this process), so it is done on those kernels only.
    let scratch = Path::new(SCRATCH);
    if mounts::shares_detached() || mounts::attach(lower.as_fd(), scratch).is_err() {
        return Err(refused);
    }
    let attached = File::open(scratch).map_err(|e| MountError::at("open", scratch, e))?;
    mounts::overlay(attached.as_fd(), upper, work, options).map_err(|_| refused)
}
