//! containerd's `hosts.toml` (containerd, `docs/hosts.md`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::{Spanned, Table, Value};

use super::endpoint::{Capabilities, TlsSettings, absolute};
use super::stamp::Reader;
use super::toml_error::{about, at, parse};
use crate::error::FetchError;

/// Keys that are known at the top and in each host's table.
const KNOWN: [&str; 8] =
    ["capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout", "server"];

/// What a `hosts.toml` says.
#[derive(Debug)]
pub(crate) struct HostsToml {
    /// In the order in which they are asked.
    pub(crate) mirrors: Vec<HostEntry>,
    /// What is asked last. Without a URL it is the registry's own.
    pub(crate) origin: HostEntry,
}

/// What is said about one host.
#[derive(Debug)]
pub(crate) struct HostEntry {
    /// Root of its API with a slash at the end.
    pub(crate) root: Option<Url>,
    pub(crate) can: Capabilities,
    pub(crate) tls: TlsSettings,
    pub(crate) headers: HeaderMap,
    pub(crate) dial_timeout: Option<Duration>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields {
    capabilities: Option<Vec<Spanned<String>>>,
    ca: Option<OneOrMore>,
    client: Option<Spanned<Clients>>,
    skip_verify: Option<bool>,
    header: toml::map::Map<String, Value>,
    override_path: bool,
    dial_timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a path or a list of paths")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a path, a list of paths, or a list of pairs of certificate and key")]
enum Clients {
    One(String),
    More(Vec<Client>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    Both(String),
    Pair(Vec<String>),
}

/// Reads a file's text. What is relative in it starts at `dir`.
///
/// # Errors
/// When it is malformed, with the line.
pub(crate) fn read(
    path: &Path,
    dir: &Path,
    text: &str,
    reader: &mut Reader,
) -> Result<HostsToml, FetchError> {
    #[derive(Deserialize)]
    struct Hosts {
        // As a table, which keeps the order of the file.
        #[serde(default)]
        host: Table,
    }
    #[derive(Deserialize)]
    struct Typed {
        #[serde(default)]
        host: std::collections::HashMap<String, Fields>,
    }
    let Server { server } = parse(path, text)?;
    let top: Fields = parse(path, text)?;
    let order: Hosts = parse(path, text)?;
    let mut typed: Typed = parse(path, text)?;
    warn_of_unknown(path, text)?;
    let source = Source { path, dir, text };
    let mut mirrors = Vec::new();
    for url in order.host.keys() {
        let fields = typed.host.remove(url).unwrap_or_default();
        let root = api_root(url, fields.override_path).map_err(|reason| about(path, text, url, reason))?;
        mirrors.push(source.entry(Some(root), fields, reader)?);
    }
    let root = match &server {
        Some(server) if !server.get_ref().is_empty() => Some(
            api_root(server.get_ref(), top.override_path)
                .map_err(|reason| at(path, text, &server.span(), reason))?,
        ),
        _ => None,
    };
    Ok(HostsToml { mirrors, origin: source.entry(root, top, reader)? })
}

#[derive(Deserialize)]
struct Server {
    server: Option<Spanned<String>>,
}

/// containerd passes over keys that it does not know, and so do we, but not without a word.
fn warn_of_unknown(path: &Path, text: &str) -> Result<(), FetchError> {
    let table: Table = parse(path, text)?;
    let unknown = |table: &Table, own: &[&str]| {
        let mut keys = table.keys().map(String::as_str);
        keys.find(|key| !own.contains(key) && !KNOWN.contains(key)).map(str::to_owned)
    };
    let hosts = table.get("host").and_then(Value::as_table);
    let inside = hosts.into_iter().flat_map(|hosts| hosts.values()).filter_map(Value::as_table);
    let found = unknown(&table, &["host"]).into_iter().chain(inside.filter_map(|host| unknown(host, &[])));
    for key in found {
        tracing::warn!(file = %path.display(), key, "a key that is not known here is passed over");
    }
    Ok(())
}

/// A file that is read.
struct Source<'a> {
    path: &'a Path,
    dir: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn entry(&self, root: Option<Url>, fields: Fields, reader: &mut Reader) -> Result<HostEntry, FetchError> {
        let can = self.capabilities(fields.capabilities.as_deref())?;
        let dial_timeout = match &fields.dial_timeout {
            None => None,
            Some(text) => Some(
                go_duration(text.get_ref())
                    .ok_or_else(|| self.at(&text.span(), "a time is a number with a unit, such as 3s"))?,
            ),
        };
        let ca = match fields.ca {
            None => Vec::new(),
            Some(OneOrMore::One(one)) => vec![self.file(&one)],
            Some(OneOrMore::More(more)) => more.iter().map(|one| self.file(one)).collect(),
        };
        let mut tls = TlsSettings {
            ca,
            client: self.client(fields.client)?,
            skip_verify: fields.skip_verify.unwrap_or(false),
            ..TlsSettings::default()
        };
        if !tls.is_plain() {
            tls.from = Some(self.path.to_owned());
        }
        tls.stamp(reader);
        Ok(HostEntry { root, can, tls, headers: self.headers(&fields.header)?, dial_timeout })
    }

