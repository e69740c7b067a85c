//! containerd's requests, one function each.

use std::sync::Arc;

use tonic::codegen::tokio_stream;
use tonic::{Request, Response, Status};

use super::attached::{Held, visible_to};
use super::blobs::Kept;
use super::collect::clean_up;
use super::error::SnapshotError;
use super::filter;
use super::labels::{self, Wanted};
use super::proto::services::snapshots::v1 as api;
use super::proto::types::Mount;
use super::record::{Below, Chain, Kind, Labels, Moment, Named, Remote, Usage};
use super::store::{Commit, New, TakenLayer};
use super::{Snapshots, mounts};
use crate::containerd::NAMESPACE;
use crate::daemon::Daemon;
use crate::daemon::why::Recorder;
use crate::failure::sentence;

/// Snapshots in one message of a list.
const LIST_CHUNK: usize = 100;

type Result<T> = std::result::Result<T, SnapshotError>;
type Answer<T> = std::result::Result<Response<T>, Status>;

/// The process at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) Option<i32>);

/// containerd's service.
#[derive(Clone)]
pub(super) struct Service {
    daemon: Arc<Daemon>,
    snapshots: Arc<Snapshots>,
}

/// How a request to prepare a layer ends.
enum Taken {
    /// The layer is a snapshot now, or was one before.
    Committed,
    /// It is one as soon as its parent is known, when it is committed.
    Staged(Chain),
    /// containerd is to unpack it.
    No,
}

impl Service {
    /// Serves these snapshots.
    pub(super) fn new(daemon: Arc<Daemon>, snapshots: Arc<Snapshots>) -> Self {
        Self { daemon, snapshots }
    }

