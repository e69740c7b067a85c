//! What refers to a manifest: the referrers API, and the list under a tag where a registry lacks the API
//! (distribution-spec, "Listing Referrers" and "Referrers Tag Schema").

use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::try_join_all;
use lazyrun_index::Digest;
use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};
use serde_json::{Value, json};

use super::RegistryClient;
use super::ask::Ask;
use super::call::{Call, Repository};
use super::redirect::same_origin;
use super::transport::host_of;
use crate::artifact::{Descriptor, parse_descriptors};
use crate::error::FetchError;
use crate::hosts::{Endpoint, Lack, Need};
use crate::manifest::{MAX_MANIFEST, OCI_INDEX};
use crate::reference::Reference;

/// Pages of one answer that are read.
const MAX_PAGES: usize = 8;
/// Referrers that are looked at.
const MAX_REFERRERS: usize = 1000;
/// How often a list under a tag is written before giving up against other writers.
const LIST_TRIES: u32 = 6;
/// Least time after which a written list is looked at again.
const SETTLE: Duration = Duration::from_millis(50);

impl RegistryClient {
    /// Descriptors of the artifacts of the given types (all, if none is given) whose subject is `subject`.
    /// They are what the registry says: nothing about them is verified.
    ///
    /// At most 1000 are returned; answers are read up to 8 pages of 4 MiB.
    ///
    /// # Errors
    /// When neither the API nor the list under the tag can be read. Having neither is an empty answer.
    pub async fn referrers(
        &self,
        reference: &Reference,
        subject: Digest,
        artifact_types: &[&str],
    ) -> Result<Vec<Descriptor>, FetchError> {
        let repository = Repository::of(reference);
        let api = async {
            if artifact_types.is_empty() {
                return self.ask_api(&repository, subject, None).await;
            }
            let asked = artifact_types.iter().map(|one| self.ask_api(&repository, subject, Some(one)));
            Ok(try_join_all(asked).await?.into_iter().flatten().collect())
        };
        let wanted = |d: &Descriptor| {
            artifact_types.is_empty()
                || d.artifact_type.as_deref().is_some_and(|t| artifact_types.contains(&t))
        };
        let mut found = if self.knows_referrers(&repository) {
            api.await?
        } else {
            // Both at once: which of the two answers is not known yet, and this stands before a start.
            let (api, listed) = tokio::join!(api, self.listed(&repository, subject));
            match api {
                Ok(found) => {
                    self.note_referrers(&repository);
                    found
                }
                Err(error) if error.is_transient() => return Err(error),
                // 404 by the specification; others answer 400, 405, with a web page, or ask for a login.
                Err(error) => listed.map_err(|_| error)?.into_iter().filter(wanted).collect(),
            }
        };
        found.truncate(MAX_REFERRERS);
        Ok(found)
    }

    fn knows_referrers(&self, repository: &Repository) -> bool {
        let known = self.transport.referrers_api.lock();
        known.unwrap_or_else(std::sync::PoisonError::into_inner).contains(&repository.registry)
    }

    fn note_referrers(&self, repository: &Repository) {
        let known = self.transport.referrers_api.lock();
        known.unwrap_or_else(std::sync::PoisonError::into_inner).insert(repository.registry.clone());
    }