    fn capabilities(&self, given: Option<&[Spanned<String>]>) -> Result<Capabilities, FetchError> {
        let Some(given) = given.filter(|g| !g.is_empty()) else { return Ok(Capabilities::ALL) };
        let mut can = Capabilities::NONE;
        for one in given {
            match one.get_ref().to_ascii_lowercase().as_str() {
                "pull" => can.pull = true,
                "resolve" => can.resolve = true,
                "push" => can.push = true,
                // Asking for referrers is a pull here, and content proves itself.
                "referrers" => {}
                other => {
                    let reason = format!("{other:?} is no capability; there are pull, resolve and push");
                    return Err(self.at(&one.span(), reason));
                }
            }
        }
        Ok(can)
    }

    fn client(&self, given: Option<Spanned<Clients>>) -> Result<Vec<(PathBuf, Option<PathBuf>)>, FetchError> {
        let Some(given) = given else { return Ok(Vec::new()) };
        let span = given.span();
        let list = match given.into_inner() {
            Clients::One(one) => vec![Client::Both(one)],
            Clients::More(more) => more,
        };
        list.into_iter()
            .map(|one| match one {
                Client::Both(file) => Ok((self.file(&file), None)),
                Client::Pair(pair) => match pair.as_slice() {
                    [cert, key] if key.is_empty() => Ok((self.file(cert), None)),
                    [cert, key] => Ok((self.file(cert), Some(self.file(key)))),
                    _ => Err(self.at(&span, "a pair is a certificate and its key")),
                },
            })
            .collect()
    }

    fn headers(&self, given: &Table) -> Result<HeaderMap, FetchError> {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            let bad = |reason: &str| about(self.path, self.text, name, format!("header {name}: {reason}"));
            let parsed: HeaderName = name.parse().map_err(|_| bad("that is no name of a header"))?;
            let values = match value {
                Value::String(one) => vec![one.as_str()],
                Value::Array(more) => more.iter().filter_map(Value::as_str).collect(),
                _ => return Err(bad("its value is not text or a list of texts")),
            };
            for value in values {
                let mut value = HeaderValue::from_str(value)
                    .map_err(|_| bad("its value holds characters that a header cannot"))?;
                // Somebody's token, as likely as not.
                value.set_sensitive(true);
                headers.append(parsed.clone(), value);
            }
        }
        Ok(headers)
    }

    fn file(&self, path: &str) -> PathBuf {
        absolute(self.dir, path)
    }

    fn at(&self, span: &std::ops::Range<usize>, reason: impl Into<String>) -> FetchError {
        at(self.path, self.text, span, reason)
    }
}

/// The root of a host's API: `/v2` is added to the path unless it is there or `override_path` is set.
pub(crate) fn api_root(text: &str, override_path: bool) -> Result<Url, String> {
    let bad = || format!("{text:?} is not the URL of a registry");
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let mut url = Url::parse(&whole).map_err(|_| bad())?;
    let plain = url.username().is_empty() && url.password().is_none();
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() || !plain {
        return Err(bad());
    }
    url.set_query(None);
    url.set_fragment(None);
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&format!("{path}/"));
    Ok(url)
}

