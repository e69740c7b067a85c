//! Containers: what is recorded of each, and what happens when one ends.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result};
use lazyrun_index::{Digest, LayerId};
use serde::{Deserialize, Serialize};

use super::hydration::KeptLazy;
use super::views::MountedView;
use crate::container::config::ExitRecord;
use crate::failure::Failure;
use crate::ipc::hydration::HydrateMode;
use crate::ipc::protocol::{ContainerSummary, NetworkMode};
use crate::network::{Attachment, PortMapping};
use crate::{clock, proc};

/// What is kept of a container (`container.json`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// 64 hex digits.
    pub id: String,
    /// Unique among the instance's containers.
    pub name: String,
    /// The image as typed.
    pub image: String,
    /// Its config's digest.
    pub image_id: Digest,
    /// Its layers, bottom first.
    pub diff_ids: Vec<Digest>,
    /// The layer files; where they are not recorded, the tars.
    #[serde(default)]
    pub layers: Vec<LayerId>,
    /// The mount plan.
    pub plan: String,
    /// What it runs.
    pub args: Vec<String>,
    /// When it was made.
    pub created: SystemTime,
    /// Its network.
    pub network: NetworkMode,
    /// Its place on the bridge.
    pub attachment: Option<Attachment>,
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// Remove it when it ends.
    pub remove: bool,
    /// With a terminal.
    pub terminal: bool,
    /// What `stop` sends first, by name or number; SIGTERM when absent.
    pub stop_signal: Option<String>,
    /// The shim.
    pub shim: Option<proc::Identity>,
    /// The container's init, once it runs.
    pub pid: Option<u32>,
    /// The socket of the shim.
    pub socket: PathBuf,
    /// Whether its image is hydrated while it runs.
    #[serde(default)]
    pub hydrate: HydrateMode,
}

/// What a container keeps as it is while it runs.
#[derive(Debug, Default)]
pub struct Holds {
    /// Its view is mounted.
    pub view: Option<Arc<MountedView>>,
    /// Its image stays lazy.
    pub kept_lazy: Option<KeptLazy>,
}

/// A container of this instance.
#[derive(Debug)]
pub struct Container {
    dir: PathBuf,
    record: Mutex<Record>,
    holds: Mutex<Holds>,
    /// Done once, by whoever comes first: the watcher or `rm`.
    pub(super) ended: tokio::sync::Mutex<bool>,
}

impl Container {
    /// A container that is being made.
    pub fn new(dir: PathBuf, record: Record, holds: Holds, ended: bool) -> Self {
        Self {
            dir,
            record: Mutex::new(record),
            holds: Mutex::new(holds),
            ended: tokio::sync::Mutex::new(ended),
        }
    }

    /// A copy of its record.
    pub fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Changes the record, on disk too.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut record);
        write_record(&self.dir, &record)
    }

    /// Lets go of what it holds.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.holds.lock().unwrap_or_else(PoisonError::into_inner));
        drop(held);
    }

    /// How it ended; `None` while it runs.
    pub fn exit(&self) -> Option<ExitRecord> {
        ExitRecord::load(&self.dir).ok().flatten()
    }

    /// Whether its shim lives.
    pub fn is_running(&self) -> bool {
        self.exit().is_none() && self.record().shim.is_some_and(proc::Identity::is_alive)
    }

    /// As `lazyrun ps` shows it.
    pub fn summary(&self) -> ContainerSummary {
        let record = self.record();
        let ago = |t: SystemTime| clock::human(t.elapsed().unwrap_or_default());
        let (state, status) = match self.exit() {
            Some(exit) => {
                let at = std::fs::metadata(self.dir.join("exit.json")).and_then(|m| m.modified());
                let at = at.unwrap_or_else(|_| SystemTime::now());
                ("exited", format!("Exited ({}) {} ago", exit.exit_code, ago(at)))
            }
            None if self.is_running() => ("running", format!("Up {}", ago(record.created))),
            None => ("dead", "Dead".to_owned()),
        };
        ContainerSummary {
            command: record.args.join(" "),
            created_at: clock::rfc3339(record.created),
            state: state.into(),
            status,
            ports: record.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            names: record.name,
            image: record.image,
            id: record.id,
        }
    }
}

/// Writes a container's record: temp, fsync, rename.
///
/// # Errors
/// The I/O error, with the path.
pub fn write_record(dir: &Path, record: &Record) -> Result<()> {
    let path = dir.join("container.json");
    let write = || -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(&mut file, record)?;
        file.as_file().sync_data()?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// All containers, by id.
#[derive(Debug, Default)]
pub struct Containers {
    by_id: Mutex<BTreeMap<String, Arc<Container>>>,
    // Names taken by containers that are still being made.
    reserved: Mutex<Vec<String>>,
}

/// A name that nobody else gets while this lives.
#[derive(Debug)]
pub struct ReservedName<'a> {
    name: String,
    of: &'a Containers,
}

impl ReservedName<'_> {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.name
    }
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        self.of.reserved.lock().unwrap_or_else(PoisonError::into_inner).retain(|n| *n != self.name);
    }
}

impl Containers {
    /// Adds a container.
    pub fn insert(&self, container: Arc<Container>) {
        self.lock().insert(container.record().id, container);
    }

    /// Takes a container off the list.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// All of them, newest first.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_by_key(|c| std::cmp::Reverse(c.record().created));
        all
    }

    /// The container with this name, id or beginning of an id.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn find(&self, name: &str) -> Result<Arc<Container>, Failure> {
        let by_id = self.lock();
        if let Some(container) = by_id.values().find(|c| c.record().name == name) {
            return Ok(Arc::clone(container));
        }
        let mut matches = by_id.iter().filter(|(id, _)| !name.is_empty() && id.starts_with(name));
        match (matches.next(), matches.next()) {
            (Some((_, container)), None) => Ok(Arc::clone(container)),
            (None, _) => Err(Failure::new(1, format!("no such container: {name}"))),
            _ => Err(Failure::new(1, format!("{name} is the beginning of several container ids"))),
        }
    }

    /// Takes a name for a container to come; without one asked for, makes one up.
    ///
    /// # Errors
    /// When the name is taken or no name at all.
    pub fn reserve(&self, name: Option<&str>) -> Result<ReservedName<'_>, Failure> {
        if let Some(name) = name {
            let valid = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
            let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
            if !first || name.len() > 128 || !name.chars().all(valid) {
                return Err(Failure::daemon(format!(
                    "{name:?} is no container name: letters, digits, _ . - are allowed, the first a letter or digit"
                )));
            }
        }
        let by_id = self.lock();
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |name: &str| {
            reserved.iter().any(|r| r == name) || by_id.values().any(|c| c.record().name == name)
        };
        let name = match name {
            Some(name) if taken(name) => {
                return Err(Failure::daemon(format!(
                    "the name {name} is taken by another container; remove that one or choose another name"
                )));
            }
            Some(name) => name.to_owned(),
            None => std::iter::repeat_with(crate::names::random).find(|n| !taken(n)).unwrap_or_default(),
        };
        reserved.push(name.clone());
        drop((by_id, reserved));
        Ok(ReservedName { name, of: self })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
