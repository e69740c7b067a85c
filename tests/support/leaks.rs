//! What an instance could leave on the host: mounts, processes, network devices, firewall tables, namespaces.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Everything found that still belongs to a root directory, a line each.
pub fn of_root(root: &Path) -> Vec<String> {
    let root = root.to_string_lossy();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
    let mounts = mounts.lines().filter(|line| line.contains(&*root)).map(|line| format!("mount: {line}"));
    mounts.chain(processes(&root).into_iter().map(|(pid, text)| format!("process {pid}: {text}"))).collect()
}

/// Living processes of the program whose command line names `text`, other than this one.
pub fn processes(text: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // By comm first, which never blocks: cmdline of a process that hangs in exec or in a fault does. Processes
        // come and go while they are listed.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if !["lazyrun", "exe", "memfd:", "containerd", "fuse", "runc"].iter().any(|own| name.starts_with(own))
        {
            continue;
        }
        let Ok(command) = fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if pid != std::process::id() as i32 && command.contains(text) {
            found.push((pid, command.trim().to_owned()));
        }
    }
    found
}

/// Names of the host's network devices.
pub fn network_devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").expect("list network devices").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Names of the host's nftables tables.
pub fn firewall_tables() -> Vec<String> {
    let output = Command::new("nft")
        .args(["list", "tables"])
        .output()
        .expect("nft is needed: run tests/tools/deps.sh");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}
