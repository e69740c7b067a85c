//! Device nodes and links in the container's /dev.

use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::rootfs;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstatat, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Nodes every container has (runtime spec, "Default Devices").
const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

/// Fills /dev with the default nodes and links and the spec's own devices.
pub(super) fn populate(root: BorrowedFd<'_>, devices: Option<&Vec<LinuxDevice>>) -> Result<()> {
    let dev = rootfs::ensure_dir(root, Path::new("/dev"))?;
    for (name, major, minor) in NODES {
        node(dev.as_fd(), name, SFlag::S_IFCHR, makedev(major, minor), 0o666)?;
    }
    for device in devices.into_iter().flatten() {
        custom(root, device)?;
    }
    for (name, target) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(e).attempt(|| format!("link /dev/{name}")),
        }
    }
    // An image's own ptmx must not lead to another devpts than the container's.
    match unlinkat(&dev, "ptmx", UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(e) => return Err(e).attempt(|| "replace /dev/ptmx"),
    }
    symlinkat("pts/ptmx", &dev, "ptmx").attempt(|| "link /dev/ptmx")
}

/// Makes a node, or accepts the same node where the image already has it.
fn node(dir: BorrowedFd<'_>, name: &str, kind: SFlag, dev: libc::dev_t, mode: u32) -> Result<()> {
    let what = || format!("make device node {name}");
    match mknodat(dir, name, kind, Mode::from_bits_truncate(mode), dev) {
        Err(Errno::EEXIST) => {
            let st = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).attempt(what)?;
            let same = SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT == kind && st.st_rdev == dev;
            if same { Ok(()) } else { Err(Errno::EEXIST).attempt(what) }
        }
        other => other.attempt(what),
    }
}

fn custom(root: BorrowedFd<'_>, device: &LinuxDevice) -> Result<()> {
    let path = rootfs::clean(device.path());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Err(ContainerError::Invalid(format!("{} is no path for a device", device.path().display())));
    };
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::A => {
            return Err(ContainerError::Invalid(format!(
                "device {} has no usable type",
                device.path().display()
            )));
        }
    };
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    let dev =
        if kind == SFlag::S_IFIFO { 0 } else { makedev(number(device.major()), number(device.minor())) };
    let dir = rootfs::ensure_dir(root, parent)?;
    let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    node(dir.as_fd(), name, kind, dev, mode)?;
    let what = || format!("set the owner of {}", device.path().display());
    fchmodat(&dir, name, Mode::from_bits_truncate(mode), FchmodatFlags::FollowSymlink).attempt(what)?;
    let (uid, gid) = (device.uid().map(Uid::from_raw), device.gid().map(Gid::from_raw));
    fchownat(&dir, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).attempt(what)
}
