//! The spec's seccomp profile as kernel filters.
//!
//! A kernel filter here has one verdict for matching and one for other calls, so a profile becomes one filter
//! for "listed at all" against the default action, and one more for each other action it names. The kernel
//! runs all of them and takes the strictest verdict.
//!
//! Calls by 32-bit programs on a 64-bit machine are outside the filters' architecture and kill the program.

use super::syscalls;
use crate::container::error::{ContainerError, Result};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Programs in the order in which they must be installed.
pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Vec<BpfProgram>> {
    if profile.listener_path().is_some() {
        return Err(ContainerError::invalid("seccomp notification is not supported by the built-in runner"));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let calls = profile.syscalls().as_deref().unwrap_or_default();
    let mut programs = Vec::new();
    let mut others: Vec<(SeccompAction, Rules)> = Vec::new();
    let mut listed = Rules::new();
    for call in calls {
        let verdict = action(call.action(), call.errno_ret())?;
        if verdict != default {
            add(&mut listed, call)?;
        }
        if verdict != SeccompAction::Allow && verdict != default {
            match others.iter_mut().find(|(a, _)| *a == verdict) {
                Some((_, rules)) => add(rules, call)?,
                None => {
                    let mut rules = Rules::new();
                    add(&mut rules, call)?;
                    others.push((verdict, rules));
                }
            }
        }
    }
    if default != SeccompAction::Allow {
        programs.push(program(listed, default, SeccompAction::Allow)?);
    }
    for (verdict, rules) in others {
        programs.push(program(rules, SeccompAction::Allow, verdict)?);
    }
    Ok(programs)
}

/// Installs compiled programs on this process.
pub(super) fn install(programs: &[BpfProgram]) -> Result<()> {
    for program in programs {
        load(program)?;
    }
    Ok(())
}

/// seccomp(2) itself: the crate's own installer also sets no_new_privs, which is the spec's business.
fn load(program: &BpfProgram) -> Result<()> {
    use crate::container::error::Attempt;
    let len = u16::try_from(program.len())
        .map_err(|_| ContainerError::invalid("the seccomp profile is too long"))?;
    #[repr(C)]
    struct Fprog {
        len: u16,
        filter: *const seccompiler::sock_filter,
    }
    let fprog = Fprog { len, filter: program.as_ptr() };
    // SAFETY: `fprog` is laid out as struct sock_fprog and points at `len` instructions that outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog) };
    nix::errno::Errno::result(ret).map(drop).attempt(|| "install the seccomp filter")
}

fn program(rules: Rules, otherwise: SeccompAction, matching: SeccompAction) -> Result<BpfProgram> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(|_| {
        ContainerError::Invalid(format!("seccomp is not supported on {}", std::env::consts::ARCH))
    })?;
    SeccompFilter::new(rules, otherwise, matching, arch)
        .and_then(TryInto::try_into)
        .map_err(|e| ContainerError::Invalid(format!("the seccomp profile cannot be compiled: {e}")))
}

/// Adds a profile entry. Names unknown on this machine are skipped, as profiles list those of all machines.
fn add(rules: &mut Rules, call: &LinuxSyscall) -> Result<()> {
    let conditions = call.args().iter().flatten().map(condition).collect::<Result<Vec<_>>>()?;
    for number in call.names().iter().filter_map(|n| syscalls::number(n)) {
        if conditions.is_empty() {
            // No rules at all means every call matches.
            rules.insert(number, Vec::new());
            continue;
        }
        let rule = SeccompRule::new(conditions.clone())
            .map_err(|e| ContainerError::Invalid(format!("a seccomp rule cannot be compiled: {e}")))?;
        match rules.entry(number) {
            std::collections::btree_map::Entry::Vacant(e) => drop(e.insert(vec![rule])),
            std::collections::btree_map::Entry::Occupied(mut e) if !e.get().is_empty() => {
                e.get_mut().push(rule);
            }
            std::collections::btree_map::Entry::Occupied(_) => {}
        }
    }
    Ok(())
}

fn condition(arg: &LinuxSeccompArg) -> Result<SeccompCondition> {
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (SeccompCmpOp::Lt, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (SeccompCmpOp::Le, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (SeccompCmpOp::Ge, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (SeccompCmpOp::Gt, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (SeccompCmpOp::MaskedEq(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    let index = u8::try_from(arg.index()).unwrap_or(u8::MAX);
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)
        .map_err(|e| ContainerError::Invalid(format!("a seccomp argument rule cannot be compiled: {e}")))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<SeccompAction> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        LinuxSeccompAction::ScmpActErrno => SeccompAction::Errno(errno),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => SeccompAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        LinuxSeccompAction::ScmpActLog => SeccompAction::Log,
        LinuxSeccompAction::ScmpActTrap => SeccompAction::Trap,
        LinuxSeccompAction::ScmpActTrace => SeccompAction::Trace(errno),
        LinuxSeccompAction::ScmpActNotify => {
            return Err(ContainerError::invalid(
                "seccomp notification is not supported by the built-in runner",
            ));
        }
    })
}
