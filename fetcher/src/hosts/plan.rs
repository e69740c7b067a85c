//! From the files to the hosts of a repository.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::endpoint::{Capabilities, Endpoint, Role, TlsSettings, is_loopback};
use super::hosts_toml::{self, HostEntry, HostsToml};
use super::registries_conf::{self, Registry, When};
use super::stamp::{Reader, Stamp};
use super::{HostFiles, certs};
use crate::client::{Repository, host_of};
use crate::error::FetchError;

/// The files are looked at again when the last look is older.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Repositories remembered. Redirects are foreign text and may name any number of hosts.
const MAX_PLANS: usize = 1024;
/// Docker Hub's name in references, and the host that serves it.
const HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// Finds the hosts of repositories.
pub(crate) struct Hosts {
    files: Arc<HostFiles>,
    /// Hosts whose certificate is not checked and that may speak plain http.
    insecure: Arc<Vec<String>>,
    plans: Mutex<HashMap<Repository, Known>>,
}

#[derive(Clone)]
struct Known {
    plan: Arc<Plan>,
    stamps: Arc<Vec<Stamp>>,
    looked: Instant,
}

/// The hosts of a repository in the order in which they are asked. At least one.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// What short names mean by `registries.conf`, and where that is said.
    pub(crate) search: Option<(Vec<String>, PathBuf)>,
}

impl Hosts {
    pub(crate) fn new(files: HostFiles, insecure: Vec<String>) -> Hosts {
        Hosts { files: Arc::new(files), insecure: Arc::new(insecure), plans: Mutex::default() }
    }

    /// The hosts of a repository, as the files say now.
    ///
    /// # Errors
    /// When a file is malformed or says that the registry is blocked.
    pub(crate) async fn plan(&self, repository: &Repository) -> Result<Arc<Plan>, FetchError> {
        let known = self.known(repository);
        if let Some(known) = &known
            && (known.looked.elapsed() < LOOK_AGAIN || known.stamps.is_empty())
        {
            return Ok(Arc::clone(&known.plan));
        }
        let (files, insecure) = (Arc::clone(&self.files), Arc::clone(&self.insecure));
        let wanted = repository.clone();
        let look = move || match known {
            Some(known) if known.stamps.iter().all(Stamp::holds) => {
                Ok(Known { looked: Instant::now(), ..known })
            }
            _ => load(&files, &insecure, &wanted),
        };
        let found = tokio::task::spawn_blocking(look).await;
        let found = found.unwrap_or(Err(FetchError::Interrupted { what: "reading registry settings" }))?;
        let plan = Arc::clone(&found.plan);
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        plans.insert(repository.clone(), found);
        Ok(plan)
    }

    /// As `plan`, but what was known stays good while the files are broken: readers of running containers must not
    /// suffer from somebody who is just editing them.
    pub(crate) async fn plan_for_readers(&self, repository: &Repository) -> Result<Arc<Plan>, FetchError> {
        match (self.plan(repository).await, self.known(repository)) {
            (Err(error), Some(known)) => {
                tracing::warn!(%error, "registry settings from before are used");
                Ok(known.plan)
            }
            (result, _) => result,
        }
    }

    /// How a connection to a URL's host is secured, whatever leads there.
    pub(crate) async fn tls_of(&self, url: &Url) -> TlsSettings {
        let host = Repository { registry: host_of(url), path: String::new(), pinned: false };
        let Ok(plan) = self.plan_for_readers(&host).await else { return TlsSettings::default() };
        let own = plan.endpoints.iter().rev().find(|e| crate::client::same_origin(&e.root, url));
        own.map(|e| e.tls.clone()).unwrap_or_default()
    }

    fn known(&self, repository: &Repository) -> Option<Known> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).get(repository).cloned()
    }
}

/// Reads the files (blocking).
fn load(files: &HostFiles, insecure: &[String], repository: &Repository) -> Result<Known, FetchError> {
    let mut loader = Loader { files, insecure, reader: Reader::default() };
    let conf = registries_conf::read(files, &mut loader.reader)?;
    let registry = conf.find(&repository.name());
    if let Some(blocked) = registry.filter(|r| r.blocked) {
        return Err(FetchError::Blocked { image: repository.name(), file: blocked.file.clone() });
    }
    let endpoints = match (loader.hosts_toml(&repository.registry)?, registry) {
        (Some((path, toml)), _) => loader.by_toml(repository, &path, toml)?,
        (None, Some(registry)) => loader.by_conf(repository, registry)?,
        (None, None) => {
            let own = Place { host: &repository.registry, repository: &repository.path };
            vec![loader.endpoint(own, Role::Origin, false, None)?]
        }
    };
    let plan = Plan { endpoints: endpoints.into_iter().map(Arc::new).collect(), search: conf.search };
    Ok(Known { plan: Arc::new(plan), stamps: Arc::new(loader.reader.stamps), looked: Instant::now() })
}

