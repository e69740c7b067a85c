//! Views of images, attached where containerd can see them.
//!
//! A view is a detached mount. For containerd a copy of it is attached at the directory of the snapshot that is the
//! image's topmost layer, when the first container needs it, and taken away with the last snapshot that stands on it.
//! Nothing here looks into a view: the daemon never opens a file through its own mounts.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lazyrun_fs::mount::{self, Shown};

use super::dirs::Dirs;
use super::error::SnapshotError;
use crate::daemon::mounts::{device_in_table, in_table};
use crate::daemon::views::{MountedView, Views};

/// All attached views, by the id of the snapshot they are attached at.
#[derive(Debug)]
pub struct Attached {
    dirs: Dirs,
    by_id: Mutex<HashMap<u64, Arc<Held>>>,
}

/// An attached view. Whoever has one of these keeps it from being taken away.
#[derive(Debug)]
pub struct Held {
    view: Arc<MountedView>,
}

/// What became of something that an earlier daemon attached.
#[derive(Debug)]
pub enum Adopted {
    /// It is this view, and works.
    View(Arc<MountedView>),
    /// Its view went with its daemon.
    Stale,
}

impl Held {
    /// The view.
    pub fn view(&self) -> &Arc<MountedView> {
        &self.view
    }
}

impl Attached {
    /// Nothing attached yet.
    pub fn new(dirs: Dirs) -> Self {
        Self { dirs, by_id: Mutex::default() }
    }

    /// The view at a snapshot, if it is there and the mount table has it.
    pub fn get(&self, id: u64) -> Option<Arc<Held>> {
        let held = self.lock().get(&id).cloned()?;
        let table = mount_table();
        in_table(&table, &self.dirs.content(id)).then_some(held)
    }

    /// Attaches a view at a snapshot, unless it is there. Blocks for a moment.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(&self, id: u64, view: Arc<MountedView>, views: &Views) -> Result<Arc<Held>, SnapshotError> {
        let mut by_id = self.lock();
        let point = self.dirs.content(id);
        if in_table(&mount_table(), &point) {
            if let Some(held) = by_id.get(&id) {
                return Ok(Arc::clone(held));
            }
            // Left by a daemon whose view is gone with it.
            detach(&point)?;
        }
        self.dirs.make_mount_point(id)?;
        let tree = views
            .stack(&view, None, &Shown::default())
            .map_err(|e| SnapshotError::Internal(format!("{e:#}")))?;
        mount::attach(tree.as_fd(), &point).map_err(|e| SnapshotError::Internal(e.to_string()))?;
        let held = Arc::new(Held { view });
        by_id.insert(id, Arc::clone(&held));
        Ok(held)
    }

    /// Takes up what an earlier daemon attached, as the mount table has it: one of `views`, told by its device number.
    /// Anything else there is stale and taken away. `None` if nothing was attached.
    pub fn adopt(
        &self,
        id: u64,
        table: &[u8],
        views: impl FnOnce() -> Vec<Arc<MountedView>>,
    ) -> Option<Adopted> {
        let point = self.dirs.content(id);
        let device = device_in_table(table, &point)?;
        let same = |view: &Arc<MountedView>| {
            mount::device_of(view.tree.as_fd())
                .is_ok_and(|(major, minor)| device == format!("{major}:{minor}"))
        };
        if let Some(view) = views().into_iter().find(same) {
            self.lock().insert(id, Arc::new(Held { view: Arc::clone(&view) }));
            return Some(Adopted::View(view));
        }
        if let Err(error) = detach(&point) {
            tracing::warn!(%error, "a stale mount stays");
        }
        Some(Adopted::Stale)
    }

    /// Takes a view away, unless somebody holds it or `in_use` says that something needs it.
    ///
    /// # Errors
    /// What `in_use` says, or the kernel's refusal.
    pub fn release(
        &self,
        id: u64,
        in_use: impl FnOnce() -> Result<bool, SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut by_id = self.lock();
        if by_id.get(&id).is_some_and(|held| Arc::strong_count(held) > 1) || in_use()? {
            return Ok(());
        }
        let point = self.dirs.content(id);
        if in_table(&mount_table(), &point) {
            detach(&point)?;
        }
        by_id.remove(&id);
        Ok(())
    }

    /// Takes all away that is attached in any of these directories.
    pub fn detach_all(&self, ids: impl IntoIterator<Item = u64>) {
        let mut by_id = self.lock();
        by_id.clear();
        let table = mount_table();
        for point in ids.into_iter().map(|id| self.dirs.content(id)).filter(|point| in_table(&table, point)) {
            if let Err(error) = detach(&point) {
                tracing::warn!(%error, "a view can't be taken down");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Held>>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn detach(point: &Path) -> Result<(), SnapshotError> {
    mount::detach(point).map_err(|e| SnapshotError::Internal(e.to_string()))
}

/// The mount table of this process.
pub fn mount_table() -> Vec<u8> {
    std::fs::read("/proc/self/mountinfo").unwrap_or_default()
}

/// Whether what is mounted at `point` is also there for process `pid`, which may have a mount namespace of its own.
///
/// # Errors
/// That it is not, and what to do.
pub fn visible_to(pid: Option<i32>, point: &Path) -> Result<(), SnapshotError> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let Some(pid) = pid else { return Ok(()) };
    let theirs = namespace(&pid.to_string());
    if theirs.is_none() || theirs == namespace("self") {
        return Ok(());
    }
    let Ok(table) = std::fs::read(format!("/proc/{pid}/mountinfo")) else { return Ok(()) };
    if in_table(&table, point) {
        return Ok(());
    }
    let root: PathBuf = point.ancestors().nth(3).unwrap_or(point).to_owned();
    Err(SnapshotError::FailedPrecondition(format!(
        "what lazyrun mounts below {root} does not appear in the mount namespace of containerd (process {pid}): run \
         both in one mount namespace, or share the directory with `mount --bind --make-rshared {root} {root}` before \
         containerd's namespace is made (docs/OPERATIONS.md, Mount propagation)",
        root = root.display(),
    )))
}
