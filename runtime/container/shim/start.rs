//! Starting init: the clone into new namespaces and the execution of our own binary there.

use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::init::{CONTROL_FD, PIDFD_FD, PLAN_FD, Plan};
use crate::container::sys;
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A started init.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    /// Our end of the control socket.
    pub(super) control: OwnedFd,
}

/// Where init is to be born.
pub(super) struct Birth<'a> {
    /// `CLONE_NEW*` flags.
    pub(super) flags: u64,
    /// Network namespace to enter first.
    pub(super) netns: Option<BorrowedFd<'a>>,
    /// PID namespace to be born in (joined or named by path).
    pub(super) pidns: Option<BorrowedFd<'a>>,
    /// v2 group to be born in.
    pub(super) cgroup: Option<BorrowedFd<'a>>,
    /// pidfd of the container's first process, for exec.
    pub(super) container: Option<BorrowedFd<'a>>,
    /// Standard streams.
    pub(super) stdio: [BorrowedFd<'a>; 3],
}

/// Our own binary, protected from whoever runs it: a read-only mount that belongs to no mount namespace, so a
/// container that executes `/proc/self/exe` finds nothing to write to. A copy in sealed memory where the
/// kernel cannot do that.
pub(super) fn protected_exe() -> Result<OwnedFd> {
    let exe = Path::new("/proc/self/exe");
    sys::readonly_tree(exe).or_else(|_| sealed_copy(exe))
}

fn sealed_copy(exe: &Path) -> Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let what = || "copy our own binary";
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut copy = File::from(memfd_create(c"lazyrun", flags).attempt(what)?);
    let mut source = File::open(exe).attempt(what)?;
    std::io::copy(&mut source.by_ref().take(1 << 30), &mut copy).attempt(what)?;
    let seals =
        SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals)).attempt(what)?;
    Ok(copy.into())
}

/// The `CLONE_NEW*` flags for namespaces the spec wants new, but for the cgroup namespace (made later, from
/// inside the groups).
pub(super) fn clone_flags(spec: &Spec) -> u64 {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let fresh = namespaces.into_iter().flatten().filter(|n| n.path().is_none());
    let flags = fresh.fold(CloneFlags::empty(), |flags, ns| flags | clone_flag(ns.typ()));
    (flags - CloneFlags::CLONE_NEWCGROUP).bits() as u64
}

pub(super) fn clone_flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::User | LinuxNamespaceType::Time => CloneFlags::empty(),
    }
}

/// Clones and executes init. The shim must be single-threaded.
pub(super) fn spawn(exe: BorrowedFd<'_>, plan: &Plan, birth: &Birth<'_>) -> Result<Child> {
    let what = || "start init";
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).attempt(what)?;
    let plan = plan.to_memfd()?;
    // Out of the way of the numbers they will be copied to.
    let high = |fd: BorrowedFd<'_>| sys::move_high(fd).attempt(what);
    let mut copies: Vec<(OwnedFd, i32)> = Vec::new();
    for (number, fd) in (0..).zip(birth.stdio) {
        copies.push((high(fd)?, number));
    }
    copies.push((high(theirs.as_fd())?, CONTROL_FD));
    copies.push((high(plan.as_fd())?, PLAN_FD));
    if let Some(container) = birth.container {
        copies.push((high(container)?, PIDFD_FD));
    }
    let exe = high(exe)?;
    let netns = birth.netns.map(high).transpose()?;
    let own_pidns = birth.pidns.map(|_| File::open("/proc/self/ns/pid")).transpose().attempt(what)?;
    if let Some(pidns) = birth.pidns {
        nix::sched::setns(pidns, CloneFlags::CLONE_NEWPID).attempt(|| "enter the PID namespace")?;
    }
    // SAFETY: the shim is single-threaded, and the child only makes system calls before it executes.
    let cloned = unsafe { sys::clone3(birth.flags, birth.cgroup) };
    if let Ok(sys::Cloned::Child) = cloned {
        become_init(&exe, netns.as_ref(), &copies);
    }
    if let Some(own) = own_pidns {
        nix::sched::setns(own, CloneFlags::CLONE_NEWPID).attempt(|| "return to the shim's PID namespace")?;
    }
    match cloned.attempt(|| "clone into new namespaces")? {
        sys::Cloned::Parent(pid, pidfd) => Ok(Child { pid, pidfd, control: ours }),
        sys::Cloned::Child => Err(ContainerError::invalid("init did not start")),
    }
}

/// The child between clone and exec.
fn become_init(exe: &OwnedFd, netns: Option<&OwnedFd>, copies: &[(OwnedFd, i32)]) -> ! {
    let failed = |step: &CStr| -> ! {
        let control =
            copies.iter().find(|(_, to)| *to == CONTROL_FD).map_or(CONTROL_FD, |(fd, _)| fd.as_raw_fd());
        let errno = nix::errno::Errno::last();
        let text = format!("cannot {}: {}", step.to_string_lossy(), errno.desc());
        let mut packet = vec![b'E', crate::container::error::EXIT_RUNNER];
        packet.extend(text.into_bytes());
        // SAFETY: pointer and length are those of `packet`; _exit never returns.
        unsafe {
            libc::send(control, packet.as_ptr().cast(), packet.len(), libc::MSG_NOSIGNAL);
            libc::_exit(i32::from(crate::container::error::EXIT_RUNNER))
        }
    };
    // SAFETY: plain system calls on descriptors that are open and strings that are NUL-terminated.
    unsafe {
        if netns.is_some_and(|fd| libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) != 0) {
            failed(c"enter the network namespace");
        }
        for (from, to) in copies {
            if libc::dup2(from.as_raw_fd(), *to) < 0 {
                failed(c"set up init's descriptors");
            }
        }
        let argv = [c"lazyrun".as_ptr(), c"init".as_ptr(), std::ptr::null()];
        let envp = [std::ptr::null::<libc::c_char>()];
        let (args, env) = (argv.as_ptr().cast(), envp.as_ptr().cast());
        libc::execveat(exe.as_raw_fd(), c"".as_ptr(), args, env, libc::AT_EMPTY_PATH);
    }
    failed(c"execute init")
}
