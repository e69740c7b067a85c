//! The shim: one small single-threaded process per container, parent of the container's first process.
//!
//! It outlives daemon and command line. It lives in a mount namespace of its own, where the container's root
//! is attached, so nothing of the container is ever in the host's mount table and everything is gone when
//! shim and container are. When the shim dies, the container's first process dies with it.

mod attach;
mod exec;
mod io;
mod log;
mod prepare;
mod reap;
mod requests;
mod run;
mod runtime;
mod start;

pub(crate) use log::Entry as LogEntry;
pub use reap::sweep;

use super::config::{ExitRecord, ShimConfig, StatusLine};
use super::error::{ContainerError, EXIT_RUNNER, Result};
use super::time::rfc3339;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

/// Entry point of the hidden `lazyrun shim --config FILE` command. Returns when the container has ended and
/// everything of it but its directory is gone.
pub fn main(config: &Path) -> ExitCode {
    let config = match ShimConfig::load(config) {
        Ok(config) => config,
        Err(error) => {
            // Without a configuration there is no status pipe to report on.
            let _ = writeln!(std::io::stderr(), "lazyrun shim: {error}");
            return ExitCode::from(EXIT_RUNNER);
        }
    };
    let mut status = Status::new(config.status_fd);
    match run::run(&config, &mut status) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            status.failed(&error);
            // The record tells a daemon that restarts what the status pipe told this one.
            let _ = record(&config.dir, i32::from(error.exit_code()), false, Some(error.to_string()));
            let _ = std::fs::remove_file(&config.socket);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes exit.json.
fn record(dir: &Path, exit_code: i32, oom_killed: bool, error: Option<String>) -> Result<()> {
    ExitRecord { exit_code, exited_at: rfc3339(SystemTime::now()), oom_killed, error }.store(dir)
}

/// The status pipe: one line, then closed.
struct Status(Option<std::fs::File>);

impl Status {
    fn new(fd: Option<i32>) -> Self {
        Self(fd.and_then(|fd| super::sys::adopt(fd).ok()).map(std::fs::File::from))
    }

    fn started(&mut self, pid: i32) {
        self.line(&StatusLine::Started { pid });
    }

    fn failed(&mut self, error: &ContainerError) {
        self.line(&StatusLine::Failed { error: error.to_string(), code: error.exit_code() });
    }

    fn line(&mut self, line: &StatusLine) {
        if let Some(mut pipe) = self.0.take() {
            let mut json = serde_json::to_vec(line).unwrap_or_default();
            json.push(b'\n');
            // The daemon may be gone; the container goes on without it.
            let _ = pipe.write_all(&json);
        }
    }
}
