//! Profiles: what a start of an image really read, in order, so that the next one can have it fetched before it
//! asks.
//!
//! A profile is recorded from the reads that reach the layer files, in blocks, the first time an image is started;
//! later starts that find bytes missing prefetch by it.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream};
use lazyrun_fetcher::{Fetcher, Layer};
use lazyrun_index::{Digest, LayerId, Layout};
use serde::{Deserialize, Serialize};

/// Version of the format. Version 1 named no layer files: they were all tars. Other versions are ignored, since a
/// profile only saves time.
const VERSION: u32 = 2;
/// What a touch is rounded to, in bytes of the layer file.
const BLOCK: u64 = 64 << 10;
/// Most blocks of a profile: 16 GiB read at a start.
const MAX_BLOCKS: usize = 1 << 18;
/// Spans asked for by one request: enough to hide the round trip, not so many that what is wanted first waits.
const MAX_RUN: usize = 4;
/// Runs that are under way at a time.
const PIPELINE: usize = 3;

/// The blocks a start touched, in order of first touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    version: u32,
    /// The layer files, bottom first.
    #[serde(default)]
    layers: Vec<LayerId>,
    /// Layer (0 at the bottom) and number of the block in its layer file.
    blocks: Vec<(u16, u32)>,
}

impl Profile {
    /// Whether it is about these layer files. A block of a tar says nothing about a table.
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
        let profile: Profile = serde_json::from_slice(&std::fs::read(self.path(chain)).ok()?).ok()?;
        ((1..=VERSION).contains(&profile.version) && profile.blocks.len() <= MAX_BLOCKS).then_some(profile)
    }

    /// Keeps the profile of a chain.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self, chain: Digest, profile: &Profile) -> Result<()> {
        let path = self.path(chain);
        let write = || -> Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            serde_json::to_writer(&mut file, profile)?;
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", path.display()))
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

/// Fetches what a profile foresees, in its order.
pub async fn prefetch(fetcher: &Fetcher, layers: &[Arc<Layer>], profile: &Profile) {
    let runs = runs(layers, profile);
    let fetches = runs.into_iter().filter_map(|(layer, spans)| {
        let (fetcher, layer) = (fetcher.clone(), Arc::clone(layers.get(usize::from(layer))?));
        Some(async move {
            if let Err(error) = fetcher.prefetch(&layer, spans).await {
                tracing::debug!(layer = %layer.diff_id(), %error, "foreseen spans can't be prefetched");
            }
        })
    });
    stream::iter(fetches).buffered(PIPELINE).for_each(|()| std::future::ready(())).await;
}

// Spans in the order of their first touch, neighbours that are touched one after the other together.
fn runs(layers: &[Arc<Layer>], profile: &Profile) -> Vec<(u16, Range<usize>)> {
    let mut seen = HashSet::new();
    let mut runs: Vec<(u16, Range<usize>)> = Vec::new();
    for &(number, block) in &profile.blocks {
        let Some(layer) = layers.get(usize::from(number)) else { continue };
        for span in layer.index().spans_covering(u64::from(block) * BLOCK, BLOCK) {
            if !seen.insert((number, span)) {
                continue;
            }
            match runs.last_mut() {
                Some((last, range)) if *last == number && range.end == span && range.len() < MAX_RUN => {
                    range.end += 1;
                }
                _ => runs.push((number, span..span + 1)),
            }
        }
    }
    runs
}

/// Recordings under way, fed by every read of a layer file.
#[derive(Debug, Default)]
pub struct Recorder {
    // Reads are many and recordings few: a read that nobody records costs one load.
    active: AtomicBool,
    recordings: Mutex<Vec<Recording>>,
}

#[derive(Debug)]
struct Recording {
    chain: Digest,
    layers: Vec<(u64, LayerId)>,
    seen: HashSet<(u16, u32)>,
    blocks: Vec<(u16, u32)>,
}

