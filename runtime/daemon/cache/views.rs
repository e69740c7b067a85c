//! The files of views: who uses them, and deleting those that nobody does.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use lazyrun_index::{Digest, LayerId};

use crate::daemon::views::Views;

impl Views {
    /// Layer files of the views that somebody uses.
    pub fn in_use(&self) -> Vec<LayerId> {
        let mounted = self.lock();
        let used = mounted.values().filter(|view| Arc::strong_count(view) > 1);
        used.flat_map(|view| view.layers.iter().map(|l| l.id())).collect()
    }

    /// The files of all views, and whether somebody uses them.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn files(&self) -> Result<Vec<(PathBuf, bool)>> {
        let used: Vec<PathBuf> = {
            let mounted = self.lock();
            let used = mounted.values().filter(|view| Arc::strong_count(view) > 1);
            used.flat_map(|view| [self.image_path(&view.id), self.appendix_path(&view.id)]).collect()
        };
        let files =
            std::fs::read_dir(&self.dir).with_context(|| format!("reading {}", self.dir.display()))?;
        Ok(files.flatten().map(|f| f.path()).map(|path| (path.clone(), used.contains(&path))).collect())
    }

    /// Takes down views that nobody uses and deletes their files, but for chains that `keep` says yes to; they can be
    /// built again. Returns the files and what they took. Does nothing while a view is being made.
    ///
    /// # Errors
    /// When the directory can't be read or a file can't be deleted.
    pub fn prune(&self, keep: impl Fn(Digest) -> bool, dry_run: bool) -> Result<Vec<(PathBuf, u64)>> {
        let Ok(_building) = self.building.try_lock() else { return Ok(Vec::new()) };
        if !dry_run {
            self.release(|view| !keep(view.id.chain));
        }
        let mut gone = Vec::new();
        for (path, used) in self.files()? {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let chain = name.get(..64).and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
            if used || chain.is_some_and(&keep) {
                continue;
            }
            let size = std::fs::metadata(&path).map_or(0, |meta| meta.blocks() * 512);
            if !dry_run {
                std::fs::remove_file(&path).with_context(|| format!("deleting {}", path.display()))?;
            }
            gone.push((path, size));
        }
        Ok(gone)
    }
}
