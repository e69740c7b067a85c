//! Runs a command and takes its times: to the first byte of output and to its end.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use thiserror::Error;

/// How much of a failed command's error output is told.
const TAIL: u64 = 4096;

/// Why there is no measurement.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// The command could not be started, or its output not be read.
    #[error("cannot run `{command}`: {source}")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// It ended with an error.
    #[error("`{command}` ended with {status}: {stderr}")]
    Failed {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// The end of its error output.
        stderr: String,
    },
    /// It ended well but wrote nothing, so there is no time to first output.
    #[error("`{command}` wrote nothing to its standard output: a bench needs a command that prints")]
    Silent {
        /// The command line.
        command: String,
    },
}

/// How long a command took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Until the first byte on standard output; `None` when it wrote nothing.
    pub first_output: Option<Duration>,
    /// Until it had ended.
    pub total: Duration,
}

impl Timing {
    /// Time to first output, or an error that names the command.
    ///
    /// # Errors
    /// When the command wrote nothing.
    pub fn require_output(&self, command: &Command) -> Result<Duration, MeasureError> {
        self.first_output.ok_or_else(|| MeasureError::Silent { command: words(command) })
    }
}

/// Runs a command to its end and measures it. Its standard input is empty.
///
/// # Errors
/// When it cannot be started or does not exit with 0.
pub fn timed(command: &mut Command) -> Result<Timing, MeasureError> {
    let (timing, _) = run(command)?;
    Ok(timing)
}

/// Runs a command to its end and returns what it wrote.
///
/// # Errors
/// As [`timed`].
pub fn output(command: &mut Command) -> Result<Vec<u8>, MeasureError> {
    let (_, output) = run(command)?;
    Ok(output)
}

fn run(command: &mut Command) -> Result<(Timing, Vec<u8>), MeasureError> {
    let name = words(command);
    let failed = |source| MeasureError::Start { command: name.clone(), source };
    // A file, not a pipe: a daemon that the command leaves behind may hold it open, and nobody must wait for it.
    let mut stderr = tempfile::tempfile().map_err(failed)?;
    let for_child = stderr.try_clone().map_err(failed)?;
    let start = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(for_child).spawn().map_err(failed)?;
    let mut output = Vec::new();
    let mut first_output = None;
    if let Some(mut stdout) = child.stdout.take() {
        let mut buffer = [0; 64 * 1024];
        loop {
            let len = stdout.read(&mut buffer).map_err(failed)?;
            if len == 0 {
                break;
            }
            first_output.get_or_insert_with(|| start.elapsed());
            output.extend_from_slice(&buffer[..len]);
        }
    }
    let status = child.wait().map_err(failed)?;
    let timing = Timing { first_output, total: start.elapsed() };
    if status.success() {
        return Ok((timing, output));
    }
    let stderr = tail(&mut stderr).unwrap_or_default();
    Err(MeasureError::Failed { command: name, status: status.to_string(), stderr: stderr.trim().to_owned() })
}

fn tail(file: &mut fs::File) -> io::Result<String> {
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn words(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(command.get_args().map(std::ffi::OsStr::to_string_lossy));
    words.join(" ")
}

/// Writes dirty pages back and empties the kernel's page, inode and dentry caches.
///
/// # Errors
/// When the caller may not (it needs root of the machine).
pub fn drop_page_cache() -> io::Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// The median of a list; of an even number the mean of the middle two. `None` for an empty list.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_output_comes_before_the_end() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first; sleep 0.2; echo second"]);
        let timing = timed(&mut command).unwrap();
        let first = timing.first_output.unwrap();
        assert!(first + Duration::from_millis(150) < timing.total, "{timing:?}");
    }

    #[test]
    fn failures_carry_the_error_output() {
        let error = timed(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("broken") && text.contains('3'), "{text}");
    }

    #[test]
    fn silence_is_an_error_where_output_is_needed() {
        let mut command = Command::new("true");
        let timing = timed(&mut command).unwrap();
        assert!(matches!(timing.require_output(&command), Err(MeasureError::Silent { .. })));
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
