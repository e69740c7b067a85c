//! The registry client: distribution-spec over HTTP. Images are only read; artifacts that refer to them are
//! also written.

mod answer;
mod ask;
mod blob;
mod call;
mod classify;
mod gates;
mod hedge;
mod login;
mod multipart;
mod parts;
mod pools;
mod proxy;
mod push;
mod range;
mod redirect;
mod referrers;
mod retry;
mod show;
mod tls;
mod trail;
mod transport;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lazyrun_index::Digest;

pub use blob::{BlobReader, BlobSource};
pub(crate) use parts::{MAX_PARTS, PartsReader};
pub use proxy::Proxies;
pub(crate) use redirect::same_origin;
pub(crate) use transport::{Call, Repository, Transport, host_of};

use crate::auth::{Keychain, ProviderFiles};
use crate::error::FetchError;
use crate::hosts::{HostFiles, Need};
use crate::manifest::{self, Document, MAX_CONFIG, MAX_MANIFEST, ResolvedImage};
use crate::observe::Watch;
use crate::platform::Platform;
use crate::reference::Reference;
use crate::stats::{ClientStats, HostStats};
use ask::Ask;
use call::Action;

pub use push::Uploaded;
pub use show::{CredentialReport, HostReport, TlsReport};

/// Lists inside lists are followed this deep.
const MAX_LIST_DEPTH: usize = 2;

/// How a [`RegistryClient`] connects.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Registries (`host` or `host:port`) whose certificate is not checked and that may speak plain http.
    /// Loopback registries always speak plain http.
    pub insecure_registries: Vec<String>,
    /// Files with credentials, in the order in which they are looked at: Docker's `config.json`, `auth.json`. One that
    /// is missing holds none.
    pub credential_files: Vec<PathBuf>,
    /// The kubelet's plugins, which are asked for a credential when no file has one.
    pub credential_providers: Option<ProviderFiles>,
    /// Pull secrets of single repositories, which come before both.
    pub keychain: Option<Arc<Keychain>>,
    /// Files that say how registries are talked to.
    pub hosts: HostFiles,
    /// Proxies on the way to registries.
    pub proxies: Proxies,
    /// How long a mirror that could not be reached is left alone at first.
    pub mirror_rest: Duration,
    /// `User-Agent` header.
    pub user_agent: String,
    /// Bound for TCP and TLS handshakes.
    pub connect_timeout: Duration,
    /// Longest time without a byte before a request counts as failed.
    pub stall_timeout: Duration,
    /// How often a failed request is repeated.
    pub retries: usize,
    /// Wait before the first repetition; it doubles, with jitter.
    pub retry_base: Duration,
    /// Longest wait between repetitions. A server that asks for more gets no more requests.
    pub max_retry_wait: Duration,
    /// Who hears of the requests.
    pub watch: Watch,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            insecure_registries: Vec::new(),
            credential_files: Vec::new(),
            credential_providers: None,
            keychain: None,
            hosts: HostFiles::default(),
            proxies: Proxies::default(),
            mirror_rest: Duration::from_secs(10),
            user_agent: concat!("lazyrun/", env!("CARGO_PKG_VERSION")).to_owned(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(20),
            retries: 4,
            retry_base: Duration::from_millis(200),
            max_retry_wait: Duration::from_secs(30),
            watch: Watch::default(),
        }
    }
}

/// An image's manifest, verified, without its config.
pub(crate) struct FoundImage {
    pub(crate) manifest: Bytes,
    /// Digest of the config.
    config: Digest,
    /// The list that led to it.
    list: Option<Bytes>,
}

/// Talks to registries. Cheap to clone; clones share connections, tokens and counters.
#[derive(Clone)]
pub struct RegistryClient {
    transport: Arc<Transport>,
}

impl RegistryClient {
    /// A client; nothing is connected or read yet.
    ///
    /// # Errors
    /// When a proxy is named that cannot be used. Connections and certificates are set up on first use.
    pub fn new(options: ClientOptions) -> Result<Self, FetchError> {
        options.proxies.check()?;
        Ok(RegistryClient { transport: Arc::new(Transport::new(options)) })
    }

