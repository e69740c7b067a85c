//! Running a plugin.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::process::Command;

use super::answer::Answer;
use super::config::Provider;

/// A plugin that takes longer is given up, as by the kubelet.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The program of a plugin, whose name is a plain one.
pub(super) fn program(bin_dir: &Path, provider: &Provider) -> PathBuf {
    bin_dir.join(&provider.name)
}

/// Asks a plugin for an image's credentials. It is a program of the cloud provider's, which knows how a node proves what it
/// is.
///
/// # Errors
/// When it can't be run, fails, takes too long, or does not answer as the protocol says.
pub(super) async fn ask(bin_dir: &Path, provider: &Provider, image: &str) -> Result<Answer, String> {
    let path = program(bin_dir, provider);
    let name = format!("the credential provider {}", path.display());
    let request = json!({
        "kind": "CredentialProviderRequest",
        "apiVersion": provider.api_version,
        "image": image,
    });
    let mut command = Command::new(&path);
    command.args(&provider.args).envs(provider.env.iter().map(|(name, value)| (name, value)));
    let answer = crate::auth::program::ask(command, &name, request.to_string().as_bytes(), TIMEOUT).await?;
    if !answer.status.success() {
        return Err(format!("{name} failed ({})", answer.status));
    }
    Answer::parse(&answer.said, &provider.api_version)
        .ok_or_else(|| format!("{name} does not answer as {} says", provider.api_version))
}
