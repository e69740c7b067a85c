//! What can be typed about registries.

use clap::{Args, Subcommand};

/// `lazyrun registry`
#[derive(Debug, Subcommand)]
pub enum RegistryCommand {
    /// Show which hosts would be asked for an image, in which order, how, and which file says so
    Show {
        /// `json`
        #[arg(long)]
        format: Option<String>,
        /// Reference of an image, or host and port of a registry
        #[arg(value_name = "REFERENCE|HOST")]
        name: String,
    },
}

/// `lazyrun login`
#[derive(Debug, Args)]
pub struct LoginArgs {
    /// User name; asked for when it is not given
    #[arg(short, long, value_name = "USER")]
    pub username: Option<String>,
    /// Password; better to be given by --password-stdin, since others may see a command line
    #[arg(short, long, value_name = "PASSWORD", conflicts_with = "password_stdin")]
    pub password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    pub password_stdin: bool,
    /// Host and port of the registry
    #[arg(default_value = "docker.io", value_name = "REGISTRY")]
    pub registry: String,
}
