//! What the daemon tells a shim (shim.json), what the shim reports back, what it leaves behind (exit.json).

use super::error::{Attempt, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Everything a shim needs to know; written by the daemon to a file named on the shim's command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShimConfig {
    /// The container's id.
    pub id: String,
    /// The container's directory: the OCI bundle (`config.json`), `rootfs/`, and where `exit.json` goes.
    pub dir: PathBuf,
    /// Path of the socket to serve attach, exec, kill and state on (at most 107 bytes).
    pub socket: PathBuf,
    /// The container has a terminal. Must agree with `process.terminal` of the spec.
    #[serde(default)]
    pub terminal: bool,
    /// Keep standard input open for attached clients; otherwise it is `/dev/null`.
    #[serde(default)]
    pub open_stdin: bool,
    /// Start the command only once a client has attached. That client is the foreground one: the container
    /// waits for it when it reads slowly, and its end of input or leaving closes standard input.
    #[serde(default)]
    pub wait_attach: bool,
    /// Signal that asks the container to stop, by name (`SIGTERM`, `TERM`) or number. Kept for whoever stops the
    /// container; the shim itself sends only what it is told to.
    #[serde(default)]
    pub stop_signal: Option<String>,
    /// Path of the json-file log, or none.
    #[serde(default)]
    pub log: Option<PathBuf>,
    /// An OCI runtime (runc, crun) to use in place of the built-in runner.
    #[serde(default)]
    pub runtime: Option<PathBuf>,
    /// Number of the inherited descriptor of the detached root mount; none: `dir/rootfs` is used as it is.
    #[serde(default)]
    pub rootfs_fd: Option<i32>,
    /// Number of the inherited descriptor of the network namespace to use; none: as the spec says.
    #[serde(default)]
    pub netns_fd: Option<i32>,
    /// Number of the inherited write end of the status pipe.
    #[serde(default)]
    pub status_fd: Option<i32>,
    /// The container's cgroup, from the root of each hierarchy (`/lazyrun/<id>`); none: no cgroup.
    #[serde(default)]
    pub cgroup: Option<String>,
}

impl ShimConfig {
    /// Reads a shim.json.
    ///
    /// # Errors
    /// The file cannot be read or is not valid.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).attempt(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes).attempt(|| format!("understand {}", path.display()))
    }
}

/// The one line a shim writes to its status pipe.
///
/// With `wait_attach` the line comes when everything is prepared and the command waits for its client;
/// otherwise when the command has been executed.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub enum StatusLine {
    /// The container's first process exists.
    Started {
        /// Its pid as the host sees it.
        pid: i32,
    },
    /// It could not be started.
    Failed {
        /// One sentence.
        error: String,
        /// 125, 126 or 127.
        code: u8,
    },
}

/// How a container ended; `exit.json` in its directory.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct ExitRecord {
    /// The command's exit code, 128 + n when signal n killed it, 125/126/127 when it never ran.
    pub exit_code: i32,
    /// When, RFC 3339 in UTC.
    pub exited_at: String,
    /// The kernel's out-of-memory killer struck inside the container.
    pub oom_killed: bool,
    /// Why it never ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl ExitRecord {
    /// Reads `exit.json` of a container's directory; `None` when the container has not ended.
    ///
    /// # Errors
    /// The file exists but cannot be read or understood.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("exit.json");
        match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => {
                let bytes = read.attempt(|| format!("read {}", path.display()))?;
                serde_json::from_slice(&bytes).map(Some).attempt(|| format!("understand {}", path.display()))
            }
        }
    }

    /// Writes `exit.json` so that a reader sees all of it or nothing. Not synced: after a power cut the
    /// container is gone anyway.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn store(&self, dir: &Path) -> Result<()> {
        let (path, temp) = (dir.join("exit.json"), dir.join(".exit.json.new"));
        let json = serde_json::to_vec(self).attempt(|| "encode the exit record")?;
        std::fs::write(&temp, json)
            .and_then(|()| std::fs::rename(&temp, &path))
            .attempt(|| format!("write {}", path.display()))
    }
}