impl Recorder {
    /// Starts to record the reads of these layer files (inode numbers and names, bottom first); `false` when that goes on already.
    pub fn start(&self, chain: Digest, layers: Vec<(u64, LayerId)>) -> bool {
        let mut recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        if recordings.iter().any(|r| r.chain == chain) {
            return false;
        }
        recordings.push(Recording { chain, layers, seen: HashSet::new(), blocks: Vec::new() });
        self.active.store(true, Ordering::Relaxed);
        true
    }

    /// Notes a read.
    pub fn note(&self, ino: u64, offset: u64, len: u32) {
        if !self.active.load(Ordering::Relaxed) || len == 0 {
            return;
        }
        let last = offset.saturating_add(u64::from(len) - 1) / BLOCK;
        let mut recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        for recording in recordings.iter_mut() {
            let Some(layer) = recording.layers.iter().position(|(l, _)| *l == ino) else { continue };
            for block in offset / BLOCK..=last {
                let (Ok(layer), Ok(block)) = (u16::try_from(layer), u32::try_from(block)) else { continue };
                if recording.blocks.len() < MAX_BLOCKS && recording.seen.insert((layer, block)) {
                    recording.blocks.push((layer, block));
                }
            }
        }
    }

    /// Ends a recording; `None` when nothing was read or nothing recorded.
    pub fn finish(&self, chain: Digest) -> Option<Profile> {
        let mut recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        let at = recordings.iter().position(|r| r.chain == chain)?;
        let recording = recordings.swap_remove(at);
        self.active.store(!recordings.is_empty(), Ordering::Relaxed);
        let layers = recording.layers.into_iter().map(|(_, id)| id).collect();
        (!recording.blocks.is_empty()).then_some(Profile {
            version: VERSION,
            layers,
            blocks: recording.blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_touches_in_order() {
        let (recorder, chain) = (Recorder::default(), Digest::of(b"c"));
        recorder.note(7, 0, 1);
        let files = [(7, LayerId::tar(chain)), (9, LayerId::table(chain))];
        assert!(recorder.start(chain, files.to_vec()) && !recorder.start(chain, files.to_vec()));
        recorder.note(9, BLOCK * 5, 1);
        recorder.note(7, BLOCK - 1, 2);
        recorder.note(9, BLOCK * 5 + 100, 4096);
        recorder.note(8, 0, 4096);
        let profile = recorder.finish(chain).expect("profile");
        assert_eq!(profile.blocks, [(1, 5), (0, 0), (0, 1)]);
        assert!(profile.is_about(files.iter().map(|(_, id)| *id)));
        assert!(!profile.is_about([LayerId::tar(chain); 2].into_iter()));
        assert_eq!(recorder.finish(chain), None);
    }

    #[test]
    fn profiles_are_kept_and_other_versions_ignored() {
        let dir = tempfile::tempdir().expect("dir");
        let (profiles, chain) = (Profiles::new(dir.path().into()), Digest::of(b"c"));
        assert_eq!(profiles.load(chain), None);
        let profile = Profile { version: VERSION, layers: vec![LayerId::tar(chain)], blocks: vec![(0, 3)] };
        profiles.save(chain, &profile).expect("save");
        assert_eq!(profiles.load(chain), Some(profile));
        std::fs::write(profiles.path(chain), br#"{"version":1,"blocks":[[0,3]]}"#).expect("write");
        let old = profiles.load(chain).expect("a profile of the first version");
        assert!(old.is_about([LayerId::tar(chain)].into_iter()));
        assert!(!old.is_about([LayerId::table(chain)].into_iter()));
        let newer = Profile { version: VERSION + 1, ..Profile::default() };
        profiles.save(chain, &newer).expect("save");
        assert_eq!(profiles.load(chain), None);
        profiles.delete_except(&[]).expect("delete");
        assert!(!profiles.path(chain).exists());
    }
}
