//! The OCI runtime spec of a container, from its image's configuration and the options of `run`, with docker's
//! defaults. What comes out is plain OCI: any runtime can run it.

pub(crate) mod defaults;
mod mounts;
mod options;
mod seccomp_profile;
pub mod user;

pub use options::{Network, RunOptions, Ulimit, Volume};

use super::error::{ContainerError, Result};
use oci_spec::image::{Config, ImageConfiguration};
use oci_spec::runtime::Spec;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Files and names that belong to one container.
#[derive(Clone, Debug, Default)]
pub struct BundlePaths {
    /// The root, absolute or relative to the bundle; usually `rootfs`.
    pub rootfs: PathBuf,
    /// File to bind over /etc/hostname.
    pub hostname: Option<PathBuf>,
    /// File to bind over /etc/hosts.
    pub hosts: Option<PathBuf>,
    /// File to bind over /etc/resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// The container's cgroup (`/lazyrun/<id>`).
    pub cgroup: Option<String>,
}

/// What is executed in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The program and its arguments; there is at least the program.
    pub args: Vec<String>,
    /// The environment, as `NAME=value`.
    pub env: Vec<String>,
    /// The absolute working directory.
    pub workdir: String,
}

impl Command {
    /// What image and options say together.
    ///
    /// # Errors
    /// Neither of them names a command, or the working directory that the options ask for is not absolute.
    pub fn of(image: &ImageConfiguration, run: &RunOptions, hostname: Option<&str>) -> Result<Command> {
        let none = Config::default();
        let config = image.config().as_ref().unwrap_or(&none);
        Ok(Command {
            args: arguments(config, run)?,
            env: environment(config, run, hostname),
            workdir: workdir(config, run)?,
        })
    }
}

/// Makes the spec.
///
/// The user stays a name in the annotation [`user::USER_ANNOTATION`]: only the shim sees the root it must be
/// looked up in, and replaces the annotation by ids (and HOME) in `config.json` before anything runs.
///
/// # Errors
/// Neither image nor options name a command; an option is not valid.
pub fn generate(image: &ImageConfiguration, run: &RunOptions, paths: &BundlePaths) -> Result<Spec> {
    let none = Config::default();
    let config = image.config().as_ref().unwrap_or(&none);
    let capabilities = defaults::capabilities(&run.cap_add, &run.cap_drop, run.privileged)?;
    let hostname = run.hostname.clone();
    let Command { args, env, workdir } = Command::of(image, run, hostname.as_deref())?;
    let mut process = json!({
        "terminal": run.tty,
        "user": {"uid": 0, "gid": 0, "additionalGids": run.group_add},
        "args": args,
        "env": env,
        "cwd": workdir,
        "noNewPrivileges": run.no_new_privileges,
        "oomScoreAdj": run.oom_score_adj.unwrap_or(0),
    });
    if !run.ulimits.is_empty() {
        process["rlimits"] = rlimits(run);
    }
    let mut linux = linux(run, paths)?;
    if let Some(path) = &paths.cgroup {
        linux["cgroupsPath"] = json!(path);
    }
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": paths.rootfs, "readonly": run.read_only},
        "process": process,
        "mounts": mounts::mounts(run, paths)?,
        "linux": linux,
        "annotations": annotations(config, run),
    });
    if let Some(hostname) = hostname {
        check_hostname(&hostname)?;
        spec["hostname"] = json!(hostname);
    }
    let mut spec: Spec = serde_json::from_value(spec)
        .map_err(|e| ContainerError::Invalid(format!("the options do not make a valid spec: {e}")))?;
    if let Some(process) = spec.process_mut() {
        process.set_capabilities(Some(defaults::capability_sets(&capabilities)?));
    }
    if !(run.privileged || run.seccomp_unconfined)
        && let Some(linux) = spec.linux_mut()
    {
        linux.set_seccomp(seccomp_profile::profile(&capabilities));
    }
    Ok(spec)
}

/// Entrypoint and arguments, combined as docker does.
fn arguments(config: &Config, run: &RunOptions) -> Result<Vec<String>> {
    let image_entrypoint = config.entrypoint().clone().unwrap_or_default();
    let image_cmd = config.cmd().clone().unwrap_or_default();
    let (mut command, default_args) = match &run.entrypoint {
        // Another entrypoint has nothing to do with the image's arguments.
        Some(entrypoint) => (entrypoint.iter().filter(|e| !e.is_empty()).cloned().collect(), Vec::new()),
        None => (image_entrypoint, image_cmd),
    };
    command.extend(if run.args.is_empty() { default_args } else { run.args.clone() });
    if command.is_empty() {
        return Err(ContainerError::invalid("no command was given and the image has none"));
    }
    Ok(command)
}

fn environment(config: &Config, run: &RunOptions, hostname: Option<&str>) -> Vec<String> {
    let mut env = vec![defaults::PATH.to_owned()];
    if let Some(name) = hostname {
        env.push(format!("HOSTNAME={name}"));
    }
    if run.tty {
        env.push("TERM=xterm".to_owned());
    }
    for pair in config.env().iter().flatten().chain(&run.env) {
        defaults::set_env(&mut env, pair);
    }
    env
}

