//! What would be done: the hosts of an image, and whether a login is good.

use std::path::PathBuf;

use reqwest::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode};
use serde::{Deserialize, Serialize};

use super::RegistryClient;
use super::answer::denied;
use super::call::{Call, Repository};
use super::transport::sensitive;
use crate::auth::{self, Challenge, Credential};
use crate::error::FetchError;
use crate::hosts::{Endpoint, Role};
use crate::reference::Reference;

/// A host that would be asked for an image, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Root of its API.
    pub url: String,
    /// `mirror` or `origin`.
    pub role: String,
    /// What it may be asked for: `pull`, `resolve`, `push`.
    pub capabilities: Vec<String>,
    /// The repository's path there.
    pub repository: String,
    /// What mirrors are told in `?ns=`.
    pub namespace: Option<String>,
    /// The file that names it; none: it follows from the reference.
    pub source: Option<PathBuf>,
    /// How connections are secured.
    pub tls: TlsReport,
    /// Names of the headers that are added; their values may be secrets.
    pub headers: Vec<String>,
    /// Where a credential was found, and of which kind it is.
    pub credential: Option<CredentialReport>,
    /// Why credentials could not be looked for.
    pub credential_error: Option<String>,
    /// The proxy on the way, without user and password.
    pub proxy: Option<String>,
    /// It could not be reached lately and is left out.
    pub resting: bool,
}

/// How connections to a host are secured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsReport {
    /// `https`, `http`, or `https or http` for an insecure registry.
    pub scheme: String,
    /// Whether certificates are checked.
    pub verify: bool,
    /// Authorities beside the system's.
    pub ca: Vec<PathBuf>,
    /// Certificates that are shown.
    pub client: Vec<PathBuf>,
    /// The file or directory that says so.
    pub source: Option<PathBuf>,
}

/// A credential, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialReport {
    /// `password` or `identity token`.
    pub kind: String,
    /// The user, where there is one.
    pub user: Option<String>,
    /// The file or credential helper.
    pub source: String,
}

impl RegistryClient {
    /// The hosts that would be asked for an image, in this order. Nothing is sent to them; credential helpers are asked.
    ///
    /// # Errors
    /// When the settings are malformed or block the image.
    pub async fn hosts(&self, reference: &Reference) -> Result<Vec<HostReport>, FetchError> {
        let plan = self.transport.hosts.plan(&Repository::of(reference)).await?;
        let mut reports = Vec::new();
        for endpoint in &plan.endpoints {
            reports.push(self.report(endpoint).await);
        }
        Ok(reports)
    }

    /// What short names mean by `registries.conf`, when that is not Docker Hub alone, and the file that says so.
    ///
    /// # Errors
    /// When the settings are malformed.
    pub async fn short_names(
        &self,
        reference: &Reference,
    ) -> Result<Option<(Vec<String>, PathBuf)>, FetchError> {
        let plan = self.transport.hosts.plan(&Repository::of(reference)).await?;
        Ok(plan.search.clone().filter(|(names, _)| names.as_slice() != ["docker.io"]))
    }

