//! Asking the hosts of a repository one after the other until one has the answer.

use std::sync::Arc;
use std::time::Duration;

use lazyrun_index::Digest;

use super::call::{Call, Repository};
use super::transport::Transport;
use crate::error::FetchError;
use crate::hosts::{Endpoint, Lack, Need};
use reqwest::Response;

/// As long as a mirror may ask to be left alone and is still waited for. The next host is nearer than that.
const MIRROR_PATIENCE: Duration = Duration::from_secs(2);

/// What is looked for.
#[derive(Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub(crate) repository: &'a Repository,
    pub(crate) need: Need,
    /// The content that is wanted: mirrors that have given it wrong are left out.
    pub(crate) blob: Option<Digest>,
    /// What a host must not be known to lack.
    pub(crate) with: Option<Lack>,
}

impl<'a> Ask<'a> {
    pub(crate) fn new(repository: &'a Repository, need: Need) -> Ask<'a> {
        Ask { repository, need, blob: None, with: None }
    }
}

/// Hosts in the order in which they are asked: mirrors that are up, the registry, and mirrors that rest, which are
/// better than nothing. Never empty.
pub(crate) type Route = Vec<Arc<Endpoint>>;

impl Transport {
    /// The hosts for what is looked for.
    ///
    /// # Errors
    /// When the settings are malformed or no host may be asked for it.
    pub(crate) async fn route(&self, ask: &Ask<'_>) -> Result<Route, FetchError> {
        let plan = match ask.blob {
            Some(_) => self.hosts.plan_for_readers(ask.repository).await?,
            None => self.hosts.plan(ask.repository).await?,
        };
        let mut able: Route = plan.endpoints.iter().filter(|e| e.can.allow(ask.need)).cloned().collect();
        if able.is_empty() {
            let what = match ask.need {
                Need::Pull => "pull",
                Need::Resolve => "resolve tags",
                Need::Push => "push",
            };
            return Err(FetchError::Incapable { image: ask.repository.name(), what });
        }
        if ask.need == Need::Push {
            // What is written in several requests must be written at one place, as containerd does it.
            able.truncate(1);
            return Ok(able);
        }
        let (mut route, mut resting, mut useless) = (Route::new(), Route::new(), Route::new());
        for endpoint in able {
            if !endpoint.is_mirror() {
                route.push(endpoint);
            } else if self.is_useless(&endpoint, ask) {
                useless.push(endpoint);
            } else if self.gates.closed_for(&endpoint.host()) > MIRROR_PATIENCE
                || !self.health.is_up(&endpoint, self.options.stall_timeout)
            {
                resting.push(endpoint);
            } else {
                route.push(endpoint);
            }
        }
        route.append(&mut resting);
        if route.is_empty() {
            route = useless;
        }
        Ok(route)
    }

    fn is_useless(&self, mirror: &Endpoint, ask: &Ask<'_>) -> bool {
        ask.blob.is_some_and(|blob| self.health.is_disbelieved(mirror, blob))
            || ask.with.is_some_and(|what| self.health.is_known_to_lack(mirror, what))
    }

    /// Lets the hosts try one after the other. Whatever goes wrong at a mirror is the next one's business; the
    /// registry itself is asked with patience, and its error is the one that counts.
    ///
    /// # Errors
    /// When none of them could do it.
    pub(crate) async fn on_hosts<T, F, Fut>(&self, ask: &Ask<'_>, attempt: F) -> Result<T, FetchError>
    where
        F: Fn(Arc<Endpoint>) -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let mut failure = None;
        for endpoint in self.route(ask).await? {
            let tried = if endpoint.is_mirror() {
                self.at_mirror(&endpoint, &attempt).await
            } else {
                self.policy().run(|| attempt(Arc::clone(&endpoint))).await
            };
            let error = match tried {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if !endpoint.is_mirror() {
                // Only where the registry could not be asked is what rests worth a try.
                let final_word = !error.is_transient();
                failure = Some(error);
                if final_word {
                    break;
                }
            } else {
                tracing::debug!(mirror = endpoint.host(), %error, "the next host is asked");
                failure.get_or_insert(error);
            }
        }
        Err(failure.unwrap_or(FetchError::Interrupted { what: "asking a registry" }))
    }

    async fn at_mirror<T, F, Fut>(&self, mirror: &Arc<Endpoint>, attempt: &F) -> Result<T, FetchError>
    where
        F: Fn(Arc<Endpoint>) -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let mut tried = attempt(Arc::clone(mirror)).await;
        if let Err(FetchError::RateLimited { retry_after, .. }) = &tried
            && retry_after.is_none_or(|after| after <= MIRROR_PATIENCE)
        {
            // The gate of the host holds it back for as long as it wants.
            tried = attempt(Arc::clone(mirror)).await;
        }
        match &tried {
            Ok(_) => self.health.answered(mirror),
            Err(error) => self.health.failed(mirror, error),
        }
        tried
    }

    /// Sends a call to the hosts in order and reads the answer; one whose reading fails counts as failed.
    ///
    /// # Errors
    /// As [`Transport::on_hosts`].
    pub(crate) async fn ask<T, F, Fut>(
        &self,
        ask: &Ask<'_>,
        call: &Call<'_>,
        read: F,
    ) -> Result<T, FetchError>
    where
        F: Fn(Response) -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let read = &read;
        self.on_hosts(ask, |at| async move { read(self.send(call, &at).await?).await }).await
    }
}
