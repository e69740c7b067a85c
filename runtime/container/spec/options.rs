//! What `run` was asked for, apart from the image.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The container's network, as far as its namespaces are concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The host's own.
    Host,
    /// A new namespace with nothing but loopback.
    #[default]
    None,
    /// A namespace that is handed to the shim as a descriptor.
    Netns,
}

/// One `-v` or `--mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub destination: PathBuf,
    /// `ro`, `rw`, propagation words and other mount options.
    #[serde(default)]
    pub options: Vec<String>,
}

/// One `--ulimit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// `nofile`, `RLIMIT_NOFILE`.
    pub name: String,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Everything about a container that does not come from its image. All fields have defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunOptions {
    /// Arguments; in place of the image's Cmd when not empty.
    pub args: Vec<String>,
    /// In place of the image's Entrypoint (which also drops its Cmd); `Some(vec![])` or `[""]` for none.
    pub entrypoint: Option<Vec<String>>,
    /// `NAME=value`, or a bare `NAME` to remove what the image sets.
    pub env: Vec<String>,
    /// In place of the image's WorkingDir.
    pub workdir: Option<String>,
    /// `name|uid[:name|gid]`, in place of the image's User.
    pub user: Option<String>,
    /// The hostname; with the host's network, the host's by default.
    pub hostname: Option<String>,
    /// Which network namespace.
    pub network: Network,
    /// With a terminal.
    pub tty: bool,
    /// Bind mounts.
    pub volumes: Vec<Volume>,
    /// tmpfs mounts: path and options (`size=64m`).
    pub tmpfs: Vec<(PathBuf, Vec<String>)>,
    /// Memory limit in bytes.
    pub memory: Option<i64>,
    /// Limit of memory and swap together in bytes, -1 for no limit; twice the memory limit by default.
    pub memory_swap: Option<i64>,
    /// Processors' worth of time.
    pub cpus: Option<f64>,
    /// Relative weight of processor time.
    pub cpu_shares: Option<u64>,
    /// Processors to run on (`0-2,4`).
    pub cpuset_cpus: Option<String>,
    /// Most processes and threads; 0 or less for no limit.
    pub pids_limit: Option<i64>,
    /// All capabilities, devices and paths; no seccomp.
    pub privileged: bool,
    /// The root is read-only.
    pub read_only: bool,
    /// Capabilities to add (`NET_ADMIN`, `ALL`).
    pub cap_add: Vec<String>,
    /// Capabilities to drop.
    pub cap_drop: Vec<String>,
    /// Nothing the container runs can gain privileges.
    pub no_new_privileges: bool,
    /// Without the default seccomp profile.
    pub seccomp_unconfined: bool,
    /// Size of /dev/shm in bytes; 64 MiB by default.
    pub shm_size: Option<u64>,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Namespaced kernel settings.
    pub sysctls: BTreeMap<String, String>,
    /// Host devices to show: path on the host, path in the container, access (`rwm`).
    pub devices: Vec<(PathBuf, PathBuf, String)>,
    /// -1000 to 1000; 0 by default.
    pub oom_score_adj: Option<i32>,
    /// Groups for the user beside its own, by id.
    pub group_add: Vec<u32>,
    /// In place of the image's StopSignal.
    pub stop_signal: Option<String>,
    /// The user sees the host's processes.
    pub host_pid: bool,
}
