//! Credentials from docker's `config.json`, `auth.json` (containers-auth.json(5)) and credential helpers.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use super::helper;
use super::keychain::Keychain;
use super::provider::{ProviderFiles, Providers};
use crate::error::FetchError;

/// Key under which docker stores what belongs to Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// A secret; never shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Credential {
    /// User name and password.
    Password { user: String, password: String },
    /// OAuth2 refresh token ("identity token").
    IdentityToken(String),
    /// Bearer token for the registry itself.
    RegistryToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Password { .. } => "Password(…)",
            Credential::IdentityToken(_) => "IdentityToken(…)",
            Credential::RegistryToken(_) => "RegistryToken(…)",
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

/// A credential and where it was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) credential: Credential,
    /// The file, or the helper and the file that names it.
    pub(crate) source: String,
}

/// Looks up credentials; the files are read each time, so that a login counts at once.
#[derive(Debug, Default)]
pub(crate) struct CredentialStore {
    /// Asked before the files.
    keychain: Option<Arc<Keychain>>,
    files: Vec<PathBuf>,
    /// Asked when no file has a credential.
    providers: Option<Providers>,
}

impl CredentialStore {
    /// Files in the order in which they are looked at.
    pub(crate) fn new(files: Vec<PathBuf>) -> Self {
        CredentialStore { files, ..CredentialStore::default() }
    }

    /// With the kubelet's plugins, which are asked after the files.
    pub(crate) fn with_providers(self, providers: Option<ProviderFiles>) -> Self {
        CredentialStore { providers: providers.map(Providers::new), ..self }
    }

    /// With what was handed over for single repositories, which comes before the files.
    pub(crate) fn with_keychain(self, keychain: Option<Arc<Keychain>>) -> Self {
        CredentialStore { keychain, ..self }
    }

    /// The credential for a repository at `registry` (`docker.io`, `host` or `host:port`), if there is one.
    pub(crate) async fn get(&self, registry: &str, repository: &str) -> Result<Option<Found>, FetchError> {
        if let Some(credential) = self.keychain.as_ref().and_then(|k| k.get(registry, repository)) {
            return Ok(Some(Found { credential, source: "a pull secret".to_owned() }));
        }
        for path in &self.files {
            if let Some(found) =
                look_into(path, registry, repository).await.map_err(|reason| problem(registry, reason))?
            {
                return Ok(Some(found));
            }
        }
        match &self.providers {
            Some(providers) => {
                providers.get(registry, repository).await.map_err(|reason| problem(registry, reason))
            }
            None => Ok(None),
        }
    }
}

async fn look_into(path: &Path, registry: &str, repository: &str) -> Result<Option<Found>, String> {
    let Some(config) = read_config(path).await? else { return Ok(None) };
    let key = key_of(registry);
    let shown = path.display().to_string();
    let by_helper = async |helper: &str| {
        let source = format!("{}, named in {shown}", helper::program(helper));
        Ok(helper::get(helper, key).await?.map(|credential| Found { credential, source }))
    };
    if let Some(credential) = config.scoped(registry, repository) {
        return Ok(Some(Found { credential, source: shown }));
    }
    let own = config.cred_helpers.get(key).or_else(|| config.cred_helpers.get(registry));
    if let Some(helper) = own {
        return by_helper(helper).await;
    }
    if let Some(credential) = config.stored(key) {
        return Ok(Some(Found { credential, source: shown }));
    }
    match &config.creds_store {
        Some(helper) if !helper.is_empty() => by_helper(helper).await,
        _ => Ok(None),
    }
}

/// Under what name Docker keeps what belongs to a registry.
pub(super) fn key_of(registry: &str) -> &str {
    if registry == "docker.io" { HUB_KEY } else { registry }
}

impl ConfigFile {
    /// The credential for a part of a registry that the repository lies in, the narrowest first (`auth.json` only).
    fn scoped(&self, registry: &str, repository: &str) -> Option<Credential> {
        let whole = format!("{registry}/{repository}");
        let mut name = whole.as_str();
        while name.len() > registry.len() {
            if let Some(credential) = self.auths.get(name).and_then(from_entry) {
                return Some(credential);
            }
            name = &name[..name.rfind('/')?];
        }
        None
    }

    /// The credential that the file itself holds for `key`.
    fn stored(&self, key: &str) -> Option<Credential> {
        let host = whole_host(key)?;
        let same = |name: &str| whole_host(name).is_some_and(|h| h == host || (is_hub(h) && is_hub(host)));
        let entry = self
            .auths
            .get(key)
            .or_else(|| self.auths.iter().find(|(name, _)| same(name)).map(|(_, entry)| entry));
        entry.and_then(from_entry)
    }
}

/// Whether a configuration file's bytes hold a credential for `key`.
#[cfg(fuzzing)]
pub(crate) fn holds(text: &[u8], key: &str) -> Result<bool, serde_json::Error> {
    serde_json::from_slice::<ConfigFile>(text)
        .map(|config| config.scoped(key, "a/b").is_some() || config.stored(key).is_some())
}

/// The host that all of is meant; `None` when only a part of its repositories is.
fn whole_host(key: &str) -> Option<&str> {
    let (rest, is_url) = match key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")) {
        Some(rest) => (rest, true),
        None => (key, false),
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    (is_url || matches!(path.trim_end_matches('/'), "" | "v1" | "v2")).then_some(host)
}

