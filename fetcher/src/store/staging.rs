//! Directories in which layers are built before they appear under their name, and in which they disappear.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use lazyrun_index::LayerId;
use nix::fcntl::{Flock, FlockArg};

use super::span_map::SpanMap;
use super::{DATA, INDEX, SPANS, sync_dir};
use crate::error::FetchError;

/// Prefix of all temporary directories.
const PREFIX: &str = ".tmp-";

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A layer in the making. Dropped without being published it leaves nothing behind.
pub(crate) struct Staging {
    id: LayerId,
    dir: PathBuf,
    /// Held for as long as the directory is in use, so that a sweep leaves it alone.
    _lock: Flock<File>,
}

impl Staging {
    pub(super) fn new(layers: &Path, id: LayerId) -> Result<Staging, FetchError> {
        let number = NEXT.fetch_add(1, Relaxed);
        let dir = layers.join(format!("{PREFIX}{}-{}-{number}", &id.diff_id.hex()[..16], std::process::id()));
        fs::create_dir(&dir).map_err(|e| FetchError::store("creating", &dir, e))?;
        match lock(&dir) {
            Ok(lock) => Ok(Staging { id, dir, _lock: lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                Err(FetchError::store("locking", &dir, error))
            }
        }
    }

    pub(crate) fn id(&self) -> LayerId {
        self.id
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn data_path(&self) -> PathBuf {
        self.dir.join(DATA)
    }

    pub(crate) fn index_path(&self) -> PathBuf {
        self.dir.join(INDEX)
    }

    /// Creates one of the files.
    pub(crate) fn create(&self, path: &Path) -> Result<File, FetchError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|e| FetchError::store("creating", path, e))
    }

    /// Gives the directory its final name, with these spans present.
    ///
    /// The index and the map are made durable first, the data is not: hundreds of megabytes would stand between
    /// the last byte and the container's start. The map carries this boot's id, so data that a power cut takes
    /// away is found by its digest before it is used; `Layer::sync` ends that state in the background.
    pub(super) fn publish(
        self,
        final_dir: &Path,
        span_count: usize,
        present: &[u64],
        boot_id: [u8; 16],
    ) -> Result<(), FetchError> {
        let map_path = self.dir.join(SPANS);
        let index_path = self.index_path();
        let mut map = SpanMap::create(&map_path, span_count, boot_id)
            .map_err(|e| FetchError::store("writing", &map_path, e))?;
        map.write_volatile(present)
            .and_then(|()| map.sync())
            .map_err(|e| FetchError::store("writing", &map_path, e))?;
        File::open(&index_path)
            .and_then(|f| f.sync_all())
            .map_err(|e| FetchError::store("writing", &index_path, e))?;
        sync_dir(&self.dir).map_err(|e| FetchError::store("writing", &self.dir, e))?;
        match fs::rename(&self.dir, final_dir) {
            Ok(()) => {}
            // Another stream of the same layer was faster; its result is as good.
            Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                return Ok(());
            }
            Err(e) => return Err(FetchError::store("publishing", final_dir, e)),
        }
        let parent = final_dir.parent().unwrap_or(final_dir);
        sync_dir(parent).map_err(|e| FetchError::store("publishing", final_dir, e))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After publishing the name is gone and this finds nothing.
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.dir.display(), %error, "temporary directory could not be removed");
        }
    }
}

fn lock(dir: &Path) -> io::Result<Flock<File>> {
    Flock::lock(File::open(dir)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

/// Removes temporary directories that no living process holds.
pub(super) fn sweep(layers: &Path) -> Result<(), FetchError> {
    for path in leftovers(layers)? {
        fs::remove_dir_all(&path).map_err(|e| FetchError::store("removing", &path, e))?;
    }
    Ok(())
}

/// Temporary directories that no living process holds.
pub(super) fn leftovers(layers: &Path) -> Result<Vec<PathBuf>, FetchError> {
    let failed = |e| FetchError::store("listing", layers, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(layers).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let ours = entry.file_name().to_str().is_some_and(|n| n.starts_with(PREFIX));
        let path = entry.path();
        if ours && lock(&path).is_ok() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Takes a directory out of the store: renamed first, so that no half of it is ever found under its name.
pub(super) fn discard(layers: &Path, dir: &Path) -> Result<(), FetchError> {
    let number = NEXT.fetch_add(1, Relaxed);
    let gone = layers.join(format!("{PREFIX}gone-{}-{number}", std::process::id()));
    match fs::rename(dir, &gone) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(FetchError::store("removing", dir, e)),
    }
    sync_dir(layers).map_err(|e| FetchError::store("removing", dir, e))?;
    fs::remove_dir_all(&gone).map_err(|e| FetchError::store("removing", &gone, e))
}