struct Loader<'a> {
    files: &'a HostFiles,
    insecure: &'a [String],
    reader: Reader,
}

/// A repository at a host.
#[derive(Clone, Copy)]
struct Place<'a> {
    host: &'a str,
    repository: &'a str,
}

impl Loader<'_> {
    /// The directory of a host: the first that exists, as containerd looks for it.
    fn dir_of(&mut self, host: &str) -> Option<PathBuf> {
        // Redirects name hosts too, and they are foreign text: no such name leads out of the directories.
        if host.starts_with('.') || host.contains(['/', '\\', '\0']) {
            return None;
        }
        let spelled = match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => Some(format!("{name}_{port}_")),
            _ => None,
        };
        for root in &self.files.hosts_dirs {
            let names = spelled.as_deref().into_iter().chain([host, "_default"]);
            for dir in names.map(|name| root.join(name)) {
                if self.reader.exists(&dir) {
                    return Some(dir);
                }
            }
        }
        None
    }

    fn hosts_toml(&mut self, host: &str) -> Result<Option<(PathBuf, HostsToml)>, FetchError> {
        let Some(dir) = self.dir_of(host) else { return Ok(None) };
        let path = dir.join("hosts.toml");
        match self.reader.text(&path)? {
            Some(text) if !text.is_empty() => {
                let toml = hosts_toml::read(&path, &dir, &text, &mut self.reader)?;
                Ok(Some((path, toml)))
            }
            _ => Ok(None),
        }
    }

    /// How a host is secured that no `hosts.toml` of another registry names.
    fn tls_of(&mut self, host: &str) -> Result<TlsSettings, FetchError> {
        if let Some((_, toml)) = self.hosts_toml(host)? {
            return Ok(toml.origin.tls);
        }
        match self.dir_of(host) {
            Some(dir) => certs::in_dir(&dir, &mut self.reader),
            None => Ok(TlsSettings::default()),
        }
    }

    fn by_toml(
        &mut self,
        repository: &Repository,
        path: &Path,
        toml: HostsToml,
    ) -> Result<Vec<Endpoint>, FetchError> {
        let registry = &repository.registry;
        let mut endpoints = Vec::new();
        let entries = toml.mirrors.into_iter().map(|m| (m, false)).chain([(toml.origin, true)]);
        for (entry, last) in entries {
            let HostEntry { root, can, tls, headers, dial_timeout } = entry;
            let own = Place { host: registry, repository: &repository.path };
            let mut endpoint = match root {
                None => Endpoint {
                    // containerd lets the registry itself do everything unless it is named.
                    can: Capabilities::ALL,
                    ..at(own, tls, self.insecure)?
                },
                Some(root) => {
                    let host = host_of(&root);
                    let foreign = host != *registry && (registry.as_str(), host.as_str()) != HUB;
                    let mut tls = tls;
                    tls.skip_verify |= self.insecure.contains(&host);
                    Endpoint {
                        may_be_plain: false,
                        role: if foreign && !last { Role::Mirror } else { Role::Origin },
                        can,
                        tls,
                        headers: HeaderMap::new(),
                        namespace: foreign.then(|| registry.clone()),
                        repository: repository.path.clone(),
                        credential_name: credential_name(&host),
                        dial_timeout: None,
                        from: Some(path.to_owned()),
                        root,
                    }
                }
            };
            (endpoint.headers, endpoint.dial_timeout) = (headers, dial_timeout);
            endpoints.push(endpoint);
        }
        Ok(endpoints)
    }

    fn by_conf(&mut self, repository: &Repository, conf: &Registry) -> Result<Vec<Endpoint>, FetchError> {
        let name = repository.name();
        let mut endpoints = Vec::new();
        for mirror in &conf.mirrors {
            if mirror.when == When::Tags && repository.pinned {
                continue;
            }
            let place = conf.place_in(mirror, &name);
            let mut endpoint =
                self.endpoint(split(&place), Role::Mirror, mirror.insecure, Some(&conf.file))?;
            endpoint.can = Capabilities { pull: true, resolve: mirror.when != When::Digests, push: false };
            endpoints.push(endpoint);
        }
        let place = conf.place(&name);
        endpoints.push(self.endpoint(split(&place), Role::Origin, conf.insecure, Some(&conf.file))?);
        Ok(endpoints)
    }

    fn endpoint(
        &mut self,
        place: Place<'_>,
        role: Role,
        insecure: bool,
        from: Option<&Path>,
    ) -> Result<Endpoint, FetchError> {
        let tls = self.tls_of(place.host)?;
        let named = [place.host.to_owned()];
        let insecure = if insecure { &named[..] } else { self.insecure };
        Ok(Endpoint { role, from: from.map(Path::to_owned), ..at(place, tls, insecure)? })
    }
}

