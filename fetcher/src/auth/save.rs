//! Logging in and out: a credential is put into a file, or given to the helper that the file names.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use super::config::{key_of, problem};
use super::helper;
use crate::error::FetchError;

/// Where a login is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// In the file itself, readable by its owner only.
    File(PathBuf),
    /// By a credential helper, the program of this name.
    Helper(String),
}

/// Keeps user and password for a registry (`docker.io`, `host` or `host:port`) as `docker login` does: by the helper that
/// the file names, or in the file.
///
/// # Errors
/// When the file is malformed or cannot be written, or the helper fails.
pub async fn save_login(file: &Path, registry: &str, user: &str, password: &str) -> Result<Kept, FetchError> {
    let failed = |reason| problem(registry, reason);
    let (key, mut config) = (key_of(registry), read(file).map_err(failed)?);
    if let Some(helper) = helper_for(&config, registry, key) {
        helper::store(&helper, key, user, password).await.map_err(failed)?;
        // Docker notes that there is something, without saying what.
        entries(&mut config).insert(key.to_owned(), json!({}));
        write(file, &config).map_err(failed)?;
        return Ok(Kept::Helper(helper::program(&helper)));
    }
    let secret = BASE64_STANDARD.encode(format!("{user}:{password}"));
    entries(&mut config).insert(key.to_owned(), json!({"auth": secret}));
    write(file, &config).map_err(failed)?;
    Ok(Kept::File(file.to_owned()))
}

/// Forgets what `save_login` keeps; false when there was nothing.
///
/// # Errors
/// As [`save_login`].
pub async fn erase_login(file: &Path, registry: &str) -> Result<bool, FetchError> {
    let failed = |reason| problem(registry, reason);
    let (key, mut config) = (key_of(registry), read(file).map_err(failed)?);
    let mut known = false;
    if let Some(helper) = helper_for(&config, registry, key) {
        known = helper::erase(&helper, key).await.map_err(failed)?;
    }
    let own = entries(&mut config);
    let removed = [key, registry].into_iter().filter_map(|name| own.remove(name)).count() > 0;
    if removed {
        write(file, &config).map_err(failed)?;
    }
    Ok(known || removed)
}

fn helper_for(config: &Map<String, Value>, registry: &str, key: &str) -> Option<String> {
    let own = config.get("credHelpers").and_then(Value::as_object);
    let own = own.and_then(|own| own.get(key).or_else(|| own.get(registry)));
    let helper = own.or_else(|| config.get("credsStore")).and_then(Value::as_str)?;
    (!helper.is_empty()).then(|| helper.to_owned())
}

fn entries(config: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let auths = config.entry("auths").or_insert_with(|| json!({}));
    if !auths.is_object() {
        *auths = json!({});
    }
    match auths {
        Value::Object(entries) => entries,
        _ => unreachable!("it was made an object"),
    }
}

fn read(file: &Path) -> Result<Map<String, Value>, String> {
    match crate::hosts::read_small(file) {
        Ok(bytes) if bytes.is_empty() => Ok(Map::new()),
        // serde_json's message quotes what it found, which could be a secret: only the place is told.
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
            let (line, column) = (e.line(), e.column());
            format!("{} is not a docker configuration (line {line}, column {column})", file.display())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(format!("{}: {error}", file.display())),
    }
}

/// Replaces the file; readers see the old one or the new one. A link stays one.
fn write(file: &Path, config: &Map<String, Value>) -> Result<(), String> {
    let place = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let failed = |e: io::Error| format!("{} cannot be written: {e}", place.display());
    let dir = place.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut make = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(make.recursive(true), 0o700).create(dir).map_err(failed)?;
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let replace = || {
        let _ = std::fs::remove_file(&temporary);
        let mut out =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        out.write_all(serde_json::to_string_pretty(config)?.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(&temporary, &place)?;
        std::fs::File::open(dir)?.sync_all()
    };
    replace().map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        failed(e)
    })
}

#[cfg(test)]
mod tests {
    use super::super::config::{Credential, CredentialStore};
    use super::*;

    #[tokio::test]
    async fn a_login_is_kept_found_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sub/config.json");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, r#"{"HttpHeaders": {"X": "y"}, "auths": {"other": {"auth": "dTpw"}}}"#)
            .unwrap();
        for registry in ["docker.io", "r.example:5000"] {
            assert_eq!(
                save_login(&file, registry, "ann", "s3:cret").await.unwrap(),
                Kept::File(file.clone())
            );
            let found = CredentialStore::new(vec![file.clone()]).get(registry, "a").await.unwrap().unwrap();
            let wanted = Credential::Password { user: "ann".into(), password: "s3:cret".into() };
            assert_eq!(found.credential, wanted);
        }
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains("HttpHeaders") && text.contains("https://index.docker.io/v1/"), "{text}");
        assert!(!text.contains("s3:cret"));
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert!(erase_login(&file, "docker.io").await.unwrap());
        assert!(!erase_login(&file, "docker.io").await.unwrap());
        assert!(CredentialStore::new(vec![file.clone()]).get("other", "a").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_first_login_makes_the_file_and_a_broken_one_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/config.json");
        save_login(&file, "r.example", "u", "p").await.unwrap();
        assert!(file.exists());
        std::fs::write(&file, "{").unwrap();
        assert!(save_login(&file, "r.example", "u", "p").await.is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{");
    }
}
