//! Credential helpers: programs named `docker-credential-*` that keep secrets (docker-credential-helpers' protocol).

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;

use super::config::Credential;

/// A helper that takes longer (it may be waiting for a screen) is given up.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Name of a helper's program.
pub(super) fn program(helper: &str) -> String {
    format!("docker-credential-{helper}")
}

/// What a helper keeps for `key`; "not found" is an answer, not an error.
pub(super) async fn get(helper: &str, key: &str) -> Result<Option<Credential>, String> {
    let Some(said) = run(helper, "get", key.as_bytes()).await? else { return Ok(None) };
    let answer: Answer = serde_json::from_slice(&said)
        .map_err(|_| format!("{} gave an answer that is not a credential", program(helper)))?;
    Ok(match (answer.username.as_str(), answer.secret) {
        (_, secret) if secret.is_empty() => None,
        ("<token>", secret) => Some(Credential::IdentityToken(secret)),
        (user, password) => Some(Credential::Password { user: user.to_owned(), password }),
    })
}

/// Gives a helper something to keep.
pub(super) async fn store(helper: &str, key: &str, user: &str, secret: &str) -> Result<(), String> {
    let input = json!({"ServerURL": key, "Username": user, "Secret": secret}).to_string();
    run(helper, "store", input.as_bytes()).await.map(drop)
}

/// Makes a helper forget; false when it kept nothing.
pub(super) async fn erase(helper: &str, key: &str) -> Result<bool, String> {
    let known = get(helper, key).await?.is_some();
    if known {
        run(helper, "erase", key.as_bytes()).await?;
    }
    Ok(known)
}

/// Runs a helper; `None`: it has nothing of that name.
async fn run(helper: &str, verb: &str, input: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if helper.is_empty()
        || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err("the credential helper's name is not a plain word".to_owned());
    }
    let name = program(helper);
    let mut command = Command::new(&name);
    command.arg(verb);
    let answer = super::program::ask(command, &name, input, HELPER_TIMEOUT).await?;
    if answer.status.success() {
        return Ok(Some(answer.said));
    }
    let said = String::from_utf8_lossy(&answer.said).to_ascii_lowercase();
    if said.contains("credentials not found") || said.contains("no credentials") {
        return Ok(None);
    }
    Err(format!("{name} failed ({})", answer.status))
}
