//! `containerd.services.diff.v1`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tonic::{Request, Response, Status};

use super::archive::{Archive, Time};
use super::change::{self, Change};
use super::error::DiffError;
use super::stream::{Compression, Digests, Layer};
use super::upper;
use crate::containerd::{Containerd, LEASE, NAMESPACE, Scope, unique};
use crate::snapshotter::Snapshots;
use crate::snapshotter::error::SnapshotError;
use crate::snapshotter::proto::services::diff::v1 as api;
use crate::snapshotter::proto::types::Descriptor;

/// Most layers that are made at a time; each takes a thread and a few MiB.
const MAX_AT_ONCE: usize = 2;
/// Pieces of a layer that wait for containerd.
const QUEUE: usize = 2;
/// How long a new layer is held for a client that has no lease, or whose lease containerd does not pass on.
const HELD: Duration = Duration::from_secs(60 * 60);
/// The media type of a layer when none was asked for.
const DEFAULT_MEDIA_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// The label of a blob that says its diffID.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

type Answer<T> = std::result::Result<Response<T>, Status>;

/// The service.
#[derive(Clone)]
pub(crate) struct DiffService {
    snapshots: Arc<Snapshots>,
    containerd: Containerd,
    slots: Arc<Semaphore>,
}

impl DiffService {
    /// Makes layers of these snapshots, for this containerd.
    pub(crate) fn new(snapshots: Arc<Snapshots>, containerd: Containerd) -> Self {
        Self { snapshots, containerd, slots: Arc::new(Semaphore::new(MAX_AT_ONCE)) }
    }

    async fn make(
        &self,
        namespace: Option<String>,
        lease: Option<String>,
        asked: api::DiffRequest,
    ) -> Result<Descriptor, DiffError> {
        let media_type = match asked.media_type.as_str() {
            "" => DEFAULT_MEDIA_TYPE.to_owned(),
            said => said.to_owned(),
        };
        let Some(compression) = Compression::of(&media_type) else {
            return Err(DiffError::not_ours(format!("the media type {media_type}")));
        };
        let (snapshots, left, right) = (Arc::clone(&self.snapshots), asked.left, asked.right);
        let found = tokio::task::spawn_blocking(move || change::find(&snapshots, &left, &right));
        let Change { directory, namespace: of_key } = found.await.map_err(|_| DiffError::Thread)??;
        let Some(namespace) = namespace.or(of_key) else {
            return Err(DiffError::not_ours("neither request nor snapshot has a namespace of containerd"));
        };
        let _slot = self.slots.acquire().await.map_err(|_| DiffError::Thread)?;
        let latest =
            asked.source_date_epoch.map(|time| Time { seconds: time.seconds, nanos: i64::from(time.nanos) });
        let job = Job { directory, compression, latest };
        if lease.is_some() {
            return self.store(Scope { namespace, lease }, job, &asked.r#ref, asked.labels, media_type).await;
        }
        let lease = self.containerd.lease(&namespace, HELD).await?;
        let stored = self.store(lease.scope().clone(), job, &asked.r#ref, asked.labels, media_type).await;
        if stored.is_err()
            && let Err(error) = self.containerd.end(&lease).await
        {
            tracing::debug!(%error, "a lease ends by itself");
        }
        stored
    }

    /// Puts a layer into containerd's content store.
    async fn store(
        &self,
        scope: Scope,
        job: Job,
        reference: &str,
        mut labels: BTreeMap<String, String>,
        media_type: String,
    ) -> Result<Descriptor, DiffError> {
        let reference = if reference.is_empty() { unique("diff") } else { reference.to_owned() };
        let mut upload = self.containerd.upload(&scope, &reference).await?;
        let (to, mut pieces) = mpsc::channel(QUEUE);
        let made = tokio::task::spawn_blocking(move || job.run(to));
        let mut size = 0;
        let mut sent = Ok(());
        while let (Some(piece), Ok(())) = (pieces.recv().await, &sent) {
            size += piece.len() as i64;
            sent = upload.write(piece).await;
        }
        // Ends the thread that makes the layer, if containerd takes no more of it.
        drop(pieces);
        let made = made.await.map_err(|_| DiffError::Thread)?;
        let digests = match sent.map_err(DiffError::from).and(made) {
            Ok(digests) => digests,
            Err(error) => {
                drop(upload);
                if let Err(error) = self.containerd.abort(&scope, &reference).await {
                    tracing::debug!(%error, "a broken upload is left to containerd's garbage collector");
                }
                return Err(error);
            }
        };
        labels.insert(UNCOMPRESSED.into(), digests.diff_id.to_string());
        upload.commit(&scope, digests.blob, labels).await?;
        self.label(&scope, digests).await?;
        Ok(Descriptor { media_type, digest: digests.blob.to_string(), size, ..Default::default() })
    }

    // A blob that was there before may lack the label.
    async fn label(&self, scope: &Scope, digests: Digests) -> Result<(), DiffError> {
        let known = self.containerd.info(scope, digests.blob).await?;
        if known.is_none_or(|known| known.labels.contains_key(UNCOMPRESSED)) {
            return Ok(());
        }
        let labels = BTreeMap::from([(UNCOMPRESSED.to_owned(), digests.diff_id.to_string())]);
        Ok(self.containerd.set_labels(scope, digests.blob, labels).await?)
    }
}

/// What the thread that makes a layer is told.
struct Job {
    directory: PathBuf,
    compression: Compression,
    latest: Option<Time>,
}

impl Job {
    fn run(self, to: mpsc::Sender<Vec<u8>>) -> Result<Digests, DiffError> {
        let mut archive = Archive::new(Layer::new(self.compression, to)?, self.latest);
        upper::write(&self.directory, &mut archive)?;
        Ok(archive.finish()?.finish()?)
    }
}

fn header<T>(request: &Request<T>, name: &str) -> Result<Option<String>, SnapshotError> {
    let Some(value) = request.metadata().get(name) else { return Ok(None) };
    let text = value.to_str().map_err(|_| SnapshotError::InvalidArgument(format!("an odd {name}")))?;
    Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
}

#[tonic::async_trait]
impl api::diff_server::Diff for DiffService {
    async fn apply(&self, request: Request<api::ApplyRequest>) -> Answer<api::ApplyResponse> {
        drop(request);
        Err(DiffError::not_ours("layers are unpacked by containerd").into())
    }

    async fn diff(&self, request: Request<api::DiffRequest>) -> Answer<api::DiffResponse> {
        let (namespace, lease) = (header(&request, NAMESPACE)?, header(&request, LEASE)?);
        let made = self.make(namespace, lease, request.into_inner()).await;
        if let Err(error) = &made
            && !matches!(error, DiffError::NotOurs(_))
        {
            tracing::warn!(%error, "a difference could not be made");
        }
        Ok(Response::new(api::DiffResponse { diff: Some(made?) }))
    }
}
