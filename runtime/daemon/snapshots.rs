//! What the daemon does for the snapshots that containerd keeps here.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use lazyrun_index::{Digest, LayerId, Layout};

use super::Daemon;
use super::images::{Images, Ready};
use super::views::{MountedView, Purpose, Views, chain_id};
use super::why::Recorder;
use crate::ipc::why::Started;
use crate::snapshotter::Snapshots;
use crate::snapshotter::attached::{Adopted, Held, mount_table};
use crate::snapshotter::record::Remote;

/// How long a view of an earlier daemon may take to be attached again: its registry may be away.
const AGAIN: Duration = Duration::from_secs(10);

fn diff_ids(layers: &[Remote]) -> Vec<Digest> {
    layers.iter().map(|layer| layer.diff_id).collect()
}

/// The layer files that belong to `removed` chains alone, also those of which nothing is there yet: they may be under way.
pub(super) fn unwanted(removed: &[Vec<Digest>], wanted: &[Vec<Digest>]) -> BTreeSet<LayerId> {
    let mut diff_ids: BTreeSet<Digest> = removed.iter().flatten().copied().collect();
    wanted.iter().flatten().for_each(|diff_id| {
        diff_ids.remove(diff_id);
    });
    let layouts = |diff_id| [Layout::Tar, Layout::Table].map(|layout| LayerId { diff_id, layout });
    diff_ids.into_iter().flat_map(layouts).collect()
}

impl Daemon {
    /// The snapshots, if there are any.
    pub(crate) fn snapshots(&self) -> Option<&Arc<Snapshots>> {
        self.snapshots.as_ref()
    }

    /// The images.
    pub(crate) fn images(&self) -> &Arc<Images> {
        &self.images
    }

    /// The views.
    pub(crate) fn views(&self) -> &Arc<Views> {
        &self.views
    }

    /// diffIDs of each chain of layers that is a snapshot, bottom first.
    pub(super) fn snapshot_layers(&self) -> Result<Vec<Vec<Digest>>> {
        let Some(snapshots) = &self.snapshots else { return Ok(Vec::new()) };
        Ok(snapshots.store.views(false)?.iter().map(|(_, layers)| diff_ids(layers)).collect())
    }

    /// diffIDs of the layers of each image and of each chain that is a snapshot, bottom first.
    pub(super) fn wanted_layers(&self) -> Result<Vec<Vec<Digest>>> {
        let mut wanted = self.snapshot_layers()?;
        for record in self.images.records()? {
            wanted.push(self.images.load(&record)?.diff_ids());
        }
        Ok(wanted)
    }

    /// A container of containerd's is to start from this image; `key` is its snapshot.
    pub(crate) fn begin_snapshot(&self, image: &str, key: &str) -> Recorder {
        self.seen.starts.begin(image, Started::Snapshot { key: key.to_owned() })
    }

    /// The view that snapshots on these layers need. When a container is to start from it, what its start will touch
    /// is fetched first; the rest follows in the background.
    pub(crate) async fn view_of(
        self: &Arc<Self>,
        ready: Ready,
        start: Option<&Recorder>,
    ) -> Result<Arc<MountedView>> {
        let Some(start) = start else {
            self.keep_profile(&ready);
            self.hydration.begin_layers(&ready.layers);
            return self.views.get(ready.layers, self.plan, Purpose::Use).await;
        };
        self.uses(start, &ready);
        let purpose = self.foresee_layers(&ready, start);
        let view = self.views.get(ready.layers, self.plan, purpose).await?;
        self.seen.mounted(start, &view);
        Ok(view)
    }

