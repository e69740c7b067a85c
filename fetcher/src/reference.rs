//! Image references by Docker's rules.
//!
//! The grammar is that of `distribution/reference`: a name whose first component is a registry only if it looks
//! like one (a dot, a colon, `localhost` or an upper-case letter), `docker.io/library` as defaults, then an
//! optional `:tag` and an optional `@digest`.

use std::fmt;
use std::str::FromStr;

use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

/// Registry that a name without one means.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Longest repository name (registry and path together) that registries accept.
const MAX_NAME: usize = 255;

/// A parsed, normalised image reference.
///
/// Parsing fills in the defaults: `debian` becomes `docker.io/library/debian:latest`. A reference with a digest
/// gets no default tag. When both are given the digest decides and the tag is only a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    /// Registry host with optional port, `docker.io` for Docker Hub.
    pub registry: String,
    /// Repository path inside the registry, with `library/` where Docker Hub wants it.
    pub repository: String,
    /// Tag; present unless a digest alone was given.
    pub tag: Option<String>,
    /// Digest of the manifest or manifest list.
    pub digest: Option<Digest>,
}

/// Why a string is not an image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {input:?}: {reason}")]
pub struct ReferenceError {
    /// What was given.
    pub input: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Reference {
    /// Host (and port) that serves this reference's registry API.
    pub fn endpoint(&self) -> &str {
        if self.registry == DEFAULT_REGISTRY { "registry-1.docker.io" } else { &self.registry }
    }

    /// The short form people type: without `docker.io/` and `library/`, unless that would mean another image.
    pub fn familiar(&self) -> String {
        let mut name = self.name();
        if self.registry == DEFAULT_REGISTRY {
            let short = self.repository.strip_prefix("library/").unwrap_or(&self.repository);
            // `docker.io/a.example/b` is not `a.example/b`, nor `library/a/b` the same as `a/b`.
            if parse(short).is_ok_and(|r| r.registry == self.registry && r.repository == self.repository) {
                short.clone_into(&mut name);
            }
        }
        self.push_suffix(&mut name);
        name
    }

    /// Registry and repository without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The same name, pinned to `digest`.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference { digest: Some(digest), ..self.clone() }
    }

    /// What the registry is asked for in `/v2/<name>/manifests/<this>`.
    pub(crate) fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    fn push_suffix(&self, out: &mut String) {
        if let Some(tag) = &self.tag {
            out.push(':');
            out.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            out.push('@');
            out.push_str(&digest.to_string());
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = self.name();
        self.push_suffix(&mut out);
        f.write_str(&out)
    }
}

impl From<Reference> for String {
    fn from(value: Reference) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for Reference {
    type Error = ReferenceError;
    fn try_from(value: String) -> Result<Self, Self::Error> {
        value.parse()
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(input: &str) -> Result<Self, Self::Err> {
        parse(input).map_err(|reason| ReferenceError { input: input.chars().take(300).collect(), reason })
    }
}

fn parse(input: &str) -> Result<Reference, &'static str> {
    if input.is_empty() {
        return Err("it is empty");
    }
    if input.len() == 64 && input.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    let (rest, digest) = match input.split_once('@') {
        Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
        None => (input, None),
    };
    let (name, tag) = split_tag(rest);
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, repository) = split_registry(name);
    check_registry(registry)?;
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    check_repository(repository)?;
    let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("the name is longer than 255 characters");
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some("latest".to_owned()),
    };
    Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
}

fn parse_digest(text: &str) -> Result<Digest, &'static str> {
    if !text.starts_with("sha256:") {
        return Err("only sha256 digests are supported");
    }
    text.parse().map_err(|_| "the digest is not sha256: and 64 lower-case hexadecimal digits")
}

/// A colon after the last slash starts a tag; one before it is a port.
fn split_tag(name: &str) -> (&str, Option<&str>) {
    let after_slash = name.rfind('/').map_or(0, |i| i + 1);
    match name[after_slash..].rfind(':') {
        Some(i) => (&name[..after_slash + i], Some(&name[after_slash + i + 1..])),
        None => (name, None),
    }
}

fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    match tag.as_bytes() {
        [] => Err("the tag is empty"),
        [first, rest @ ..]
            if word(*first)
                && rest.len() < 128
                && rest.iter().all(|&b| word(b) || b == b'.' || b == b'-') =>
        {
            Ok(())
        }
        _ => Err("a tag is up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'"),
    }
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    const BAD: &str = "the registry is not a host name or address with an optional port";
    let (host, port) = if let Some(v6) = registry.strip_prefix('[') {
        let (address, rest) = v6.split_once(']').ok_or(BAD)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| BAD)?;
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return Err(BAD),
        }
    } else {
        match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        }
    };
    if let Some(port) = port
        && (!port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().map_or(true, |p| p == 0))
    {
        return Err(BAD);
    }
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match host {
        Some(host) if !host.split('.').all(label) => Err(BAD),
        _ => Ok(()),
    }
}

fn check_repository(path: &str) -> Result<(), &'static str> {
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository name must be lower case");
    }
    if path.split('/').all(is_path_component) {
        Ok(())
    } else {
        Err("repository names are lower-case letters and digits, separated by '/', '.', '_', '__' or dashes")
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(part: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !alnum(first) || !alnum(last) {
        return false;
    }
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    separators
        .filter(|s| !s.is_empty())
        .all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalises_as_docker_does() {
        for (input, full, familiar) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("grafana/loki", "docker.io/grafana/loki:latest", "grafana/loki:latest"),
            ("index.docker.io/redis", "docker.io/library/redis:latest", "redis:latest"),
            ("docker.io/a/b:c", "docker.io/a/b:c", "a/b:c"),
            ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
            ("localhost:5000/a:B", "localhost:5000/a:B", "localhost:5000/a:B"),
            ("127.0.0.1:5000/x/y", "127.0.0.1:5000/x/y:latest", "127.0.0.1:5000/x/y:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
            ("ghcr.io/a/b__c-d.e:1", "ghcr.io/a/b__c-d.e:1", "ghcr.io/a/b__c-d.e:1"),
            ("Host/a", "Host/a:latest", "Host/a:latest"),
        ] {
            let reference: Reference = input.parse().unwrap();
            assert_eq!(reference.to_string(), full, "{input}");
            assert_eq!(reference.familiar(), familiar, "{input}");
            assert_eq!(full.parse::<Reference>().unwrap(), reference, "{input}");
        }
    }

    #[test]
    fn a_familiar_form_never_means_another_image() {
        for (input, familiar) in [
            ("docker.io/a.example/b", "docker.io/a.example/b:latest"),
            ("docker.io/localhost/b:t", "docker.io/localhost/b:t"),
            ("docker.io/library/a/b", "docker.io/library/a/b:latest"),
            ("docker.io/library/a.b", "a.b:latest"),
            ("docker.io/library/localhost", "localhost:latest"),
        ] {
            let reference: Reference = input.parse().unwrap();
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(familiar.parse(), Ok(reference), "{input}");
        }
        let name = Reference { tag: None, digest: None, ..reference("debian") };
        assert_eq!(name.familiar(), "debian");
    }

    fn reference(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn digest_keeps_the_tag_and_needs_none() {
        let both: Reference = format!("a:t@sha256:{HEX}").parse().unwrap();
        assert_eq!(both.tag.as_deref(), Some("t"));
        assert_eq!(both.manifest_name(), format!("sha256:{HEX}"));
        let only: Reference = format!("quay.io/a/b@sha256:{HEX}").parse().unwrap();
        assert_eq!(only.tag, None);
        assert_eq!(only.to_string(), format!("quay.io/a/b@sha256:{HEX}"));
    }

    #[test]
    fn refuses_what_docker_refuses() {
        let long = format!("a/{}", "b".repeat(300));
        for input in [
            "",
            "Debian",
            "a/B",
            HEX,
            ":tag",
            "a:",
            "a:-x",
            "a//b",
            "/a",
            "a/",
            "a..b",
            "a-",
            "_a",
            "a___b",
            "a@sha256:12",
            "a@md5:00",
            "a:t:u",
            "http://x/y",
            "x.io:port/a",
            "x.io:0/a",
            "x.io:99999/a",
            "-x.io/a",
            "a b",
            "a/../b",
            "[::g]/a",
            "é",
            long.as_str(),
            "x.io/",
            "a@",
            "..../a",
        ] {
            assert!(input.parse::<Reference>().is_err(), "{input:?} was accepted");
        }
    }

    #[test]
    fn docker_hub_is_served_elsewhere() {
        assert_eq!("debian".parse::<Reference>().unwrap().endpoint(), "registry-1.docker.io");
        assert_eq!("quay.io/a".parse::<Reference>().unwrap().endpoint(), "quay.io");
    }
}