fn is_hub(host: &str) -> bool {
    matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

pub(super) fn problem(registry: &str, reason: String) -> FetchError {
    FetchError::Credentials { host: registry.to_owned(), reason }
}

async fn read_config(path: &Path) -> Result<Option<ConfigFile>, String> {
    let file = path.to_owned();
    let read = tokio::task::spawn_blocking(move || parse(&file)).await;
    read.unwrap_or_else(|_| Err(format!("{}: reading it was interrupted", path.display())))
}

/// Reads a file (blocking); `None` if there is none.
fn parse(path: &Path) -> Result<Option<ConfigFile>, String> {
    let shown = path.display();
    match crate::hosts::read_small(path) {
        // serde_json's message quotes what it found, which could be a secret: only the place is told.
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| {
            format!("{shown} is not a docker configuration (line {}, column {})", e.line(), e.column())
        }),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(format!("{shown}: {error}")),
    }
}

/// What a file with credentials holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Names with a credential in the file itself, sorted.
    pub(crate) names: Vec<String>,
    /// Names whose entry can't be used, sorted.
    pub(crate) useless: Vec<String>,
    /// Programs that it leaves credentials to, sorted.
    pub(crate) helpers: Vec<String>,
}

/// What a file holds, without a secret (blocking); `None` if there is none.
///
/// # Errors
/// When it can't be read or is malformed, without its text.
pub(crate) fn summary(path: &Path) -> Result<Option<Summary>, String> {
    let Some(config) = parse(path)? else { return Ok(None) };
    let mut summary = Summary::default();
    for (name, entry) in &config.auths {
        if from_entry(entry).is_some() {
            summary.names.push(name.clone());
        } else if [&entry.auth, &entry.username, &entry.password].iter().any(|part| part.is_some()) {
            // Docker leaves empty entries for what a helper keeps: those are as they should be.
            summary.useless.push(name.clone());
        }
    }
    let helpers = config.creds_store.iter().chain(config.cred_helpers.values());
    summary.helpers = helpers.filter(|name| !name.is_empty()).map(|name| helper::program(name)).collect();
    for list in [&mut summary.names, &mut summary.useless, &mut summary.helpers] {
        list.sort();
        list.dedup();
    }
    Ok(Some(summary))
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn lookup(json: &str, registry: &str) -> Result<Option<Credential>, FetchError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        let (registry, repository) = registry.split_once('/').unwrap_or((registry, "library/redis"));
        let found = CredentialStore::new(vec![path]).get(registry, repository).await?;
        Ok(found.map(|found| found.credential))
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
        let none = CredentialStore::new(vec!["/nonexistent/x.json".into()]).get("a", "b").await.unwrap();
        assert!(none.is_none());
        let error = lookup(r#"{"auths": {"a": "hunter2"}}"#, "a").await.unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
        let error = lookup(r#"{"credsStore": "../evil"}"#, "a").await.unwrap_err().to_string();
        assert!(error.contains("plain word"), "{error}");
        let shown = format!("{:?}", password("u", "hunter2"));
        assert!(!shown.contains("hunter2"));
    }

    #[tokio::test]
    async fn parts_of_a_registry_have_credentials_of_their_own() {
        let json = r#"{"auths": {
            "r.example/team/app": {"username": "app", "password": "p"},
            "r.example/team": {"username": "team", "password": "p"},
            "docker.io": {"username": "hub", "password": "p"},
            "part.example/team": {"username": "team", "password": "p"},
            "r.example": {"username": "all", "password": "p"}}}"#;
        for (name, user) in [
            ("r.example/team/app", "app"),
            ("r.example/team/app/sub", "app"),
            ("r.example/team/apple", "team"),
            ("r.example/teams", "all"),
            ("docker.io/library/redis", "hub"),
        ] {
            assert_eq!(lookup(json, name).await.unwrap(), password(user, "p"), "{name}");
        }
        assert_eq!(lookup(json, "part.example/other").await.unwrap(), None, "not for all of the registry");
    }

    #[tokio::test]
    async fn the_first_file_with_a_credential_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let first = write("1", r#"{"auths": {"a": {"username": "one", "password": "p"}}}"#);
        let second = write("2", r#"{"auths": {"a": {"auth": "dTpw"}, "b": {"auth": "dTpw"}}}"#);
        let store = CredentialStore::new(vec![first.clone(), second.clone()]);
        let found = store.get("a", "x").await.unwrap().unwrap();
        assert_eq!(
            (Some(found.credential), found.source),
            (password("one", "p"), first.display().to_string())
        );
        let found = store.get("b", "x").await.unwrap().unwrap();
        assert_eq!(found.source, second.display().to_string());
    }

    #[tokio::test]
    async fn asks_the_helper() {
        // Helpers are found by PATH, which a library test must not change: a missing one is told by name.
        let error =
            lookup(r#"{"credHelpers": {"a.example": "lazyrun-missing"}}"#, "a.example").await.unwrap_err();
        assert!(error.to_string().contains("docker-credential-lazyrun-missing"), "{error}");
    }
}