    /// Takes up the views that an earlier daemon attached for containerd.
    pub(super) async fn recover_snapshots(self: &Arc<Self>) -> Result<()> {
        let Some(snapshots) = &self.snapshots else { return Ok(()) };
        for (key, _) in snapshots.store.images()? {
            if let Err(error) = snapshots.images.of_row(&key, &snapshots.store) {
                tracing::warn!(image = key, error = format!("{error:#}"), "an image can't be used");
            }
        }
        let (table, mut stale) = (mount_table(), Vec::new());
        for (id, layers) in snapshots.store.views(false)? {
            let Some(chain) = chain_id(&diff_ids(&layers)) else { continue };
            match snapshots.attached.adopt(id, &table, || self.views.of_chain(chain)) {
                Some(Adopted::View(view)) => self.hydration.begin_layers(&view.layers),
                Some(Adopted::Stale) => stale.push((id, layers)),
                None => {}
            }
        }
        snapshots.sweep();
        self.attach_again(snapshots, stale).await?;
        snapshots.resume_blobs(self)
    }

    // containerd knows where the views of its snapshots are, and mounts on them without asking again.
    async fn attach_again(
        self: &Arc<Self>,
        snapshots: &Arc<Snapshots>,
        stale: Vec<(u64, Vec<Remote>)>,
    ) -> Result<()> {
        let used: Vec<u64> = snapshots.store.views(true)?.into_iter().map(|(id, _)| id).collect();
        for (id, layers) in stale.into_iter().filter(|(id, _)| used.contains(id)) {
            let attached = tokio::time::timeout(AGAIN, self.attach_view(snapshots, id, &layers, None)).await;
            if let Err(error) = attached.map_err(anyhow::Error::from).and_then(|attached| attached) {
                let error = format!("{error:#}");
                tracing::warn!(snapshot = id, error, "a view is attached when somebody asks for it");
            }
        }
        Ok(())
    }

    /// Attaches the view of a snapshot's image where containerd can see it. `start` is the container's that needs it.
    ///
    /// # Errors
    /// When the view can't be had or the kernel refuses.
    pub(crate) async fn attach_view(
        self: &Arc<Self>,
        snapshots: &Arc<Snapshots>,
        id: u64,
        layers: &[Remote],
        start: Option<&Recorder>,
    ) -> Result<Arc<Held>> {
        let ready = snapshots.images.ready(layers, &snapshots.store).await?;
        let view = self.view_of(ready, start).await?;
        let snapshots = Arc::clone(snapshots);
        self.blocking(move |this| Ok(snapshots.attached.attach(id, view, this.views())?)).await
    }

    /// Takes all views down that are attached for containerd.
    pub(super) fn detach_snapshots(&self) {
        if let Some(snapshots) = &self.snapshots {
            let views = snapshots.store.views(false).unwrap_or_default();
            snapshots.attached.detach_all(views.into_iter().map(|(id, _)| id));
        }
    }

    /// Deletes what was kept for chains of layers that are no snapshots any more and belong to no image. Returns those of
    /// which something is in use yet.
    ///
    /// # Errors
    /// When something can't be read or deleted.
    pub(crate) fn collect_removed(&self, removed: &[Vec<Digest>]) -> Result<Vec<Vec<Digest>>> {
        let wanted = self.wanted_layers()?;
        let chains: Vec<Digest> = wanted.iter().filter_map(|diff_ids| chain_id(diff_ids)).collect();
        let gone: Vec<Digest> = removed.iter().filter_map(|diff_ids| chain_id(diff_ids)).collect();
        let gone: Vec<Digest> = gone.into_iter().filter(|chain| !chains.contains(chain)).collect();
        let busy = self.views.release(|view| gone.contains(&view.id.chain));
        let store = self.images.fetcher().store();
        let (mut later, dropped): (Vec<_>, Vec<_>) =
            unwanted(removed, &wanted).into_iter().partition(|id| busy.contains(id));
        later.extend(self.hydration.stop_layers(dropped.iter().copied()));
        for id in dropped {
            if let Some(name) = store.file_name(id) {
                self.service.forget(&name);
            }
            store.remove(id)?;
        }
        for chain in gone {
            self.views.delete(chain)?;
            self.profiles.delete(chain)?;
        }
        let left = |diff_ids: &&Vec<Digest>| later.iter().any(|id| diff_ids.contains(&id.diff_id));
        Ok(removed.iter().filter(left).cloned().collect())
    }
}
