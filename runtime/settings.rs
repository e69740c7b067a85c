//! Settings of a daemon. Whoever starts one passes them on by its environment.

use std::time::Duration;

use lazyrun_fetcher::FetchOptions;

use crate::daemon::page_cache::PageCache;
use crate::logs::Format;
use crate::units::{Rate, Timeout};

const HYDRATE_LIMIT: &str = "LAZYRUN_HYDRATE_LIMIT";
const FAULT_TIMEOUT: &str = "LAZYRUN_FAULT_TIMEOUT";
const METRICS_ADDRESS: &str = "LAZYRUN_METRICS_ADDRESS";
const FUSE_RESEND: &str = "LAZYRUN_FUSE_RESEND";
const PAGE_CACHE: &str = "LAZYRUN_PAGE_CACHE";
const LOG: &str = "LAZYRUN_LOG";
const LOG_FORMAT: &str = "LAZYRUN_LOG_FORMAT";

/// What can be said to a daemon when it starts; one that runs keeps its own.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// Most bytes per second for hydration, such as 50MiB/s; for the daemon, if this command starts it [default: none]
    #[arg(long, global = true, env = HYDRATE_LIMIT, value_name = "RATE")]
    pub hydrate_limit: Option<Rate>,
    /// How long a read of bytes that are not local may wait before it fails, such as 30s; for the daemon, if this
    /// command starts it [default: 30s]
    #[arg(long, global = true, env = FAULT_TIMEOUT, value_name = "TIME")]
    pub fault_timeout: Option<Timeout>,
    /// Serve Prometheus metrics at this address, IP:PORT or unix:PATH; for the daemon, if this command starts it
    #[arg(long, global = true, env = METRICS_ADDRESS, value_name = "ADDRESS")]
    pub metrics_address: Option<String>,
    /// Whether the kernel is relied on to hand out again what a dead daemon did not answer, where it can. Without it
    /// every request is kept in a journal, as on kernels before 6.9
    #[arg(long, global = true, hide = true, env = FUSE_RESEND, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub fuse_resend: bool,
    /// How layer files use the kernel's page cache, beside the files of an image that are read from them; for the
    /// daemon, if this command starts it
    #[arg(long, global = true, env = PAGE_CACHE, value_enum, default_value_t, value_name = "MODE")]
    pub page_cache: PageCache,
    /// What the daemon logs: error, warn, info, debug, trace, or directives such as lazyrun_fetcher=debug; if this
    /// command starts it [default: info]
    #[arg(long, global = true, env = LOG, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How lines of the daemon's log look, if this command starts it
    #[arg(long, global = true, env = LOG_FORMAT, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: Format,
}

impl Settings {
    /// The bound of a fault.
    pub fn fault_timeout(&self) -> Duration {
        self.fault_timeout.map_or_else(|| FetchOptions::default().fault_timeout, |timeout| timeout.0)
    }

    /// The environment that says the same.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let limit = self.hydrate_limit.map(|rate| (HYDRATE_LIMIT, rate.to_string()));
        let timeout = self.fault_timeout.map(|timeout| (FAULT_TIMEOUT, timeout.to_string()));
        let metrics = self.metrics_address.clone().map(|address| (METRICS_ADDRESS, address));
        let level = self.log_level.clone().map(|level| (LOG, level));
        let resend = (FUSE_RESEND, self.fuse_resend.to_string());
        let format = (LOG_FORMAT, self.log_format.name().to_owned());
        let cache = (PAGE_CACHE, self.page_cache.name().to_owned());
        limit.into_iter().chain(timeout).chain(metrics).chain(level).chain([resend, format, cache]).collect()
    }
}
