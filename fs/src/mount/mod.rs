//! Detached mounts: made by descriptors (fsopen, fsconfig, fsmount), attached nowhere.
//!
//! A detached mount lives as long as somebody holds its descriptor or has attached it, so nothing
//! of ours sits in the host's mount table unless it was asked for, and nothing can be left there.
//!
//! The functions that open files on a FUSE mount ([`erofs`] with devices on it, [`overlay`] with
//! such a lower) must not run in the process that serves that mount: see [`crate::mounter`].

mod context;
mod error;
mod idmap;
mod sys;

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::fchown;
use serde::{Deserialize, Serialize};

pub(crate) use context::{FsContext, fd_path};
pub use error::MountError;
pub use idmap::{IdMap, IdRange, idmapped};

/// Mount attribute: read-only (`MOUNT_ATTR_RDONLY`).
pub const ATTR_RDONLY: u64 = 0x1;
/// Mount attribute: set-user-id bits have no effect (`MOUNT_ATTR_NOSUID`).
pub const ATTR_NOSUID: u64 = 0x2;
/// Mount attribute: device nodes cannot be opened (`MOUNT_ATTR_NODEV`).
pub const ATTR_NODEV: u64 = 0x4;
/// Mount attribute: nothing can be executed (`MOUNT_ATTR_NOEXEC`).
pub const ATTR_NOEXEC: u64 = 0x8;
/// Mount attribute: reading changes no times (`MOUNT_ATTR_NOATIME`).
pub const ATTR_NOATIME: u64 = 0x10;
/// Mount attribute: reading directories changes no times (`MOUNT_ATTR_NODIRATIME`).
pub const ATTR_NODIRATIME: u64 = 0x80;
/// All of when reading changes times (`MOUNT_ATTR__ATIME`): one of it is set after all are cleared.
pub const ATTRS_ATIME: u64 = 0x70;

/// How the kernel's overlay filesystem is to be mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OverlayOptions {
    /// Never sync the upper directory (`volatile`): faster, for containers that die with the host.
    pub volatile: bool,
    /// Keep overlay's own attributes in `user.overlay.*`, as mounts in a user namespace must and do anyway (`userxattr`).
    pub userxattr: bool,
    /// Force the composition of inode numbers on or off; the kernel's default otherwise (`xino`).
    pub xino: Option<bool>,
    /// Mount flags, `ATTR_*` of this module.
    pub attrs: u64,
    /// As whose and as what files are shown.
    pub shown: Shown,
}

/// As whose and as what files are shown, if not as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// SELinux's `context` and its like, by name.
    pub labels: Vec<(String, String)>,
    /// Which ids stand for those that files have.
    pub idmap: Option<IdMap>,
}

/// Mounts the EROFS image read-only and detached. `devices` are its extra devices in device-table
/// order; regular files need no loop device from Linux 6.12. `directio` reads them past the page cache.
pub fn erofs(image: &Path, devices: &[PathBuf], directio: bool) -> Result<OwnedFd, MountError> {
    let ctx = FsContext::open(c"erofs", format!("the EROFS view {}", image.display()))?;
    let mut held = Vec::new();
    ctx.file(c"source", image, &mut held)?;
    ctx.flag(c"ro")?;
    if directio {
        ctx.flag(c"directio")?;
    }
    for device in devices {
        ctx.file(c"device", device, &mut held)?;
    }
    ctx.mount(ATTR_RDONLY)
}

/// Mounts overlayfs detached, with `lower` (a mount, detached or not) below `upper` and `work`.
///
/// Kernels before 6.15 refuse a detached mount as a lower; [`crate::mounter`] attaches it first.
pub fn overlay(
    lower: BorrowedFd<'_>,
    upper: &Path,
    work: &Path,
    options: &OverlayOptions,
) -> Result<OwnedFd, MountError> {
    // Directories go in as descriptors: strings end at 255 bytes, and overlayfs reads ':' and '\' in them.
    let upper_dir = open_dir(upper)?;
    let work_dir = open_dir(work)?;
    // Overlayfs itself can't be idmapped, and makes files in the upper directory as whoever asks for them: what is shown
    // there is what is on the disk. Held until overlayfs has it, because a detached mount goes with its descriptor.
    let mapped = options.shown.idmap.as_ref().map(|map| idmapped(lower, map)).transpose()?;
    let lower_dir = open_root(mapped.as_ref().map_or(lower, AsFd::as_fd))?;
    if mapped.is_some() {
        let owner = |e: nix::Error| MountError::tree("give the upper directory its owner", e.into());
        let root = fstat(&lower_dir).map_err(owner)?;
        fchown(&upper_dir, Some(root.st_uid.into()), Some(root.st_gid.into())).map_err(owner)?;
    }
    let dirs = [lower_dir.as_fd(), upper_dir.as_fd(), work_dir.as_fd()];
    let what = format!("an overlay on {}", upper.display());
    let options = OverlayOptions { userxattr: options.userxattr || in_user_namespace(), ..options.clone() };
    match overlay_context(&what, dirs, &options, true) {
        Ok(ctx) => ctx.mount(options.attrs),
        // Before Linux 6.13 overlayfs takes no descriptors; names under /proc serve as well.
        Err(_) => overlay_context(&what, dirs, &options, false)?.mount(options.attrs),
    }
}

