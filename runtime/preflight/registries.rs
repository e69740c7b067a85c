//! The files that say how registries are talked to, and whether containerd and lazyrun read the same ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lazyrun_fetcher::{HostFiles, check_providers, check_settings};
use toml::Value;

use super::{ContainerdConfig, Rows, find_program};
use crate::ipc::protocol::RegistryOptions;
use crate::registries;

/// Variables that say where settings are.
const VARIABLES: [&str; 9] = [
    "HOME",
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
    "XDG_RUNTIME_DIR",
    "XDG_CONFIG_HOME",
    "LAZYRUN_HOSTS_DIR",
    "CONTAINERS_REGISTRIES_CONF",
    "LAZYRUN_IMAGE_CREDENTIAL_PROVIDER_CONFIG",
    "LAZYRUN_IMAGE_CREDENTIAL_PROVIDER_BIN_DIR",
];

/// Every file there is.
pub(super) fn check(registry: &RegistryOptions, rows: &mut Rows) {
    let credentials: Vec<PathBuf> =
        registry.docker_config.iter().chain(&registry.auth_files).cloned().collect();
    let mut files = check_settings(&registry.hosts, &credentials);
    files.extend(registry.providers.as_deref().map(check_providers));
    if files.is_empty() {
        rows.ok("registries", "no settings: registries are asked themselves, without credentials");
    }
    for file in files {
        let what = file.kind;
        let path = file.path.display();
        if let Some(error) = &file.error {
            // Most errors name their file.
            let named = error.contains(&path.to_string());
            let why = if named { error.clone() } else { format!("{path}: {error}") };
            rows.error(what, why, "correct it: images that need it can't be fetched");
        } else {
            rows.ok(what, format!("{path}: {}", file.says));
        }
        for warning in file.warnings {
            rows.warning(what, format!("{path}: {warning}"), "");
        }
        for helper in file.helpers.iter().filter(|helper| !find_program(helper)) {
            rows.error(
                what,
                format!("{path} leaves credentials to {helper}, which is not installed"),
                format!("install {helper} where the snapshotter's PATH leads, or take it out of {path}"),
            );
        }
    }
}

/// Where containerd reads of mirrors and credentials that lazyrun does not look at.
pub(super) fn check_config_path(config: &ContainerdConfig, files: &HostFiles, rows: &mut Rows) {
    let what = "registries of containerd";
    let of = |section: &str, key: &str| config.get(&["plugins", section, "registry", key]);
    let sections = ["io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri"];
    for section in sections {
        let dirs = of(section, "config_path").and_then(Value::as_str).unwrap_or_default();
        for dir in dirs.split(':').filter(|dir| !dir.is_empty()) {
            if files.hosts_dirs.iter().any(|own| own == Path::new(dir)) {
                rows.ok(what, format!("lazyrun reads {dir} too"));
            } else {
                rows.warning(
                    what,
                    format!("containerd reads {dir} for mirrors and certificates, lazyrun does not"),
                    format!("give the snapshotter --hosts-dir {dir}, or LAZYRUN_HOSTS_DIR"),
                );
            }
        }
        for (key, instead) in [
            ("mirrors", "write them as hosts.toml below /etc/containerd/certs.d and set config_path"),
            ("configs", "write certificates as hosts.toml, and credentials to the snapshotter's config.json"),
            ("auths", "write them to the snapshotter's config.json (lazyrun login)"),
        ] {
            if of(section, key).and_then(Value::as_table).is_some_and(|table| !table.is_empty()) {
                rows.warning(
                    what,
                    format!("[plugins.\"{section}\".registry.{key}] is not read by lazyrun"),
                    instead,
                );
            }
        }
    }
}

/// Whether the snapshotter that runs was started in an environment like this one, which says where settings are.
pub(super) fn check_environment(daemon: Option<u32>, rows: &mut Rows) {
    let what = "environment";
    let Some(pid) = daemon else { return };
    let Ok(text) = std::fs::read(format!("/proc/{pid}/environ")) else { return };
    let theirs: BTreeMap<String, String> = text
        .split(|b| *b == 0)
        .filter_map(|one| {
            let one = String::from_utf8_lossy(one);
            let (name, value) = one.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        })
        .collect();
    let different: Vec<&str> =
        VARIABLES.into_iter().filter(|name| differs(name, theirs.get(*name))).collect();
    if different.is_empty() {
        rows.ok(what, format!("the snapshotter (process {pid}) looks for settings where this command does"));
        return;
    }
    let shown: Vec<String> = different
        .iter()
        .map(|name| format!("{name}={}", theirs.get(*name).map_or("", String::as_str)))
        .collect();
    rows.warning(
        what,
        format!("the snapshotter (process {pid}) looks for settings elsewhere: it has {}", shown.join(" ")),
        format!("check again with {}", shown.join(" ")),
    );
}

/// Whether a variable has another value here than `theirs`. Empty is unset, and a home that is not set is the user's.
fn differs(name: &str, theirs: Option<&String>) -> bool {
    let meant = |value: Option<&String>| {
        let value = value.filter(|value| !value.is_empty()).map(PathBuf::from);
        value.or_else(|| registries::home().filter(|_| name == "HOME"))
    };
    meant(std::env::var(name).ok().as_ref()) != meant(theirs)
}