    async fn report(&self, at: &Endpoint) -> HostReport {
        let looked = self.transport.credentials.get(&at.credential_name, &at.repository).await;
        let (credential, credential_error) = match looked {
            Ok(found) => (found.map(|found| described(&found)), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let can = [("pull", at.can.pull), ("resolve", at.can.resolve), ("push", at.can.push)];
        let mut headers: Vec<String> = at.headers.keys().map(ToString::to_string).collect();
        headers.dedup();
        HostReport {
            url: at.root.to_string(),
            role: match at.role {
                Role::Mirror => "mirror",
                Role::Origin => "origin",
            }
            .to_owned(),
            capabilities: can.into_iter().filter(|(_, can)| *can).map(|(name, _)| name.to_owned()).collect(),
            repository: at.repository.clone(),
            namespace: at.namespace.clone(),
            source: at.from.clone(),
            tls: TlsReport {
                scheme: if at.may_be_plain { "https or http" } else { at.root.scheme() }.to_owned(),
                verify: !at.tls.skip_verify && at.root.scheme() == "https",
                ca: at.tls.ca.clone(),
                client: at.tls.client.iter().map(|(cert, _)| cert.clone()).collect(),
                source: at.tls.from.clone(),
            },
            headers,
            credential,
            credential_error,
            proxy: self.transport.pools.proxy_shown(&at.root),
            resting: at.is_mirror() && self.transport.health.rests(at),
        }
    }

    /// Whether the registry of a reference takes this user and password. Nothing is kept.
    ///
    /// # Errors
    /// When it does not, or cannot be asked.
    pub async fn check_login(
        &self,
        reference: &Reference,
        user: &str,
        password: &str,
    ) -> Result<(), FetchError> {
        let repository = Repository::of(reference);
        let plan = self.transport.hosts.plan(&repository).await?;
        let Some(at) = plan.endpoints.last() else { return Ok(()) };
        let call = Call::get(&repository, String::new());
        let first = self.ping(at, None).await?;
        if first.status().is_success() {
            return Ok(());
        }
        let values = first.headers().get_all(WWW_AUTHENTICATE);
        let challenges = auth::parse_challenges(values.iter().filter_map(|v| v.to_str().ok()));
        let credential = Credential::Password { user: user.to_owned(), password: password.to_owned() };
        let bearer = challenges.iter().find_map(|c| match c {
            Challenge::Bearer { realm, service, .. } => Some((realm, service)),
            Challenge::Basic => None,
        });
        let value = match bearer {
            Some((realm, service)) => {
                let service = service.as_deref();
                let request = auth::token_request(first.url(), realm, service, "", Some(&credential))?;
                let policy = self.transport.policy();
                let token = policy.run(|| self.transport.fetch_token(&call, at, &request)).await?;
                token.value.to_string()
            }
            None if challenges.contains(&Challenge::Basic) => auth::basic(user, password),
            None => return Err(denied(&call, at, "it wants a kind of login that is not known here")),
        };
        let second = self.ping(at, Some(&value)).await?;
        if second.status().is_success() {
            return Ok(());
        }
        let said = self.transport.error_detail(second).await;
        Err(denied(&call, at, said.as_deref().unwrap_or("the user name or password is wrong")))
    }

    /// GET of the API's root, which every registry answers with 200 or a challenge.
    async fn ping(&self, at: &Endpoint, authorization: Option<&str>) -> Result<Response, FetchError> {
        let transport = &self.transport;
        let base = transport.base_url(at).await?;
        let client = transport.pools.get(transport.way_to(&base, at, false).await)?.client;
        let mut headers = at.headers.clone();
        if let Some(value) = authorization {
            headers.insert(AUTHORIZATION, sensitive(value)?);
        }
        let send = || {
            let request = client.get(base.clone()).headers(headers.clone());
            async { transport.timed(&at.host(), "a login", request.send()).await }
        };
        let response = transport.policy().run(send).await?;
        let status = response.status();
        if status.is_success() || status == StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        if status == StatusCode::FORBIDDEN {
            let repository = Repository {
                registry: at.credential_name.clone(),
                path: at.repository.clone(),
                pinned: false,
            };
            let call = Call::get(&repository, String::new());
            let said = transport.error_detail(response).await;
            return Err(denied(&call, at, said.as_deref().unwrap_or("no permission")));
        }
        let what = "a login".to_owned();
        Err(FetchError::Server { host: at.host(), status: status.as_u16(), what, retry_after: None })
    }
}

fn described(found: &auth::Found) -> CredentialReport {
    let (kind, user) = match &found.credential {
        Credential::Password { user, .. } => ("password", Some(user.clone())),
        Credential::IdentityToken(_) => ("identity token", None),
        Credential::RegistryToken(_) => ("registry token", None),
    };
    CredentialReport { kind: kind.to_owned(), user, source: found.source.clone() }
}
