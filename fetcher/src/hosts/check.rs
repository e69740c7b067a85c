//! All files of settings at once, as an administrator wants to see them checked: what is read of each, and what is wrong.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::stamp::Reader;
use super::{HostFiles, certs, hosts_toml, registries_conf};
use crate::auth::{self, ProviderFiles};

/// A file, or a directory of certificates, that is read to find and reach registries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it is: `hosts.toml`, `certificates`, `registries.conf`, `credentials` or
    /// `credential providers`.
    pub kind: &'static str,
    /// What it says, in a few words and without secrets.
    pub says: String,
    /// Why requests that need it fail.
    pub error: Option<String>,
    /// What is probably not as it was meant.
    pub warnings: Vec<String>,
    /// Programs that it leaves credentials to.
    pub helpers: Vec<String>,
}

impl CheckedFile {
    fn new(path: &Path, kind: &'static str) -> CheckedFile {
        let path = path.to_owned();
        CheckedFile {
            path,
            kind,
            says: String::new(),
            error: None,
            warnings: Vec::new(),
            helpers: Vec::new(),
        }
    }

    fn fill(mut self, said: Result<String, String>) -> CheckedFile {
        match said {
            Ok(says) => self.says = says,
            Err(error) => self.error = Some(error),
        }
        self
    }
}

/// Reads every file there is, whichever registry it is for. Nothing is sent anywhere; no helper is asked.
pub fn check_settings(files: &HostFiles, credentials: &[PathBuf]) -> Vec<CheckedFile> {
    let mut checked = directories(&files.hosts_dirs);
    let places = files.registries_conf.iter().find(|path| path.exists()).cloned();
    let mut reader = Reader::default();
    let drop_ins = files.registries_conf_dirs.iter().flat_map(|dir| reader.list(dir).unwrap_or_default());
    let drop_ins = drop_ins.filter(|path| path.extension().is_some_and(|e| e == "conf"));
    checked.extend(places.into_iter().chain(drop_ins).map(|path| registries(&path)));
    checked.extend(credentials.iter().filter_map(|path| credential_file(path)));
    checked
}

/// Reads the configuration of the kubelet's credential providers and looks for their programs. None is asked.
pub fn check_providers(files: &ProviderFiles) -> CheckedFile {
    let checked = CheckedFile::new(&files.config, "credential providers");
    match auth::providers_summary(files) {
        Ok((names, warnings)) if names.is_empty() => {
            CheckedFile { warnings, ..checked.fill(Ok("no plugins that act for the node".to_owned())) }
        }
        Ok((names, warnings)) => CheckedFile { warnings, ..checked.fill(Ok(names.join(", "))) },
        Err(error) => checked.fill(Err(error)),
    }
}

/// The directories of registries in all parents.
fn directories(parents: &[PathBuf]) -> Vec<CheckedFile> {
    let mut checked = Vec::new();
    // The first directory of a registry is the one that counts.
    let mut seen: HashMap<String, PathBuf> = HashMap::new();
    for parent in parents {
        let dirs = match Reader::default().list(parent) {
            Ok(dirs) => dirs,
            Err(error) => {
                checked.push(CheckedFile::new(parent, "hosts.toml").fill(Err(error.to_string())));
                continue;
            }
        };
        for dir in dirs.into_iter().filter(|dir| dir.is_dir()) {
            let mut found = directory(&dir);
            let name = registry_of(&dir);
            if let Some(first) = seen.get(&name) {
                found.warnings.push(format!("it is never read: {} comes first", first.display()));
            }
            seen.entry(name).or_insert(dir);
            checked.push(found);
        }
    }
    checked
}

/// The registry that a directory is for: `HOST_PORT_` is another spelling of `HOST:PORT`.
fn registry_of(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match name.strip_suffix('_').and_then(|name| name.rsplit_once('_')) {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => format!("{host}:{port}"),
        _ => name,
    }
}