    /// The referrers API of the first host that has it, all pages.
    async fn ask_api(
        &self,
        repository: &Repository,
        subject: Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, FetchError> {
        let ask = Ask { with: Some(Lack::Referrers), ..Ask::new(repository, Need::Pull) };
        let at_host = |at: Arc<Endpoint>| async move {
            let asked = self.ask_api_at(repository, &at, subject, artifact_type).await;
            if matches!(asked, Err(FetchError::Server { status: 404, .. })) && at.is_mirror() {
                self.transport.health.lacks(&at, Lack::Referrers);
            }
            asked
        };
        self.transport.on_hosts(&ask, at_host).await
    }

    async fn ask_api_at(
        &self,
        repository: &Repository,
        at: &Endpoint,
        subject: Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, FetchError> {
        let mut resource = format!("referrers/{subject}");
        if let Some(artifact_type) = artifact_type {
            let query: String = reqwest::Url::parse_with_params("query:", [("artifactType", artifact_type)])
                .ok()
                .and_then(|u| u.query().map(str::to_owned))
                .unwrap_or_default();
            resource = format!("{resource}?{query}");
        }
        let mut call = Call { accept: Some(OCI_INDEX), ..Call::get(repository, resource) };
        let mut found = Vec::new();
        for _ in 0..MAX_PAGES {
            let (page, filtered, next) = self.api_page(&call, at).await?;
            found.extend(page.into_iter().filter(|d| match (&d.artifact_type, artifact_type) {
                (Some(held), Some(wanted)) => held == wanted,
                // A descriptor without a type is believed if the registry says that it has filtered.
                (None, Some(_)) => filtered,
                (_, None) => true,
            }));
            match next {
                Some(next) if found.len() < MAX_REFERRERS => call.place = Some(next),
                _ => break,
            }
        }
        Ok(found)
    }

    /// One page: its descriptors, whether it is filtered, where the next one is.
    async fn api_page(
        &self,
        call: &Call<'_>,
        at: &Endpoint,
    ) -> Result<(Vec<Descriptor>, bool, Option<Url>), FetchError> {
        let response = self.transport.send(call, at).await?;
        let (url, headers) = (response.url().clone(), response.headers().clone());
        let body = self.transport.body(response, "the referrers", MAX_MANIFEST).await?;
        let fail = |reason: &str| self.transport.protocol(&host_of(&url), call, reason);
        let page = parse_descriptors(&body).ok_or_else(|| fail("it is not an image index"))?;
        let applied = headers.get("oci-filters-applied").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let filtered = applied.split(',').any(|f| f.trim() == "artifactType");
        let next = match next_link(&headers) {
            Some(link) => Some(
                url.join(&link)
                    .ok()
                    .filter(|next| same_origin(&url, next))
                    .ok_or_else(|| fail("its next page is at another host"))?,
            ),
            None => None,
        };
        Ok((page, filtered, next))
    }

    /// The list under the tag; a missing one is empty.
    async fn listed(&self, repository: &Repository, subject: Digest) -> Result<Vec<Descriptor>, FetchError> {
        let Some(bytes) = self.find_manifest(repository, &tag_of(subject), None, OCI_INDEX).await? else {
            return Ok(Vec::new());
        };
        parse_descriptors(&bytes).ok_or_else(|| not_a_list(repository, subject))
    }

    /// Adds an artifact to the list under its subject's tag.
    pub(super) async fn list_referrer(
        &self,
        repository: &Repository,
        subject: Digest,
        artifact: &Descriptor,
    ) -> Result<(), FetchError> {
        let digest = artifact.digest.to_string();
        let entry = artifact.to_json();
        self.change_list(repository, subject, |list| {
            if list.iter().any(|e| e["digest"] == digest.as_str()) {
                return false;
            }
            list.push(entry.clone());
            true
        })
        .await
    }

    /// Takes an artifact out of the list under its subject's tag, if there is such a list.
    pub(crate) async fn unlist_referrer(
        &self,
        reference: &Reference,
        subject: Digest,
        artifact: Digest,
    ) -> Result<(), FetchError> {
        let digest = artifact.to_string();
        self.change_list(&Repository::of(reference), subject, |list| {
            let before = list.len();
            list.retain(|e| e["digest"] != digest.as_str());
            list.len() != before
        })
        .await
    }

    /// Changes the list under a tag until the change is seen to have lasted.
    ///
    /// Registries have no conditional PUT: between reading and writing another writer's change can get lost, or
    /// ours by its. So the list is read again some time after each write (longer than a writer needs between
    /// reading and writing), and changed again if the change is gone.
    async fn change_list(
        &self,
        repository: &Repository,
        subject: Digest,
        change: impl Fn(&mut Vec<Value>) -> bool,
    ) -> Result<(), FetchError> {
        let _turn = self.transport.referrers_turn.lock().await;
        let tag = tag_of(subject);
        let mut written = false;
        let mut wait = SETTLE;
        for attempt in 0..LIST_TRIES {
            let began = Instant::now();
            // A mirror may have an old one.
            let ask = Ask::new(repository, Need::Push);
            let held = self.find_manifest_at(&ask, &tag, OCI_INDEX).await?;
            let mut index = match &held {
                Some(bytes) => read_list(bytes).ok_or_else(|| not_a_list(repository, subject))?,
                None => empty_list(),
            };
            let Some(list) = index["manifests"].as_array_mut() else {
                return Err(not_a_list(repository, subject));
            };
            if !change(list) {
                return Ok(());
            }
            if written {
                tracing::debug!(%subject, attempt, "another writer changed the list of referrers at the same time");
            }
            self.write_list(repository, &tag, &mut index).await?;
            written = true;
            // Different writers wait for different times, or they would meet again.
            let jitter = std::hash::RandomState::new().build_hasher().finish() % 50;
            wait = wait.max(began.elapsed() * 3) + Duration::from_millis(jitter);
            tokio::time::sleep(wait).await;
        }
        Err(FetchError::Protocol {
            host: repository.registry.clone(),
            what: format!("the list of referrers of {subject}"),
            reason: "other writers kept changing it at the same time".to_owned(),
        })
    }

    /// Writes a list. Registries refuse one that names manifests they do not have any more: those are dropped.
    async fn write_list(
        &self,
        repository: &Repository,
        tag: &str,
        index: &mut Value,
    ) -> Result<(), FetchError> {
        let put = |index: &Value| Bytes::from(index.to_string());
        match self.put_manifest(repository, tag, OCI_INDEX, put(index)).await {
            Err(FetchError::Rejected { .. }) => {}
            other => return other.map(drop),
        }
        let list = index["manifests"].as_array().cloned().unwrap_or_default();
        let mut alive = Vec::new();
        for entry in list {
            let name = entry["digest"].as_str().unwrap_or_default().to_owned();
            if self.probe(repository, format!("manifests/{name}")).await? {
                alive.push(entry);
            }
        }
        index["manifests"] = Value::Array(alive);
        self.put_manifest(repository, tag, OCI_INDEX, put(index)).await.map(drop)
    }
}

/// The tag under which the referrers of a manifest are listed.
fn tag_of(subject: Digest) -> String {
    format!("sha256-{}", subject.hex())
}

fn empty_list() -> Value {
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})
}

