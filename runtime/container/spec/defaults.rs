//! Docker's defaults for a container: capabilities, environment, masked paths, devices.

use crate::container::error::{ContainerError, Result};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, LinuxCapabilitiesBuilder};
use std::str::FromStr;

/// Capabilities a container has unless told otherwise.
pub(super) const CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// `PATH` of images that set none.
pub(super) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Hidden from containers.
pub(super) const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Read-only in containers.
pub(super) const READONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Sets a `NAME=value` pair, replacing an earlier one of that name; a bare `NAME` removes it.
pub(crate) fn set_env(env: &mut Vec<String>, pair: &str) {
    let name = pair.split('=').next().unwrap_or(pair);
    let same = |e: &String| e.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
    if !pair.contains('=') {
        env.retain(|e| !same(e));
        return;
    }
    match env.iter_mut().find(|e| same(e)) {
        Some(old) => pair.clone_into(old),
        None => env.push(pair.to_owned()),
    }
}

/// `CAP_CHOWN` from `chown`, `CHOWN`, `CAP_CHOWN`.
fn capability_name(word: &str) -> Result<String> {
    let upper = word.to_ascii_uppercase();
    let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    match caps::Capability::from_str(&full) {
        Ok(_) => Ok(full),
        Err(_) => Err(ContainerError::Invalid(format!("\"{word}\" is not a capability"))),
    }
}

/// Names of all capabilities there are to give: those this process has itself.
fn all_names() -> Vec<String> {
    let own = caps::read(None, caps::CapSet::Permitted).unwrap_or_default();
    let mut all: Vec<_> = own.into_iter().collect();
    all.sort_by_key(caps::Capability::index);
    all.iter().map(ToString::to_string).collect()
}

/// The default set with additions and removals; `ALL` works for both, and drops come first.
pub(super) fn capabilities(add: &[String], drop: &[String], privileged: bool) -> Result<Vec<String>> {
    if privileged {
        return Ok(all_names());
    }
    let all = |list: &[String]| list.iter().any(|w| w.eq_ignore_ascii_case("all"));
    let mut out = if all(add) {
        all_names()
    } else if all(drop) {
        Vec::new()
    } else {
        CAPABILITIES.iter().map(|c| format!("CAP_{c}")).collect()
    };
    for word in drop.iter().filter(|w| !w.eq_ignore_ascii_case("all")) {
        let name = capability_name(word)?;
        out.retain(|c| *c != name);
    }
    for word in add.iter().filter(|w| !w.eq_ignore_ascii_case("all")) {
        let name = capability_name(word)?;
        if !out.contains(&name) {
            out.push(name);
        }
    }
    Ok(out)
}

/// The sets for a process: inheritable and ambient stay empty (CVE-2022-29162).
pub(super) fn capability_sets(names: &[String]) -> Result<LinuxCapabilities> {
    let set: Capabilities = serde_json::from_value(serde_json::json!(names))
        .map_err(|e| ContainerError::Invalid(format!("a capability is not known: {e}")))?;
    LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()
        .map_err(|e| ContainerError::Invalid(format!("the capabilities do not make a spec: {e}")))
}

/// Every capability of this kernel.
pub(crate) fn all_capabilities() -> LinuxCapabilities {
    capability_sets(&all_names()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn capability_words() {
        assert_eq!(capabilities(&[], &[], false).unwrap().len(), 14);
        let got = capabilities(&words(&["net_admin"]), &words(&["ALL"]), false).unwrap();
        assert_eq!(got, ["CAP_NET_ADMIN"]);
        let got = capabilities(&words(&["all"]), &words(&["CAP_SYS_ADMIN"]), false).unwrap();
        assert!(got.len() > 30 && !got.contains(&"CAP_SYS_ADMIN".to_owned()));
        assert!(capabilities(&words(&["FLY"]), &[], false).is_err());
    }

    #[test]
    fn environment_pairs_replace_by_name() {
        let mut env = words(&["A=1", "AB=2"]);
        set_env(&mut env, "A=3");
        set_env(&mut env, "C=");
        set_env(&mut env, "AB");
        assert_eq!(env, ["A=3", "C="]);
    }
}
