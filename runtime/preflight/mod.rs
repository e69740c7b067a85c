//! `lazyrun config check`: whether a node is set up to use lazyrun as containerd's snapshotter. What the kernel and the
//! machine can do is `lazyrun doctor`'s to say.
//!
//! Nothing is changed and nothing started, but for a socket that systemd listens at: asking there starts the snapshotter,
//! as containerd's own first request would.

mod containerd_config;
mod cri;
mod diff;
mod glob;
mod image;
mod propagation;
mod proxy;
mod registries;
mod socket;
mod version;

use std::fmt;
use std::path::{Path, PathBuf};

use lazyrun_fetcher::HostReport;
use serde::Serialize;

pub use containerd_config::{ConfigError, ContainerdConfig};
pub use version::Version;

use crate::ipc::protocol::RegistryOptions;

/// Where containerd's configuration is unless it was told.
pub const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";

/// How a part of the configuration was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but perhaps not as it was meant; or it could not be seen.
    Warning,
    /// It does not work.
    Error,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// How it was found to be.
    pub level: Level,
    /// What was looked at.
    pub what: String,
    /// What was found, and what follows from it.
    pub why: String,
    /// What to do; empty if nothing.
    pub todo: String,
}

/// The rows as they are found.
#[derive(Debug, Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn add(&mut self, level: Level, what: &str, why: impl Into<String>, todo: impl Into<String>) {
        self.0.push(Row { level, what: what.to_owned(), why: why.into(), todo: todo.into() });
    }

    fn ok(&mut self, what: &str, why: impl Into<String>) {
        self.add(Level::Ok, what, why, "");
    }

    fn warning(&mut self, what: &str, why: impl Into<String>, todo: impl Into<String>) {
        self.add(Level::Warning, what, why, todo);
    }

    fn error(&mut self, what: &str, why: impl Into<String>, todo: impl Into<String>) {
        self.add(Level::Error, what, why, todo);
    }
}

/// What is to be checked.
#[derive(Debug, Clone)]
pub struct Options {
    /// containerd's configuration.
    pub containerd_config: PathBuf,
    /// containerd's socket; none: the one its configuration names.
    pub containerd_address: Option<PathBuf>,
    /// Where the snapshotter listens; none: where its socket unit says, or the usual place.
    pub address: Option<PathBuf>,
    /// lazyrun's root directory.
    pub root: PathBuf,
    /// The daemon of this root, if it runs.
    pub daemon: Option<u32>,
    /// How registries are talked to.
    pub registry: RegistryOptions,
}

/// Looks at everything but images.
pub async fn check(options: &Options) -> Vec<Row> {
    let mut rows = Rows::default();
    let unit = socket::unit(&socket::UNIT_DIRS.map(PathBuf::from));
    let address = socket::expected(options.address.as_deref(), unit.as_ref());
    let config = read_config(&options.containerd_config, &mut rows);
    let containerd = options
        .containerd_address
        .clone()
        .or_else(|| config.as_ref().and_then(ContainerdConfig::socket))
        .unwrap_or_else(|| crate::containerd::DEFAULT_ADDRESS.into());
    let running = version::ask(&containerd, &mut rows).await;
    if let Some(config) = &config {
        check_config(config, running, &address, &options.root, &mut rows);
        registries::check_config_path(config, &options.registry.hosts, &mut rows);
    }
    socket::check(&address, unit.as_ref(), &mut rows).await;
    propagation::check(&containerd, options.daemon, &options.root, &mut rows);
    registries::check(&options.registry, &mut rows);
    registries::check_environment(options.daemon, &mut rows);
    rows.0
}

/// The rows of the hosts that would be asked for an image.
pub fn check_image(image: &str, hosts: Result<Vec<HostReport>, String>) -> Vec<Row> {
    let mut rows = Rows::default();
    image::check(image, hosts, &mut rows);
    rows.0
}

fn read_config(path: &Path, rows: &mut Rows) -> Option<ContainerdConfig> {
    let what = "containerd's configuration";
    match ContainerdConfig::load(path) {
        Ok(config) => {
            config.check(rows);
            Some(config)
        }
        Err(error @ ConfigError::Missing { .. }) => {
            rows.error(
                what,
                error.to_string(),
                format!(
                    "write {} as docs/OPERATIONS.md shows, or name the file with --containerd-config",
                    path.display()
                ),
            );
            None
        }
        Err(error) => {
            rows.error(what, error.to_string(), "correct the file: containerd does not start with it either");
            None
        }
    }
}

/// What containerd's configuration says of lazyrun.
fn check_config(
    config: &ContainerdConfig,
    running: Option<Version>,
    address: &Path,
    root: &Path,
    rows: &mut Rows,
) {
    if config.version() >= 3 && running.is_some_and(|v| v < Version(2, 0, 0)) {
        rows.error(
            "containerd's configuration",
            format!("it is of version {}, which containerd before 2.0 refuses", config.version()),
            "write it as version 2 (docs/OPERATIONS.md, containerd 1.6 and 1.7)",
        );
    }
    let name = proxy::check(config, address, root, rows);
    diff::check(config, running, address, &name, rows);
    cri::check(config, running, &name, rows);
}

/// Whether a program is found where programs are looked for, or in a directory for the administrator's.
pub(crate) fn find_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(name).is_file())
}

#[cfg(test)]
mod tests;
