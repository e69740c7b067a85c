//! Credentials from docker's `config.json` and credential helpers.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;

use crate::error::FetchError;

/// Largest configuration file or helper answer that is read, in bytes.
const MAX_SIZE: u64 = 1 << 20;
/// A helper that takes longer (it may be waiting for a screen) is given up.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// Key under which docker stores what belongs to Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// A secret; never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// User name and password.
    Password { user: String, password: String },
    /// OAuth2 refresh token ("identity token").
    IdentityToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Password { .. } => "Password(…)",
            Credential::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ConfigFile {
    auths: HashMap<String, AuthEntry>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Looks up credentials; the file is read each time, so that a `docker login` counts at once.
#[derive(Debug, Default)]
pub(crate) struct CredentialStore {
    path: Option<PathBuf>,
}

impl CredentialStore {
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        CredentialStore { path }
    }

    /// The credential for `registry` (`docker.io`, `host` or `host:port`), if there is one.
    pub(crate) async fn get(&self, registry: &str) -> Result<Option<Credential>, FetchError> {
        let Some(path) = &self.path else { return Ok(None) };
        let Some(config) = read_config(path).await.map_err(|reason| problem(registry, reason))? else {
            return Ok(None);
        };
        let key = if registry == "docker.io" { HUB_KEY } else { registry };
        let helper = config.cred_helpers.get(key).or_else(|| config.cred_helpers.get(registry));
        if let Some(helper) = helper {
            return ask_helper(helper, key).await.map_err(|reason| problem(registry, reason));
        }
        if let Some(credential) = config.stored(key) {
            return Ok(Some(credential));
        }
        match &config.creds_store {
            Some(helper) if !helper.is_empty() => {
                ask_helper(helper, key).await.map_err(|reason| problem(registry, reason))
            }
            _ => Ok(None),
        }
    }
}

impl ConfigFile {
    /// The credential that the file itself holds for `key`.
    fn stored(&self, key: &str) -> Option<Credential> {
        let entry = self
            .auths
            .get(key)
            .or_else(|| self.auths.iter().find(|(k, _)| host_of(k) == host_of(key)).map(|(_, v)| v));
        entry.and_then(from_entry)
    }
}

/// Whether a configuration file's bytes hold a credential for `key`.
#[cfg(fuzzing)]
pub(crate) fn holds(text: &[u8], key: &str) -> Result<bool, serde_json::Error> {
    serde_json::from_slice::<ConfigFile>(text).map(|config| config.stored(key).is_some())
}

fn problem(registry: &str, reason: String) -> FetchError {
    FetchError::Credentials { host: registry.to_owned(), reason }
}

async fn read_config(path: &Path) -> Result<Option<ConfigFile>, String> {
    let shown = path.display();
    let text = match tokio::fs::metadata(path).await {
        Ok(meta) if meta.len() > MAX_SIZE => return Err(format!("{shown} is larger than 1 MiB")),
        Ok(_) => tokio::fs::read(path).await,
        Err(error) => Err(error),
    };
    match text {
        // serde_json's message quotes what it found, which could be a secret: only the place is told.
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| {
            format!("{shown} is not a docker configuration (line {}, column {})", e.line(), e.column())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{shown}: {error}")),
    }
}

/// `https://host/v1/` → `host`.
fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

fn from_entry(entry: &AuthEntry) -> Option<Credential> {
    if let Some(token) = entry.identitytoken.as_ref().filter(|t| !t.is_empty()) {
        return Some(Credential::IdentityToken(token.clone()));
    }
    if let Some(auth) = entry.auth.as_ref().filter(|a| !a.is_empty()) {
        let decoded = BASE64_STANDARD.decode(auth.trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (user, password) = text.split_once(':')?;
        // Docker pads some passwords with NULs.
        let password = password.trim_end_matches('\0');
        return Some(Credential::Password { user: user.to_owned(), password: password.to_owned() });
    }
    match (&entry.username, &entry.password) {
        (Some(user), Some(password)) if !user.is_empty() => {
            Some(Credential::Password { user: user.clone(), password: password.clone() })
        }
        _ => None,
    }
}

/// Runs `docker-credential-<helper> get`; "not found" is an answer, not an error.
async fn ask_helper(helper: &str, key: &str) -> Result<Option<Credential>, String> {
    if helper.is_empty()
        || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err("the credential helper's name is not a plain word".to_owned());
    }
    let program = format!("docker-credential-{helper}");
    let run = async {
        let mut child = tokio::process::Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("{program} could not be started: {e}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that answers without reading closes the pipe; its answer counts.
            let _ = stdin.write_all(key.as_bytes()).await;
        }
        child.wait_with_output().await.map_err(|e| format!("{program} failed: {e}"))
    };
    let output = tokio::time::timeout(HELPER_TIMEOUT, run)
        .await
        .map_err(|_| format!("{program} did not answer within {} s", HELPER_TIMEOUT.as_secs()))??;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stdout).to_ascii_lowercase();
        if said.contains("credentials not found") || said.contains("no credentials") {
            return Ok(None);
        }
        return Err(format!("{program} failed ({})", output.status));
    }
    let answer: HelperAnswer = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{program} gave an answer that is not a credential"))?;
    Ok(match (answer.username.as_str(), answer.secret) {
        (_, secret) if secret.is_empty() => None,
        ("<token>", secret) => Some(Credential::IdentityToken(secret)),
        (user, password) => Some(Credential::Password { user: user.to_owned(), password }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lookup(json: &str, registry: &str) -> Result<Option<Credential>, FetchError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        CredentialStore::new(Some(path)).get(registry).await
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: password.into() })
    }

    #[tokio::test]
    async fn reads_auths_of_all_shapes() {
        let json = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "aHViOnNlOmNyZXQ="},
            "host:5000": {"username": "u", "password": "p"},
            "https://other.example/v2/": {"auth": "dTpw"},
            "token.example": {"auth": "dTpw", "identitytoken": "id"},
            "empty.example": {}}}"#;
        assert_eq!(lookup(json, "docker.io").await.unwrap(), password("hub", "se:cret"));
        assert_eq!(lookup(json, "host:5000").await.unwrap(), password("u", "p"));
        assert_eq!(lookup(json, "host").await.unwrap(), None);
        assert_eq!(lookup(json, "other.example").await.unwrap(), password("u", "p"));
        assert_eq!(
            lookup(json, "token.example").await.unwrap(),
            Some(Credential::IdentityToken("id".into()))
        );
        assert_eq!(lookup(json, "empty.example").await.unwrap(), None);
    }

    #[tokio::test]
    async fn missing_file_is_no_credential_and_errors_hold_no_secret() {
        assert_eq!(CredentialStore::new(Some("/nonexistent/x.json".into())).get("a").await.unwrap(), None);
        let error = lookup(r#"{"auths": {"a": "hunter2"}}"#, "a").await.unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
        let error = lookup(r#"{"credsStore": "../evil"}"#, "a").await.unwrap_err().to_string();
        assert!(error.contains("plain word"), "{error}");
        let shown = format!("{:?}", password("u", "hunter2"));
        assert!(!shown.contains("hunter2"));
    }

    #[tokio::test]
    async fn asks_the_helper() {
        // Helpers are found by PATH, which a library test must not change: a missing one is told by name.
        let error =
            lookup(r#"{"credHelpers": {"a.example": "lazyrun-missing"}}"#, "a.example").await.unwrap_err();
        assert!(error.to_string().contains("docker-credential-lazyrun-missing"), "{error}");
    }
}
