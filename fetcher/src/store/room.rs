//! Room on the disk: every byte of a layer that is written is asked for here first.
//!
//! There is room while the store stays under its limit and the disk keeps its reserve. Where there is none, spans are
//! evicted (see `victims`); where that does not help, or may not be done for what is to be written, the answer is an
//! error, not a full disk. Whoever asks holds no lock of a layer.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

use super::Inner;
use super::limits::CacheLimits;
use super::victims::{self, Hooks};

/// Bytes written between two looks at the disk.
const LOOK_EVERY: u64 = 16 << 20;
/// Evicted beyond what is needed at once: a part of the limit, so that the next span finds room without an eviction.
const SLACK_PART: u64 = 16;
const MAX_SLACK: u64 = 256 << 20;
/// Evictions for one write.
const ROUNDS: u32 = 3;
/// How long a span that a reader waits for waits itself while all that could go is in use by other readers.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);
/// What a write may take at each of its ends.
const BLOCK: u64 = 4096;

/// For whom something is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Somebody waits for it: anything that no pin is on may go.
    Reader,
    /// Nobody does yet: only images that are not in use may go.
    Ahead,
}

/// There is no room, although the disk is not full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoom {
    #[error("only {free} bytes of the disk are free, of which {reserve} are kept")]
    Reserve { free: u64, reserve: u64 },
    #[error("the cache has {used} of at most {limit} bytes, and nothing that may be evicted")]
    Limit { used: u64, limit: u64 },
}

impl From<NoRoom> for io::Error {
    fn from(reason: NoRoom) -> io::Error {
        io::Error::new(io::ErrorKind::StorageFull, reason)
    }
}

/// What has been evicted since the store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvictionStats {
    /// Evictions: each frees many spans of perhaps several layers.
    pub evictions: u64,
    /// Bytes of disk freed by them.
    pub bytes: u64,
    /// Writes that found no room in the end.
    pub refused: u64,
}

#[derive(Default)]
struct Counters {
    evictions: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
}

/// What may be written before the next look.
#[derive(Default)]
struct Account {
    /// Bytes until the limit, as far as it was counted; more than there is, never less.
    limit_left: u64,
    /// Bytes until the next look at the disk.
    disk_left: u64,
    /// Bytes that have their room and may not be on the disk yet.
    writing: u64,
}

/// Room that was taken for a write, until that is over.
struct Taken<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut account = self.room.account();
        account.writing = account.writing.saturating_sub(self.bytes);
    }
}

/// The room of one store.
pub(crate) struct Room {
    layers: PathBuf,
    limits: RwLock<CacheLimits>,
    account: Mutex<Account>,
    /// Bytes that are certain to be written without asking.
    promised: AtomicU64,
    /// One looks and evicts at a time; the others find room when it is done.
    turn: Mutex<()>,
    pub(super) hooks: Hooks,
    store: Weak<Inner>,
    counters: Counters,
}

/// What a look at the disk has found, in bytes.
struct Look {
    free: u64,
    reserve: u64,
    /// Taken by the store, and its limit.
    limited: Option<(u64, u64)>,
}

impl Room {
    pub(super) fn new(layers: PathBuf, store: Weak<Inner>) -> Room {
        Room {
            layers,
            limits: RwLock::default(),
            account: Mutex::default(),
            promised: AtomicU64::new(0),
            turn: Mutex::default(),
            hooks: Hooks::default(),
            store,
            counters: Counters::default(),
        }
    }

