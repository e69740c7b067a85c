//! A separate lazyrun instance that exists for one measurement: a root directory of its own, driven through the
//! command line as a user would, reset when dropped.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::BenchError;
use super::measure::{MeasureError, output, timed};

/// One instance below a temporary root directory.
pub struct Instance {
    exe: PathBuf,
    insecure: Vec<String>,
    hosts_dirs: Vec<PathBuf>,
    root: TempDir,
}

impl Instance {
    /// A fresh instance whose root is made below `parent` (the temporary directory when `None`). Nothing is
    /// started yet.
    ///
    /// # Errors
    /// When no directory can be made.
    pub fn fresh(exe: &Path, parent: Option<&Path>, insecure: &[String]) -> Result<Instance, BenchError> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("lazyrun-bench-");
        let root = match parent {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        };
        let root = root.map_err(|source| BenchError::Root { source })?;
        Ok(Instance { exe: exe.to_owned(), insecure: insecure.to_vec(), hosts_dirs: Vec::new(), root })
    }

    /// The same with directories of registries' settings (`--hosts-dir`).
    #[must_use]
    pub fn with_hosts_dirs(mut self, dirs: &[PathBuf]) -> Instance {
        self.hosts_dirs = dirs.to_vec();
        self
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// A command of this instance; the subcommand and its arguments are the caller's.
    pub fn command<I, S>(&self, args: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(&self.exe);
        command.arg("--root").arg(self.root.path().join("root"));
        for host in &self.insecure {
            command.arg("--insecure-registry").arg(host);
        }
        for dir in &self.hosts_dirs {
            command.arg("--hosts-dir").arg(dir);
        }
        command.args(args);
        command
    }

    /// Runs a command of this instance to its end.
    ///
    /// # Errors
    /// When it does not exit with 0.
    pub fn run<const N: usize>(&self, args: [&str; N]) -> Result<(), MeasureError> {
        timed(&mut self.command(args)).map(|_| ())
    }

    /// What `lazyrun info --format json` says.
    ///
    /// # Errors
    /// When the command fails or prints no JSON.
    pub fn info(&self) -> Result<Value, BenchError> {
        let bytes = output(&mut self.command(["info", "--format", "json"]))?;
        serde_json::from_slice(&bytes).map_err(|source| BenchError::Info { source })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Whatever state the instance is in; a failure here must not hide the one that led to the drop.
        let _ = self
            .command(["system", "reset", "--force"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}
