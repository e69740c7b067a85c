//! Mounts made for `lazyrun mount`: attached by the caller, remembered here.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use lazyrun_fs::mount::Shown;
use lazyrun_index::{Digest, LayerId};
use serde::{Deserialize, Serialize};

use super::hydration::KeptLazy;
use super::views::{MountedView, Purpose};
use super::{Daemon, layer_ids};
use crate::ipc::hydration::HydrateMode;
use crate::names;

/// What is kept of a mount (`mounts/<id>/mount.json`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountRecord {
    /// Where it is.
    pub target: PathBuf,
    /// The image as typed.
    pub image: String,
    /// Its layers, bottom first.
    pub diff_ids: Vec<Digest>,
    /// The layer files; where they are not recorded, the tars.
    #[serde(default)]
    pub layers: Vec<LayerId>,
    /// The mount plan.
    pub plan: String,
    /// Whether the image is hydrated meanwhile.
    #[serde(default)]
    pub hydrate: HydrateMode,
}

#[derive(Debug)]
struct Entry {
    record: MountRecord,
    // Until the caller has attached it, a mount is rightly in no mount table.
    attached: bool,
    // Keeps the view mounted and its layers local.
    _view: Option<Arc<MountedView>>,
    _kept_lazy: Option<KeptLazy>,
}

/// All mounts, by id of their directory.
#[derive(Debug, Default)]
pub struct Mounts {
    by_id: Mutex<BTreeMap<String, Entry>>,
}

