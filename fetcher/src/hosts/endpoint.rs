//! One host that can be asked, and everything that was said about it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::stamp::{Reader, Stamp};

/// What a host may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Content by digest.
    pub(crate) pull: bool,
    /// What a tag leads to.
    pub(crate) resolve: bool,
    /// Writing.
    pub(crate) push: bool,
}

impl Capabilities {
    pub(crate) const ALL: Capabilities = Capabilities { pull: true, resolve: true, push: true };
    pub(crate) const NONE: Capabilities = Capabilities { pull: false, resolve: false, push: false };

    pub(crate) fn allow(self, need: Need) -> bool {
        match need {
            Need::Pull => self.pull,
            Need::Resolve => self.resolve,
            Need::Push => self.push,
        }
    }
}

/// What a request needs of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Content by digest, which proves itself.
    Pull,
    /// The digest of a tag, for which the host's word is taken.
    Resolve,
    /// Writing, and reading what is about to be changed.
    Push,
}

/// Why a host is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// In place of the registry.
    Mirror,
    /// It is the registry.
    Origin,
}

/// How a connection is secured. Equal settings share connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct TlsSettings {
    /// Authorities that count beside the system's (PEM).
    pub(crate) ca: Vec<PathBuf>,
    /// Certificates to show, with keys (PEM); without a second file both lie in the first.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    /// The certificate is not checked.
    pub(crate) skip_verify: bool,
    /// What the files looked like: changed ones make other connections.
    pub(crate) stamps: Vec<Stamp>,
    /// The file or directory that says so.
    pub(crate) from: Option<PathBuf>,
}

impl TlsSettings {
    /// Whether nothing was said.
    pub(crate) fn is_plain(&self) -> bool {
        self.ca.is_empty() && self.client.is_empty() && !self.skip_verify
    }

    /// Notes what the files look like now.
    pub(crate) fn stamp(&mut self, reader: &mut Reader) {
        let keys = self.client.iter().flat_map(|(cert, key)| std::iter::once(cert).chain(key));
        let files: Vec<PathBuf> = self.ca.iter().chain(keys).cloned().collect();
        self.stamps = files.iter().map(|f| Stamp::of(f)).collect();
        reader.stamps.extend(self.stamps.iter().cloned());
    }
}

/// A host that may be asked for the contents of one repository.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// Root of its API with a slash at the end: `https://host:port/v2/`.
    pub(crate) root: Url,
    /// It may turn out to speak only plain http.
    pub(crate) may_be_plain: bool,
    pub(crate) role: Role,
    pub(crate) can: Capabilities,
    pub(crate) tls: TlsSettings,
    /// Headers for each request to it; values may be secrets.
    pub(crate) headers: HeaderMap,
    /// What goes into the query as `ns`: the registry that a mirror is asked about.
    pub(crate) namespace: Option<String>,
    /// The repository's path there.
    pub(crate) repository: String,
    /// Under what name its credentials are kept: `docker.io`, `host` or `host:port`.
    pub(crate) credential_name: String,
    /// Bound for connecting, when it is set.
    pub(crate) dial_timeout: Option<Duration>,
    /// The file that names it; none: it follows from the reference.
    pub(crate) from: Option<PathBuf>,
}

impl Endpoint {
    /// What tells it from other endpoints.
    pub(crate) fn key(&self) -> &str {
        self.root.as_str()
    }

    /// `host` or `host:port`.
    pub(crate) fn host(&self) -> String {
        crate::client::host_of(&self.root)
    }

    pub(crate) fn is_mirror(&self) -> bool {
        self.role == Role::Mirror
    }
}

/// Whether the URL's host is this machine by the loopback interface.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A path of a configuration file, which is relative to where that lies.
pub(crate) fn absolute(dir: &Path, path: &str) -> PathBuf {
    dir.join(path)
}