    // Runs what reads or writes files away from the threads that answer requests.
    async fn blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Snapshots) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let snapshots = Arc::clone(&self.snapshots);
        let done = tokio::task::spawn_blocking(move || job(&snapshots)).await;
        done.map_err(|_| SnapshotError::Internal("the snapshotter's own thread failed".into()))?
    }

    /// Makes an active snapshot or a view.
    async fn create(&self, asked: Asked, kind: Kind) -> Result<Vec<Mount>> {
        labels::check(&asked.labels)?;
        if asked.key.is_empty() {
            return Err(SnapshotError::InvalidArgument("a snapshot needs a key".into()));
        }
        let unpacks = asked.labels.contains_key(labels::TARGET);
        if kind == Kind::Active
            && let Some(wanted) = labels::wanted(&asked.labels)
        {
            let whole = self.snapshots.blobs.as_ref().map(|blobs| (blobs, Self::kept(&asked, &wanted)));
            let taken = self.take_over(&asked, wanted).await?;
            if let (Some((blobs, image)), Taken::Committed | Taken::Staged(_)) = (whole, &taken) {
                blobs.begin(&self.daemon, image);
            }
            match taken {
                Taken::Committed => return Err(SnapshotError::AlreadyExists(asked.key)),
                Taken::Staged(chain) => return Ok(mounts::of(&self.snapshots.dirs, &chain)),
                Taken::No => {}
            }
        }
        let (namespace, parent) = (asked.namespace.clone(), asked.parent.clone());
        let below = self.blocking(move |s| s.store.below(&namespace, &parent)).await?;
        let starts = (kind == Kind::Active && !unpacks).then(|| labels::key_of_client(&asked.key).to_owned());
        // Held until the snapshot is there, which keeps the view from then on.
        let (_view, start) = self.view(&below, starts.as_deref(), asked.peer).await?;
        let made = self.blocking(move |s| {
            let like = below.first().filter(|below| below.remote.is_none()).map(|below| below.id);
            let owner = labels::mapped_root(&asked.labels)?;
            let new = New {
                namespace: &asked.namespace,
                key: &asked.key,
                parent: &asked.parent,
                kind,
                labels: asked.labels,
                remote: None,
            };
            let chain = s.store.create(new, |id| match owner {
                Some(owner) => s.dirs.make(id, kind, None).and_then(|()| s.dirs.give(id, owner)),
                None => s.dirs.make(id, kind, like),
            })?;
            Ok(mounts::of(&s.dirs, &chain))
        });
        let made = made.await;
        match (&made, start) {
            (Ok(_), Some(start)) => start.started(),
            (Err(error), Some(start)) => start.failed(&error.to_string()),
            (_, None) => {}
        }
        made
    }

    /// Has the view that a snapshot on `below` needs attached, if it needs one. Where a container is to start, `starts`
    /// is the key of its snapshot, and the start is recorded.
    async fn view(
        &self,
        below: &[Below],
        starts: Option<&str>,
        peer: Peer,
    ) -> Result<(Option<Arc<Held>>, Option<Recorder>)> {
        let chain = Chain { id: 0, kind: Kind::View, remote: None, below: below.to_vec(), idmap: Vec::new() };
        let Some((id, layers)) = chain.view() else { return Ok((None, None)) };
        let point = self.snapshots.dirs.content(id);
        let held = self.blocking(move |s| Ok(s.attached.get(id))).await?;
        let (held, start) = match (held, starts) {
            (Some(held), None) => (held, None),
            (None, None) => (
                self.daemon
                    .attach_view(&self.snapshots, id, &layers, None)
                    .await
                    .map_err(|e| unavailable(&e))?,
                None,
            ),
            (held, Some(key)) => {
                let image = self.snapshots.images.name_of(&layers, &self.snapshots.store).await;
                let start = self.daemon.begin_snapshot(&image.map_err(|e| unavailable(&e))?, key);
                let attached = self.daemon.attach_view(&self.snapshots, id, &layers, Some(&start));
                let attached = match held {
                    None => start.watch(attached).await,
                    // What is attached works, whatever a registry says now.
                    Some(held) => attached.await.or(Ok(held)),
                };
                (attached.map_err(|e| unavailable(&e))?, Some(start))
            }
        };
        let visible = self.blocking(move |_| visible_to(peer.0, &point)).await;
        if let (Err(error), Some(start)) = (&visible, &start) {
            start.failed(&error.to_string());
        }
        visible.map(|()| (Some(held), start))
    }

    /// The image of a request, as containerd has it.
    fn kept(asked: &Asked, wanted: &Wanted) -> Kept {
        let namespace = Some(asked.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        let namespace = namespace.or_else(|| labels::namespace_of(&asked.key)).unwrap_or_default();
        let (reference, manifest) = (wanted.reference.clone(), wanted.manifest);
        Kept { namespace: namespace.to_owned(), reference, manifest }
    }

    /// Makes a snapshot of a layer of an image, without its content, if it can be had that way.
    async fn take_over(&self, asked: &Asked, wanted: Wanted) -> Result<Taken> {
        let (namespace, parent, target) =
            (asked.namespace.clone(), asked.parent.clone(), wanted.target.to_string());
        let place = (namespace.clone(), target.clone(), parent.clone());
        if self.blocking(move |s| s.store.has_layer(&place.0, &place.1, &place.2)).await? {
            return Ok(Taken::Committed);
        }
        let below = self.blocking(move |s| s.store.below(&namespace, &parent)).await?;
        if below.iter().any(|below| below.remote.is_none()) {
            // It stands on what was built or unpacked here.
            return Ok(Taken::No);
        }
        let known = match self.snapshots.images.get(&wanted, &self.snapshots.store).await {
            Ok(known) => known,
            Err(error) => {
                let (image, error) = (&wanted.reference, format!("{error:#}"));
                tracing::warn!(image, error, "containerd is left to unpack an image");
                return Ok(Taken::No);
            }
        };
        let diff_ids = known.image.diff_ids();
        let position = known.chains.iter().position(|chain| *chain == wanted.target);
        let Some(position) =
            position.filter(|i| wanted.layer.is_none_or(|layer| known.image.layers[*i].digest == layer))
        else {
            tracing::warn!(image = wanted.reference, %wanted.target, "the image has no such layer");
            return Ok(Taken::No);
        };
        let remote = Remote { image: known.key.clone(), position, diff_id: diff_ids[position] };
        let rebased = asked.parent.is_empty() && position > 0;
        let fits = below.iter().rev().filter_map(|below| below.remote.as_ref().map(|r| r.diff_id));
        if !rebased && !fits.eq(diff_ids[..position].iter().copied()) {
            return Err(SnapshotError::InvalidArgument(format!(
                "{target} does not stand on snapshot {}",
                asked.parent
            )));
        }
        let (asked, image) = (asked.clone(), Arc::clone(&known));
        let taken = self.blocking(move |s| {
            if rebased {
                stage(s, &asked, remote, &image.row)
            } else {
                let layer = TakenLayer {
                    namespace: &asked.namespace,
                    name: &labels::name_of_layer(&asked.namespace, &asked.key, &target),
                    target: &target,
                    parent: &asked.parent,
                    labels: asked.labels,
                    remote,
                    image: &image.row,
                };
                match s.store.take_layer(layer) {
                    Ok(()) | Err(SnapshotError::AlreadyExists(_)) => Ok(Taken::Committed),
                    Err(error) => Err(error),
                }
            }
        });
        let taken = taken.await?;
        self.snapshots.images.begin(&known);
        Ok(taken)
    }
}

