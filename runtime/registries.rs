//! Where this machine keeps what is to be known of registries: credentials, mirrors, certificates, proxies. The libraries
//! read no environment; this does.

use std::path::{Path, PathBuf};

use lazyrun_fetcher::{FetchError, HostFiles, ProviderFiles, Proxies, Reference, RegistryClient};

/// Directories with a directory for each registry that count for everybody.
const HOSTS_DIRS: [&str; 4] =
    ["/etc/lazyrun/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d", "/etc/containers/certs.d"];
/// The same below a user's configuration directory, when it is not root who asks.
const USER_HOSTS_DIRS: [&str; 4] =
    ["lazyrun/certs.d", "containerd/certs.d", "docker/certs.d", "containers/certs.d"];

/// Files that say how registries are talked to. `hosts_dirs`, if not empty, or `LAZYRUN_HOSTS_DIR` (separated by colons)
/// take the place of the usual directories.
pub fn host_files(hosts_dirs: &[PathBuf]) -> HostFiles {
    let user = (!nix::unistd::geteuid().is_root()).then(config_home).flatten();
    let below = |names: &[&str]| -> Vec<PathBuf> {
        user.iter().flat_map(|home| names.iter().map(|name| home.join(name))).collect()
    };
    let hosts_dirs = if hosts_dirs.is_empty() {
        match set("LAZYRUN_HOSTS_DIR") {
            Some(dirs) => std::env::split_paths(&dirs).filter(|dir| !dir.as_os_str().is_empty()).collect(),
            None => below(&USER_HOSTS_DIRS).into_iter().chain(HOSTS_DIRS.map(PathBuf::from)).collect(),
        }
    } else {
        hosts_dirs.to_vec()
    };
    let registries_conf = match set("CONTAINERS_REGISTRIES_CONF") {
        Some(one) => vec![one],
        None => {
            let own = below(&["containers/registries.conf"]);
            own.into_iter().chain([PathBuf::from("/etc/containers/registries.conf")]).collect()
        }
    };
    let drop_ins = below(&["containers/registries.conf.d"]);
    let registries_conf_dirs =
        [PathBuf::from("/etc/containers/registries.conf.d")].into_iter().chain(drop_ins).collect();
    // The daemon has another working directory.
    let absolute = |paths: Vec<PathBuf>| -> Vec<PathBuf> {
        paths.into_iter().map(|path| std::path::absolute(&path).unwrap_or(path)).collect()
    };
    HostFiles {
        hosts_dirs: absolute(hosts_dirs),
        registries_conf: absolute(registries_conf),
        registries_conf_dirs,
    }
}

/// The file that a login is written to, and the first to look into: `REGISTRY_AUTH_FILE`, or docker's `config.json`.
pub fn login_file() -> Option<PathBuf> {
    let file = set("REGISTRY_AUTH_FILE").or_else(docker_config)?;
    Some(std::path::absolute(&file).unwrap_or(file))
}

/// Further files with credentials, in the order in which they are looked into.
pub fn more_credential_files() -> Vec<PathBuf> {
    let first = login_file();
    let uid = nix::unistd::geteuid();
    let runtime = set("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
    let run = Path::new("/run/containers").join(uid.to_string()).join("auth.json");
    let config = config_home().map(|home| home.join("containers/auth.json"));
    let all = [docker_config(), runtime, Some(run), config];
    let mut files: Vec<PathBuf> = Vec::new();
    for file in all.into_iter().flatten() {
        if first.as_ref() != Some(&file) && !files.contains(&file) {
            files.push(file);
        }
    }
    files
}

/// The kubelet's credential providers, wherever the daemon works.
pub fn provider_files(config: &Path, bin_dir: &Path) -> ProviderFiles {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    ProviderFiles { config: absolute(config), bin_dir: absolute(bin_dir) }
}

/// The proxies of this process's environment.
pub fn proxies() -> Proxies {
    let any = |names: [&str; 2]| {
        names.into_iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    };
    // Often one for SOCKS, which is not spoken here and which Docker does not look at either.
    let http = |url: &String| !url.contains("://") || url.starts_with("http");
    let all = || any(["ALL_PROXY", "all_proxy"]).filter(http);
    Proxies {
        http: any(["HTTP_PROXY", "http_proxy"]).or_else(all),
        https: any(["HTTPS_PROXY", "https_proxy"]).or_else(all),
        no_proxy: any(["NO_PROXY", "no_proxy"]),
    }
}

/// Adds to an error about a name without a registry that `registries.conf` would have it mean others too.
pub async fn with_hint(
    error: FetchError,
    client: &RegistryClient,
    reference: &Reference,
    typed: &str,
) -> anyhow::Error {
    let names_it = typed.starts_with(&format!("{}/", reference.registry));
    match client.short_names(reference).await {
        Ok(Some((names, file))) if !names_it => anyhow::anyhow!(
            "{error}; {} lets a name without a registry mean {}, but here it always means docker.io: name the registry",
            file.display(),
            names.join(", ")
        ),
        _ => error.into(),
    }
}

fn docker_config() -> Option<PathBuf> {
    let dir = set("DOCKER_CONFIG").or_else(|| Some(home()?.join(".docker")))?;
    Some(dir.join("config.json"))
}

fn config_home() -> Option<PathBuf> {
    set("XDG_CONFIG_HOME").or_else(|| Some(home()?.join(".config")))
}

/// The user's home. systemd gives no `HOME` to the services of root.
pub(crate) fn home() -> Option<PathBuf> {
    set("HOME").or_else(|| Some(nix::unistd::User::from_uid(nix::unistd::geteuid()).ok()??.dir))
}

fn set(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
