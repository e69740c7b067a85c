//! Leases: what keeps content that no image names yet from containerd's garbage collector.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use lazyrun_index::Digest;
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
        let until = prost_types::Timestamp::from(SystemTime::now() + time);
        let labels = BTreeMap::from([(EXPIRES.to_owned(), until.to_string())]);
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
