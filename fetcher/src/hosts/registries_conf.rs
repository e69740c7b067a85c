//! `registries.conf`, version 2 (containers-registries.conf(5)): mirrors and other places by prefix of the name.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::HostFiles;
use super::stamp::Reader;
use super::toml_error::{at, parse};
use crate::error::FetchError;

/// What the files say together.
#[derive(Debug, Default)]
pub(crate) struct RegistriesConf {
    registries: Vec<Registry>,
    /// Registries that a short name may mean, and the file that says so.
    pub(crate) search: Option<(Vec<String>, PathBuf)>,
}

/// A `[[registry]]`.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    prefix: String,
    location: String,
    pub(crate) insecure: bool,
    pub(crate) blocked: bool,
    pub(crate) mirrors: Vec<Mirror>,
    pub(crate) file: PathBuf,
}

/// A `[[registry.mirror]]`.
#[derive(Clone, Debug)]
pub(crate) struct Mirror {
    location: String,
    pub(crate) insecure: bool,
    pub(crate) when: When,
}

/// For which references a mirror is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    /// Never for what a tag leads to.
    Digests,
    /// Not for references by digest.
    Tags,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    unqualified_search_registries: Option<Vec<String>>,
    #[serde(default)]
    registry: Vec<Spanned<RegistryToml>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct RegistryToml {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<Spanned<MirrorToml>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct MirrorToml {
    location: String,
    insecure: bool,
    pull_from_mirror: Option<Spanned<String>>,
}

/// Reads what there is.
///
/// # Errors
/// When a file is malformed, with the line.
pub(crate) fn read(files: &HostFiles, reader: &mut Reader) -> Result<RegistriesConf, FetchError> {
    let mut conf = RegistriesConf::default();
    for path in &files.registries_conf {
        if let Some(text) = reader.text(path)? {
            conf.merge(path, &text)?;
            break;
        }
    }
    for dir in &files.registries_conf_dirs {
        for path in reader.list(dir)? {
            if path.extension().is_some_and(|e| e == "conf")
                && let Some(text) = reader.text(&path)?
            {
                conf.merge(&path, &text)?;
            }
        }
    }
    Ok(conf)
}

impl RegistriesConf {
    fn merge(&mut self, path: &Path, text: &str) -> Result<(), FetchError> {
        let file: File = parse(path, text)?;
        if let Some(search) = file.unqualified_search_registries {
            self.search = Some((search, path.to_owned()));
        }
        for registry in file.registry {
            let span = registry.span();
            let toml = registry.into_inner();
            let prefix = if toml.prefix.is_empty() { &toml.location } else { &toml.prefix };
            let prefix = prefix.trim_end_matches('/').to_owned();
            if prefix.is_empty() {
                return Err(at(path, text, &span, "a registry has neither prefix nor location"));
            }
            check_place(&toml.location).map_err(|reason| at(path, text, &span, reason))?;
            let mirrors = toml
                .mirror
                .into_iter()
                .map(|mirror| read_mirror(path, text, mirror, toml.mirror_by_digest_only))
                .collect::<Result<_, _>>()?;
            self.registries.retain(|r| r.prefix != prefix);
            self.registries.push(Registry {
                prefix,
                location: toml.location.trim_end_matches('/').to_owned(),
                insecure: toml.insecure,
                blocked: toml.blocked,
                mirrors,
                file: path.to_owned(),
            });
        }
        Ok(())
    }

    /// How many registries are named.
    pub(crate) fn len(&self) -> usize {
        self.registries.len()
    }

    /// The registry with the longest prefix of a name (`host/repository`).
    pub(crate) fn find(&self, name: &str) -> Option<&Registry> {
        self.registries.iter().filter(|r| r.matched(name).is_some()).max_by_key(|r| r.prefix.len())
    }
}

impl Registry {
    /// The part of the name that the prefix is.
    fn matched<'a>(&self, name: &'a str) -> Option<&'a str> {
        if let Some(domain) = self.prefix.strip_prefix('*') {
            let host = name.split('/').next().unwrap_or_default();
            let bare = host.split(':').next().unwrap_or_default();
            return (bare.len() > domain.len() && bare.ends_with(domain)).then_some(host);
        }
        let rest = name.strip_prefix(self.prefix.as_str())?;
        (rest.is_empty() || rest.starts_with('/')).then(|| &name[..self.prefix.len()])
    }

    /// Where a name that the prefix fits is in the registry itself.
    pub(crate) fn place(&self, name: &str) -> String {
        self.replace(name, &self.location)
    }

    /// Where it is in a mirror.
    pub(crate) fn place_in(&self, mirror: &Mirror, name: &str) -> String {
        self.replace(name, &mirror.location)
    }

    fn replace(&self, name: &str, location: &str) -> String {
        match self.matched(name) {
            Some(matched) if !location.is_empty() => format!("{location}{}", &name[matched.len()..]),
            _ => name.to_owned(),
        }
    }
}

