//! Profiles: what starts of an image really read, in order, so that the next one can have it fetched before it
//! asks.
//!
//! A profile is recorded from the reads that reach the layer files; starts that find bytes missing prefetch by it.
//! It can make nothing wrong, only waste bandwidth, so one that came with an index from the registry is as good as our
//! own once it fits the image's layers. docs/FORMAT.md has the format.

mod paths;
mod prefetch;
mod readahead;
mod recorder;
mod translate;

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use lazyrun_fetcher::Layer;
use lazyrun_index::{Digest, LayerId, Layout};
use serde::{Deserialize, Serialize};

pub use crate::ipc::profiles::PathTouches;
pub use paths::paths_of;
pub use prefetch::prefetch;
pub use readahead::{Devices, ShortReadahead};
pub use recorder::{Recorder, Watched};
pub(in crate::daemon) use translate::touch_in;
pub use translate::{Sources, translate};

/// Version of the format. Versions 1 and 2 had blocks instead of touches, and version 1 named no layer files: they
/// were all tars. Newer ones are ignored.
const VERSION: u32 = 3;
/// What a touch is rounded to, in bytes of the layer file.
pub const PAGE: u64 = 4096;
/// Pages of a block of the old versions.
const BLOCK_PAGES: u32 = 16;
/// Most touches of a profile.
const MAX_TOUCHES: usize = 1 << 17;
/// Most pages of a profile in all: 16 GiB.
const MAX_PAGES: u64 = 1 << 22;
/// Most bytes of a profile as JSON.
const MAX_SIZE: usize = 8 << 20;
/// Runs of a layer file with less than this between them are one run to spans, in bytes: a span's checkpoint costs
/// about as much.
const SAME_RUN: u64 = 16 << 10;

/// A run of pages that was read at once for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u16, u32, u32, u32)", into = "(u16, u32, u32, u32)")]
pub struct Touch {
    /// The layer, 0 at the bottom.
    pub layer: u16,
    /// First page of its layer file.
    pub page: u32,
    /// Number of pages.
    pub pages: u32,
    /// Milliseconds since the start.
    pub at_ms: u32,
}

impl From<(u16, u32, u32, u32)> for Touch {
    fn from((layer, page, pages, at_ms): (u16, u32, u32, u32)) -> Self {
        Touch { layer, page, pages, at_ms }
    }
}

impl From<Touch> for (u16, u32, u32, u32) {
    fn from(touch: Touch) -> Self {
        (touch.layer, touch.page, touch.pages, touch.at_ms)
    }
}

impl Touch {
    /// First byte of the layer file, and the byte after the last.
    pub fn bytes(&self) -> Range<u64> {
        u64::from(self.page) * PAGE..(u64::from(self.page) + u64::from(self.pages)) * PAGE
    }
}

/// What a start touches, in order of first touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    version: u32,
    /// The layer files, bottom first.
    #[serde(default)]
    layers: Vec<LayerId>,
    /// The touches.
    #[serde(default)]
    touches: Vec<Touch>,
    /// Of old versions: layer and number of a block of 64 KiB.
    #[serde(default, skip_serializing)]
    blocks: Vec<(u16, u32)>,
}

impl Profile {
    /// A profile of these layer files.
    pub fn new(layers: Vec<LayerId>, touches: Vec<Touch>) -> Self {
        Self { version: VERSION, layers, touches, blocks: Vec::new() }
    }

