//! What is kept of hydration on disk (`hydration.json`): which images want it, what is paused, the limit.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::ipc::protocol::ImageRequest;

const VERSION: u32 = 1;

/// The file's content.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Saved {
    version: u32,
    /// All hydration is paused.
    #[serde(default)]
    pub(super) paused: bool,
    /// The limit that was set while a daemon ran, in bytes per second; 0 is none, and it wins over the daemon's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) limit: Option<u64>,
    /// By full reference.
    #[serde(default)]
    pub(super) images: BTreeMap<String, Entry>,
}

/// An image that wants hydration, or whose hydration is paused.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Entry {
    /// How to get at it.
    pub(super) request: ImageRequest,
    /// It shall become whole.
    pub(super) wanted: bool,
    /// The user asked for that, so it goes before others.
    pub(super) asked: bool,
    /// Not now.
    pub(super) paused: bool,
}

impl Entry {
    pub(super) fn new(request: ImageRequest) -> Self {
        Self { request, wanted: false, asked: false, paused: false }
    }
}

impl Default for Saved {
    fn default() -> Self {
        Self { version: VERSION, paused: false, limit: None, images: BTreeMap::new() }
    }
}

impl Saved {
    /// Drops entries that say nothing.
    pub(super) fn prune(&mut self) {
        self.images.retain(|_, entry| entry.wanted || entry.paused);
    }
}

/// The file, with one writer at a time.
pub(super) struct SavedFile {
    path: PathBuf,
    turn: Mutex<()>,
}

impl SavedFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, turn: Mutex::default() }
    }

    /// What the file says. One that cannot be understood counts as empty: the worst that comes of it is that an image
    /// stays lazy until its next start.
    pub(super) fn load(&self) -> Result<Saved> {
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Saved::default()),
            Err(e) => return Err(e).with_context(|| format!("reading {}", self.path.display())),
        };
        match serde_json::from_slice::<Saved>(&bytes) {
            Ok(saved) if saved.version == VERSION => Ok(saved),
            Ok(saved) => {
                tracing::warn!(path = %self.path.display(), saved.version, "hydration's state has another version");
                Ok(Saved::default())
            }
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "hydration's state is damaged");
                Ok(Saved::default())
            }
        }
    }

    /// Writes what `now` gives once it is this writer's turn: the newest state, whoever comes last.
    pub(super) fn write(&self, now: impl FnOnce() -> Saved) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let context = || format!("writing {}", self.path.display());
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::NamedTempFile::new_in(dir).with_context(context)?;
        file.write_all(&serde_json::to_vec(&now())?).with_context(context)?;
        file.as_file().sync_data().with_context(context)?;
        file.persist(&self.path).with_context(context)?;
        std::fs::File::open(dir)?.sync_all().with_context(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::protocol::{IndexOptions, PullPolicy, RegistryOptions};

    #[test]
    fn what_was_wanted_survives_and_nonsense_is_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let file = SavedFile::new(dir.path().join("hydration.json"));
        assert!(file.load().expect("nothing yet").images.is_empty());
        let request = ImageRequest {
            reference: "x".into(),
            pull: PullPolicy::Missing,
            registry: RegistryOptions::default(),
            index: IndexOptions::default(),
        };
        let mut saved = Saved { paused: true, limit: Some(0), ..Saved::default() };
        saved.images.insert("idle".into(), Entry::new(request.clone()));
        saved.images.insert("x".into(), Entry { wanted: true, ..Entry::new(request) });
        saved.prune();
        file.write(|| saved.clone()).expect("write");
        let loaded = file.load().expect("load");
        assert!(loaded.paused && loaded.limit == Some(0) && loaded.images["x"].wanted);
        assert_eq!(loaded.images.len(), 1);
        for nonsense in ["", "{", "{\"version\": 2}"] {
            std::fs::write(&file.path, nonsense).expect("write nonsense");
            assert!(!file.load().expect("load").paused);
        }
    }
}