/// A registry by its name, with nothing said about it but its certificates.
fn at(place: Place<'_>, mut tls: TlsSettings, insecure: &[String]) -> Result<Endpoint, FetchError> {
    let host = if place.host == HUB.0 { HUB.1 } else { place.host };
    let parse = |scheme: &str| {
        Url::parse(&format!("{scheme}://{host}/v2/")).map_err(|e| FetchError::Unreachable {
            host: host.to_owned(),
            reason: format!("not a host name: {e}"),
        })
    };
    let insecure = insecure.iter().any(|name| name == place.host || name == host);
    let mut root = parse("https")?;
    let plain = is_loopback(&root) && tls.is_plain();
    if plain {
        root = parse("http")?;
    }
    tls.skip_verify |= insecure;
    Ok(Endpoint {
        root,
        may_be_plain: insecure && !plain,
        role: Role::Origin,
        can: Capabilities::ALL,
        tls,
        headers: HeaderMap::new(),
        namespace: None,
        repository: place.repository.to_owned(),
        credential_name: credential_name(host),
        dial_timeout: None,
        from: None,
    })
}

/// `host/path` at its first slash.
fn split(place: &str) -> Place<'_> {
    let (host, repository) = place.split_once('/').unwrap_or((place, ""));
    Place { host, repository }
}