impl Mounts {
    /// Their records.
    pub fn all(&self) -> Vec<MountRecord> {
        self.lock().values().map(|entry| entry.record.clone()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Entry>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Daemon {
    /// A detached mount of a view for the caller to attach at `target`; recorded before it is handed out, so
    /// that a caller killed at any moment leaves nothing unknown.
    ///
    /// # Errors
    /// When the mount can't be made.
    pub async fn mount(
        self: &Arc<Self>,
        image: &str,
        view: Arc<MountedView>,
        target: PathBuf,
        (writable, shown): (bool, Shown),
        hydrate: HydrateMode,
    ) -> Result<(String, OwnedFd)> {
        let id = names::id();
        let kept_lazy = self.keep_lazy(hydrate, &id, &view.layers);
        let dir = self.paths.mounts().join(&id);
        let record = MountRecord {
            target,
            image: image.to_owned(),
            diff_ids: view.layers.iter().map(|l| l.diff_id()).collect(),
            layers: view.layers.iter().map(|l| l.id()).collect(),
            plan: view.plan.to_string(),
            hydrate,
        };
        let make = || -> Result<()> {
            std::fs::create_dir_all(dir.join("upper"))?;
            std::fs::create_dir_all(dir.join("work"))?;
            std::fs::write(dir.join("mount.json"), serde_json::to_vec(&record)?)?;
            Ok(())
        };
        make().with_context(|| format!("writing {}", dir.display()))?;
        let entry = Entry { record, attached: false, _view: Some(Arc::clone(&view)), _kept_lazy: kept_lazy };
        self.mounts.lock().insert(id.clone(), entry);
        // Views are shared, and labels are a filesystem's: they need one above. Whoever attaches it makes it read-only.
        let upper_and_work =
            (writable || !shown.labels.is_empty()).then(|| (dir.join("upper"), dir.join("work")));
        let views = Arc::clone(&self.views);
        let mounted = tokio::task::spawn_blocking(move || views.stack(&view, upper_and_work, &shown));
        match mounted.await.context("mounting the image")? {
            Ok(fd) => Ok((id, fd)),
            Err(error) => {
                self.forget_mount(&id);
                Err(error).context("mounting the image")
            }
        }
    }

    /// The caller of [`Daemon::mount`] has attached the mount, or is gone.
    pub fn settle_mount(&self, id: &str) {
        if let Some(entry) = self.mounts.lock().get_mut(id) {
            entry.attached = true;
        }
        self.sweep_mounts();
    }

    /// Forgets mounts that are no longer in the mount table.
    pub fn sweep_mounts(&self) {
        let Ok(table) = std::fs::read("/proc/self/mountinfo") else { return };
        let gone: Vec<String> = {
            let mounts = self.mounts.lock();
            let gone = mounts.iter().filter(|(_, e)| e.attached && !in_table(&table, &e.record.target));
            gone.map(|(id, _)| id.clone()).collect()
        };
        for id in gone {
            self.forget_mount(&id);
        }
    }

    /// Forgets the mount at `target`, which the caller has taken down.
    pub fn unmounted(&self, target: &Path) {
        let ids: Vec<String> = {
            let mounts = self.mounts.lock();
            mounts.iter().filter(|(_, e)| e.record.target == target).map(|(id, _)| id.clone()).collect()
        };
        for id in ids {
            self.forget_mount(&id);
        }
    }

    /// Takes all mounts down that this process can see.
    pub fn unmount_all(&self) {
        self.detach_snapshots();
        for record in self.mounts.all() {
            if let Err(error) = lazyrun_fs::mount::detach(&record.target) {
                tracing::warn!(target = %record.target.display(), %error, "a mount can't be taken down");
            }
        }
        self.sweep_mounts();
    }

    /// Forgets one mount and deletes what was written to it.
    pub fn forget_mount(&self, id: &str) {
        let entry = self.mounts.lock().remove(id);
        drop(entry);
        let _ = std::fs::remove_dir_all(self.paths.mounts().join(id));
    }

    /// Picks up the mounts that an earlier daemon made.
    ///
    /// # Errors
    /// When their directory can't be read.
    pub(super) async fn recover_mounts(self: &Arc<Self>) -> Result<()> {
        let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        for entry in std::fs::read_dir(self.paths.mounts())? {
            let entry = entry?;
            let record: Option<MountRecord> = std::fs::read(entry.path().join("mount.json"))
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let Some(record) = record.filter(|r| in_table(&table, &r.target)) else {
                let _ = std::fs::remove_dir_all(entry.path());
                continue;
            };
            let id = entry.file_name().to_string_lossy().into_owned();
            let (view, kept_lazy) = match (
                self.known_layers(&layer_ids(&record.layers, &record.diff_ids)),
                record.plan.parse(),
            ) {
                (Some(layers), Ok(plan)) => {
                    let kept_lazy = self.keep_lazy(record.hydrate, &id, &layers);
                    (self.views.get(layers, plan, Purpose::Use).await.ok(), kept_lazy)
                }
                _ => (None, None),
            };
            if let Some(view) = &view {
                self.seen.recovered(&record.image, view);
            }
            self.mounts
                .lock()
                .insert(id, Entry { record, attached: true, _view: view, _kept_lazy: kept_lazy });
        }
        Ok(())
    }
}

/// Whether a mount table (mountinfo) has something at `target`.
pub(crate) fn in_table(mountinfo: &[u8], target: &Path) -> bool {
    device_in_table(mountinfo, target).is_some()
}

/// The device number, `major:minor`, of what a mount table has at `target`.
pub(crate) fn device_in_table(mountinfo: &[u8], target: &Path) -> Option<String> {
    fields_in_table(mountinfo, target).map(|fields| String::from_utf8_lossy(fields[2]).into_owned())
}

/// The fields of the line that a mount table has for `target` (proc_pid_mountinfo(5)), at least those up to the mount point.
pub(crate) fn fields_in_table<'a>(mountinfo: &'a [u8], target: &Path) -> Option<Vec<&'a [u8]>> {
    // Field 5 of a line is the mount point, with space, tab, newline and backslash in octal; the last one is on top.
    let mut escaped = Vec::new();
    for &byte in target.as_os_str().as_encoded_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => escaped.extend(format!("\\{byte:03o}").bytes()),
            byte => escaped.push(byte),
        }
    }
    let lines = mountinfo.rsplit(|b| *b == b'\n');
    let line = lines
        .map(|line| line.split(|b| *b == b' '))
        .find(|fields| fields.clone().nth(4) == Some(&escaped))?;
    Some(line.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_spaces_are_found() {
        let table = b"36 25 0:32 / /a\\040b rw - overlay overlay rw\n37 25 0:33 / /c rw - proc proc rw\n";
        assert!(in_table(table, Path::new("/a b")) && in_table(table, Path::new("/c")));
        assert!(!in_table(table, Path::new("/a")));
        assert_eq!(device_in_table(table, Path::new("/a b")).as_deref(), Some("0:32"));
        let twice = [&table[..], b"38 25 0:99 / /c rw - erofs x ro\n"].concat();
        assert_eq!(device_in_table(&twice, Path::new("/c")).as_deref(), Some("0:99"));
    }
}