fn unavailable(error: &anyhow::Error) -> SnapshotError {
    SnapshotError::Unavailable(sentence(error))
}

fn stage(s: &Snapshots, asked: &Asked, remote: Remote, image: &super::record::ImageRow) -> Result<Taken> {
    s.store.put_image(&remote.image, image)?;
    let new = New {
        namespace: &asked.namespace,
        key: &asked.key,
        parent: "",
        kind: Kind::Active,
        labels: asked.labels.clone(),
        remote: Some(remote),
    };
    Ok(Taken::Staged(s.store.create(new, |id| s.dirs.make_mount_point(id).map(drop))?))
}

/// What is asked for with a new snapshot.
#[derive(Debug, Clone)]
struct Asked {
    namespace: String,
    key: String,
    parent: String,
    labels: Labels,
    peer: Peer,
}

// Absent when containerd's garbage collector asks, which means all namespaces.
fn namespace<T>(request: &Request<T>) -> Result<Option<String>> {
    let Some(value) = request.metadata().get(NAMESPACE) else { return Ok(None) };
    let text = value.to_str().map_err(|_| SnapshotError::InvalidArgument("an odd namespace".into()))?;
    Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
}

fn peer<T>(request: &Request<T>) -> Peer {
    request.extensions().get::<Peer>().copied().unwrap_or(Peer(None))
}

fn moment(of: Moment) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds: of.seconds, nanos: of.nanos })
}