fn credential_name(host: &str) -> String {
    if host == HUB.1 { HUB.0.to_owned() } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(registry: &str, path: &str) -> Repository {
        Repository { registry: registry.to_owned(), path: path.to_owned(), pinned: false }
    }

    fn shown(plan: &Plan) -> Vec<String> {
        let one = |e: &Arc<Endpoint>| format!("{}{}", e.root, e.repository);
        plan.endpoints.iter().map(one).collect()
    }

    fn dirs(dir: &Path) -> HostFiles {
        HostFiles {
            hosts_dirs: vec![dir.join("a"), dir.join("b")],
            registries_conf: vec![dir.join("none"), dir.join("registries.conf")],
            registries_conf_dirs: vec![],
        }
    }

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[tokio::test]
    async fn defaults_are_dockers() {
        let hosts = Hosts::new(HostFiles::default(), vec!["i.example:5000".to_owned()]);
        let hub = hosts.plan(&repository("docker.io", "library/redis")).await.unwrap();
        assert_eq!(shown(&hub), ["https://registry-1.docker.io/v2/library/redis"]);
        assert_eq!(hub.endpoints[0].credential_name, "docker.io");
        assert_eq!(hub.endpoints[0].namespace, None);
        let local = hosts.plan(&repository("127.0.0.1:5000", "a")).await.unwrap();
        assert_eq!(shown(&local), ["http://127.0.0.1:5000/v2/a"]);
        let insecure = hosts.plan(&repository("i.example:5000", "a")).await.unwrap();
        assert!(insecure.endpoints[0].may_be_plain && insecure.endpoints[0].tls.skip_verify);
    }

    #[tokio::test]
    async fn directories_are_found_as_containerd_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::new(dirs(dir.path()), Vec::new());
        write(&dir.path().join("b/r.example:5000/hosts.toml"), "[host.\"https://second\"]");
        write(&dir.path().join("b/_default/hosts.toml"), "[host.\"https://any\"]");
        write(&dir.path().join("a/r.example_5000_/hosts.toml"), "[host.\"https://first\"]");
        write(&dir.path().join("a/c.example/x.crt"), "");
        let of = async |name: &str| shown(&hosts.plan(&repository(name, "x")).await.unwrap());
        assert_eq!(of("r.example:5000").await, ["https://first/v2/x", "https://r.example:5000/v2/x"]);
        assert_eq!(of("other").await, ["https://any/v2/x", "https://other/v2/x"]);
        assert_eq!(of("c.example").await, ["https://c.example/v2/x"]);
        let plan = hosts.plan(&repository("c.example", "x")).await.unwrap();
        assert_eq!(plan.endpoints[0].tls.ca, [dir.path().join("a/c.example/x.crt")]);
        let plan = hosts.plan(&repository("other", "x")).await.unwrap();
        assert_eq!(plan.endpoints[0].namespace.as_deref(), Some("other"));
        assert_eq!(plan.endpoints[1].namespace, None);
    }

    #[tokio::test]
    async fn no_host_leads_out_of_the_directories() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::new(dirs(dir.path()), Vec::new());
        write(&dir.path().join("a/inside.crt"), "");
        write(&dir.path().join("outside.crt"), "");
        for host in [".", "..", "../a", "../../etc"] {
            let url = Url::parse(&format!("https://{host}/x"));
            let named = hosts.plan(&repository(host, "x")).await;
            assert!(named.is_err() || named.is_ok_and(|p| p.endpoints[0].tls.is_plain()), "{host}");
            if let Ok(url) = url {
                assert!(hosts.tls_of(&url).await.is_plain(), "{host}");
            }
        }
    }

    #[tokio::test]
    async fn certificates_make_loopback_https_and_need_their_keys() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::new(dirs(dir.path()), Vec::new());
        let certs = dir.path().join("a/127.0.0.1:5000");
        write(&certs.join("ca.crt"), "");
        write(&certs.join("client.cert"), "");
        let error = hosts.plan(&repository("127.0.0.1:5000", "a")).await.unwrap_err();
        assert!(error.to_string().contains("client.key is missing"), "{error}");
        write(&certs.join("client.key"), "");
        let plan = hosts.plan(&repository("127.0.0.1:5000", "a")).await.unwrap();
        assert_eq!(shown(&plan), ["https://127.0.0.1:5000/v2/a"]);
        assert_eq!(plan.endpoints[0].tls.client.len(), 1);
    }

    #[tokio::test]
    async fn registries_conf_counts_where_there_is_no_hosts_toml() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::new(dirs(dir.path()), Vec::new());
        let conf = "[[registry]]\nlocation = \"docker.io\"\n[[registry.mirror]]\nlocation = \"m.example/hub\"\n\
             pull-from-mirror = \"tag-only\"\n[[registry]]\nlocation = \"bad.example\"\nblocked = true";
        write(&dir.path().join("registries.conf"), conf);
        let redis = repository("docker.io", "library/redis");
        let plan = hosts.plan(&redis).await.unwrap();
        assert_eq!(
            shown(&plan),
            ["https://m.example/v2/hub/library/redis", "https://registry-1.docker.io/v2/library/redis"]
        );
        assert_eq!(plan.endpoints[0].namespace, None, "the name there says it all");
        let pinned = Repository { pinned: true, ..redis.clone() };
        assert_eq!(hosts.plan(&pinned).await.unwrap().endpoints.len(), 1);
        let error = hosts.plan(&repository("bad.example", "x")).await.unwrap_err();
        assert!(matches!(error, FetchError::Blocked { .. }), "{error}");
        write(&dir.path().join("b/docker.io/hosts.toml"), "server = \"https://s.example\"");
        let hosts = Hosts::new(dirs(dir.path()), Vec::new());
        assert_eq!(shown(&hosts.plan(&redis).await.unwrap()), ["https://s.example/v2/library/redis"]);
    }

    #[tokio::test]
    async fn changes_are_noticed_and_readers_survive_mistakes() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::new(dirs(dir.path()), Vec::new());
        let of = repository("r.example", "x");
        assert_eq!(hosts.plan(&of).await.unwrap().endpoints.len(), 1);
        let age = || {
            let old = Instant::now().checked_sub(LOOK_AGAIN * 2).unwrap();
            hosts.plans.lock().unwrap().values_mut().for_each(|k| k.looked = old);
        };
        let path = dir.path().join("a/r.example/hosts.toml");
        write(&path, "[host.\"m\"]");
        assert_eq!(hosts.plan(&of).await.unwrap().endpoints.len(), 1, "not looked at twice in a second");
        age();
        assert_eq!(hosts.plan(&of).await.unwrap().endpoints.len(), 2);
        write(&path, "[host.");
        age();
        let error = hosts.plan(&of).await.unwrap_err();
        assert!(error.to_string().contains("hosts.toml, line 1"), "{error}");
        assert_eq!(hosts.plan_for_readers(&of).await.unwrap().endpoints.len(), 2);
        std::fs::remove_file(&path).unwrap();
        age();
        assert_eq!(hosts.plan(&of).await.unwrap().endpoints.len(), 1);
    }
}
