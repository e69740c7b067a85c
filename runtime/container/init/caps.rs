//! Capabilities and ids of the container's command.

use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::sys;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Process};
use std::str::FromStr;

/// Capability sets as bit masks.
#[derive(Clone, Copy, Debug, Default)]
struct Sets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Sets {
    fn of(caps: Option<&LinuxCapabilities>) -> Result<Self> {
        let Some(c) = caps else { return Ok(Self::default()) };
        Ok(Self {
            bounding: mask(c.bounding().as_ref())?,
            effective: mask(c.effective().as_ref())?,
            permitted: mask(c.permitted().as_ref())?,
            inheritable: mask(c.inheritable().as_ref())?,
            ambient: mask(c.ambient().as_ref())?,
        })
    }
}

fn mask(caps: Option<&Capabilities>) -> Result<u64> {
    let mut out = 0;
    for cap in caps.into_iter().flatten() {
        let name =
            serde_json::to_value(cap).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
        let known = caps::Capability::from_str(&name)
            .map_err(|_| ContainerError::Invalid(format!("capability {name} is not known here")))?;
        out |= 1u64 << known.index();
    }
    Ok(out)
}

/// Gives up everything the command must not have: bounding set, groups, ids, capabilities, in the order that
/// works. Called last but for no_new_privs and the exec.
pub(super) fn become_user(process: &Process) -> Result<()> {
    let sets = Sets::of(process.capabilities().as_ref())?;
    let last = last_capability();
    let supported = if last >= 63 { u64::MAX } else { (1 << (last + 1)) - 1 };
    for cap in (0..=last).filter(|c| sets.bounding & 1 << c == 0) {
        sys::prctl(libc::PR_CAPBSET_DROP, cap).attempt(|| "drop capabilities from the bounding set")?;
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1).attempt(|| "keep capabilities over the change of user")?;
    let user = process.user();
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).attempt(|| "set the supplementary groups")?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).attempt(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).attempt(|| format!("become user {uid}"))?;
    set(sets.effective & supported, sets.permitted & supported, sets.inheritable & supported)?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0).attempt(|| "stop keeping capabilities")?;
    // Ambient capabilities must be permitted and inheritable; specs (runc's template too) ask for more.
    let ambient = sets.ambient & sets.permitted & sets.inheritable;
    for cap in (0..=last).filter(|c| ambient & 1 << c != 0) {
        raise_ambient(cap)?;
    }
    Ok(())
}

/// Highest capability of this kernel, found without /proc: the container's may hide it.
fn last_capability() -> libc::c_ulong {
    // SAFETY: PR_CAPBSET_READ takes an integer.
    let known = |cap: libc::c_ulong| unsafe { libc::prctl(libc::PR_CAPBSET_READ, cap, 0, 0, 0) } >= 0;
    (0..63).take_while(|c| known(*c)).last().unwrap_or(0)
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [half(0), half(32)];
    // SAFETY: header and data are laid out as capset(2) wants for version 3 (two data elements).
    let ret = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    nix::errno::Errno::result(ret).map(drop).attempt(|| "set the capabilities")
}

fn raise_ambient(cap: libc::c_ulong) -> Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
    // SAFETY: PR_CAP_AMBIENT takes integers.
    let ret = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, cap, 0, 0) };
    nix::errno::Errno::result(ret).map(drop).attempt(|| "raise ambient capabilities")
}
