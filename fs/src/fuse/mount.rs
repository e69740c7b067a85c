//! Making a FUSE mount, detached.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::mount::{ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, FsContext, MountError, device_of};

/// Why a FUSE mount or its server could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// `/dev/fuse` cannot be opened.
    #[error("cannot open /dev/fuse: {0} (is the fuse module loaded?)")]
    Device(#[source] io::Error),
    /// The mount itself failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The session with the kernel could not be started or taken over.
    #[error("cannot {action} a FUSE session: {source}")]
    Session {
        /// What was being done: `start` or `adopt`.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// What a FUSE mount is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FuseKind {
    /// A directory of layer files: nothing in it is run or opened as a device.
    Flat,
    /// A whole view, used as a container's root or a lower of one.
    View,
    /// A writable union, used as a container's root.
    Union,
}

/// A FUSE filesystem nobody serves yet.
#[derive(Debug)]
pub struct FuseMount {
    /// The detached mount.
    pub tree: OwnedFd,
    /// The `/dev/fuse` descriptor of its connection.
    pub dev: OwnedFd,
}

/// Makes a FUSE filesystem, detached. It answers nothing until [`super::serve`] is called.
pub fn mount(kind: FuseKind) -> Result<FuseMount, FuseError> {
    let dev = open_device().map_err(FuseError::Device)?;
    let ctx = FsContext::open(c"fuse", "a FUSE filesystem")?;
    ctx.string(c"source", b"lazyrun")?;
    ctx.string(c"subtype", b"lazyrun")?;
    ctx.string(c"fd", dev.as_raw_fd().to_string().as_bytes())?;
    ctx.string(c"rootmode", b"40000")?;
    ctx.string(c"user_id", b"0")?;
    ctx.string(c"group_id", b"0")?;
    ctx.flag(c"allow_other")?;
    ctx.flag(c"default_permissions")?;
    let attrs = match kind {
        FuseKind::Flat => ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC,
        FuseKind::View => ATTR_RDONLY,
        FuseKind::Union => 0,
    };
    if attrs & ATTR_RDONLY != 0 {
        ctx.flag(c"ro")?;
    }
    let tree = ctx.mount(attrs)?;
    Ok(FuseMount { tree, dev: dev.into() })
}

pub(crate) fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")
}

/// Raises a mount's readahead, in KiB, above the 128 KiB that INIT can negotiate. Files opened from
/// then on use it. Call it after [`super::serve`].
pub fn set_readahead(tree: BorrowedFd<'_>, kib: u32) -> Result<(), MountError> {
    let (major, minor) = device_of(tree)?;
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(&path, kib.to_string())
        .map_err(|e| MountError::tree(format!("raise the readahead in {path}"), e))
}

/// Ends the connection of a FUSE mount for everybody: reads in flight and to come fail, also those that wait for a
/// server that is gone. The last resort of whoever holds the mount.
pub fn abort(tree: BorrowedFd<'_>) -> Result<(), MountError> {
    abort_device(device_of(tree)?)
}

/// Needs the fusectl filesystem.
pub(super) fn abort_device(device: (u32, u32)) -> Result<(), MountError> {
    let control = FsContext::open(c"fusectl", "the FUSE control filesystem")?.mount(0)?;
    let name = format!("{}/abort", (u64::from(device.0) << 20) | u64::from(device.1));
    let fail = |e: io::Error| MountError::tree(format!("abort FUSE connection {}", device.1), e);
    let file = nix::fcntl::openat(
        control.as_fd(),
        name.as_str(),
        nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(|e| fail(e.into()))?;
    nix::unistd::write(file, b"1").map(drop).map_err(|e| fail(e.into()))
}
