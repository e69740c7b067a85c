//! The first process of a container: started by the shim in new namespaces, it builds the container around
//! itself and then becomes the container's command. The same code joins a running container for `exec`.
//!
//! It is this binary executed again, single-threaded, with three descriptors: the control socket to the
//! shim, the plan, and for `exec` a pidfd of the container's first process.
//!
//! The binary it runs from is a read-only detached mount of the host's binary (see `shim::start`), so a
//! container that executes `/proc/self/exe` cannot write to the host's file (CVE-2019-5736).

mod caps;
mod cgroup;
mod console;
mod control;
mod dev;
mod exec;
mod mounts;
mod options;
mod paths;
mod seccomp;
mod syscalls;

pub(crate) use control::{CgroupView, Message, Plan, Report};

use super::error::{Attempt, ContainerError, Result};
use super::sys;
use control::Control;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

/// Descriptor numbers by which the shim hands things over.
pub(crate) const CONTROL_FD: i32 = 3;
/// See [`CONTROL_FD`].
pub(crate) const PLAN_FD: i32 = 4;
/// See [`CONTROL_FD`].
pub(crate) const PIDFD_FD: i32 = 5;

/// Entry point of the hidden `lazyrun init` command. Returns only when the container's command could not be
/// executed, having told the shim why.
pub fn main() -> ExitCode {
    let Ok(control) = sys::adopt(CONTROL_FD).map(Control::new) else {
        return ExitCode::from(super::error::EXIT_RUNNER);
    };
    let Err(error) = run(&control);
    control.report_error(&error);
    ExitCode::from(error.exit_code())
}

fn run(control: &Control) -> Result<Infallible> {
    sys::cloexec_from(3).attempt(|| "protect inherited descriptors")?;
    die_with_shim()?;
    // Until the exec nobody in the container may look into this process, which still has the host's view.
    sys::prctl(libc::PR_SET_DUMPABLE, 0).attempt(|| "make init undumpable")?;
    let plan = Plan::read(sys::adopt(PLAN_FD).attempt(|| "take the plan")?)?;
    umask(Mode::empty());
    // The shim's child is never a group leader, so this can only fail if it already leads a session.
    let _ = nix::unistd::setsid();
    if plan.exec {
        join(control, &plan)?;
    } else {
        build(control, &plan)?;
    }
    exec::into_command(control, &plan)
}

/// The container must not outlive the shim that holds its streams and its exit status.
fn die_with_shim() -> Result<()> {
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong).attempt(|| "tie init to its shim")
}

/// Builds the container's namespaces and root, and moves into it.
fn build(control: &Control, plan: &Plan) -> Result<()> {
    enter_given_namespaces(&plan.spec)?;
    if plan.fresh_network {
        loopback_up()?;
    }
    let mut cgroup = cgroup::Gate::new(control, plan);
    mounts::build_root(control, plan, &mut cgroup)?;
    cgroup.pass()?;
    name_host(&plan.spec)?;
    paths::set_sysctls(&plan.spec)
}

/// Namespaces that the spec names by path, other than the PID namespace (which the shim entered for us).
fn enter_given_namespaces(spec: &Spec) -> Result<()> {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    for ns in namespaces.into_iter().flatten() {
        let Some(path) = ns.path() else { continue };
        let flag = match ns.typ() {
            LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            _ => continue,
        };
        let file = std::fs::File::open(path).attempt(|| format!("open namespace {}", path.display()))?;
        setns(file, flag).attempt(|| format!("enter namespace {}", path.display()))?;
    }
    Ok(())
}

fn join(control: &Control, plan: &Plan) -> Result<()> {
    control.wait_for(Message::CgroupReady)?;
    let pidfd: OwnedFd = sys::adopt(PIDFD_FD).attempt(|| "take the container's pidfd")?;
    sys::cloexec_from(3).attempt(|| "protect inherited descriptors")?;
    let flags = CloneFlags::from_bits_truncate(plan.join);
    setns(&pidfd, flags).attempt(|| "enter the container's namespaces")?;
    if plan.spec.process().as_ref().is_some_and(|p| p.terminal() == Some(true)) {
        let root = std::fs::File::open("/").attempt(|| "open the container's root")?;
        console::attach(control, &root.into(), None, plan)?;
    }
    Ok(())
}

fn name_host(spec: &Spec) -> Result<()> {
    if let Some(name) = spec.hostname() {
        nix::unistd::sethostname(name).attempt(|| format!("set the hostname to \"{name}\""))?;
    }
    if let Some(name) = spec.domainname() {
        // SAFETY: pointer and length describe the string's bytes.
        let ret = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
        nix::errno::Errno::result(ret).attempt(|| format!("set the domain name to \"{name}\""))?;
    }
    Ok(())
}

/// A fresh network namespace has its loopback interface down.
fn loopback_up() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .attempt(|| "open a socket for the loopback interface")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `request` is a valid ifreq for the call's duration.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) };
    nix::errno::Errno::result(ret).map(drop).attempt(|| "bring the loopback interface up")
}

/// Own cgroup namespace, once the shim has put this process into the container's groups.
fn unshare_cgroup() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWCGROUP).attempt(|| "make a cgroup namespace")
}

fn has_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|ns| ns.typ() == kind)
}

/// Refuses what this runner does not do, before anything is made.
///
/// # Errors
/// One sentence naming the feature.
pub(crate) fn check_supported(spec: &Spec) -> Result<()> {
    let refuse = |what: &str| {
        Err(ContainerError::Invalid(format!(
            "{what} not supported by the built-in runner; use another --runtime"
        )))
    };
    let Some(linux) = spec.linux() else {
        return Err(ContainerError::invalid("the spec has no \"linux\" section"));
    };
    for ns in linux.namespaces().iter().flatten() {
        match ns.typ() {
            LinuxNamespaceType::User => return refuse("user namespaces are"),
            LinuxNamespaceType::Time => return refuse("time namespaces are"),
            LinuxNamespaceType::Mount | LinuxNamespaceType::Cgroup if ns.path().is_some() => {
                return refuse("mount and cgroup namespaces by path are");
            }
            _ => {}
        }
    }
    if !has_namespace(spec, LinuxNamespaceType::Mount) {
        return refuse("containers without a mount namespace are");
    }
    let Some(process) = spec.process() else {
        return Err(ContainerError::invalid("the spec has no \"process\" section"));
    };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(ContainerError::invalid("the spec names no command to run"));
    }
    if !process.cwd().is_absolute() {
        return Err(ContainerError::invalid("the working directory must be an absolute path"));
    }
    if process.selinux_label().as_ref().is_some_and(|l| !l.is_empty()) {
        return refuse("SELinux labels are");
    }
    if process.apparmor_profile().as_ref().is_some_and(|p| !p.is_empty() && p != "unconfined") {
        return refuse("AppArmor profiles are");
    }
    // An empty list of hooks is no hook.
    let hooks = spec.hooks().as_ref().and_then(|h| serde_json::to_value(h).ok());
    let has_hook = |v: &serde_json::Value| v.as_array().is_some_and(|a| !a.is_empty());
    if hooks.as_ref().and_then(|h| h.as_object()).is_some_and(|h| h.values().any(has_hook)) {
        return refuse("hooks are");
    }
    Ok(())
}

/// The container's root as the spec names it, relative paths counting from the bundle.
pub(crate) fn root_path(spec: &Spec, bundle: &Path) -> Result<std::path::PathBuf> {
    let root =
        spec.root().as_ref().ok_or_else(|| ContainerError::invalid("the spec has no \"root\" section"))?;
    Ok(bundle.join(root.path()))
}
