//! Leases: what keeps content that no image names yet from containerd's garbage collector.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use lazyrun_index::Digest;
use tonic::Code;
use tonic::transport::Channel;

use super::{Containerd, ContainerdError, Scope};
use crate::snapshotter::proto::services::leases::v1 as api;
use api::leases_client::LeasesClient;

/// The label with the time from which on the garbage collector passes a lease over.
const EXPIRES: &str = "containerd.io/gc.expire";

/// A lease that was made here.
#[derive(Debug)]
pub struct Lease(Scope);

impl Lease {
    /// The scope in which what is made is held.
    pub fn scope(&self) -> &Scope {
        &self.0
    }
}

/// A name that no other call of this process or an earlier one has taken.
pub fn unique(what: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    format!("lazyrun-{what}-{}-{since}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed))
}

impl Containerd {
    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    /// Makes a lease that ends by itself after `time`.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn lease(&self, namespace: &str, time: Duration) -> Result<Lease, ContainerdError> {
        self.new_lease(namespace, time, None).await
    }

    /// As [`Containerd::lease`], with a label by which it is found again: a lease that was made with the same before, and
    /// has half of its time left, is taken. So an upload that broke off can be resumed.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn lease_for(
        &self,
        namespace: &str,
        time: Duration,
        label: (&str, &str),
    ) -> Result<Lease, ContainerdError> {
        let since = SystemTime::now() - time / 2;
        let found = self.leases_with(namespace, label).await?.into_iter().find(|lease| {
            let made = lease.created_at.and_then(|made| SystemTime::try_from(made).ok());
            made.is_some_and(|made| made > since)
        });
        match found {
            Some(lease) => Ok(Lease(Scope { namespace: namespace.to_owned(), lease: Some(lease.id) })),
            None => self.new_lease(namespace, time, Some(label)).await,
        }
    }

    async fn new_lease(
        &self,
        namespace: &str,
        time: Duration,
        label: Option<(&str, &str)>,
    ) -> Result<Lease, ContainerdError> {
        let until = prost_types::Timestamp::from(SystemTime::now() + time);
        let mut labels = BTreeMap::from([(EXPIRES.to_owned(), until.to_string())]);
        labels.extend(label.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let id = unique("lease");
        let scope = Scope { namespace: namespace.to_owned(), lease: None };
        let asked = async {
            let request = scope.request(api::CreateRequest { id: id.clone(), labels })?;
            self.leases().create(request).await
        };
        self.answer(|| format!("make a lease in namespace {namespace}"), asked).await?;
        Ok(Lease(Scope { lease: Some(id), ..scope }))
    }

    /// Has the scope's lease, if there is one, hold a blob.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn hold(&self, scope: &Scope, digest: Digest) -> Result<(), ContainerdError> {
        let Some(lease) = &scope.lease else { return Ok(()) };
        let resource = api::Resource { id: digest.to_string(), r#type: "content".into() };
        let asked = async {
            let message = api::AddResourceRequest { id: lease.clone(), resource: Some(resource) };
            self.leases().add_resource(scope.request(message)?).await
        };
        self.answer(|| format!("hold {digest} by the lease {lease}"), asked).await.map(drop)
    }

    /// Ends all leases with this label; another caller may be faster with some.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn end_all(&self, namespace: &str, label: (&str, &str)) -> Result<(), ContainerdError> {
        for lease in self.leases_with(namespace, label).await? {
            let scope = Scope { namespace: namespace.to_owned(), lease: Some(lease.id) };
            match self.end(&Lease(scope)).await {
                Err(error) if error.code() != Code::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    async fn leases_with(
        &self,
        namespace: &str,
        (name, value): (&str, &str),
    ) -> Result<Vec<api::Lease>, ContainerdError> {
        let scope = Scope { namespace: namespace.to_owned(), lease: None };
        let asked = async {
            let filters = vec![format!("labels.{name:?}=={value:?}")];
            Ok(self.leases().list(scope.request(api::ListRequest { filters })?).await?.into_inner().leases)
        };
        self.answer(|| format!("list the leases of namespace {namespace}"), asked).await
    }

    /// Ends a lease; what it alone held is garbage then.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn end(&self, lease: &Lease) -> Result<(), ContainerdError> {
        let Scope { namespace, lease } = lease.scope();
        let id = lease.clone().unwrap_or_default();
        let scope = Scope { namespace: namespace.clone(), lease: None };
        let asked = async {
            let request = scope.request(api::DeleteRequest { id: id.clone(), sync: false })?;
            self.leases().delete(request).await
        };
        self.answer(|| format!("end the lease {id}"), asked).await.map(drop)
    }
}
