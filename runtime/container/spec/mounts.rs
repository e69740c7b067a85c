//! The mounts and devices of a container.

use super::BundlePaths;
use super::options::RunOptions;
use crate::container::error::{Attempt, ContainerError, Result};
use serde_json::{Value, json};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

const DEFAULT_SHM: u64 = 64 << 20;

/// The spec's `mounts`, in the order in which they must be made.
pub(super) fn mounts(run: &RunOptions, paths: &BundlePaths) -> Result<Vec<Value>> {
    let sys_mode = if run.privileged { "rw" } else { "ro" };
    let shm = format!("size={}", run.shm_size.unwrap_or(DEFAULT_SHM));
    let plain = ["nosuid", "noexec", "nodev"];
    let with = |more: &[&str]| -> Vec<String> { plain.iter().chain(more).map(|s| (*s).to_owned()).collect() };
    let mut out = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": plain}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": with(&[sys_mode])}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
               "options": with(&["relatime", sys_mode])}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": plain}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
               "options": with(&["mode=1777", &shm])}),
    ];
    let files = [
        ("/etc/resolv.conf", &paths.resolv_conf),
        ("/etc/hostname", &paths.hostname),
        ("/etc/hosts", &paths.hosts),
    ];
    for (destination, source) in files {
        if let Some(source) = source {
            out.push(json!({"destination": destination, "type": "bind", "source": source,
                            "options": ["rbind", "rprivate"]}));
        }
    }
    for (destination, options) in &run.tmpfs {
        absolute(destination)?;
        let mut words = with(&[]);
        words.extend(options.iter().cloned());
        out.push(json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": words}));
    }
    let mut volumes: Vec<_> = run.volumes.iter().collect();
    // A volume inside another one's place must come after it.
    volumes.sort_by_key(|v| v.destination.components().count());
    for volume in volumes {
        out.push(bind(&volume.source, &volume.destination, &volume.options)?);
    }
    Ok(out)
}

fn absolute(path: &Path) -> Result<()> {
    if path.is_absolute() && crate::container::rootfs::clean(path).as_os_str() != "" {
        return Ok(());
    }
    Err(ContainerError::Invalid(format!(
        "{} is not a usable path for a mount in the container",
        path.display()
    )))
}

fn bind(source: &Path, destination: &Path, options: &[String]) -> Result<Value> {
    absolute(destination)?;
    let mut words = vec!["rbind".to_owned()];
    let propagation =
        |w: &String| matches!(w.trim_start_matches('r'), "private" | "slave" | "shared" | "unbindable");
    if !options.iter().any(propagation) {
        words.push("rprivate".to_owned());
    }
    words.extend(options.iter().filter(|w| !matches!(w.as_str(), "" | "z" | "Z" | "nocopy")).cloned());
    Ok(json!({"destination": destination, "type": "bind", "source": source, "options": words}))
}

/// The spec's `linux.devices` and the access rules for them.
pub(super) fn devices(run: &RunOptions) -> Result<(Vec<Value>, Vec<Value>)> {
    if run.privileged {
        return Ok((host_devices(), vec![json!({"allow": true, "access": "rwm"})]));
    }
    let mut nodes = Vec::new();
    let mut rules = vec![json!({"allow": false, "access": "rwm"})];
    for (source, destination, access) in &run.devices {
        absolute(destination)?;
        let node = device(source, destination)?;
        let access = if access.is_empty() { "rwm" } else { access };
        rules.push(json!({"allow": true, "type": node["type"], "major": node["major"],
                          "minor": node["minor"], "access": access}));
        nodes.push(node);
    }
    Ok((nodes, rules))
}

fn device(source: &Path, destination: &Path) -> Result<Value> {
    let meta = std::fs::metadata(source).attempt(|| format!("look at the device {}", source.display()))?;
    let kind = match meta.file_type() {
        t if t.is_char_device() => "c",
        t if t.is_block_device() => "b",
        _ => return Err(ContainerError::Invalid(format!("{} is not a device", source.display()))),
    };
    let (major, minor) = (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
    Ok(json!({"path": destination, "type": kind, "major": major, "minor": minor,
              "fileMode": meta.mode() & 0o7777, "uid": meta.uid(), "gid": meta.gid()}))
}

/// The host's devices for a privileged container: those directly in /dev and one level below, but for
/// terminals and what the container has of its own.
fn host_devices() -> Vec<Value> {
    let mut out = Vec::new();
    let mut dirs = vec![std::path::PathBuf::from("/dev")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let Ok(kind) = entry.file_type() else { continue };
            let own = [
                "pts",
                "shm",
                "mqueue",
                "fd",
                "console",
                "ptmx",
                "null",
                "zero",
                "full",
                "random",
                "urandom",
                "tty",
                ".lxc",
                ".lxd-mounts",
                ".udev",
            ];
            if own.iter().any(|o| name == *o) {
                continue;
            }
            if kind.is_dir() && dir == Path::new("/dev") {
                dirs.push(path);
            } else if kind.is_char_device() || kind.is_block_device() {
                out.extend(device(&path, &path));
            }
        }
    }
    out.sort_by_key(|d| d["path"].to_string());
    out
}
