//! The container's terminal: made inside the container's own devpts, its master handed to the shim.

use super::control::{Control, Plan};
use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::{rootfs, sys};
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, fstatfs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Opens a new terminal in the devpts of `root`, makes it this process' controlling terminal and standard
/// streams, sends the master to the shim, and with `console_root` shows it as /dev/console there.
pub(super) fn attach(
    control: &Control,
    root: &OwnedFd,
    console_root: Option<BorrowedFd<'_>>,
    plan: &Plan,
) -> Result<()> {
    let master = open_master(root.as_fd())?;
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    let ret = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) };
    nix::errno::Errno::result(ret).attempt(|| "unlock the container's terminal")?;
    // By ioctl, not by name: a path could have been replaced (CVE-2025-52565).
    let slave = sys::pty_peer(master.as_fd()).attempt(|| "open the container's terminal")?;
    if let Some(size) = plan.spec.process().as_ref().and_then(oci_spec::runtime::Process::console_size) {
        let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        sys::set_winsize(master.as_fd(), clamp(size.height()), clamp(size.width()))
            .attempt(|| "set the terminal's size")?;
    }
    if let Some(root) = console_root {
        let target = rootfs::ensure_file(root, Path::new("/dev/console"))?;
        let what = || "mount /dev/console";
        let tree = sys::clone_tree_at(slave.as_fd(), false).attempt(what)?;
        sys::move_mount(tree.as_fd(), target.as_fd()).attempt(what)?;
    }
    // SAFETY: TIOCSCTTY takes an integer; 0 means do not steal.
    let ret = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) };
    nix::errno::Errno::result(ret).attempt(|| "take the container's terminal")?;
    control.report_console(&master)?;
    let what = || "use the container's terminal";
    nix::unistd::dup2_stdin(&slave).attempt(what)?;
    nix::unistd::dup2_stdout(&slave).attempt(what)?;
    nix::unistd::dup2_stderr(&slave).attempt(what)
}

/// The multiplexer of a real devpts; anything else under that name is refused.
fn open_master(root: BorrowedFd<'_>) -> Result<OwnedFd> {
    let what = || "open /dev/pts/ptmx in the container";
    // Looked at as a path first, so that opening has no effect on a device it should not touch.
    let path = rootfs::open_path(root, Path::new("/dev/pts/ptmx")).attempt(what)?;
    let st = fstat(&path).attempt(what)?;
    let is_char = SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    let devpts = fstatfs(&path).attempt(what)?.filesystem_type() == DEVPTS_SUPER_MAGIC;
    if !(is_char && devpts && (major(st.st_rdev), minor(st.st_rdev)) == (5, 2)) {
        return Err(ContainerError::invalid("/dev/pts/ptmx in the container is not a terminal multiplexer"));
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = rootfs::open(root, Path::new("/dev/pts/ptmx"), flags, Mode::empty()).attempt(what)?;
    let again = fstat(&master).attempt(what)?;
    if (again.st_dev, again.st_ino) == (st.st_dev, st.st_ino) {
        return Ok(master);
    }
    Err(ContainerError::invalid("/dev/pts/ptmx in the container changed while it was opened"))
}
