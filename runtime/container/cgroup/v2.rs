//! cgroup v2: one directory, controllers handed down by `cgroup.subtree_control`.

use super::{devices, missing, set};
use crate::container::error::{Attempt, Result};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use std::fs;
use std::path::Path;

/// Makes `path` below `mount`, handing every available controller down to it.
pub(super) fn create(mount: &Path, path: &Path) -> Result<()> {
    let mut dir = mount.to_path_buf();
    for part in path {
        hand_down(&dir);
        dir.push(part);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.attempt(|| format!("create cgroup {}", dir.display()))?,
        }
    }
    Ok(())
}

/// Enables what the group has for its children, one by one: a controller that cannot be enabled (threads,
/// realtime tasks) must not keep the others away. A limit that then has no controller is an error later.
fn hand_down(dir: &Path) {
    let list = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let enabled = list("cgroup.subtree_control");
    for controller in list("cgroup.controllers").split_whitespace() {
        if !enabled.split_whitespace().any(|c| c == controller) {
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// Sets all limits of `r` on the group `dir`.
pub(super) fn apply(dir: &Path, r: &LinuxResources) -> Result<()> {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let need = |controller: &str| {
        let found = available.split_whitespace().any(|c| c == controller);
        if found { Ok(()) } else { Err(missing(controller)) }
    };
    if let Some(m) = r.memory().as_ref().filter(|m| **m != LinuxMemory::default()) {
        need("memory")?;
        apply_memory(dir, m)?;
    }
    if let Some(cpu) = r.cpu() {
        apply_cpu(dir, cpu, &need)?;
    }
    if let Some(limit) = r.pids().as_ref().map(oci_spec::runtime::LinuxPids::limit) {
        need("pids")?;
        set(dir, "pids.max", &if limit > 0 { limit.to_string() } else { "max".to_owned() })?;
    }
    if let Some(weight) = r.block_io().as_ref().and_then(oci_spec::runtime::LinuxBlockIo::weight) {
        need("io")?;
        // v1 counts 10..=1000, v2 1..=10000.
        let weight = 1 + u64::from(weight.clamp(10, 1000) - 10) * 9999 / 990;
        set(dir, "io.weight", &weight.to_string())?;
    }
    for limit in r.hugepage_limits().iter().flatten() {
        need("hugetlb")?;
        set(dir, &format!("hugetlb.{}.max", limit.page_size()), &limit.limit().to_string())?;
    }
    for (file, value) in r.unified().iter().flatten() {
        set_unified(dir, file, value)?;
    }
    if let Some(rules) = r.devices().as_ref().filter(|d| !d.is_empty()) {
        super::v2_devices::attach(dir, &devices::with_defaults(rules))?;
    }
    Ok(())
}

fn set_unified(dir: &Path, file: &str, value: &str) -> Result<()> {
    if file.contains('/') || file == "." || file == ".." {
        let message = format!("\"{file}\" is not the name of a cgroup file");
        return Err(crate::container::error::ContainerError::Invalid(message));
    }
    set(dir, file, value)
}

fn apply_memory(dir: &Path, m: &LinuxMemory) -> Result<()> {
    let text = |v: i64| if v < 0 { "max".to_owned() } else { v.to_string() };
    if let Some(limit) = m.limit() {
        set(dir, "memory.max", &text(limit))?;
    }
    // The spec counts memory and swap together, v2 counts swap alone.
    let swap = match (m.swap(), m.limit()) {
        (Some(swap), _) if swap < 0 => Some("max".to_owned()),
        (Some(swap), Some(limit)) if limit >= 0 => Some(text((swap - limit).max(0))),
        _ => None,
    };
    if let Some(swap) = swap.filter(|_| dir.join("memory.swap.max").exists()) {
        set(dir, "memory.swap.max", &swap)?;
    }
    m.reservation().map_or(Ok(()), |v| set(dir, "memory.low", &text(v)))
}

fn apply_cpu(dir: &Path, cpu: &LinuxCpu, need: &dyn Fn(&str) -> Result<()>) -> Result<()> {
    if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
        need("cpu")?;
        // shares 2..=262144 onto weight 1..=10000, as the kernel documentation maps them.
        let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
        set(dir, "cpu.weight", &weight.to_string())?;
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        need("cpu")?;
        let quota = cpu.quota().filter(|q| *q > 0).map_or("max".to_owned(), |q| q.to_string());
        let period = cpu.period().filter(|p| *p > 0).unwrap_or(100_000);
        set(dir, "cpu.max", &format!("{quota} {period}"))?;
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
            need("cpuset")?;
            set(dir, file, value)?;
        }
    }
    Ok(())
}
