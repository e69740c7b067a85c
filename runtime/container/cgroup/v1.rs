//! cgroup v1: one directory per controller hierarchy.

use super::{Hierarchies, V1, missing, set};
use crate::container::error::{Attempt, Result};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxResources};
use std::fs;
use std::path::{Path, PathBuf};

/// Makes `path` in one hierarchy. A new cpuset group is unusable until it has its parent's cpus and nodes.
pub(super) fn create(h: &V1, path: &Path) -> Result<()> {
    let mut dir = h.mount.clone();
    let cpuset = h.controllers.iter().any(|c| c == "cpuset");
    for part in path {
        let parent = dir.clone();
        dir.push(part);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.attempt(|| format!("create cgroup {}", dir.display()))?,
        }
        if cpuset {
            inherit(&parent, &dir, "cpuset.cpus")?;
            inherit(&parent, &dir, "cpuset.mems")?;
        }
    }
    Ok(())
}

fn inherit(parent: &Path, dir: &Path, file: &str) -> Result<()> {
    let own = fs::read_to_string(dir.join(file)).attempt(|| format!("read {file} of {}", dir.display()))?;
    if !own.trim().is_empty() {
        return Ok(());
    }
    let value =
        fs::read_to_string(parent.join(file)).attempt(|| format!("read {file} of {}", parent.display()))?;
    set(dir, file, value.trim())
}

/// Sets all limits of `r`.
pub(super) fn apply(hs: &Hierarchies, path: &Path, r: &LinuxResources) -> Result<()> {
    let dir = |controller: &str| -> Result<PathBuf> {
        hs.v1(controller).map(|h| h.mount.join(path)).ok_or_else(|| missing(controller))
    };
    if let Some(devices) = r.devices().as_ref().filter(|d| !d.is_empty()) {
        apply_devices(&dir("devices")?, devices)?;
    }
    if let Some(m) = r.memory().as_ref().filter(|m| **m != LinuxMemory::default()) {
        apply_memory(&dir("memory")?, m)?;
    }
    if let Some(cpu) = r.cpu() {
        apply_cpu(&dir, cpu)?;
    }
    if let Some(limit) = r.pids().as_ref().map(oci_spec::runtime::LinuxPids::limit) {
        let value = if limit > 0 { limit.to_string() } else { "max".to_owned() };
        set(&dir("pids")?, "pids.max", &value)?;
    }
    if let Some(io) = r.block_io().as_ref().filter(|b| **b != LinuxBlockIo::default()) {
        let blkio = dir("blkio")?;
        if let Some(weight) = io.weight() {
            set(&blkio, "blkio.weight", &weight.to_string())?;
        }
    }
    for limit in r.hugepage_limits().iter().flatten() {
        let file = format!("hugetlb.{}.limit_in_bytes", limit.page_size());
        set(&dir("hugetlb")?, &file, &limit.limit().to_string())?;
    }
    Ok(())
}

fn apply_memory(dir: &Path, m: &LinuxMemory) -> Result<()> {
    let write = |file: &str, value: Option<i64>| value.map_or(Ok(()), |v| set(dir, file, &v.to_string()));
    // The kernel wants memory ≤ memory+swap at every moment; a fresh group has both unlimited.
    write("memory.limit_in_bytes", m.limit())?;
    if dir.join("memory.memsw.limit_in_bytes").exists() {
        write("memory.memsw.limit_in_bytes", m.swap())?;
    }
    write("memory.soft_limit_in_bytes", m.reservation())?;
    if let Some(swappiness) = m.swappiness() {
        set(dir, "memory.swappiness", &swappiness.to_string())?;
    }
    if m.disable_oom_killer() == Some(true) {
        set(dir, "memory.oom_control", "1")?;
    }
    Ok(())
}

fn apply_cpu(dir: &dyn Fn(&str) -> Result<PathBuf>, cpu: &LinuxCpu) -> Result<()> {
    if cpu.shares().is_some() || cpu.quota().is_some() || cpu.period().is_some() {
        let group = dir("cpu")?;
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            set(&group, "cpu.shares", &shares.to_string())?;
        }
        if let Some(period) = cpu.period().filter(|p| *p != 0) {
            set(&group, "cpu.cfs_period_us", &period.to_string())?;
        }
        if let Some(quota) = cpu.quota().filter(|q| *q != 0) {
            set(&group, "cpu.cfs_quota_us", &quota.to_string())?;
        }
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|c| !c.is_empty()) {
        set(&dir("cpuset")?, "cpuset.cpus", cpus)?;
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|m| !m.is_empty()) {
        set(&dir("cpuset")?, "cpuset.mems", mems)?;
    }
    Ok(())
}

fn apply_devices(dir: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    for rule in super::devices::with_defaults(rules) {
        let file = if rule.allow { "devices.allow" } else { "devices.deny" };
        set(dir, file, &rule.v1_line())?;
    }
    Ok(())
}
