//! What the daemon does for the snapshots that containerd keeps here.

use std::sync::Arc;

use anyhow::Result;
use lazyrun_index::Digest;

use super::Daemon;
use super::images::{Images, Ready};
use super::views::{MountedView, Purpose, Views, chain_id};
use super::why::Recorder;
use crate::ipc::why::Started;
use crate::snapshotter::Snapshots;
use crate::snapshotter::attached::mount_table;
use crate::snapshotter::record::Remote;

fn diff_ids(layers: &[Remote]) -> Vec<Digest> {
    layers.iter().map(|layer| layer.diff_id).collect()
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
    pub(super) fn recover_snapshots(self: &Arc<Self>) -> Result<()> {
        let Some(snapshots) = &self.snapshots else { return Ok(()) };
        for (key, _) in snapshots.store.images()? {
            if let Err(error) = snapshots.images.of_row(&key, &snapshots.store) {
                tracing::warn!(image = key, error = format!("{error:#}"), "an image can't be used");
            }
        }
        let table = mount_table();
        for (id, layers) in snapshots.store.views(false)? {
            let Some(chain) = chain_id(&diff_ids(&layers)) else { continue };
            if let Some(view) = snapshots.attached.adopt(id, &table, || self.views.of_chain(chain)) {
                self.hydration.begin_layers(&view.layers);
            }
        }
        snapshots.sweep();
        snapshots.resume_blobs(self)
    }

    /// Takes all views down that are attached for containerd.
    pub(super) fn detach_snapshots(&self) {
        if let Some(snapshots) = &self.snapshots {
            let views = snapshots.store.views(false).unwrap_or_default();
            snapshots.attached.detach_all(views.into_iter().map(|(id, _)| id));
        }
    }

    /// Deletes what was kept for chains of layers that are no snapshots any more and belong to no image.
    ///
    /// # Errors
    /// When something can't be read or deleted.
    pub(crate) fn collect_removed(&self, removed: &[Vec<Digest>]) -> Result<()> {
        let mut wanted = self.snapshot_layers()?;
        for record in self.images.records()? {
            wanted.push(self.images.load(&record)?.layers.iter().map(|l| l.diff_id).collect());
        }
        let chains: Vec<Digest> = wanted.iter().filter_map(|diff_ids| chain_id(diff_ids)).collect();
        let gone: Vec<Digest> = removed.iter().filter_map(|diff_ids| chain_id(diff_ids)).collect();
        let gone: Vec<Digest> = gone.into_iter().filter(|chain| !chains.contains(chain)).collect();
        let busy = self.views.release(|view| gone.contains(&view.id.chain));
        let store = self.images.fetcher().store();
        let mut dropped = store.list()?;
        dropped.retain(|id| {
            let has = |diff_ids: &Vec<Digest>| diff_ids.contains(&id.diff_id);
            removed.iter().any(has) && !wanted.iter().any(has) && !busy.contains(id)
        });
        self.hydration.stop_layers(&dropped);
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
        Ok(())
    }
}