    pub(crate) fn limits(&self) -> CacheLimits {
        *self.limits.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets new limits; evicts at once what is beyond them, as far as it may go. Blocks on the disk.
    pub(crate) fn set_limits(&self, limits: CacheLimits) -> io::Result<()> {
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = limits;
        match self.take(0, Need::Reader) {
            Err(e) if is_full(&e) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Counts bytes that will be written without asking, until [`Room::keep_promise`].
    pub(crate) fn promise(&self, bytes: u64) {
        self.promised.fetch_add(bytes, Relaxed);
    }

    /// Promised bytes are written, or never will be.
    pub(crate) fn keep_promise(&self, bytes: u64) {
        self.promised.fetch_sub(bytes, Relaxed);
    }

    /// Looks whether what was written without asking is beyond the limit, and evicts what nobody needs if it is.
    pub(crate) fn settle(&self) {
        if self.limits().limit.is_none() {
            return;
        }
        if let Err(error) = self.take(0, Need::Ahead) {
            tracing::debug!(%error, "the cache is beyond its limit");
        }
    }

    pub(crate) fn stats(&self) -> EvictionStats {
        EvictionStats {
            evictions: self.counters.evictions.load(Relaxed),
            bytes: self.counters.bytes.load(Relaxed),
            refused: self.counters.refused.load(Relaxed),
        }
    }

    /// Writes `len` bytes at `offset` of a file of the store by `write`, with room made for them. A disk that is full
    /// all the same is given one more eviction and `write` one more try.
    pub(crate) fn with_room<T>(
        &self,
        offset: u64,
        len: usize,
        need: Need,
        mut write: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        // As many blocks as it touches.
        let cost = (len as u64).saturating_add(offset % BLOCK).saturating_add(BLOCK - 1) / BLOCK * BLOCK;
        let _taken = self.take(cost, need)?;
        match write() {
            Err(error) if is_full(&error) => {
                let freed = {
                    let _turn = self.turn();
                    self.close();
                    self.evict(cost.saturating_add(LOOK_EVERY), need)
                };
                tracing::warn!(%error, freed, "the disk of the store is full, spans are evicted");
                if freed == 0 { Err(error) } else { write() }
            }
            result => result,
        }
    }

    /// Room for `len` bytes, or an error of kind `StorageFull`.
    fn take(&self, len: u64, need: Need) -> io::Result<Taken<'_>> {
        let taken = || Taken { room: self, bytes: len };
        if len > 0 && self.spend(len) {
            return Ok(taken());
        }
        let began = Instant::now();
        let mut rounds = 0;
        loop {
            let (reason, freed) = {
                let _turn = self.turn();
                if len > 0 && self.spend(len) {
                    return Ok(taken());
                }
                match self.look_and_evict(len, need)? {
                    Ok(()) => return Ok(taken()),
                    Err(failed) => failed,
                }
            };
            rounds += 1;
            let again = freed > 0 && rounds < ROUNDS;
            let waits = need == Need::Reader && len > 0 && began.elapsed() < PATIENCE;
            if !again && !waits {
                self.counters.refused.fetch_add(1, Relaxed);
                return Err(reason.into());
            }
            if !again {
                // All that could go is held by readers: they will be done.
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// One look, and one eviction if it is needed; the turn is held. Why there is no room, and what was freed.
    fn look_and_evict(&self, len: u64, need: Need) -> io::Result<Result<(), (NoRoom, u64)>> {
        let mut look = self.look()?;
        let (short, mut freed) = (look.short(len), 0);
        if short > 0 {
            freed = self.evict(short.saturating_add(look.slack(len)), need);
            look = self.look()?;
        }
        if let Some(reason) = look.no_room(len) {
            return Ok(Err((reason, freed)));
        }
        let mut account = self.account();
        account.disk_left = (look.free - look.reserve).min(LOOK_EVERY.max(len)) - len;
        // Indexes and maps are written without asking: the next look finds them.
        let soon = look.slack(len);
        let left = |(used, limit): (u64, u64)| limit.saturating_sub(used).min(soon.max(len)) - len;
        account.limit_left = look.limited.map_or(u64::MAX, left);
        account.writing = account.writing.saturating_add(len);
        Ok(Ok(()))
    }

    fn evict(&self, want: u64, need: Need) -> u64 {
        let Some(store) = self.store.upgrade() else { return 0 };
        let freed = victims::evict(&store, &self.hooks, want, need);
        if freed > 0 {
            self.counters.evictions.fetch_add(1, Relaxed);
            self.counters.bytes.fetch_add(freed, Relaxed);
            tracing::info!(want, freed, ?need, "spans evicted");
        }
        freed
    }

    fn spend(&self, len: u64) -> bool {
        let mut account = self.account();
        let enough = account.disk_left >= len && account.limit_left >= len;
        if enough {
            account.disk_left -= len;
            account.limit_left -= len;
            account.writing = account.writing.saturating_add(len);
        }
        enough
    }

    /// Nothing more is to be had without a look; returns what may not be on the disk yet.
    fn close(&self) -> u64 {
        let mut account = self.account();
        (account.limit_left, account.disk_left) = (0, 0);
        account.writing
    }

    fn look(&self) -> io::Result<Look> {
        let limits = self.limits();
        // Before the count: what is written meanwhile is counted twice rather than not at all.
        let pending = self.close().saturating_add(self.promised.load(Relaxed));
        let disk = statvfs(&self.layers)?;
        let bytes = |blocks: u64| blocks.saturating_mul(disk.fragment_size());
        let size = bytes(disk.blocks());
        let limited = match limits.limit_on(size) {
            Some(limit) => Some((used_below(&self.layers)?.saturating_add(pending), limit)),
            None => None,
        };
        let free = bytes(disk.blocks_available()).saturating_sub(pending);
        Ok(Look { free, reserve: limits.reserve_on(size), limited })
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Look {
    /// Bytes that are missing for `len` more.
    fn short(&self, len: u64) -> u64 {
        let disk = self.reserve.saturating_add(len).saturating_sub(self.free);
        let limit = self.limited.map_or(0, |(used, limit)| used.saturating_add(len).saturating_sub(limit));
        disk.max(limit)
    }

    fn slack(&self, len: u64) -> u64 {
        let part = self.limited.map_or(LOOK_EVERY, |(_, limit)| limit / SLACK_PART);
        part.clamp(len.min(MAX_SLACK), MAX_SLACK)
    }

    fn no_room(&self, len: u64) -> Option<NoRoom> {
        if self.free < self.reserve.saturating_add(len) {
            return Some(NoRoom::Reserve { free: self.free, reserve: self.reserve });
        }
        let (used, limit) = self.limited?;
        (used.saturating_add(len) > limit).then_some(NoRoom::Limit { used, limit })
    }
}

/// Whether an error speaks of space.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Bytes of disk that the files in the directories of `layers` take. What disappears meanwhile takes none.
pub(super) fn used_below(layers: &Path) -> io::Result<u64> {
    let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let mut used = 0;
    for dir in fs::read_dir(layers)? {
        let files = match fs::read_dir(dir?.path()) {
            Err(e) if gone(&e) || e.kind() == io::ErrorKind::NotADirectory => continue,
            files => files?,
        };
        for file in files {
            match file.and_then(|file| file.metadata()) {
                Err(e) if gone(&e) => {}
                meta => used += meta?.blocks() * 512,
            }
        }
    }
    Ok(used)
}
