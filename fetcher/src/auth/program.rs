//! Asking a program that keeps or gets credentials: one question on its standard input, one answer on its standard output.
//! Credential helpers and the kubelet's plugins are programs; there is no other way to ask them than to run them.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Most that a program may say, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// What came of asking.
pub(super) struct Answer {
    /// How the program ended.
    pub(super) status: ExitStatus,
    /// What it said, which may be a secret.
    pub(super) said: Vec<u8>,
}

/// Asks a program, which errors call `name`.
///
/// # Errors
/// When it can't be run, says more than a credential can be, or takes longer than `timeout`. What it says is in no error.
pub(super) async fn ask(
    mut command: Command,
    name: &str,
    question: &[u8],
    timeout: Duration,
) -> Result<Answer, String> {
    // It may say secrets on standard error, too.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let talk = async {
        let failed = |e: io::Error| format!("{name} failed: {e}");
        let mut child = command.spawn().map_err(|e| format!("{name} could not be started: {e}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that answers without reading closes the pipe; its answer counts.
            let _ = stdin.write_all(question).await;
        }
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_ANSWER + 1).read_to_end(&mut said).await.map_err(failed)?;
        }
        if said.len() as u64 > MAX_ANSWER {
            return Err(format!("{name} answers with more than 1 MiB"));
        }
        Ok(Answer { status: child.wait().await.map_err(failed)?, said })
    };
    let late = |_| format!("{name} did not answer within {} s", timeout.as_secs());
    tokio::time::timeout(timeout, talk).await.map_err(late)?
}