    /// The blobs of a reference's repository.
    pub fn blobs(&self, reference: &Reference) -> BlobSource {
        BlobSource { transport: Arc::clone(&self.transport), repository: Arc::new(Repository::of(reference)) }
    }

    /// Counters since the client was made.
    pub fn stats(&self) -> ClientStats {
        self.transport.counters.snapshot()
    }

    /// How the hosts that were asked have answered.
    pub fn host_stats(&self) -> Vec<HostStats> {
        let mut hosts = self.transport.counters.hosts();
        for (name, window) in self.transport.gates.windows() {
            if let Some(host) = hosts.iter_mut().find(|host| host.host == name) {
                host.window = Some(window);
            }
        }
        hosts
    }

    /// Fetches and verifies manifest and config of an image for a platform.
    ///
    /// # Errors
    /// When the image cannot be had, is malformed, or is of a kind that lazyrun does not run.
    pub async fn resolve(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<ResolvedImage, FetchError> {
        let found = self.find_image(reference, platform).await?;
        self.with_config(reference, found).await
    }

    /// The digest that a tag (or digest) leads to now, by a request without a body; `None` when the registry does not
    /// say.
    ///
    /// # Errors
    /// When the registry cannot be asked or has no such image.
    pub async fn tag_digest(&self, reference: &Reference) -> Result<Option<Digest>, FetchError> {
        let repository = Repository::of(reference);
        let resource = format!("manifests/{}", reference.manifest_name());
        let call = Call {
            action: Action::Probe,
            accept: Some(manifest::ACCEPT),
            ..Call::get(&repository, resource)
        };
        let ask = Ask::new(&repository, need_of(reference.digest));
        self.transport.ask(&ask, &call, |response| async move { Ok(claimed_digest(&response)) }).await
    }

    /// The manifest of an image for a platform.
    pub(crate) async fn find_image(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<FoundImage, FetchError> {
        let repository = Repository::of(reference);
        let mut bytes =
            self.manifest(reference, &repository, &reference.manifest_name(), reference.digest).await?;
        let mut list_bytes = None;
        for _ in 0..=MAX_LIST_DEPTH {
            match manifest::parse(reference, &bytes)? {
                Document::Image(image) => {
                    return Ok(FoundImage { manifest: bytes, config: image.config_digest, list: list_bytes });
                }
                Document::List(list) => {
                    let digest = manifest::choose(reference, &list, platform)?;
                    let chosen =
                        self.manifest(reference, &repository, &digest.to_string(), Some(digest)).await?;
                    list_bytes = Some(std::mem::replace(&mut bytes, chosen));
                }
            }
        }
        Err(FetchError::Invalid {
            image: reference.familiar(),
            what: "manifest",
            reason: "lists are nested too deep".to_owned(),
        })
    }

    /// The image of a manifest.
    pub(crate) async fn with_config(
        &self,
        reference: &Reference,
        found: FoundImage,
    ) -> Result<ResolvedImage, FetchError> {
        let repository = Repository::of(reference);
        let config = self.small_blob(&repository, found.config, "config", MAX_CONFIG).await?;
        let mut image = ResolvedImage::from_parts(reference.clone(), found.manifest, config)?;
        image.list = found.list;
        Ok(image)
    }

    /// One manifest, verified against `want` or, by tag, against the digest the registry claims.
    async fn manifest(
        &self,
        reference: &Reference,
        repository: &Repository,
        name: &str,
        want: Option<Digest>,
    ) -> Result<Bytes, FetchError> {
        match self.find_manifest(repository, name, want, manifest::ACCEPT).await? {
            Some(bytes) => Ok(bytes),
            None => Err(self.why_missing(reference, repository).await),
        }
    }

    /// As `manifest`, for any kind of manifest; `None` when there is none of that name.
    async fn find_manifest(
        &self,
        repository: &Repository,
        name: &str,
        want: Option<Digest>,
        accept: &'static str,
    ) -> Result<Option<Bytes>, FetchError> {
        let ask = Ask { blob: want, ..Ask::new(repository, need_of(want)) };
        self.find_manifest_at(&ask, name, accept).await
    }

    /// As `find_manifest`, from hosts of the caller's choice.
    async fn find_manifest_at(
        &self,
        ask: &Ask<'_>,
        name: &str,
        accept: &'static str,
    ) -> Result<Option<Bytes>, FetchError> {
        let call = Call { accept: Some(accept), ..Call::get(ask.repository, format!("manifests/{name}")) };
        let read = |response: reqwest::Response| async move {
            let (host, claimed) = (host_of(response.url()), claimed_digest(&response));
            let body = self.transport.body(response, "the manifest", MAX_MANIFEST).await?;
            match (ask.blob.or(claimed), Digest::of(&body)) {
                (Some(want), got) if want != got => {
                    Err(FetchError::WrongDigest { host, what: "manifest", want, got })
                }
                _ => Ok(body),
            }
        };
        match self.transport.ask(ask, &call, read).await {
            Ok(body) => Ok(Some(body)),
            Err(FetchError::Server { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The manifest of an artifact, verified; `None` when the repository does not have it.
    ///
    /// # Errors
    /// When it cannot be had, is larger than 4 MiB or does not have its digest.
    pub async fn artifact_manifest(
        &self,
        reference: &Reference,
        digest: Digest,
    ) -> Result<Option<Bytes>, FetchError> {
        let repository = Repository::of(reference);
        self.find_manifest(&repository, &digest.to_string(), Some(digest), manifest::ACCEPT).await
    }

    /// A manifest of any kind by tag or digest, verified by `want` or by the digest that the registry claims.
    pub(crate) async fn manifest_named(
        &self,
        reference: &Reference,
        name: &str,
        want: Option<Digest>,
    ) -> Result<Option<Bytes>, FetchError> {
        self.find_manifest(&Repository::of(reference), name, want, manifest::ACCEPT).await
    }

    /// A whole blob of at most `limit` bytes, verified. `what` names it in errors.
    ///
    /// # Errors
    /// When it cannot be had, is larger or does not have its digest.
    pub async fn blob(
        &self,
        reference: &Reference,
        digest: Digest,
        what: &'static str,
        limit: u64,
    ) -> Result<Bytes, FetchError> {
        self.small_blob(&Repository::of(reference), digest, what, limit).await
    }

    async fn small_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        what: &'static str,
        limit: u64,
    ) -> Result<Bytes, FetchError> {
        let call = Call::blob(repository, digest);
        let ask = Ask { blob: Some(digest), ..Ask::new(repository, Need::Pull) };
        let read = |response: reqwest::Response| async move {
            let host = host_of(response.url());
            let body = self.transport.body(response, &format!("the {what}"), limit).await?;
            let got = Digest::of(&body);
            if got == digest {
                Ok(body)
            } else {
                Err(FetchError::WrongDigest { host, what, want: digest, got })
            }
        };
        self.transport.ask(&ask, &call, read).await
    }

    /// Tells a missing repository from a missing tag. Only a registry that says so has no such repository; if it cannot
    /// be asked, or does not list tags to everybody, what is known is that the manifest is missing.
    async fn why_missing(&self, reference: &Reference, repository: &Repository) -> FetchError {
        let call = Call::get(repository, "tags/list?n=1".to_owned());
        let ask = Ask::new(repository, Need::Resolve);
        match self.transport.ask(&ask, &call, |_| std::future::ready(Ok(()))).await {
            Err(FetchError::Server { status: 404, .. }) => {
                FetchError::ImageNotFound { image: reference.familiar() }
            }
            _ => FetchError::TagNotFound {
                image: Reference { tag: None, digest: None, ..reference.clone() }.familiar(),
                tag: reference.manifest_name(),
            },
        }
    }
}

/// What a tag leads to is a question of trust; content by digest proves itself.
fn need_of(digest: Option<Digest>) -> Need {
    if digest.is_some() { Need::Pull } else { Need::Resolve }
}

/// The digest that a registry says a manifest has.
fn claimed_digest(response: &reqwest::Response) -> Option<Digest> {
    response.headers().get("docker-content-digest")?.to_str().ok()?.parse().ok()
}
