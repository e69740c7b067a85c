//! Deleting what snapshots leave behind.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use lazyrun_index::Digest;

use super::Snapshots;
use super::error::SnapshotError;
use super::record::Named;
use crate::daemon::Daemon;

/// Before what was in use is tried again; each time twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(60);

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
            true => self.removed().extend(chain),
            false => self.release_view_of(&namespace, &record.parent),
        }
        Ok(())
    }

    fn removed(&self) -> MutexGuard<'_, Vec<Vec<Digest>>> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn diff_ids_of(&self, named: &Named) -> Result<Option<Vec<Digest>>, SnapshotError> {
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

/// Deletes what removed snapshots leave: images, layers, views. What is in use yet, say because somebody asked for it a
/// moment ago, is deleted once it is not.
///
/// # Errors
/// When something can't be read or deleted.
pub(super) async fn clean_up(daemon: &Arc<Daemon>, snapshots: &Arc<Snapshots>) -> Result<()> {
    if !collect(daemon, snapshots).await? || snapshots.cleans.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let (daemon, snapshots) = (Arc::clone(daemon), Arc::clone(snapshots));
    tokio::spawn(async move {
        let mut pause = FIRST_PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
            // Lowered before it looks: whoever comes later with something new begins anew.
            snapshots.cleans.store(false, Ordering::Relaxed);
            match collect(&daemon, &snapshots).await {
                Ok(false) => return,
                Ok(true) => {}
                Err(error) => tracing::warn!(error = format!("{error:#}"), "removed layers stay"),
            }
            if snapshots.cleans.swap(true, Ordering::Relaxed) {
                return;
            }
        }
    });
    Ok(())
}

/// Says whether something is left.
async fn collect(daemon: &Arc<Daemon>, snapshots: &Arc<Snapshots>) -> Result<bool> {
    let (daemon, snapshots) = (Arc::clone(daemon), Arc::clone(snapshots));
    tokio::task::spawn_blocking(move || {
        let removed = std::mem::take(&mut *snapshots.removed());
        if removed.is_empty() {
            return Ok(false);
        }
        let left = delete(&daemon, &snapshots, &removed);
        let later = left.as_ref().map_or(&removed, |left| left).clone();
        snapshots.removed().extend(later);
        left.map(|left| !left.is_empty())
    })
    .await?
}

/// Says of which chains something is left.
fn delete(daemon: &Daemon, snapshots: &Snapshots, removed: &[Vec<Digest>]) -> Result<Vec<Vec<Digest>>> {
    let gone = snapshots.store.forget_images()?;
    snapshots.images.forget(&gone);
    if let Some(blobs) = &snapshots.blobs {
        blobs.forget(&gone);
    }
    daemon.collect_removed(removed)
}
