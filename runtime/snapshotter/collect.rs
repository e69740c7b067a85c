//! Deleting what snapshots leave behind.

use std::collections::HashSet;
use std::sync::PoisonError;

use anyhow::Result;

use super::Snapshots;
use super::error::SnapshotError;
use super::record::Named;
use crate::daemon::Daemon;

impl Snapshots {
    /// Deletes directories that belong to no snapshot: of a daemon that was killed while it made or removed one.
    pub fn sweep(&self) {
        // Listed before the database is asked: what is made meanwhile is not among them.
        let Ok(ids) = self.dirs.ids() else { return };
        let Ok(known) = self.store.all(None) else { return };
        let known: HashSet<u64> = known.iter().map(|named| named.record.id).collect();
        for id in ids.difference(&known) {
            // Not known to be a layer or not: what is mounted there goes first in either case.
            let deleted = self.attached.release(*id, || Ok(false)).and_then(|()| {
                self.dirs.delete(*id, false).map_err(|e| SnapshotError::Internal(e.to_string()))
            });
            if let Err(error) = deleted {
                tracing::warn!(id, %error, "the directory of a removed snapshot stays");
            }
        }
    }

    /// Removes a snapshot, its directory, and the view that nothing else needs.
    ///
    /// # Errors
    /// When it is missing or something stands on it.
    pub fn remove(&self, namespace: Option<&str>, key: &str) -> Result<(), SnapshotError> {
        let chain = self.store.stat(namespace, key).and_then(|named| self.diff_ids_of(&named))?;
        let Named { namespace, record, .. } = self.store.remove(namespace, key)?;
        // The snapshot is gone: what can't be deleted now is deleted at the next start.
        let id = record.id;
        let layer = record.remote.is_some();
        let released = if layer { self.attached.release(id, || Ok(false)) } else { Ok(()) };
        let deleted = released
            .and_then(|()| self.dirs.delete(id, layer).map_err(|e| SnapshotError::Internal(e.to_string())));
        if let Err(error) = deleted {
            tracing::warn!(id, key, %error, "the directory of a removed snapshot stays");
        }
        match layer {
            true => self.removed.lock().unwrap_or_else(PoisonError::into_inner).extend(chain),
            false => self.release_view_of(&namespace, &record.parent),
        }
        Ok(())
    }

    fn diff_ids_of(&self, named: &Named) -> Result<Option<Vec<lazyrun_index::Digest>>, SnapshotError> {
        let Some(remote) = &named.record.remote else { return Ok(None) };
        let below = self.store.below(&named.namespace, &named.record.parent)?;
        let below = below.into_iter().rev().filter_map(|below| below.remote);
        Ok(Some(below.map(|layer| layer.diff_id).chain([remote.diff_id]).collect()))
    }

    // After the last snapshot on a view; the next one may get a better view.
    fn release_view_of(&self, namespace: &str, parent: &str) {
        if parent.is_empty() {
            return;
        }
        let released = self.store.stat(Some(namespace), parent).and_then(|parent| {
            if parent.record.remote.is_none() {
                return Ok(());
            }
            self.attached.release(parent.record.id, || self.store.in_use(namespace, &parent.name))
        });
        if let Err(error) = released {
            tracing::warn!(parent, %error, "a view stays attached");
        }
    }
}

/// Deletes what removed snapshots leave: images, layers, views.
///
/// # Errors
/// When something can't be read or deleted.
pub(super) fn clean_up(daemon: &Daemon, snapshots: &Snapshots) -> Result<()> {
    let removed = std::mem::take(&mut *snapshots.removed.lock().unwrap_or_else(PoisonError::into_inner));
    if removed.is_empty() {
        return Ok(());
    }
    let gone = snapshots.store.forget_images()?;
    snapshots.images.forget(&gone);
    if let Some(blobs) = &snapshots.blobs {
        blobs.forget(&gone);
    }
    daemon.collect_removed(&removed)
}
