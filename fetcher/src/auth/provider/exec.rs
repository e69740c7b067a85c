//! Running a plugin.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::answer::Answer;
use super::config::Provider;

/// A plugin that takes longer is given up, as by the kubelet.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Most that a plugin may say.
const MAX_ANSWER: u64 = 1 << 20;

/// The program of a plugin.
///
/// # Errors
/// When its name leads out of the directory.
pub(super) fn program(bin_dir: &Path, provider: &Provider) -> Result<PathBuf, String> {
    let path = bin_dir.join(&provider.name);
    if path.parent() == Some(bin_dir) {
        Ok(path)
    } else {
        Err(format!("the plugin {:?} is not in {}", provider.name, bin_dir.display()))
    }
}

/// Asks a plugin for an image's credentials. It is a program of the cloud provider's, which knows how a node proves what it
/// is; there is no other way to ask it than to run it, as the kubelet does.
///
/// # Errors
/// When it can't be run, fails, takes too long, or does not answer as the protocol says.
pub(super) async fn ask(bin_dir: &Path, provider: &Provider, image: &str) -> Result<Answer, String> {
    let path = program(bin_dir, provider)?;
    let shown = path.display();
    let request = json!({
        "kind": "CredentialProviderRequest",
        "apiVersion": provider.api_version,
        "image": image,
    })
    .to_string();
    let run = async {
        let mut child = tokio::process::Command::new(&path)
            .args(&provider.args)
            .envs(provider.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It may say secrets there.
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("the credential provider {shown} could not be started: {e}"))?;
        let failed = |e: std::io::Error| format!("the credential provider {shown} failed: {e}");
        if let Some(mut stdin) = child.stdin.take() {
            // One that answers without reading closes the pipe; its answer counts.
            let _ = stdin.write_all(request.as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_ANSWER + 1).read_to_end(&mut said).await.map_err(failed)?;
        }
        if said.len() as u64 > MAX_ANSWER {
            return Err(format!("the credential provider {shown} answers with more than 1 MiB"));
        }
        let status = child.wait().await.map_err(failed)?;
        if status.success() {
            Ok(said)
        } else {
            Err(format!("the credential provider {shown} failed ({status})"))
        }
    };
    let late = |_| format!("the credential provider {shown} did not answer within {} s", TIMEOUT.as_secs());
    let said = tokio::time::timeout(TIMEOUT, run).await.map_err(late)??;
    Answer::parse(&said, &provider.api_version).ok_or_else(|| {
        format!("the credential provider {shown} does not answer as {} says", provider.api_version)
    })
}