fn workdir(config: &Config, run: &RunOptions) -> Result<String> {
    let dir = run.workdir.as_ref().or(config.working_dir().as_ref()).filter(|d| !d.is_empty());
    let dir = dir.map_or("/", String::as_str);
    if dir.starts_with('/') {
        return Ok(dir.to_owned());
    }
    if run.workdir.is_some() {
        return Err(ContainerError::Invalid(format!("the working directory \"{dir}\" is not absolute")));
    }
    // Images with a relative one exist; docker counts it from the root.
    Ok(format!("/{dir}"))
}

fn check_hostname(name: &str) -> Result<()> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if name.is_empty() || name.len() > 63 || !name.bytes().all(fine) {
        return Err(ContainerError::Invalid(format!("\"{name}\" is not a valid hostname")));
    }
    Ok(())
}

fn rlimits(run: &RunOptions) -> Value {
    let name = |n: &str| {
        let upper = n.to_ascii_uppercase();
        if upper.starts_with("RLIMIT_") { upper } else { format!("RLIMIT_{upper}") }
    };
    run.ulimits.iter().map(|u| json!({"type": name(&u.name), "soft": u.soft, "hard": u.hard})).collect()
}

fn annotations(config: &Config, run: &RunOptions) -> Map<String, Value> {
    let mut out = Map::new();
    let name = run.user.as_ref().or(config.user().as_ref()).cloned().unwrap_or_default();
    out.insert(user::USER_ANNOTATION.to_owned(), json!(name));
    if let Some(signal) = run.stop_signal.as_ref().or(config.stop_signal().as_ref()) {
        out.insert("org.opencontainers.image.stopSignal".to_owned(), json!(signal));
    }
    let mut join = |key: &str, list: &Option<Vec<String>>| {
        if let Some(list) = list.as_ref().filter(|l| !l.is_empty()) {
            out.insert(key.to_owned(), json!(list.join(",")));
        }
    };
    join("org.opencontainers.image.exposedPorts", config.exposed_ports());
    join("org.lazyrun.image.volumes", config.volumes());
    out
}

fn linux(run: &RunOptions, paths: &BundlePaths) -> Result<Value> {
    let mut namespaces = vec!["mount", "uts", "ipc"];
    if !run.host_pid {
        namespaces.push("pid");
    }
    if run.network != Network::Host {
        namespaces.push("network");
    }
    // Without groups of its own a cgroup namespace would only hide where the container really is.
    if paths.cgroup.is_some() {
        namespaces.push("cgroup");
    }
    if run.network == Network::Host && run.hostname.is_none() {
        namespaces.retain(|n| *n != "uts");
    }
    let namespaces: Vec<Value> = namespaces.iter().map(|n| json!({"type": n})).collect();
    let (nodes, rules) = mounts::devices(run)?;
    let mut linux = json!({
        "namespaces": namespaces,
        "resources": resources(run, &rules)?,
        "devices": nodes,
    });
    if !run.sysctls.is_empty() {
        linux["sysctl"] = json!(run.sysctls);
    }
    if !run.privileged {
        linux["maskedPaths"] = json!(defaults::MASKED);
        linux["readonlyPaths"] = json!(defaults::READONLY);
    }
    Ok(linux)
}

/// The kernel's period for processor time, in microseconds.
const CPU_PERIOD: u64 = 100_000;
/// Less memory than this cannot even start a container.
const LEAST_MEMORY: i64 = 6 << 20;

fn resources(run: &RunOptions, devices: &[Value]) -> Result<Value> {
    let mut out = json!({"devices": devices});
    if let Some(limit) = run.memory.filter(|m| *m != 0) {
        if limit < LEAST_MEMORY {
            return Err(ContainerError::invalid("the memory limit must be at least 6 MiB"));
        }
        let swap = run.memory_swap.unwrap_or_else(|| limit.saturating_mul(2));
        if swap >= 0 && swap < limit {
            return Err(ContainerError::invalid(
                "the limit of memory and swap cannot be below the memory limit",
            ));
        }
        out["memory"] = json!({"limit": limit, "swap": swap});
    }
    let mut cpu = Map::new();
    if let Some(cpus) = run.cpus {
        if !cpus.is_finite() || !(0.01..=100_000.0).contains(&cpus) {
            return Err(ContainerError::Invalid(format!("{cpus} processors cannot be allotted")));
        }
        cpu.insert("period".to_owned(), json!(CPU_PERIOD));
        cpu.insert("quota".to_owned(), json!((cpus * CPU_PERIOD as f64).round() as i64));
    }
    if let Some(shares) = run.cpu_shares {
        cpu.insert("shares".to_owned(), json!(shares));
    }
    if let Some(cpus) = &run.cpuset_cpus {
        cpu.insert("cpus".to_owned(), json!(cpus));
    }
    if !cpu.is_empty() {
        out["cpu"] = Value::Object(cpu);
    }
    if let Some(limit) = run.pids_limit {
        out["pids"] = json!({"limit": if limit > 0 { limit } else { -1 }});
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
