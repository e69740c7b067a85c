//! Removing what is not needed.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use lazyrun_index::Digest;

use super::Daemon;
use super::usage::{disk_bytes, name_of};
use crate::daemon::containers::Container;
use crate::daemon::meta::ImageRecord;
use crate::daemon::views::chain_id;
use crate::ipc::system::{PruneOptions, Pruned};

impl Daemon {
    /// Removes containers that have ended, views and leftovers that nobody uses, and what else `options` say.
    pub(super) async fn prune(self: &Arc<Self>, options: PruneOptions) -> Result<Pruned> {
        let mut pruned = Pruned { dry_run: options.dry_run, ..Pruned::default() };
        self.prune_containers(options, &mut pruned).await?;
        let this = Arc::clone(self);
        let rest = tokio::task::spawn_blocking(move || {
            this.sweep_mounts();
            this.prune_leftovers(options, &mut pruned)?;
            this.prune_images(options, &mut pruned)?;
            this.prune_views(options, &mut pruned)?;
            this.prune_cache(options, &mut pruned)?;
            Ok(pruned)
        });
        rest.await.context("the daemon's own thread failed")?
    }

    async fn prune_containers(self: &Arc<Self>, options: PruneOptions, pruned: &mut Pruned) -> Result<()> {
        for container in self.containers.all().into_iter().filter(|c| !c.is_running()) {
            pruned.space_reclaimed += disk_bytes(container.dir());
            pruned.containers.push(container.record().id);
            if !options.dry_run {
                self.remove(&container, false).await?;
            }
        }
        Ok(())
    }

    fn prune_leftovers(&self, options: PruneOptions, pruned: &mut Pruned) -> Result<()> {
        for path in self.leftovers()? {
            pruned.space_reclaimed += disk_bytes(&path);
            pruned.leftovers.push(name_of(&path));
            if !options.dry_run {
                delete(&path).with_context(|| format!("deleting {}", path.display()))?;
            }
        }
        Ok(())
    }

    // As `rmi` does: a layer goes with the last image that has it.
    fn prune_images(&self, options: PruneOptions, pruned: &mut Pruned) -> Result<()> {
        if !options.all {
            return Ok(());
        }
        let containers = self.kept_containers(options);
        let mounted = self.mounts.all();
        let used = |record: &ImageRecord| {
            containers.iter().any(|c| c.record().image_id == record.config)
                || self.diff_ids(record).is_some_and(|ids| mounted.iter().any(|m| m.diff_ids == ids))
        };
        let (kept, unused): (Vec<_>, Vec<_>) = self.images.records()?.into_iter().partition(used);
        let needed: Vec<Digest> = kept.iter().filter_map(|record| self.diff_ids(record)).flatten().collect();
        let busy = self.views.in_use();
        let store = self.images.fetcher().store();
        let doomed: Vec<Digest> =
            unused.iter().filter_map(|record| self.diff_ids(record)).flatten().collect();
        for id in store.list()? {
            if doomed.contains(&id.diff_id) && !needed.contains(&id.diff_id) && !busy.contains(&id) {
                pruned.space_reclaimed += disk_bytes(&self.paths.layers().join(id.to_string()));
            }
        }
        for record in unused {
            for digest in [record.manifest, record.config] {
                pruned.space_reclaimed += disk_bytes(&self.paths.blobs().join(digest.hex()));
            }
            if !options.dry_run {
                self.images.remove(&record)?;
            }
            pruned.images.push(record.reference);
        }
        if !options.dry_run && !pruned.images.is_empty() {
            // Views go along, so they are counted before.
            self.prune_views(options, pruned)?;
            self.collect_layers()?;
        }
        Ok(())
    }

    fn prune_views(&self, options: PruneOptions, pruned: &mut Pruned) -> Result<()> {
        let containers = self.kept_containers(options);
        let chains: Vec<Digest> = containers.iter().filter_map(|c| chain_id(&c.record().diff_ids)).collect();
        let files = self.views.prune(|chain| chains.contains(&chain), options.dry_run)?;
        for (path, size) in files {
            let name = name_of(&path);
            if !pruned.views.contains(&name) {
                pruned.space_reclaimed += size;
                pruned.views.push(name);
            }
        }
        Ok(())
    }

    fn prune_cache(&self, options: PruneOptions, pruned: &mut Pruned) -> Result<()> {
        if !options.cache {
            return Ok(());
        }
        let store = self.images.fetcher().store();
        let in_use = self.layers_in_use();
        let idle = store.list()?.into_iter().filter(|id| !in_use.contains_key(id)).collect::<Vec<_>>();
        if options.dry_run {
            let doomed = self.diff_ids_of(&pruned.images);
            for id in idle.iter().filter(|id| !doomed.contains(&id.diff_id)) {
                if let Some(layer) = store.by_id(*id)?.filter(|layer| store.can_refetch(layer)) {
                    pruned.evicted += layer.disk_bytes()?;
                }
            }
        } else {
            // Nobody is to fill again what is thrown away.
            let diff_ids: Vec<_> = idle.iter().map(|id| id.diff_id).collect();
            self.hydration.give_up(&diff_ids)?;
            self.hydration.stop_layers(idle.iter().copied());
            pruned.evicted = store.evict_idle();
            let names: Vec<_> = idle.into_iter().filter_map(|id| store.file_name(id)).collect();
            let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
            // It is not wrong, only of no use.
            let _ = self.views.invalidate(&self.flat, &names);
        }
        pruned.space_reclaimed += pruned.evicted;
        Ok(())
    }

    /// Containers that are there when those that have ended are gone.
    fn kept_containers(&self, options: PruneOptions) -> Vec<Arc<Container>> {
        let mut containers = self.containers.all();
        containers.retain(|c| !options.dry_run || c.is_running());
        containers
    }

    fn diff_ids(&self, record: &ImageRecord) -> Option<Vec<Digest>> {
        Some(self.images.load(record).ok()?.diff_ids())
    }

    fn diff_ids_of(&self, references: &[String]) -> Vec<Digest> {
        let records = self.images.records().unwrap_or_default();
        let named = records.iter().filter(|r| references.contains(&r.reference));
        named.filter_map(|record| self.diff_ids(record)).flatten().collect()
    }
}

fn delete(path: &Path) -> std::io::Result<()> {
    let deleted = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match deleted {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