fn directory(dir: &Path) -> CheckedFile {
    let mut reader = Reader::default();
    let path = dir.join("hosts.toml");
    match reader.text(&path) {
        Ok(Some(text)) if !text.is_empty() => {
            let read = hosts_toml::read(&path, dir, &text, &mut reader).map_err(|e| e.to_string());
            let missing = |read: &hosts_toml::HostsToml| {
                let entries = read.mirrors.iter().chain([&read.origin]);
                let files = entries.flat_map(|entry| {
                    let keys = entry.tls.client.iter().flat_map(|(c, k)| std::iter::once(c).chain(k));
                    entry.tls.ca.iter().chain(keys)
                });
                files
                    .filter(|file| !file.exists())
                    .map(|file| format!("{} is missing", file.display()))
                    .collect()
            };
            let warnings = read.as_ref().map(missing).unwrap_or_default();
            let says = read.map(|toml| match toml.mirrors.len() {
                1 => "1 host".to_owned(),
                n => format!("{n} hosts"),
            });
            CheckedFile { warnings, ..CheckedFile::new(&path, "hosts.toml").fill(says) }
        }
        Err(error) => CheckedFile::new(&path, "hosts.toml").fill(Err(error.to_string())),
        _ => {
            let tls = certs::in_dir(dir, &mut reader).map_err(|e| e.to_string());
            let says = tls.map(|tls| format!("{} authorities, {} to show", tls.ca.len(), tls.client.len()));
            CheckedFile::new(dir, "certificates").fill(says)
        }
    }
}

fn registries(path: &Path) -> CheckedFile {
    let files = HostFiles { registries_conf: vec![path.to_owned()], ..HostFiles::default() };
    let read = registries_conf::read(&files, &mut Reader::default()).map_err(|e| e.to_string());
    CheckedFile::new(path, "registries.conf").fill(read.map(|conf| match conf.len() {
        1 => "1 registry".to_owned(),
        n => format!("{n} registries"),
    }))
}

fn credential_file(path: &Path) -> Option<CheckedFile> {
    let checked = CheckedFile::new(path, "credentials");
    let summary = match auth::summary(path) {
        Ok(summary) => summary?,
        Err(error) => return Some(checked.fill(Err(error))),
    };
    let auth::Summary { names, useless, helpers } = summary;
    let mut warnings: Vec<String> =
        useless.iter().map(|name| format!("its entry for {name} is no credential")).collect();
    let mode = std::fs::metadata(path).map_or(0, |meta| meta.permissions().mode() & 0o777);
    if mode & 0o077 != 0 && !names.is_empty() {
        warnings.push(format!("others may read its secrets (mode {mode:03o}); chmod 600 it"));
    }
    let says = if names.is_empty() { "no entries".to_owned() } else { format!("for {}", names.join(", ")) };
    Some(CheckedFile { warnings, helpers, ..checked.fill(Ok(says)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn each_file_is_read_and_what_is_wrong_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        write(&at("a/r.example_5000_/hosts.toml"), "[host.\"https://m\"]\nca = \"none.pem\"");
        write(&at("b/r.example:5000/hosts.toml"), "");
        write(&at("b/bad.example/hosts.toml"), "[host.");
        write(&at("b/c.example/client.cert"), "");
        write(&at("registries.conf"), "[[registry]]\nlocation = \"x.example\"");
        write(&at("conf.d/10.conf"), "nonsense");
        write(
            &at("config.json"),
            r#"{"auths": {"r": {"auth": "dTpzM2NyZXQ="}, "s": {"auth": "?"}, "t": {}},
              "credHelpers": {"gcr.io": "gcr"}, "credsStore": "pass"}"#,
        );
        write(&at("auth.json"), "{");
        let files = HostFiles {
            hosts_dirs: vec![at("a"), at("b"), at("none")],
            registries_conf: vec![at("none"), at("registries.conf")],
            registries_conf_dirs: vec![at("conf.d")],
        };
        let checked = check_settings(&files, &[at("config.json"), at("auth.json"), at("none")]);
        let of = |path: &str| checked.iter().find(|c| c.path == at(path)).unwrap_or_else(|| panic!("{path}"));
        assert_eq!(checked.len(), 8);
        let mirror = of("a/r.example_5000_/hosts.toml");
        assert_eq!((mirror.says.as_str(), &mirror.error), ("1 host", &None));
        assert!(mirror.warnings[0].contains("none.pem is missing"), "{mirror:?}");
        assert!(of("b/r.example:5000").warnings[0].contains("never read"));
        let error = |path: &str| of(path).error.clone().unwrap_or_default();
        assert!(error("b/bad.example/hosts.toml").contains("line 1"));
        assert!(error("b/c.example").contains("client.key is missing"));
        assert_eq!(of("registries.conf").says, "1 registry");
        assert!(error("conf.d/10.conf").contains("line 1"));
        let config = of("config.json");
        assert_eq!(config.says, "for r");
        assert_eq!(config.helpers, ["docker-credential-gcr", "docker-credential-pass"]);
        assert_eq!(config.warnings.len(), 2, "{config:?}");
        assert!(error("auth.json").contains("not a docker configuration"));
        assert!(!format!("{checked:?}").contains("s3cret"));
    }
}
