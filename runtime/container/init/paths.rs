//! Masked and read-only paths, and sysctls, none of which the container's own files can redirect.

use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::{rootfs, sys};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use oci_spec::runtime::Spec;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The host's /dev/null, proven to be it (a bundle might have swapped it; CVE-2025-31133).
pub(super) fn host_null() -> Result<OwnedFd> {
    let fd =
        open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).attempt(|| "open /dev/null")?;
    let st = fstat(&fd).attempt(|| "look at /dev/null")?;
    let is_char = SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    if is_char && (major(st.st_rdev), minor(st.st_rdev)) == (1, 3) {
        return Ok(fd);
    }
    Err(ContainerError::invalid("/dev/null on this machine is not the null device"))
}

/// Whatever is at `path`, or `None` when nothing is.
fn existing(root: BorrowedFd<'_>, path: &Path) -> Result<Option<OwnedFd>> {
    match rootfs::open_path(root, path) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES) => Ok(None),
        Err(e) => Err(e).attempt(|| format!("open {} in the container", path.display())),
    }
}

/// Hides a file behind /dev/null and a directory behind an empty read-only tmpfs.
pub(super) fn mask(root: BorrowedFd<'_>, path: &Path, null: BorrowedFd<'_>) -> Result<()> {
    let Some(target) = existing(root, path)? else { return Ok(()) };
    let what = || format!("mask {} in the container", path.display());
    let st = fstat(&target).attempt(what)?;
    let is_dir = SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
    let cover = if is_dir {
        let size =
            [("size".to_owned(), Some("0k".to_owned())), ("nr_inodes".to_owned(), Some("2".to_owned()))];
        sys::fs_mount(
            "tmpfs",
            Some("tmpfs"),
            &size,
            &[],
            sys::attr::RDONLY | sys::attr::NODEV | sys::attr::NOSUID,
        )
    } else {
        sys::clone_tree_at(null, false)
    };
    sys::move_mount(cover.attempt(what)?.as_fd(), target.as_fd()).attempt(what)
}

/// Covers a path with a read-only mount of itself.
pub(super) fn make_readonly(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let Some(target) = existing(root, path)? else { return Ok(()) };
    let what = || format!("make {} in the container read-only", path.display());
    let tree = sys::clone_tree_at(target.as_fd(), true).attempt(what)?;
    let readonly = sys::MountAttr { set: sys::attr::RDONLY, ..sys::MountAttr::default() };
    sys::mount_setattr(tree.as_fd(), true, &readonly).attempt(what)?;
    sys::move_mount(tree.as_fd(), target.as_fd()).attempt(what)
}

/// A procfs of this PID namespace that is mounted nowhere, so nothing in the container can stand in its way.
pub(super) fn private_proc() -> Result<OwnedFd> {
    sys::fs_mount("proc", Some("proc"), &[], &[], 0).attempt(|| "mount a private proc")
}

/// Writes one file of a private procfs.
pub(super) fn write_proc(proc: &OwnedFd, path: &str, value: &str) -> Result<()> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(OFlag::O_WRONLY | OFlag::O_CLOEXEC).resolve(resolve);
    let what = || format!("write \"{value}\" to /proc/{path}");
    let fd = openat2(proc.as_fd(), path, how).attempt(what)?;
    File::from(fd).write_all(value.as_bytes()).attempt(what)
}

/// Sets the spec's sysctls; only those that belong to the container's own namespaces are allowed.
pub(super) fn set_sysctls(spec: &Spec) -> Result<()> {
    let sysctls = spec.linux().as_ref().and_then(|l| l.sysctl().as_ref());
    let Some(sysctls) = sysctls.filter(|s| !s.is_empty()) else { return Ok(()) };
    let proc = private_proc()?;
    for (key, value) in sysctls {
        if !is_namespaced(key) {
            let message =
                format!("sysctl {key} belongs to the whole machine and cannot be set for a container");
            return Err(ContainerError::Invalid(message));
        }
        write_proc(&proc, &format!("sys/{}", key.replace('.', "/")), value)?;
    }
    Ok(())
}

fn is_namespaced(key: &str) -> bool {
    let ipc = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    ipc.contains(&key) || key.starts_with("net.") || key.starts_with("fs.mqueue.")
}