/// A list as it is, fields we do not know included; `None` if it is none or too long.
fn read_list(bytes: &[u8]) -> Option<Value> {
    let index: Value = serde_json::from_slice(bytes).ok()?;
    let list = index.get("manifests")?.as_array()?;
    // Digests become part of URLs.
    let plain = |e: &Value| {
        e["digest"].as_str().is_some_and(|d| d.bytes().all(|b| b.is_ascii_alphanumeric() || b == b':'))
    };
    (list.len() < MAX_REFERRERS && list.iter().all(plain)).then_some(index)
}

fn not_a_list(repository: &Repository, subject: Digest) -> FetchError {
    FetchError::Protocol {
        host: repository.registry.clone(),
        what: format!("the list of referrers of {subject}"),
        reason: "what lies under its tag is not a list of manifests".to_owned(),
    }
}

/// The URL of `Link: <url>; rel="next"` (RFC 8288).
fn next_link(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(LINK).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).find_map(|link| {
        let (url, params) = link.trim().strip_prefix('<')?.split_once('>')?;
        let next = params.split(';').any(|p| {
            let p = p.trim().to_ascii_lowercase();
            p == "rel=next" || p == "rel=\"next\""
        });
        next.then(|| url.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_next_page() {
        let headers = |v: &str| HeaderMap::from_iter([(LINK, v.parse().unwrap())]);
        let next = |v| next_link(&headers(v));
        assert_eq!(next("</v2/a/referrers/x?n=1>; rel=\"next\"").unwrap(), "/v2/a/referrers/x?n=1");
        assert_eq!(next("</a>; rel=prev, </b>; title=x; rel=next").unwrap(), "/b");
        assert_eq!(next("</a>; rel=prev"), None);
        assert_eq!(next("nonsense"), None);
    }

    #[test]
    fn lists_keep_what_is_not_known() {
        let text = br#"{"schemaVersion":2,"manifests":[{"digest":"sha512:ab","x":1}],"y":2}"#;
        let list = read_list(text).unwrap();
        assert_eq!(list["manifests"][0]["x"], 1);
        assert_eq!(list["y"], 2);
        for bad in ["", "[]", "{}", r#"{"manifests":[{"digest":"../x"}]}"#, r#"{"manifests":[{}]}"#] {
            assert!(read_list(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