fn open_root(tree: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    openat(tree, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| MountError::tree("open the lower directory", e.into()))
}

/// Whether this is another user namespace than the first one, which maps all ids to themselves: attributes under
/// `trusted.` are out of reach here (user_namespaces(7)).
fn in_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().ne(["0", "0", "4294967295"]))
}

fn overlay_context(
    what: &str,
    [lower, upper, work]: [BorrowedFd<'_>; 3],
    options: &OverlayOptions,
    by_fd: bool,
) -> Result<FsContext, MountError> {
    let ctx = FsContext::open(c"overlay", what)?;
    ctx.string(c"source", b"lazyrun")?;
    if by_fd {
        ctx.fd(c"lowerdir+", lower)?;
        ctx.fd(c"upperdir", upper)?;
        ctx.fd(c"workdir", work)?;
    } else {
        ctx.string(c"lowerdir", fd_path(lower).as_bytes())?;
        ctx.string(c"upperdir", fd_path(upper).as_bytes())?;
        ctx.string(c"workdir", fd_path(work).as_bytes())?;
    }
    // What containerd asks for too: an upper may be used again with another mount of the same lower.
    ctx.string(c"index", b"off")?;
    ctx.string(c"metacopy", b"off")?;
    if options.volatile {
        ctx.flag(c"volatile")?;
    }
    if options.userxattr {
        ctx.flag(c"userxattr")?;
    } else {
        // Some kernels are built with it on; an upper directory with redirects could be used by no other plan.
        // With `userxattr` it is off by itself.
        ctx.string(c"redirect_dir", b"off")?;
    }
    for (name, label) in &options.shown.labels {
        let name = CString::new(name.as_str()).unwrap_or_default();
        ctx.string(&name, label.as_bytes())?;
    }
    if let Some(on) = options.xino {
        ctx.string(c"xino", if on { b"on" } else { b"off" })?;
    }
    Ok(ctx)
}

/// Whether a detached mount can be copied and put below an overlay as it is (Linux 6.15). Before that it has to be
/// attached first, which spends it: such a mount serves one user.
pub fn shares_detached() -> bool {
    let Ok(name) = nix::sys::utsname::uname() else { return true };
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 15)
}

/// Makes another detached mount of the same tree (Linux 6.15 when `tree` itself is detached).
pub fn clone_tree(tree: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    sys::clone_tree(tree).map_err(|e| MountError::tree("clone a mount", e))
}

/// Attaches a detached mount at `target` in this process's mount namespace.
pub fn attach(tree: BorrowedFd<'_>, target: &Path) -> Result<(), MountError> {
    let path = CString::new(target.as_os_str().as_bytes())
        .map_err(|e| MountError::at("attach a mount at", target, e.into()))?;
    sys::move_mount(tree, &path).map_err(|e| MountError::at("attach a mount at", target, e))
}

/// Detaches the mount at `target`, following no link there; open files keep it alive until closed.
pub fn detach(target: &Path) -> Result<(), MountError> {
    umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        .map_err(|e| MountError::at("unmount", target, e.into()))
}

/// Sets and clears mount attributes (`ATTR_*`) of one mount.
pub fn set_attrs(tree: BorrowedFd<'_>, set: u64, clear: u64) -> Result<(), MountError> {
    sys::mount_setattr(tree, set, clear).map_err(|e| MountError::tree("change a mount's attributes", e))
}

/// Makes one mount read-only.
pub fn set_readonly(tree: BorrowedFd<'_>) -> Result<(), MountError> {
    set_attrs(tree, ATTR_RDONLY, 0)
}

/// Device number (major, minor) of the filesystem behind a mount, found without asking it.
pub fn device_of(tree: BorrowedFd<'_>) -> Result<(u32, u32), MountError> {
    sys::device(tree).map_err(|e| MountError::tree("find the device number of a mount", e))
}

fn open_dir(path: &Path) -> Result<File, MountError> {
    File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)
        .map_err(|e| MountError::at("open the directory", path, e))
}