    /// Reads foreign bytes; `None` when they are no profile of a version that is known.
    pub fn parse(bytes: &[u8]) -> Option<Profile> {
        if bytes.len() > MAX_SIZE {
            return None;
        }
        let mut profile: Profile = serde_json::from_slice(bytes).ok()?;
        if !(1..=VERSION).contains(&profile.version) {
            return None;
        }
        let old = std::mem::take(&mut profile.blocks).into_iter().filter_map(|(layer, block)| {
            let page = block.checked_mul(BLOCK_PAGES)?;
            Some(Touch { layer, page, pages: BLOCK_PAGES, at_ms: 0 })
        });
        profile.touches.extend(old);
        let sound = profile.touches.iter().all(|t| t.pages > 0 && t.page.checked_add(t.pages).is_some());
        let pages: u64 = profile.touches.iter().map(|t| u64::from(t.pages)).sum();
        (sound && profile.touches.len() <= MAX_TOUCHES && pages <= MAX_PAGES).then_some(profile)
    }

    /// As JSON.
    ///
    /// # Errors
    /// When it cannot be written, which does not happen.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(&Profile { version: VERSION, ..self.clone() })?)
    }

    /// The touches, in order.
    pub fn touches(&self) -> &[Touch] {
        &self.touches
    }

    /// When the last page was first touched, after the start.
    pub fn duration(&self) -> Duration {
        Duration::from_millis(self.touches.iter().map(|touch| u64::from(touch.at_ms)).max().unwrap_or(0))
    }

    /// Whether it is about these layer files. A page of a tar says nothing about a table.
    pub fn fits(&self, layers: &[Arc<Layer>]) -> bool {
        self.is_about(layers.iter().map(|l| l.id()))
    }

    fn is_about(&self, mut files: impl Iterator<Item = LayerId>) -> bool {
        if self.version == 1 {
            files.all(|id| id.layout == Layout::Tar)
        } else {
            files.eq(self.layers.iter().copied())
        }
    }

    /// Whether another profile is about the same layer files.
    pub fn is_about_same(&self, other: &Profile) -> bool {
        self.is_about(other.layers.iter().copied())
    }

    /// With what a later start touched and this one has not: what was needed once is needed again more likely than
    /// anything else is.
    pub fn merge(&mut self, later: Profile) {
        let pages = |t: &Touch| (t.layer, t.page..t.page.saturating_add(t.pages));
        let mut known: HashSet<(u16, u32)> = HashSet::new();
        for (layer, range) in self.touches.iter().map(pages) {
            known.extend(range.map(|page| (layer, page)));
        }
        for touch in later.touches {
            let (layer, mut range) = pages(&touch);
            if self.touches.len() < MAX_TOUCHES && range.any(|page| !known.contains(&(layer, page))) {
                self.touches.push(touch);
            }
        }
    }

    /// The runs of one layer file that are touched, ascending and apart, for spans to follow.
    pub fn runs(&self, layer: usize) -> Vec<Range<u64>> {
        let of = self.touches.iter().filter(|t| usize::from(t.layer) == layer);
        let mut runs: Vec<Range<u64>> = of.map(Touch::bytes).collect();
        runs.sort_unstable_by_key(|run| run.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for run in runs {
            match merged.last_mut() {
                Some(last) if run.start <= last.end.saturating_add(SAME_RUN) => {
                    last.end = last.end.max(run.end);
                }
                _ => merged.push(run),
            }
        }
        merged
    }
}

/// The profiles of an instance, one a chain.
#[derive(Debug)]
pub struct Profiles {
    dir: PathBuf,
}

impl Profiles {
    /// Profiles kept in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn path(&self, chain: Digest) -> PathBuf {
        self.dir.join(format!("{}.json", chain.hex()))
    }

    /// The profile of a chain, if a usable one is there.
    pub fn load(&self, chain: Digest) -> Option<Profile> {
        Profile::parse(&std::fs::read(self.path(chain)).ok()?)
    }

    /// Keeps the profile of a chain.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self, chain: Digest, profile: &Profile) -> Result<()> {
        let path = self.path(chain);
        let write = || -> Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            std::io::Write::write_all(&mut file, &profile.to_json()?)?;
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// Forgets the profile of a chain; whether there was one.
    ///
    /// # Errors
    /// When it can't be deleted.
    pub fn delete(&self, chain: Digest) -> Result<bool> {
        let path = self.path(chain);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).with_context(|| format!("deleting {}", path.display())),
        }
    }

    /// Deletes the profiles of all chains but these.
    ///
    /// # Errors
    /// When the directory can't be read or a file can't be deleted.
    pub fn delete_except(&self, chains: &[Digest]) -> Result<()> {
        let keep: Vec<PathBuf> = chains.iter().map(|c| self.path(*c)).collect();
        delete_others(&self.dir, &keep)
    }
}

