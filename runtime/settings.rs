//! Settings of a daemon. Whoever starts one passes them on by its environment.

use std::time::Duration;

use crate::units::{Rate, Timeout};

const HYDRATE_LIMIT: &str = "LAZYRUN_HYDRATE_LIMIT";
const FAULT_TIMEOUT: &str = "LAZYRUN_FAULT_TIMEOUT";

/// What can be said to a daemon when it starts; one that runs keeps its own.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Settings {
    /// Most bytes per second for hydration, such as 50MiB/s; for the daemon, if this command starts it [default: none]
    #[arg(long, global = true, env = HYDRATE_LIMIT, value_name = "RATE")]
    pub hydrate_limit: Option<Rate>,
    /// How long a read of bytes that are not local may wait before it fails, such as 30s; for the daemon, if this
    /// command starts it [default: 30s]
    #[arg(long, global = true, env = FAULT_TIMEOUT, value_name = "TIME")]
    pub fault_timeout: Option<Timeout>,
}

impl Settings {
    /// The bound of a fault, if one is set.
    pub fn fault_timeout(&self) -> Option<Duration> {
        self.fault_timeout.map(|timeout| timeout.0)
    }

    /// The environment that says the same.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let limit = self.hydrate_limit.map(|rate| (HYDRATE_LIMIT, rate.to_string()));
        let timeout = self.fault_timeout.map(|timeout| (FAULT_TIMEOUT, timeout.to_string()));
        limit.into_iter().chain(timeout).collect()
    }
}
