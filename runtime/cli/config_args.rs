//! What can be typed about configuration and shells.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::preflight;

/// `lazyrun config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check whether this node is set up to use lazyrun as containerd's snapshotter; exits with 1 on errors
    ///
    /// Give it the same --root, --hosts-dir, --insecure-registry and --image-credential-provider-config and -bin-dir as the
    /// snapshotter; /etc/default/lazyrun is not read.
    Check(CheckArgs),
}

/// `lazyrun config check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// `json`, `table`, or a template such as '{{.level}} {{.what}}'
    #[arg(long)]
    pub format: Option<String>,
    /// containerd's configuration; what it imports is read too
    #[arg(long, value_name = "FILE", default_value = preflight::CONTAINERD_CONFIG)]
    pub containerd_config: PathBuf,
    /// Unix socket of containerd [default: as its configuration says]
    #[arg(long, env = "CONTAINERD_ADDRESS", value_name = "SOCKET")]
    pub containerd_address: Option<PathBuf>,
    /// Unix socket of the snapshotter [default: as systemd's socket unit says, or /run/lazyrun/snapshotter.sock]
    #[arg(long, value_name = "SOCKET")]
    pub address: Option<PathBuf>,
    /// Also tell which hosts would be asked for this image, and with which credentials; can be given several times
    #[arg(long, value_name = "REFERENCE")]
    pub image: Vec<String>,
}

/// Shells that can complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU bash
    Bash,
    /// Z shell
    Zsh,
    /// Friendly interactive shell
    Fish,
}