/// `1m30s`, `500ms`: times as Go writes them.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |i| digits + i);
        let seconds = match &rest[digits..unit_end] {
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number * seconds).ok()?;
        rest = &rest[unit_end..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<HostsToml, FetchError> {
        read(Path::new("/c/r/hosts.toml"), Path::new("/c/r"), text, &mut Reader::default())
    }

    #[test]
    fn everything_that_containerd_reads() {
        let text = r#"
server = "https://registry-1.docker.io"
ca = "root.crt"

[host."https://z.example"]
  capabilities = ["pull", "Resolve"]
  ca = ["/etc/a.crt", "b.crt"]
  client = [["c.cert", "c.key"], ["d.pem", ""]]
  skip_verify = true
  override_path = true
  dial_timeout = "1m500ms"
  [host."https://z.example".header]
    x-one = "1"
    x-more = ["2", "3"]

[host."a.example:5000/some/path"]
  client = "both.pem"

[host."http://m.example/v2"]
  client = ["x.pem", "/y.pem"]
"#;
        let read = read_text(text).unwrap();
        let roots: Vec<&str> = read.mirrors.iter().map(|m| m.root.as_ref().unwrap().as_str()).collect();
        assert_eq!(
            roots,
            ["https://z.example/", "https://a.example:5000/some/path/v2/", "http://m.example/v2/"]
        );
        assert_eq!(read.origin.root.unwrap().as_str(), "https://registry-1.docker.io/v2/");
        assert_eq!(read.origin.tls.ca, [Path::new("/c/r/root.crt")]);
        let first = &read.mirrors[0];
        assert_eq!(first.can, Capabilities { pull: true, resolve: true, push: false });
        assert_eq!(first.tls.ca, [Path::new("/etc/a.crt"), Path::new("/c/r/b.crt")]);
        assert_eq!(
            first.tls.client,
            [("/c/r/c.cert".into(), Some(PathBuf::from("/c/r/c.key"))), (PathBuf::from("/c/r/d.pem"), None)]
        );
        assert!(first.tls.skip_verify);
        assert_eq!(first.dial_timeout, Some(Duration::from_millis(60_500)));
        assert_eq!(first.headers.get_all("x-more").iter().count(), 2);
        assert_eq!(read.mirrors[1].can, Capabilities::ALL);
        assert_eq!(read.mirrors[1].tls.client, [(PathBuf::from("/c/r/both.pem"), None)]);
        assert_eq!(read.mirrors[2].tls.client.len(), 2);
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, line) in [
            ("server = \"x\"\nserver = [", 2),
            ("\n\nskip_verify = \"yes\"", 3),
            ("\n[host.\"https://m\"]\ncapabilities = [\n\"pull\",\n\"fly\"]", 5),
            ("\n[host.\"ftp://m\"]", 2),
            ("\nserver = \"https://u:p@m\"", 2),
            ("\n[host.\"https://m\"]\nclient = [[\"a\"]]", 3),
            ("\n[host.\"https://m\"]\nca = 7", 3),
            ("\n\n\n[header]\n\"bad name\" = \"1\"", 5),
        ] {
            let error = read_text(text).unwrap_err();
            let FetchError::Config { line: found, .. } = &error else { panic!("{error}") };
            assert_eq!(*found, Some(line), "{text}: {error}");
            assert!(error.to_string().contains("/c/r/hosts.toml"), "{error}");
        }
    }

    #[test]
    fn unknown_keys_and_an_empty_server_are_nothing() {
        let read = read_text("server = \"\"\nnew_key = 1\n[host.\"m\"]\nother = [1]").unwrap();
        assert!(read.origin.root.is_none());
        assert_eq!(read.mirrors.len(), 1);
        assert!(read_text("").unwrap().mirrors.is_empty());
    }
}