fn info(named: Named) -> api::Info {
    let kind = match named.record.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: named.name,
        parent: named.record.parent,
        kind: kind.into(),
        created_at: moment(named.record.created),
        updated_at: moment(named.record.updated),
        labels: named.record.labels,
    }
}

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for Service {
    type ListStream =
        tokio_stream::Iter<std::vec::IntoIter<std::result::Result<api::ListSnapshotsResponse, Status>>>;

    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Answer<api::PrepareSnapshotResponse> {
        let (namespace, peer) = (namespace(&request)?.unwrap_or_default(), peer(&request));
        let api::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.create(Asked { namespace, key, parent, labels, peer }, Kind::Active).await?;
        Ok(Response::new(api::PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<api::ViewSnapshotRequest>) -> Answer<api::ViewSnapshotResponse> {
        let (namespace, peer) = (namespace(&request)?.unwrap_or_default(), peer(&request));
        let api::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.create(Asked { namespace, key, parent, labels, peer }, Kind::View).await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<api::MountsRequest>) -> Answer<api::MountsResponse> {
        let (namespace, peer) = (namespace(&request)?, peer(&request));
        let key = request.into_inner().key;
        let chain = self.blocking(move |s| s.store.chain(namespace.as_deref(), &key)).await?;
        // After a reboot nothing is attached any more.
        let _view = Self::view(self, &chain.below, None, peer).await?;
        Ok(Response::new(api::MountsResponse { mounts: mounts::of(&self.snapshots.dirs, &chain) }))
    }

    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Answer<()> {
        let namespace = namespace(&request)?;
        let asked = request.into_inner();
        labels::check(&asked.labels)?;
        if asked.name.is_empty() {
            return Err(SnapshotError::InvalidArgument("a committed snapshot needs a name".into()).into());
        }
        let commit = move |s: &Snapshots| {
            let active = s.store.stat(namespace.as_deref(), &asked.key)?.record;
            let measured = active.kind == Kind::Active && active.remote.is_none();
            let usage = if measured { s.dirs.usage(active.id)? } else { Usage::default() };
            s.store.commit(Commit {
                namespace: namespace.as_deref(),
                key: &asked.key,
                name: &asked.name,
                parent: &asked.parent,
                labels: asked.labels,
                usage,
            })
        };
        self.blocking(commit).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Answer<()> {
        let namespace = namespace(&request)?;
        let key = request.into_inner().key;
        self.blocking(move |s| s.remove(namespace.as_deref(), &key)).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<api::StatSnapshotRequest>) -> Answer<api::StatSnapshotResponse> {
        let namespace = namespace(&request)?;
        let key = request.into_inner().key;
        let named = self.blocking(move |s| s.store.stat(namespace.as_deref(), &key)).await?;
        Ok(Response::new(api::StatSnapshotResponse { info: Some(info(named)) }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Answer<api::UpdateSnapshotResponse> {
        let namespace = namespace(&request)?;
        let asked = request.into_inner();
        let wanted = asked.info.ok_or_else(|| Status::invalid_argument("no snapshot was named"))?;
        labels::check(&wanted.labels)?;
        let paths = asked.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let update =
            move |s: &Snapshots| s.store.update(namespace.as_deref(), &wanted.name, &wanted.labels, &paths);
        let named = self.blocking(update).await?;
        Ok(Response::new(api::UpdateSnapshotResponse { info: Some(info(named)) }))
    }

    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let namespace = namespace(&request)?;
        let filters = request.into_inner().filters;
        let filters = filter::parse_all(&filters).map_err(SnapshotError::InvalidArgument)?;
        let list = move |s: &Snapshots| {
            let mut all = s.store.all(namespace.as_deref())?;
            all.retain(|named| filter::any_matches(&filters, named));
            Ok(all.into_iter().map(info).collect::<Vec<_>>())
        };
        let all = self.blocking(list).await?;
        let chunks =
            all.chunks(LIST_CHUNK).map(|info| Ok(api::ListSnapshotsResponse { info: info.to_vec() }));
        Ok(Response::new(tokio_stream::iter(chunks.collect::<Vec<_>>())))
    }

    async fn usage(&self, request: Request<api::UsageRequest>) -> Answer<api::UsageResponse> {
        let namespace = namespace(&request)?;
        let key = request.into_inner().key;
        let daemon = Arc::clone(&self.daemon);
        let measure = move |s: &Snapshots| {
            let record = s.store.stat(namespace.as_deref(), &key)?.record;
            match (&record.remote, record.kind) {
                (Some(remote), _) => Ok(layer_usage(&daemon, remote)),
                (None, Kind::Active) => s.dirs.usage(record.id),
                (None, _) => Ok(record.usage),
            }
        };
        let Usage { size, inodes } = self.blocking(measure).await?;
        Ok(Response::new(api::UsageResponse { size, inodes }))
    }

    async fn cleanup(&self, request: Request<api::CleanupRequest>) -> Answer<()> {
        drop(request);
        let cleaned = clean_up(&self.daemon, &self.snapshots).await;
        cleaned.map_err(|e| SnapshotError::Internal(format!("{e:#}")))?;
        Ok(Response::new(()))
    }
}

/// What is here of a layer: the blocks of its file, whatever its length, and of its index.
fn layer_usage(daemon: &Daemon, remote: &Remote) -> Usage {
    use std::os::unix::fs::MetadataExt;
    let layer = daemon.images().fetcher().store().get(remote.diff_id).ok().flatten();
    let files = layer.iter().flat_map(|layer| [layer.data_path(), layer.index_path()]);
    let found: Vec<_> = files.filter_map(|path| std::fs::metadata(path).ok()).collect();
    let blocks: u64 = found.iter().map(MetadataExt::blocks).sum();
    Usage {
        size: i64::try_from(blocks.saturating_mul(512)).unwrap_or(i64::MAX),
        inodes: i64::try_from(found.len()).unwrap_or(i64::MAX),
    }
}
