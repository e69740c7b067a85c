//! A container's control groups: v1 hierarchies, v2, or both side by side as on hybrid machines.

mod devices;
mod v1;
mod v2;
mod v2_devices;

use super::error::{Attempt, ContainerError, Result};
use oci_spec::runtime::LinuxResources;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// One mounted v1 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct V1 {
    /// `["cpu", "cpuacct"]`, or `["name=systemd"]`.
    pub(crate) controllers: Vec<String>,
    pub(crate) mount: PathBuf,
}

/// What this machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    pub(crate) v1: Vec<V1>,
    pub(crate) v2: Option<PathBuf>,
}

impl Hierarchies {
    /// Finds the hierarchies mounted in this process' mount namespace.
    ///
    /// # Errors
    /// `/proc/self/mountinfo` cannot be read.
    pub fn detect() -> Result<Self> {
        let text = fs::read_to_string("/proc/self/mountinfo").attempt(|| "read /proc/self/mountinfo")?;
        Ok(Self::parse(&text))
    }

    fn parse(mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let mut right = right.split(' ');
            let (fstype, options) = (right.next(), right.nth(1).unwrap_or(""));
            let Some(mount) = left.split(' ').nth(4).map(|m| PathBuf::from(m.replace("\\040", " "))) else {
                continue;
            };
            match fstype {
                Some("cgroup2") if found.v2.is_none() => found.v2 = Some(mount),
                Some("cgroup") => {
                    let is_controller = |o: &&str| o.starts_with("name=") || V1_CONTROLLERS.contains(o);
                    let controllers: Vec<String> =
                        options.split(',').filter(is_controller).map(str::to_owned).collect();
                    let known = found.v1.iter().any(|h| h.controllers == controllers);
                    if !controllers.is_empty() && !known {
                        found.v1.push(V1 { controllers, mount });
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Only the unified hierarchy, with no v1 controller beside it.
    pub(crate) const fn is_unified(&self) -> bool {
        self.v1.is_empty() && self.v2.is_some()
    }

    fn v1(&self, controller: &str) -> Option<&V1> {
        self.v1.iter().find(|h| h.controllers.iter().any(|c| c == controller))
    }
}

const V1_CONTROLLERS: [&str; 14] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "net_cls",
    "net_prio",
    "perf_event",
    "hugetlb",
    "rdma",
    "misc",
];

/// The control groups of one container: one directory per hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    hierarchies: Hierarchies,
    /// Relative path, without a leading `/`.
    path: PathBuf,
}

impl Cgroup {
    /// Names a container's groups without making them. `path` counts from the root of each hierarchy.
    ///
    /// # Errors
    /// The path is empty or climbs with `..`.
    pub fn new(hierarchies: Hierarchies, path: &str) -> Result<Self> {
        let relative = path.trim_matches('/');
        let sound =
            !relative.is_empty() && relative.split('/').all(|p| !p.is_empty() && p != "." && p != "..");
        if !sound {
            return Err(ContainerError::Invalid(format!("\"{path}\" is not a usable cgroup path")));
        }
        Ok(Self { hierarchies, path: PathBuf::from(relative) })
    }

    /// Makes the groups and sets the limits. On failure what was made is removed again.
    ///
    /// # Errors
    /// A limit is asked for whose controller is missing, or the kernel refuses a value.
    pub fn create(&self, resources: Option<&LinuxResources>) -> Result<()> {
        let made = self.make(resources);
        if made.is_err() {
            // The error that is already on its way matters more than one of the clean-up.
            let _ = self.remove();
        }
        made
    }

    fn make(&self, resources: Option<&LinuxResources>) -> Result<()> {
        for h in &self.hierarchies.v1 {
            v1::create(h, &self.path)?;
        }
        if let Some(mount) = &self.hierarchies.v2 {
            v2::create(mount, &self.path)?;
        }
        let Some(resources) = resources else { return Ok(()) };
        if self.hierarchies.is_unified() {
            v2::apply(&self.dirs()[0], resources)
        } else {
            v1::apply(&self.hierarchies, &self.path, resources)
        }
    }

    /// Moves a process into every group.
    ///
    /// # Errors
    /// The process is gone or the kernel refuses.
    pub fn add(&self, pid: i32) -> Result<()> {
        for dir in self.dirs() {
            fs::write(dir.join("cgroup.procs"), pid.to_string())
                .attempt(|| format!("move process {pid} into cgroup {}", dir.display()))?;
        }
        Ok(())
    }

    pub(crate) const fn unified_fd_possible(&self) -> bool {
        self.hierarchies.is_unified()
    }

    /// What the container may see of its groups.
    pub(crate) fn view(&self) -> super::init::CgroupView {
        let v1 = self.hierarchies.v1.iter().map(|h| (h.controllers.clone(), h.mount.join(&self.path)));
        super::init::CgroupView {
            v1: v1.collect(),
            v2: self.hierarchies.v2.as_ref().map(|m| m.join(&self.path)),
        }
    }

    /// On a purely unified machine: the group as a descriptor, for a clone straight into it.
    pub(crate) fn unified_fd(&self) -> Option<OwnedFd> {
        if !self.hierarchies.is_unified() {
            return None;
        }
        fs::File::open(self.dirs().first()?).ok().map(OwnedFd::from)
    }

    /// Whether the out-of-memory killer struck in the group.
    pub fn oom_killed(&self) -> bool {
        let v1 = self.hierarchies.v1("memory").map(|h| h.mount.join(&self.path).join("memory.oom_control"));
        let v2 = self.hierarchies.v2.as_ref().map(|m| m.join(&self.path).join("memory.events"));
        [v1, v2].into_iter().flatten().any(|file| {
            let text = fs::read_to_string(file).unwrap_or_default();
            text.lines().filter_map(|l| l.strip_prefix("oom_kill ")).any(|n| n.trim() != "0")
        })
    }

    /// Kills every process in the group: at once where the kernel can (`cgroup.kill`), one by one otherwise.
    pub fn kill_all(&self) {
        for dir in self.dirs() {
            if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
                return;
            }
        }
        // Without cgroup.kill: repeat, because a process may fork between the reading and the signal.
        for _ in 0..16 {
            let pids = self.pids();
            if pids.is_empty() {
                return;
            }
            for pid in pids {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            }
        }
    }

    /// Processes in the group, as this process sees their ids.
    pub fn pids(&self) -> Vec<i32> {
        let dirs = self.dirs();
        let text =
            dirs.first().and_then(|d| fs::read_to_string(d.join("cgroup.procs")).ok()).unwrap_or_default();
        text.lines().filter_map(|l| l.trim().parse().ok()).collect()
    }

    /// Removes the groups; those already gone are no error.
    ///
    /// # Errors
    /// A group still holds processes.
    pub fn remove(&self) -> Result<()> {
        let mut first_error = None;
        for dir in self.dirs() {
            if let Err(e) = remove_tree(&dir) {
                first_error.get_or_insert((dir, e));
            }
        }
        match first_error {
            None => Ok(()),
            Some((dir, e)) => Err(e).attempt(|| format!("remove cgroup {}", dir.display())),
        }
    }

    /// All directories of the container, v1 first.
    pub(crate) fn dirs(&self) -> Vec<PathBuf> {
        let v1 = self.hierarchies.v1.iter().map(|h| &h.mount);
        v1.chain(&self.hierarchies.v2).map(|m| m.join(&self.path)).collect()
    }
}

/// Removes a group with the groups that the container made below it.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let gone = |r: io::Result<()>| match r {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match fs::remove_dir(dir) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
        other => return gone(other),
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    gone(fs::remove_dir(dir))
}

#[cfg(test)]
pub(crate) fn attach_v2_filter(dir: &Path, rules: &[oci_spec::runtime::LinuxDeviceCgroup]) -> Result<()> {
    v2_devices::attach(dir, &devices::with_defaults(rules))
}

/// Writes one control file.
fn set(dir: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(dir.join(file), value)
        .attempt(|| format!("set {file} to \"{value}\" in cgroup {}", dir.display()))
}

fn missing(controller: &str) -> ContainerError {
    ContainerError::Invalid(format!(
        "this machine has no {controller} cgroup controller, so the container's {controller} limit cannot be set"
    ))
}

#[cfg(test)]
mod tests;
