//! The directories of snapshots: `snapshots/<id>/fs`, for active ones `work` beside it.
//!
//! A snapshot that stands for a layer of an image has nothing in its `fs`: the view of the image is mounted on it.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::error::SnapshotError;
use super::record::{Kind, Usage};

/// All directories of snapshots.
#[derive(Debug, Clone)]
pub struct Dirs(PathBuf);

impl Dirs {
    /// Those below `dir`, which is made.
    ///
    /// # Errors
    /// When it can't be made, or has a name that an overlay's options can't carry.
    pub fn new(dir: PathBuf) -> Result<Self, SnapshotError> {
        if dir.to_str().is_none_or(|text| text.contains([',', ':', '\\'])) {
            return Err(SnapshotError::Internal(format!(
                "the root directory can't be used for snapshots: {} has a comma, colon or backslash, or is not UTF-8, \
                 and the mount options of overlayfs can't carry it",
                dir.display()
            )));
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| failed("make", &dir, &e))?;
        Ok(Self(dir))
    }

    /// Where a snapshot's content is.
    pub fn content(&self, id: u64) -> PathBuf {
        self.0.join(id.to_string()).join("fs")
    }

    /// Where overlayfs works for an active snapshot.
    pub fn work(&self, id: u64) -> PathBuf {
        self.0.join(id.to_string()).join("work")
    }

    /// Makes the directories of a new snapshot; its root belongs to the owner of `like`'s.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn make(&self, id: u64, kind: Kind, like: Option<u64>) -> Result<(), SnapshotError> {
        let content = self.content(id);
        let make = |path: &Path, mode| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(path)
                .map_err(|e| failed("make", path, &e))
        };
        make(content.parent().unwrap_or(&self.0), 0o700)?;
        make(&content, 0o755)?;
        if kind == Kind::Active {
            make(&self.work(id), 0o711)?;
        }
        if let Some(like) = like {
            let parent = self.content(like);
            let of = fs::symlink_metadata(&parent).map_err(|e| failed("look at", &parent, &e))?;
            self.give(id, (of.uid(), of.gid()))?;
        }
        Ok(())
    }

    /// Gives the root of a new snapshot to a user and a group.
    ///
    /// # Errors
    /// When that can't be done.
    pub fn give(&self, id: u64, (user, group): (u32, u32)) -> Result<(), SnapshotError> {
        let content = self.content(id);
        std::os::unix::fs::lchown(&content, Some(user), Some(group))
            .map_err(|e| failed("give away", &content, &e))
    }

    /// Makes the mount point of a layer.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make_mount_point(&self, id: u64) -> Result<PathBuf, SnapshotError> {
        self.make(id, Kind::View, None)?;
        Ok(self.content(id))
    }

    /// Deletes what a snapshot had. On `fs` nothing may be mounted any more.
    ///
    /// # Errors
    /// When something can't be deleted.
    pub fn delete(&self, id: u64, layer: bool) -> io::Result<()> {
        let dir = self.0.join(id.to_string());
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        if !layer {
            return gone(fs::remove_dir_all(dir));
        }
        // What is still mounted there is not to be deleted through.
        gone(fs::remove_dir(self.content(id)))?;
        gone(fs::remove_dir(dir))
    }

    /// The ids that have a directory.
    ///
    /// # Errors
    /// When they can't be listed.
    pub fn ids(&self) -> io::Result<HashSet<u64>> {
        let names = fs::read_dir(&self.0)?.map(|entry| Ok(entry?.file_name()));
        let ids = names.filter_map(|name: io::Result<_>| match name {
            Ok(name) => name.to_str()?.parse().ok().map(Ok),
            Err(error) => Some(Err(error)),
        });
        ids.collect()
    }

    /// What a snapshot's content takes.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn usage(&self, id: u64) -> Result<Usage, SnapshotError> {
        let content = self.content(id);
        measure(&content).map_err(|e| failed("measure", &content, &e))
    }
}

// Files come and go while an active snapshot is measured.
fn measure(dir: &Path) -> io::Result<Usage> {
    let mut seen = HashSet::new();
    let mut usage = Usage::default();
    let mut count = |of: &fs::Metadata| {
        if of.is_dir() || of.nlink() == 1 || seen.insert((of.dev(), of.ino())) {
            usage.size = usage.size.saturating_add_unsigned(of.blocks().saturating_mul(512));
            usage.inodes += 1;
        }
    };
    count(&fs::symlink_metadata(dir)?);
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(of) => {
                    count(&of);
                    if of.is_dir() {
                        open.push(entry.path());
                    }
                }
            }
        }
    }
    Ok(usage)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> SnapshotError {
    SnapshotError::Internal(format!("can't {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = Dirs::new(dir.path().join("snapshots")).expect("dirs");
        dirs.make(7, Kind::Active, None).expect("make");
        let before = dirs.usage(7).expect("usage");
        assert_eq!(before.inodes, 1);
        let content = dirs.content(7);
        fs::write(content.join("a"), vec![1; 100_000]).expect("write");
        fs::hard_link(content.join("a"), content.join("b")).expect("link");
        std::os::unix::fs::symlink("/", content.join("c")).expect("symlink");
        fs::File::create(content.join("d")).expect("create").set_len(1 << 30).expect("a hole");
        let after = dirs.usage(7).expect("usage");
        assert_eq!(after.inodes, 4);
        let grown = after.size - before.size;
        assert!((100_000..200_000).contains(&grown), "{grown}");
        assert_eq!(dirs.ids().expect("ids"), HashSet::from([7]));
        dirs.delete(7, false).expect("delete");
        dirs.delete(7, false).expect("nothing to delete");
        assert!(dirs.ids().expect("ids").is_empty());
    }

    #[test]
    fn roots_that_overlayfs_cannot_name_are_refused() {
        let dir = tempfile::tempdir().expect("dir");
        for name in ["a,b", "a:b", "a\\b"] {
            assert!(Dirs::new(dir.path().join(name)).is_err(), "{name}");
        }
    }
}
