//! What can be typed about measurements.

use std::path::PathBuf;

use clap::Args;

/// `lazyrun demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Bandwidth of the registry in Mbit/s; 0 for all there is
    #[arg(long, default_value_t = 200.0)]
    pub mbit: f64,
    /// Round-trip time to the registry in milliseconds
    #[arg(long, default_value_t = 20.0)]
    pub rtt_ms: f64,
    /// Rounds; the table shows medians
    #[arg(long, default_value_t = 1)]
    pub rounds: usize,
    /// Compressed size the image should have at least, in MiB, if the machine has so many files
    #[arg(long, default_value_t = 210, value_name = "MIB")]
    pub size_mb: u64,
    /// Directory that keeps the image for the next time [default: lazyrun-demo in the temporary directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Network of the containers: bridge, host or none
    #[arg(long, visible_alias = "net", value_name = "MODE")]
    pub network: Option<String>,
    /// `json`
    #[arg(long)]
    pub format: Option<String>,
}

/// `lazyrun bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Rounds; the table shows medians
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Network of the containers: bridge, host or none
    #[arg(long, visible_alias = "net", value_name = "MODE")]
    pub network: Option<String>,
    /// `json`
    #[arg(long)]
    pub format: Option<String>,
    /// Reference of the image
    pub image: String,
    /// Command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}
