//! Recording what a start reads. Always on, so it has to cost next to nothing: a read whose pages were all seen before,
//! or that nobody records, takes no lock that anybody waits for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use lazyrun_index::{Digest, LayerId};

use super::{MAX_TOUCHES, PAGE, Profile, Touch};

/// Recordings under way, fed by every read of a layer file.
#[derive(Debug, Default)]
pub struct Recorder {
    // Reads are many and recordings few: a read that nobody records costs one load.
    active: AtomicBool,
    recordings: RwLock<Vec<Arc<Recording>>>,
}

/// A layer file whose reads are recorded.
#[derive(Debug)]
pub struct Watched {
    ino: u64,
    id: LayerId,
    // A bit for each page that was seen.
    seen: Vec<AtomicU64>,
}

impl Watched {
    /// The layer file with this inode number, name and length in bytes.
    pub fn new(ino: u64, id: LayerId, len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(PAGE).div_ceil(64)).unwrap_or(0);
        Self { ino, id, seen: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Marks pages as seen; whether any of them was new.
    fn see(&self, pages: std::ops::RangeInclusive<u64>) -> bool {
        let (mut page, last) = pages.into_inner();
        let mut new = false;
        while page <= last {
            let Some(word) = self.seen.get(usize::try_from(page / 64).unwrap_or(usize::MAX)) else {
                return new;
            };
            let in_word = (last - page + 1).min(64 - page % 64);
            let bits = (u64::MAX >> (64 - in_word)) << (page % 64);
            // Most reads are of pages that were seen; those need not write.
            if word.load(Ordering::Relaxed) & bits != bits {
                new |= word.fetch_or(bits, Ordering::Relaxed) & bits != bits;
            }
            page += in_word;
        }
        new
    }
}

#[derive(Debug)]
struct Recording {
    chain: Digest,
    began: Instant,
    layers: Vec<Watched>,
    touches: Mutex<Vec<Touch>>,
}

impl Recorder {
    /// Starts to record the reads of these layer files, bottom first; `false` when that goes on already.
    pub fn start(&self, chain: Digest, layers: Vec<Watched>) -> bool {
        let mut recordings = self.recordings.write().unwrap_or_else(PoisonError::into_inner);
        if recordings.iter().any(|r| r.chain == chain) {
            return false;
        }
        recordings.push(Arc::new(Recording {
            chain,
            began: Instant::now(),
            layers,
            touches: Mutex::default(),
        }));
        self.active.store(true, Ordering::Relaxed);
        true
    }

    /// Notes a read.
    pub fn note(&self, ino: u64, offset: u64, len: u32) {
        if !self.active.load(Ordering::Relaxed) || len == 0 {
            return;
        }
        let pages = offset / PAGE..=offset.saturating_add(u64::from(len) - 1) / PAGE;
        let recordings = self.recordings.read().unwrap_or_else(PoisonError::into_inner);
        for recording in recordings.iter() {
            recording.note(ino, &pages);
        }
    }

    /// Ends a recording; `None` when nothing was read or nothing recorded.
    pub fn finish(&self, chain: Digest) -> Option<Profile> {
        let recording = {
            let mut recordings = self.recordings.write().unwrap_or_else(PoisonError::into_inner);
            let at = recordings.iter().position(|r| r.chain == chain)?;
            let recording = recordings.swap_remove(at);
            self.active.store(!recordings.is_empty(), Ordering::Relaxed);
            recording
        };
        let touches = std::mem::take(&mut *recording.touches.lock().unwrap_or_else(PoisonError::into_inner));
        let layers = recording.layers.iter().map(|l| l.id).collect();
        (!touches.is_empty()).then(|| Profile::new(layers, touches))
    }
}

impl Recording {
    fn note(&self, ino: u64, pages: &std::ops::RangeInclusive<u64>) {
        let Some((layer, watched)) = self.layers.iter().enumerate().find(|(_, l)| l.ino == ino) else {
            return;
        };
        if !watched.see(pages.clone()) {
            return;
        }
        let count = pages.end() - pages.start() + 1;
        let (Ok(layer), Ok(page), Ok(pages)) =
            (u16::try_from(layer), u32::try_from(*pages.start()), u32::try_from(count))
        else {
            return;
        };
        let at_ms = u32::try_from(self.began.elapsed().as_millis()).unwrap_or(u32::MAX);
        let mut touches = self.touches.lock().unwrap_or_else(PoisonError::into_inner);
        let last = touches.last_mut().filter(|last| last.layer == layer);
        // A read that goes on where the last one ended is one touch with it.
        if let Some(last) = last.filter(|last| last.page.checked_add(last.pages) == Some(page)) {
            last.pages = last.pages.saturating_add(pages);
        } else if touches.len() < MAX_TOUCHES {
            touches.push(Touch { layer, page, pages, at_ms });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare(profile: &Profile) -> Vec<(u16, u32, u32)> {
        profile.touches().iter().map(|t| (t.layer, t.page, t.pages)).collect()
    }

    #[test]
    fn first_touches_in_order() {
        let (recorder, chain) = (Recorder::default(), Digest::of(b"c"));
        recorder.note(7, 0, 1);
        let files = || {
            let (tar, table) = (LayerId::tar(chain), LayerId::table(chain));
            vec![Watched::new(7, tar, 1 << 20), Watched::new(9, table, 1 << 20)]
        };
        assert!(recorder.start(chain, files()) && !recorder.start(chain, files()));
        recorder.note(9, PAGE * 5, 1);
        recorder.note(7, PAGE - 1, 2);
        recorder.note(9, PAGE * 5 + 100, 3000);
        recorder.note(7, PAGE * 2, 4096);
        recorder.note(8, 0, 4096);
        recorder.note(9, 1 << 30, 4096);
        let profile = recorder.finish(chain).expect("profile");
        assert_eq!(bare(&profile), [(1, 5, 1), (0, 0, 3)]);
        assert!(profile.is_about(files().iter().map(|file| file.id)));
        assert!(!profile.is_about([LayerId::tar(chain); 2].into_iter()));
        assert_eq!(recorder.finish(chain), None);
    }

    #[test]
    fn pages_are_seen_across_words() {
        let file = Watched::new(1, LayerId::tar(Digest::of(b"x")), 1000 * PAGE);
        assert!(file.see(60..=200) && !file.see(61..=199) && file.see(59..=60) && file.see(200..=201));
        assert!(!file.see(64..=127) && !file.see(59..=201) && file.see(0..=0));
    }
}
