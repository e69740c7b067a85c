//! The last steps: limits, user, filters, working directory, and the exec of the container's command.

use super::control::{Control, Message, Plan};
use super::{caps, die_with_shim, paths, seccomp};
use crate::container::error::{Attempt, ContainerError, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Result};
use crate::container::sys;
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, SFlag, stat, umask};
use oci_spec::runtime::{PosixRlimitType, Process};
use std::convert::Infallible;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Becomes the container's command. Never returns but with an error.
pub(super) fn into_command(control: &Control, plan: &Plan) -> Result<Infallible> {
    let process = plan
        .spec
        .process()
        .as_ref()
        .ok_or_else(|| ContainerError::invalid("the spec has no \"process\" section"))?;
    if let Some(score) = process.oom_score_adj() {
        let path = format!("{}/oom_score_adj", nix::unistd::getpid());
        paths::write_proc(&paths::private_proc()?, &path, &score.to_string())?;
    }
    for limit in process.rlimits().iter().flatten() {
        setrlimit(resource(limit.typ())?, limit.soft(), limit.hard())
            .attempt(|| format!("set {:?}", limit.typ()))?;
    }
    own_streams(process)?;
    let no_new_privs = process.no_new_privileges() == Some(true);
    let profile = plan.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let filters = profile.map_or(Ok(Vec::new()), seccomp::compile)?;
    umask(Mode::from_bits_truncate(process.user().umask().unwrap_or(0o022)));
    let entered = nix::unistd::chdir(process.cwd());
    if no_new_privs {
        caps::become_user(process)?;
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).attempt(|| "set no_new_privs")?;
        enter_cwd(process.cwd(), entered)?;
        reset_signals()?;
        // Changing ids cleared the tie to the shim.
        die_with_shim()?;
        let program = find(process)?;
        seccomp::install(&filters)?;
        return start(control, plan, process, &program);
    }
    // Without no_new_privs a filter can only be installed while there is CAP_SYS_ADMIN.
    seccomp::install(&filters)?;
    caps::become_user(process)?;
    enter_cwd(process.cwd(), entered)?;
    reset_signals()?;
    die_with_shim()?;
    let program = find(process)?;
    start(control, plan, process, &program)
}

fn start(control: &Control, plan: &Plan, process: &Process, program: &Path) -> Result<Infallible> {
    let strings = |list: &[String]| -> Result<Vec<CString>> {
        let nul = |_| ContainerError::invalid("arguments and environment cannot contain NUL bytes");
        list.iter().map(|s| CString::new(s.as_str()).map_err(nul)).collect()
    };
    let args = strings(process.args().as_deref().unwrap_or_default())?;
    let env = strings(process.env().as_deref().unwrap_or_default())?;
    let path = sys::cstring(program).attempt(|| "use the command's path")?;
    if !plan.auto_start {
        control.report_ready()?;
        control.wait_for(Message::Start)?;
    }
    let Err(errno) = nix::unistd::execve(&path, &args, &env);
    Err(refusal(&program.display().to_string(), errno))
}

/// The sentence and code docker's users know.
fn refusal(command: &str, errno: Errno) -> ContainerError {
    let code = if errno == Errno::ENOENT { EXIT_NOT_FOUND } else { EXIT_NOT_EXECUTABLE };
    let why = match errno {
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        Errno::ENOEXEC => "exec format error",
        Errno::EISDIR => "is a directory",
        other => other.desc(),
    };
    ContainerError::Failed { code, message: format!("exec: \"{command}\": {why}") }
}

/// Where the command is, as the container's user sees it.
fn find(process: &Process) -> Result<PathBuf> {
    let command = process.args().as_deref().and_then(<[String]>::first).map_or("", String::as_str);
    if command.contains('/') {
        return executable(Path::new(command)).map(|()| command.into()).map_err(|e| refusal(command, e));
    }
    let path = process.env().iter().flatten().find_map(|e| e.strip_prefix("PATH=")).unwrap_or_default();
    let mut denied = false;
    for dir in path.split(':').filter(|_| !command.is_empty()) {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(command);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return Err(refusal(command, Errno::EACCES));
    }
    let message = format!("exec: \"{command}\": executable file not found in $PATH");
    Err(ContainerError::Failed { code: EXIT_NOT_FOUND, message })
}

fn executable(path: &Path) -> Result<(), Errno> {
    let st = stat(path)?;
    match SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => nix::unistd::eaccess(path, nix::unistd::AccessFlags::X_OK),
        SFlag::S_IFDIR => Err(Errno::EISDIR),
        _ => Err(Errno::EACCES),
    }
}

/// The working directory, entered as the user when root could not (or had no reason to); and never one that
/// lies outside the container's root (CVE-2024-21626).
fn enter_cwd(cwd: &Path, entered: nix::Result<()>) -> Result<()> {
    if entered.is_err() {
        nix::unistd::chdir(cwd).attempt(|| format!("enter the working directory {}", cwd.display()))?;
    }
    match nix::unistd::getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(ContainerError::Invalid(format!(
            "the working directory {} is not inside the container's root",
            cwd.display()
        ))),
    }
}

/// The shim blocks signals and Rust ignores SIGPIPE; the command must know nothing of either.
fn reset_signals() -> Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            // SAFETY: SIG_DFL installs no handler; numbers the C library reserves are refused, which is fine.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).attempt(|| "unblock signals")
}

/// Makes standard streams the user's own, so that opening /dev/stdout works for users other than root.
fn own_streams(process: &Process) -> Result<()> {
    use std::os::fd::BorrowedFd;
    let uid = process.user().uid();
    for number in 0..3 {
        // SAFETY: only looked at during this iteration; 0 to 2 are open by the shim's doing.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(st) = nix::sys::stat::fstat(fd) else { continue };
        let null = st.st_rdev == nix::sys::stat::makedev(1, 3);
        if st.st_uid == uid || null {
            continue;
        }
        match nix::unistd::fchown(fd, Some(nix::unistd::Uid::from_raw(uid)), None) {
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS | Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(e).attempt(|| "give standard streams to the container's user"),
        }
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Result<Resource> {
    Ok(match kind {
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
    })
}
