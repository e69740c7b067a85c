//! What the user asks of the daemon: on the command line of `lazyrun daemon`, or in the environment of whichever command
//! starts it. The keeper hands it on in the environment.

use std::process::Command;

use clap::Args;

use crate::logs::Format;

/// Settings of the daemon.
#[derive(Debug, Clone, Default, Args)]
pub struct DaemonSettings {
    /// Serve Prometheus metrics at this address: IP:PORT or unix:PATH
    #[arg(long, env = "LAZYRUN_METRICS_ADDRESS", value_name = "ADDRESS")]
    pub metrics_address: Option<String>,
    /// What is logged: error, warn, info, debug, trace, or directives such as lazyrun_fetcher=debug
    #[arg(long, env = "LAZYRUN_LOG", value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How log lines look
    #[arg(long, env = "LAZYRUN_LOG_FORMAT", value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: Format,
}

impl DaemonSettings {
    /// Hands these settings to a child.
    pub fn apply(&self, command: &mut Command) {
        for (name, value) in
            [("LAZYRUN_METRICS_ADDRESS", &self.metrics_address), ("LAZYRUN_LOG", &self.log_level)]
        {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("LAZYRUN_LOG_FORMAT", self.log_format.name());
    }
}
