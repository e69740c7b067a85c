//! What takes how much of the disk.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lazyrun_fetcher::InUse;
use lazyrun_index::{Digest, LayerId};
use nix::sys::statvfs::statvfs;

use super::Daemon;
use crate::ipc::system::{
    CacheUsage, ContainerUsage, DiskUsage, FilesUsage, ImageUsage, LayerUsage, ViewUsage,
};

impl Daemon {
    pub(super) fn usage(&self) -> Result<DiskUsage> {
        self.sweep_mounts();
        let layers = self.layer_usage()?;
        let leftovers = self.leftovers()?;
        let size = leftovers.iter().map(|path| disk_bytes(path)).sum();
        Ok(DiskUsage {
            images: self.image_usage(&layers)?,
            views: self.view_usage()?,
            containers: self.container_usage(),
            profiles: files_in(&self.paths.profiles())?,
            leftovers: FilesUsage { count: leftovers.len(), size },
            cache: self.cache_usage()?,
            layers: layers.into_iter().map(|(_, usage)| usage).collect(),
        })
    }

    fn cache_usage(&self) -> Result<CacheUsage> {
        let store = self.images.fetcher().store();
        let (limits, evictions) = (store.limits(), store.evictions());
        let disk = statvfs(self.paths.root()).context("asking for the size of the disk")?;
        let bytes = |blocks: u64| blocks.saturating_mul(disk.fragment_size());
        let disk_size = bytes(disk.blocks());
        Ok(CacheUsage {
            used: store.disk_bytes()?,
            limit: limits.limit.map(|limit| limit.to_string()).unwrap_or_default(),
            limit_bytes: limits.limit_on(disk_size).unwrap_or(0),
            reserve: limits.reserve_on(disk_size),
            disk_size,
            disk_free: bytes(disk.blocks_available()),
            evictions: evictions.evictions,
            evicted: evictions.bytes,
            refused: evictions.refused,
        })
    }

    fn layer_usage(&self) -> Result<Vec<(LayerId, LayerUsage)>> {
        let store = self.images.fetcher().store();
        let in_use = self.layers_in_use();
        let mut images: HashMap<Digest, usize> = HashMap::new();
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            let diff_ids: HashSet<Digest> = image.diff_ids().into_iter().collect();
            diff_ids.into_iter().for_each(|diff_id| *images.entry(diff_id).or_default() += 1);
        }
        let mut found = Vec::new();
        for id in store.list()? {
            let Some(layer) = store.by_id(id)? else { continue };
            let size = layer.disk_bytes()?;
            let dir = self.paths.layers().join(id.to_string());
            let usage = LayerUsage {
                id: layer.file_name().to_owned(),
                size,
                index_size: disk_bytes(&dir).saturating_sub(size),
                full: layer.index().layer_size(),
                local: layer.local_bytes(),
                in_use: match in_use.get(&id) {
                    None => "",
                    Some(InUse::Mounted) => "mounted",
                    Some(InUse::Running) => "running",
                }
                .to_owned(),
                refetchable: store.can_refetch(&layer),
                images: images.get(&id.diff_id).copied().unwrap_or(0),
            };
            found.push((id, usage));
        }
        found.sort_by(|a, b| b.1.size.cmp(&a.1.size).then_with(|| a.1.id.cmp(&b.1.id)));
        Ok(found)
    }

    fn image_usage(&self, layers: &[(LayerId, LayerUsage)]) -> Result<Vec<ImageUsage>> {
        let containers: Vec<Digest> = self.containers.all().iter().map(|c| c.record().image_id).collect();
        let mut images = Vec::new();
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            let of_it: Vec<&LayerUsage> = layers
                .iter()
                .filter(|(id, _)| image.layers.iter().any(|l| l.diff_id == id.diff_id))
                .map(|(_, usage)| usage)
                .collect();
            let sum = |shared: bool| -> u64 {
                of_it.iter().filter(|l| (l.images > 1) == shared).map(|l| l.size + l.index_size).sum()
            };
            let documents: u64 = [Some(record.manifest), Some(record.config), record.list]
                .into_iter()
                .flatten()
                .map(|digest| disk_bytes(&self.paths.blobs().join(digest.hex())))
                .sum();
            images.push(ImageUsage {
                id: record.config.to_string(),
                shared_size: sum(true),
                unique_size: sum(false) + documents,
                full: of_it.iter().map(|l| l.full).sum(),
                local: of_it.iter().map(|l| l.local).sum(),
                containers: containers.iter().filter(|id| **id == record.config).count(),
                reference: record.reference,
            });
        }
        Ok(images)
    }

    fn view_usage(&self) -> Result<Vec<ViewUsage>> {
        let files = self.views.files()?;
        let usage = |(path, in_use): (PathBuf, bool)| ViewUsage {
            name: name_of(&path),
            size: disk_bytes(&path),
            in_use,
        };
        Ok(files.into_iter().map(usage).collect())
    }

    fn container_usage(&self) -> Vec<ContainerUsage> {
        let usage = |container: std::sync::Arc<super::super::containers::Container>| {
            let record = container.record();
            ContainerUsage {
                size: disk_bytes(container.dir()),
                running: container.is_running(),
                id: record.id,
                names: record.name,
                image: record.image,
            }
        };
        self.containers.all().into_iter().map(usage).collect()
    }

    /// What interrupted work has left and nobody uses.
    pub(super) fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let mut found = self.images.fetcher().store().leftovers()?;
        // A document is written under a name of its own, and renamed at once.
        let documents =
            list(&self.paths.blobs())?.into_iter().filter(|path| name_of(path).starts_with(".tmp"));
        found.extend(documents.filter(|path| is_old(path)));
        Ok(found)
    }
}

/// Whether nobody can be writing a file any more that is written and renamed in one go.
fn is_old(path: &Path) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|meta| meta.modified());
    modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > std::time::Duration::from_secs(3600)))
}

/// The last part of a path, for people.
pub(super) fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn files_in(dir: &Path) -> Result<FilesUsage> {
    let files = list(dir)?;
    Ok(FilesUsage { count: files.len(), size: files.iter().map(|path| disk_bytes(path)).sum() })
}

/// Bytes of disk that a file, or a directory with all that is in it, takes. Links are not followed and other file
/// systems not entered; a file with several names counts once; what can't be read counts nothing.
pub(super) fn disk_bytes(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let (device, mut total) = (meta.dev(), 0);
    let mut seen = HashSet::new();
    let mut waiting = vec![path.to_owned()];
    while let Some(path) = waiting.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.dev() != device || (meta.nlink() > 1 && !meta.is_dir() && !seen.insert(meta.ino())) {
            continue;
        }
        total += meta.blocks() * 512;
        if meta.is_dir() {
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_bytes_are_blocks() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("a");
        fs::write(&file, vec![1; 100_000]).expect("write");
        let size = disk_bytes(&file);
        assert!((100_000..200_000).contains(&size), "{size}");
        let before = disk_bytes(dir.path());
        fs::hard_link(&file, dir.path().join("b")).expect("link");
        std::os::unix::fs::symlink("/", dir.path().join("c")).expect("symlink");
        assert!(disk_bytes(dir.path()) < before + 50_000, "links cost nothing");
        let sparse = fs::File::create(dir.path().join("d")).expect("create");
        sparse.set_len(1 << 30).expect("grow");
        assert!(disk_bytes(dir.path()) < before + 50_000, "holes cost nothing");
        assert_eq!(disk_bytes(&dir.path().join("none")), 0);
    }
}