/// Deletes all files of a directory but these.
///
/// # Errors
/// When the directory can't be read or a file can't be deleted.
pub fn delete_others(dir: &Path, keep: &[PathBuf]) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let file = entry?.path();
        if !keep.contains(&file) {
            std::fs::remove_file(&file).with_context(|| format!("deleting {}", file.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(layer: u16, page: u32, pages: u32) -> Touch {
        Touch { layer, page, pages, at_ms: 7 }
    }

    #[test]
    fn profiles_are_kept_and_unknown_versions_ignored() {
        let dir = tempfile::tempdir().expect("dir");
        let (profiles, chain) = (Profiles::new(dir.path().into()), Digest::of(b"c"));
        assert_eq!(profiles.load(chain), None);
        let profile = Profile::new(vec![LayerId::tar(chain)], vec![touch(0, 3, 2)]);
        profiles.save(chain, &profile).expect("save");
        assert_eq!(profiles.load(chain), Some(profile));
        std::fs::write(profiles.path(chain), br#"{"version":1,"blocks":[[0,3]]}"#).expect("write");
        let old = profiles.load(chain).expect("a profile of the first version");
        assert!(old.is_about([LayerId::tar(chain)].into_iter()));
        assert!(!old.is_about([LayerId::table(chain)].into_iter()));
        assert_eq!(old.touches(), [Touch { layer: 0, page: 48, pages: 16, at_ms: 0 }]);
        assert_eq!(old.touches()[0].bytes(), 3 << 16..4 << 16);
        std::fs::write(profiles.path(chain), br#"{"version":4}"#).expect("write");
        assert_eq!(profiles.load(chain), None);
        profiles.delete_except(&[]).expect("delete");
        assert!(!profiles.path(chain).exists() && !profiles.delete(chain).expect("nothing to delete"));
    }

    #[test]
    fn foreign_profiles_that_make_no_sense_are_ignored() {
        let id = LayerId::tar(Digest::of(b"c"));
        for touches in ["[[0,1,0,0]]", "[[0,4294967295,2,0]]", "[[70000,1,1,0]]", "[[0,-1,1,0]]", "{}"] {
            let text = format!(r#"{{"version":3,"layers":["{id}"],"touches":{touches}}}"#);
            assert_eq!(Profile::parse(text.as_bytes()), None, "{touches}");
        }
        let many = vec![touch(0, 1, 1); MAX_TOUCHES + 1];
        assert_eq!(Profile::parse(&Profile::new(vec![id], many).to_json().expect("JSON")), None);
    }

    #[test]
    fn runs_are_ascending_and_apart() {
        let touches =
            vec![touch(0, 100, 2), touch(1, 0, 1), touch(0, 4, 4), touch(0, 10, 1), touch(0, 101, 3)];
        let profile = Profile::new(Vec::new(), touches);
        assert_eq!(profile.runs(0), [4 * PAGE..11 * PAGE, 100 * PAGE..104 * PAGE]);
        assert_eq!(profile.runs(2), []);
    }

    #[test]
    fn later_starts_add_what_is_new() {
        let mut profile = Profile::new(Vec::new(), vec![touch(0, 0, 4)]);
        profile.merge(Profile::new(Vec::new(), vec![touch(0, 1, 2), touch(0, 3, 2), touch(1, 0, 1)]));
        assert_eq!(profile.touches(), [touch(0, 0, 4), touch(0, 3, 2), touch(1, 0, 1)]);
    }
}