fn read_mirror(
    path: &Path,
    text: &str,
    mirror: Spanned<MirrorToml>,
    digests_only: bool,
) -> Result<Mirror, FetchError> {
    let span = mirror.span();
    let toml = mirror.into_inner();
    if toml.location.is_empty() {
        return Err(at(path, text, &span, "a mirror has no location"));
    }
    check_place(&toml.location).map_err(|reason| at(path, text, &span, reason))?;
    let when = match toml.pull_from_mirror.as_ref().map(|w| (w.get_ref().as_str(), w.span())) {
        None if digests_only => When::Digests,
        None | Some(("all", _)) => When::Always,
        Some((_, span)) if digests_only => {
            return Err(at(
                path,
                text,
                &span,
                "mirror-by-digest-only and pull-from-mirror exclude each other",
            ));
        }
        Some(("digest-only", _)) => When::Digests,
        Some(("tag-only", _)) => When::Tags,
        Some((_, span)) => {
            return Err(at(path, text, &span, "pull-from-mirror is all, digest-only or tag-only"));
        }
    };
    let location = toml.location.trim_end_matches('/').to_owned();
    Ok(Mirror { location, insecure: toml.insecure, when })
}

/// A location is `host[:port][/path]`; empty is fine.
fn check_place(location: &str) -> Result<(), String> {
    if location.contains("://") {
        return Err(format!("{location:?} is a URL; a location is a host with a path"));
    }
    if location.starts_with('/')
        || location.contains(char::is_whitespace)
        || location.contains(['@', '?', '#'])
    {
        return Err(format!("{location:?} is no location"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &str) -> Result<RegistriesConf, FetchError> {
        let mut conf = RegistriesConf::default();
        conf.merge(Path::new("/c/registries.conf"), text).map(|()| conf)
    }

    #[test]
    fn the_longest_prefix_counts_and_is_replaced() {
        let conf = conf(
            r#"
unqualified-search-registries = ["docker.io"]
[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "mirror.example:5000/hub"
pull-from-mirror = "digest-only"

[[registry]]
prefix = "docker.io/library"
location = "internal.example/lib"
insecure = true

[[registry]]
prefix = "*.corp.example"
blocked = true
"#,
        )
        .unwrap();
        let place = |name: &str| conf.find(name).map(|r| r.place(name));
        assert_eq!(place("docker.io/library/redis").unwrap(), "internal.example/lib/redis");
        assert_eq!(place("docker.io/librarything/x").unwrap(), "docker.io/librarything/x");
        assert_eq!(place("docker.iox/a"), None);
        let hub = conf.find("docker.io/a/b").unwrap();
        assert_eq!(hub.place_in(&hub.mirrors[0], "docker.io/a/b"), "mirror.example:5000/hub/a/b");
        assert_eq!(hub.mirrors[0].when, When::Digests);
        assert!(conf.find("x.corp.example:5000/a").unwrap().blocked);
        assert!(conf.find("corp.example/a").is_none());
        assert_eq!(place("x.corp.example/a").unwrap(), "x.corp.example/a");
    }

    #[test]
    fn what_is_read_later_replaces() {
        let mut conf = conf("[[registry]]\nlocation = \"a.example\"\nblocked = true").unwrap();
        let later = "[[registry]]\nlocation = \"a.example\"\n[[registry.mirror]]\nlocation = \"m\"";
        conf.merge(Path::new("/c/d/1.conf"), later).unwrap();
        let found = conf.find("a.example/x").unwrap();
        assert!(!found.blocked && found.mirrors.len() == 1 && found.file.ends_with("d/1.conf"));
    }

    #[test]
    fn errors_name_the_line() {
        for (text, line) in [
            ("\n[[registry]]\nblocked = 3", 3),
            ("\n\n[[registry]]\ninsecure = true", 3),
            ("[[registry]]\nlocation = \"a\"\n[[registry.mirror]]\nlocation = \"https://m\"", 3),
            (
                "[[registry]]\nlocation = \"a\"\n[[registry.mirror]]\nlocation = \"m\"\npull-from-mirror = \"x\"",
                5,
            ),
        ] {
            let error = conf(text).unwrap_err();
            let FetchError::Config { line: found, .. } = &error else { panic!("{error}") };
            assert_eq!(*found, Some(line), "{text}: {error}");
        }
    }
}
