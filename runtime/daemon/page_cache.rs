//! Content is cached once: what the files of a view have in the page cache, the layer files below need not have, too.
//!
//! EROFS reads its devices through their own page cache, and a span that arrives is written through that of the layer
//! file, so that after a start the same bytes may be in memory three times. Reading past the cache costs more than it
//! saves: small files lie side by side in a layer, and what was read ahead of one serves the next (`make
//! bench-page-cache`). So the copies are let go of afterwards, once nobody reads any more.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::Daemon;
use super::views::ReadLayer;

/// How the kernel's page cache is used for layer files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PageCache {
    /// Through the cache, which is let go of when reads pause.
    #[default]
    Drop,
    /// Through the cache, until memory is needed.
    Keep,
    /// Past the cache, where EROFS reads them: three to four times slower for small files.
    Direct,
}

impl PageCache {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Keep => "keep",
            Self::Direct => "direct",
        }
    }
}

/// How often it is looked whether reads have paused.
const TICK: Duration = Duration::from_secs(5);
/// Reads that don't pause are no reason to keep everything twice.
const AT_LEAST_EVERY: u32 = 12;
/// What is not on the disk yet is written when it is first let go of, and goes the second time.
const ROUNDS: u32 = 2;

/// When the pages of one layer are due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pages {
    reads: u64,
    busy: u32,
    rounds: u32,
}

impl Pages {
    /// Told the number of reads so far at each tick; says whether the pages are to go.
    fn tick(&mut self, reads: u64) -> bool {
        if self.reads != reads {
            self.reads = reads;
            self.rounds = ROUNDS;
            self.busy += 1;
            if self.busy < AT_LEAST_EVERY {
                return false;
            }
        }
        self.busy = 0;
        let due = self.rounds > 0;
        self.rounds = self.rounds.saturating_sub(1);
        due
    }
}

/// Lets go of cached pages for as long as the daemon lives.
pub fn watch(daemon: &Arc<Daemon>) {
    let daemon: Weak<Daemon> = Arc::downgrade(daemon);
    tokio::spawn(async move {
        let mut layers = HashMap::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Some(daemon) = daemon.upgrade() else { return };
            // Starts a helper, and may wait for the disk.
            let done = tokio::task::spawn_blocking(move || {
                daemon.drop_pages(&mut layers);
                layers
            });
            layers = done.await.unwrap_or_default();
        }
    });
}

impl Daemon {
    fn drop_pages(&self, pages: &mut HashMap<u64, Pages>) {
        let layers = self.views.layers();
        pages.retain(|ino, _| layers.contains_key(ino));
        let (mut files, mut copies) = (Vec::new(), Vec::new());
        for (ino, ReadLayer { layer, by_flat, direct }) in layers {
            // An earlier daemon may have served it.
            let pages = pages.entry(ino).or_insert(Pages { rounds: ROUNDS, ..Pages::default() });
            let due = pages.tick(self.service.reads(ino));
            if due && by_flat {
                copies.push(layer.file_name().to_owned());
            }
            // What is read without the daemon, it can't see; of a file that nobody reads there is nothing to let go of.
            if due || direct {
                files.push(layer);
            }
        }
        if !copies.is_empty()
            && let Err(error) = self.views.let_go(copies)
        {
            tracing::debug!(%error, "cached pages of layer files are kept");
        }
        for layer in files {
            if let Err(error) = layer.drop_pages() {
                tracing::debug!(layer = layer.file_name(), %error, "cached pages of a layer file are kept");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_twice_when_reads_pause() {
        let mut pages = Pages::default();
        assert!(!pages.tick(0), "nothing was read");
        assert!(!pages.tick(7), "reads are under way");
        assert!(!pages.tick(9), "reads are under way");
        assert_eq!([9, 9, 9].map(|reads| pages.tick(reads)), [true, true, false]);
        assert!(!pages.tick(10));
        assert_eq!([10, 10, 10].map(|reads| pages.tick(reads)), [true, true, false]);
    }

    #[test]
    fn reads_without_a_pause_keep_nothing_for_ever() {
        let mut pages = Pages::default();
        let due = (1..=24).filter(|reads| pages.tick(*reads)).collect::<Vec<_>>();
        assert_eq!(due, [12, 24]);
    }
}
