//! Which hosts are asked for a repository, in which order, and how each is talked to: containerd's `hosts.toml`,
//! Docker's certificate directories, `registries.conf`.
//!
//! The files are read when they are needed and again when they have changed. Nothing is known of where they are:
//! whoever makes the client says so ([`HostFiles`]).

mod certs;
mod check;
mod endpoint;
mod health;
mod hosts_toml;
mod plan;
mod registries_conf;
mod stamp;
mod toml_error;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use check::{CheckedFile, check_providers, check_settings};
pub(crate) use endpoint::{Endpoint, Need, Role, TlsSettings, is_loopback};
pub(crate) use health::{Health, Lack};
pub(crate) use plan::Hosts;
pub(crate) use stamp::read_small;

/// The files that say how registries are talked to. Those that are missing say nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostFiles {
    /// Directories with a directory for each registry, holding a `hosts.toml` as containerd's `certs.d` has them, or
    /// certificates as Docker's. The first one that has the registry (or `_default`) counts.
    pub hosts_dirs: Vec<PathBuf>,
    /// Places of `registries.conf`; the first one that exists counts.
    pub registries_conf: Vec<PathBuf>,
    /// Directories of drop-ins for it (`*.conf`), read in this order, each by name. What is read later replaces what
    /// came before for the same prefix.
    pub registries_conf_dirs: Vec<PathBuf>,
}

/// Most bytes of a configuration file or certificate that are read.
pub(crate) const MAX_FILE: u64 = 1 << 20;
