//! Writing to a repository: blobs, manifests, and taking manifests away.

use std::sync::Arc;

use bytes::Bytes;
use lazyrun_index::Digest;
use reqwest::header::LOCATION;
use reqwest::{Method, StatusCode, Url};

use super::RegistryClient;
use super::ask::Ask;
use super::call::{Action, Call, Repository};
use super::transport::host_of;
use crate::error::FetchError;
use crate::hosts::{Endpoint, Need};
use crate::manifest::OCI_MANIFEST;
use crate::reference::Reference;

/// Header by which a registry says that it has taken note of a manifest's subject.
const OCI_SUBJECT: &str = "oci-subject";

/// How often a manifest is put again that the registry says not to have its digest.
const DOUBTS: usize = 3;

/// What became of a blob that should be in the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uploaded {
    /// It was there before.
    Existed,
    /// It was sent.
    Sent,
}

impl RegistryClient {
    /// Whether the repository has the blob.
    ///
    /// # Errors
    /// When the registry cannot say.
    pub async fn has_blob(&self, reference: &Reference, digest: Digest) -> Result<bool, FetchError> {
        let repository = Repository::of(reference);
        self.probe(&repository, format!("blobs/{digest}")).await
    }

    /// HEAD: whether there is such a thing.
    pub(super) async fn probe(&self, repository: &Repository, resource: String) -> Result<bool, FetchError> {
        let accept = Some(crate::manifest::ACCEPT).filter(|_| resource.starts_with("manifests/"));
        let call = Call { action: Action::Probe, accept, ..Call::get(repository, resource) };
        match self.write(&call).await {
            Ok(_) => Ok(true),
            Err(FetchError::Server { status: 404, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a call to where the repository is written.
    async fn write(&self, call: &Call<'_>) -> Result<reqwest::Response, FetchError> {
        let ask = Ask::new(call.repository, Need::Push);
        self.transport.ask(&ask, call, |response| std::future::ready(Ok(response))).await
    }

    /// Puts a blob into the repository unless it is there.
    ///
    /// # Errors
    /// When the registry does not take it after retries.
    pub async fn upload_blob(
        &self,
        reference: &Reference,
        digest: Digest,
        bytes: Bytes,
    ) -> Result<Uploaded, FetchError> {
        if self.has_blob(reference, digest).await? {
            return Ok(Uploaded::Existed);
        }
        let repository = Repository::of(reference);
        let ask = Ask::new(&repository, Need::Push);
        let once = |at: Arc<Endpoint>| {
            let (repository, bytes) = (&repository, &bytes);
            async move { self.upload_once(repository, &at, digest, bytes).await }
        };
        let upload = || self.transport.on_hosts(&ask, once);
        match upload().await {
            // The registry has lost the upload: it has to begin anew (distribution-spec, "Pushing blobs").
            Err(FetchError::Rejected { status: 404, .. }) => upload().await?,
            other => other?,
        }
        Ok(Uploaded::Sent)
    }

    async fn upload_once(
        &self,
        repository: &Repository,
        at: &Endpoint,
        digest: Digest,
        bytes: &Bytes,
    ) -> Result<(), FetchError> {
        let write = |method, content_type: Option<&str>, body| Action::Write {
            method,
            content_type: content_type.map(str::to_owned),
            body,
        };
        let begin = Call {
            action: write(Method::POST, None, Bytes::new()),
            ..Call::get(repository, "blobs/uploads/".to_owned())
        };
        let response = self.transport.send(&begin, at).await?;
        if response.status() == StatusCode::CREATED {
            return Ok(());
        }
        let location = response.headers().get(LOCATION).and_then(|v| v.to_str().ok());
        let mut place = upload_place(response.url(), location)
            .map_err(|reason| self.transport.protocol(&host_of(response.url()), &begin, reason))?;
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let finish = Call {
            place: Some(place),
            action: write(Method::PUT, Some("application/octet-stream"), bytes.clone()),
            ..Call::get(repository, format!("the upload of blob {digest}"))
        };
        self.transport.send(&finish, at).await.map(drop)
    }

    /// Puts a manifest under its digest. Says whether the registry has noted the manifest's subject: if not, it
    /// is for the client to list it among the subject's referrers.
    ///
    /// # Errors
    /// When the registry does not take it.
    pub(crate) async fn put_manifest(
        &self,
        repository: &Repository,
        name: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<bool, FetchError> {
        let call = Call {
            action: Action::Write {
                method: Method::PUT,
                content_type: Some(media_type.to_owned()),
                body: bytes,
            },
            ..Call::get(repository, format!("manifests/{name}"))
        };
        let policy = self.transport.policy();
        let mut patience = policy.delays().take(DOUBTS);
        loop {
            match self.write(&call).await {
                Ok(response) => return Ok(response.headers().contains_key(OCI_SUBJECT)),
                // The bytes have the digest they are named by, but the registry says no. One that keeps its links in
                // files says so when another client is just writing the link of a blob that both have.
                Err(error @ FetchError::Rejected { status: 400, .. }) if name.starts_with("sha256:") => {
                    tokio::time::sleep(patience.next().ok_or(error)?).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Puts an artifact's manifest, whose blobs must be there, beside its subject and makes it findable from
    /// there.
    ///
    /// # Errors
    /// When the registry does not take it, or the list of referrers cannot be changed.
    pub(crate) async fn put_artifact(
        &self,
        reference: &Reference,
        subject: Digest,
        artifact: &crate::artifact::Descriptor,
        bytes: Bytes,
    ) -> Result<(), FetchError> {
        let repository = Repository::of(reference);
        let name = artifact.digest.to_string();
        if self.put_manifest(&repository, &name, OCI_MANIFEST, bytes).await? {
            return Ok(());
        }
        self.list_referrer(&repository, subject, artifact).await
    }

    /// Takes a manifest out of the repository; `false` when it was not there.
    ///
    /// # Errors
    /// [`FetchError::Undeletable`] when the registry does not do that.
    pub async fn delete_manifest(&self, reference: &Reference, digest: Digest) -> Result<bool, FetchError> {
        let repository = Repository::of(reference);
        let call = Call { action: Action::Delete, ..Call::get(&repository, format!("manifests/{digest}")) };
        match self.write(&call).await {
            Ok(_) => Ok(true),
            Err(FetchError::Server { status: 404, .. } | FetchError::Rejected { status: 404, .. }) => {
                Ok(false)
            }
            Err(FetchError::Rejected { status: 400 | 405 | 501, host, .. }) => {
                Err(FetchError::Undeletable { host, digest })
            }
            Err(FetchError::Server { status: 501, host, .. }) => {
                Err(FetchError::Undeletable { host, digest })
            }
            Err(error) => Err(error),
        }
    }
}

/// Where an upload that was begun at `from` goes on.
fn upload_place(from: &Url, location: Option<&str>) -> Result<Url, &'static str> {
    let location = location.ok_or("it does not say where to upload to")?;
    let mut place = from.join(location).map_err(|_| "the place to upload to is not a URL")?;
    // A registry behind a proxy that does TLS for it may not know that it is spoken to by https.
    let downgraded = from.scheme() == "https" && place.scheme() == "http";
    if downgraded && place.host() == from.host() && place.port().is_none_or(|p| Some(p) == from.port()) {
        place.set_scheme("https").map_err(|()| "the place to upload to is not a URL")?;
    }
    super::redirect::next_hop(from, Some(place.as_str())).map_err(|_| "the place to upload to is not safe")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upload_places_are_checked() {
        let from = Url::parse("https://r.example/v2/a/blobs/uploads/").unwrap();
        let place = |l| upload_place(&from, Some(l)).map(|u| u.to_string());
        assert_eq!(place("/v2/a/x?_s=1").unwrap(), "https://r.example/v2/a/x?_s=1");
        assert_eq!(place("https://up.example/x").unwrap(), "https://up.example/x");
        assert_eq!(place("http://r.example/x").unwrap(), "https://r.example/x");
        assert!(place("http://other.example/x").is_err());
        assert!(place("https://u:p@r.example/x").is_err());
        assert!(upload_place(&from, None).is_err());
    }
}
