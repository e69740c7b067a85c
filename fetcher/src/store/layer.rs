//! One layer: its index, its sparse data and which spans of it are local.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use lazyrun_index::{Digest, DigestOf, Hasher, IndexError, LayerId, LayerIndex, SpanInfo};
use nix::fcntl::{FallocateFlags, fallocate};

use super::learnt::Learnt;
use super::order::BlobOrder;
use super::span_map::{Bits, SpanMap};
use super::standing::Standing;
use super::{DATA, DIGESTS, INDEX, SPANS};
use crate::error::FetchError;
use crate::trust::Origin;

/// A layer of the store. Shared by everybody who uses it; safe from many threads.
pub struct Layer {
    id: LayerId,
    file_name: String,
    dir: PathBuf,
    index: LayerIndex,
    order: BlobOrder,
    standing: Standing,
    data: File,
    /// Digests that the index lacks; `None` when it lacks none.
    learnt: Option<Learnt>,
    /// Held while a span is written whose bytes cannot be told right or wrong by the index alone.
    learning: Mutex<()>,
    /// Spans whose bytes are in `data` and verified.
    trusted: Vec<AtomicU64>,
    trusted_count: AtomicUsize,
    /// Spans that were written before a reboot and not looked at since.
    suspect: Vec<AtomicU64>,
    map: Mutex<SpanMap>,
    /// Shared by readers and writers of `data`, exclusive for `forget`: what was seen present must not be
    /// punched away between the look and the read.
    gate: RwLock<()>,
    /// Counts `forget`s.
    epoch: AtomicU64,
}

pub(super) enum OpenError {
    Damaged(String),
    Io(FetchError),
}

impl Layer {
    pub(super) fn open(dir: &Path, id: LayerId, boot_id: [u8; 16]) -> Result<Layer, OpenError> {
        let io_error = |what, path: &Path, e| OpenError::Io(FetchError::store(what, path, e));
        let index_path = dir.join(INDEX);
        let index = match LayerIndex::open(&index_path) {
            Ok(index) => index,
            Err(IndexError::IndexIo { source, .. }) if source.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("opening", &index_path, source));
            }
            Err(error) => return Err(OpenError::Damaged(error.to_string())),
        };
        if index.id() != id {
            return Err(OpenError::Damaged(format!("its index is that of {}", index.id())));
        }
        let standing = Standing::open(dir).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => OpenError::Damaged(e.to_string()),
            _ => io_error("reading the origin of", dir, e),
        })?;
        let data_path = dir.join(DATA);
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&data_path)
            .map_err(|e| io_error("opening", &data_path, e))?;
        let spans = index.span_count();
        let map_path = dir.join(SPANS);
        let (map, mut loaded) =
            SpanMap::open(&map_path, spans, boot_id).map_err(|e| io_error("opening", &map_path, e))?;
        let len = data.metadata().map_err(|e| io_error("opening", &data_path, e))?.len();
        if len != index.layer_size() {
            // Somebody else's hand: nothing in the file can be believed without looking.
            for (suspect, trusted) in loaded.suspect.iter_mut().zip(&mut loaded.trusted) {
                *suspect |= std::mem::take(trusted);
            }
            data.set_len(index.layer_size()).map_err(|e| io_error("resizing", &data_path, e))?;
        }
        let learnt = match index.spans().any(|s| s.digest_of != DigestOf::Decoded) {
            true => {
                let path = dir.join(DIGESTS);
                Some(Learnt::open(&path, spans).map_err(|e| io_error("opening", &path, e))?)
            }
            false => None,
        };
        let count: u32 = loaded.trusted.iter().map(|w| w.count_ones()).sum();
        Ok(Layer {
            id,
            file_name: standing.file_name(&id.to_string()),
            dir: dir.to_owned(),
            order: BlobOrder::of(&index),
            index,
            standing,
            data,
            learnt,
            learning: Mutex::default(),
            trusted: loaded.trusted.into_iter().map(AtomicU64::new).collect(),
            trusted_count: AtomicUsize::new(count as usize),
            suspect: loaded.suspect.into_iter().map(AtomicU64::new).collect(),
            map: Mutex::new(map),
            gate: RwLock::default(),
            epoch: AtomicU64::new(0),
        })
    }

    /// Digest of the uncompressed layer.
    pub fn diff_id(&self) -> Digest {
        self.id.diff_id
    }

    /// The layer file's name in the store.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The layer file's name towards the kernel, which remembers what it read under a name: the id, with a part of
    /// the index's digest behind it when the index was adopted.
    pub fn file_name(&self) -> &str {
        &self.file_name
    }

    /// Where the index came from while it is not proven.
    pub fn origin(&self) -> Option<Origin> {
        if self.is_proven() { None } else { self.standing.origin().cloned() }
    }

    /// Where the index came from if it was not built here, proven since or not.
    pub fn adopted_from(&self) -> Option<Origin> {
        self.standing.origin().cloned()
    }

    /// Whether the index was built here, or proven by a stream of the blob.
    pub fn is_proven(&self) -> bool {
        self.standing.is_proven()
    }

    /// The error that all reads get once the index turned out to be a lie.
    pub fn lie(&self) -> Option<FetchError> {
        let reason = self.standing.lie()?.to_owned();
        Some(FetchError::Lie { layer: self.id.diff_id, origin: self.standing.origin()?.kind, reason })
    }

    /// What the layer contains and where its bytes are.
    pub fn index(&self) -> &LayerIndex {
        &self.index
    }

    /// The file of the index.
    pub fn index_path(&self) -> PathBuf {
        self.dir.join(INDEX)
    }

    /// The sparse layer file. Only a hydrated one may be read directly.
    pub fn data_path(&self) -> PathBuf {
        self.dir.join(DATA)
    }

    /// Reads from the layer file what is local: the number of bytes read (short only at the end of the file, 0
    /// beyond it), or `None` when some of them are missing. Does file I/O, and after an unclean reboot hashes
    /// the spans it meets for the first time.
    ///
    /// # Errors
    /// When the file system fails, or the layer's index is known to be a lie.
    pub fn read_local(&self, offset: u64, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let left = self.index.layer_size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        if len == 0 {
            return Ok(Some(0));
        }
        let _gate = self.enter();
        if let Some(lie) = self.lie() {
            return Err(io::Error::other(lie));
        }
        if !self.is_whole() {
            for span in self.index.spans_covering(offset, len as u64) {
                if !self.check_span(span)? {
                    return Ok(None);
                }
            }
        }
        self.data.read_exact_at(&mut buf[..len], offset)?;
        Ok(Some(len))
    }

    /// Whether every byte is local and proven.
    pub fn is_hydrated(&self) -> bool {
        self.is_whole() && self.is_proven()
    }

    /// Whether every byte is local and verified by what the index says.
    pub(crate) fn is_whole(&self) -> bool {
        self.trusted_count.load(Ordering::Acquire) == self.index.span_count()
    }

    /// Bytes of the layer file that are local (those to be verified again included).
    pub fn local_bytes(&self) -> u64 {
        if self.is_whole() {
            return self.index.layer_size();
        }
        (0..self.index.span_count())
            .filter(|&i| has(&self.trusted, i) || has(&self.suspect, i))
            .map(|i| self.index.span(i).len)
            .sum()
    }

    /// Number of spans that are local and verified.
    pub fn local_spans(&self) -> usize {
        self.trusted_count.load(Ordering::Acquire)
    }

    /// Drops all local bytes; the index stays. The map forgets first, so that a crash in between cannot make
    /// holes count as data.
    ///
    /// Must not be called for a layer whose file is read directly, without [`Layer::read_local`].
    ///
    /// # Errors
    /// When the map cannot be written (then nothing is dropped) or the bytes cannot be freed.
    pub fn forget(&self) -> io::Result<()> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        {
            let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
            map.write_durable(&vec![0; self.trusted.len()])?;
            self.epoch.fetch_add(1, Ordering::AcqRel);
        }
        for word in self.trusted.iter().chain(&self.suspect) {
            word.store(0, Ordering::Release);
        }
        self.trusted_count.store(0, Ordering::Release);
        self.punch()
    }

    fn punch(&self) -> io::Result<()> {
        let size = self.index.layer_size();
        if size == 0 {
            return Ok(());
        }
        // To the end of the last page: part of a page would be zeroed but kept.
        let pages = size.checked_next_multiple_of(4096).and_then(|len| i64::try_from(len).ok());
        let Some(len) = pages else { return Err(io::ErrorKind::FileTooLarge.into()) };
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.data, flags, 0, len) {
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                self.data.set_len(0)?;
                self.data.set_len(size)
            }
            result => Ok(result?),
        }
    }

    /// Makes what is local survive a power cut: writes the data out, then the durable map. Blocks on the disk.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn sync(&self) -> io::Result<()> {
        let epoch = self.epoch();
        let bits = load(&self.trusted);
        self.data.sync_data()?;
        if let Some(learnt) = &self.learnt {
            learnt.sync()?;
        }
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        if self.epoch() != epoch {
            return Ok(());
        }
        map.write_durable(&bits)?;
        // Spans that came meanwhile, or still wait for their check, are in no durable slot.
        let now = self.local_bits();
        if now == bits { Ok(()) } else { map.write_volatile(&now) }
    }

    /// Verifies what was written before a reboot; afterwards it either counts or is gone. Reads and hashes all
    /// of it: not for an async task.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn verify_suspects(&self) -> io::Result<()> {
        for span in 0..self.index.span_count() {
            if has(&self.suspect, span) {
                let _gate = self.enter();
                self.check_span(span)?;
            }
        }
        Ok(())
    }

    /// Whether anything waits to be verified again.
    pub(crate) fn has_suspects(&self) -> bool {
        self.suspect.iter().any(|w| w.load(Ordering::Relaxed) != 0)
    }

    /// Whether a span may be used without a further look.
    pub fn has_span(&self, span: usize) -> bool {
        has(&self.trusted, span)
    }

    /// Whether a span is neither proven nor waiting for proof.
    pub fn lacks_span(&self, span: usize) -> bool {
        !has(&self.trusted, span) && !has(&self.suspect, span)
    }

    /// The number of `forget`s so far.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The span at a rank of the blob's order.
    pub(crate) fn span_at(&self, rank: usize) -> SpanInfo {
        self.index.span(self.order.span(rank))
    }

    /// The place of a span in the blob's order.
    pub(crate) fn rank_of(&self, span: usize) -> usize {
        self.order.rank(span)
    }

    /// Whether a span that is fetched by range can be verified. One with no digest at all never is before a stream
    /// has proven what it decodes to; no trust mode admits bytes that nothing vouches for. Of a proven layer the
    /// checkpoints are still only claimed, so there the bytes must be what the stream has seen.
    pub(crate) fn can_fault(&self, span: &SpanInfo) -> bool {
        let known = || self.learnt_digest(span.index as usize).is_some();
        span.restartable
            && match span.digest_of {
                DigestOf::Decoded => true,
                DigestOf::Blob => !self.is_proven() || known(),
                DigestOf::Nothing => self.is_proven() && known(),
            }
    }

    /// Stores a span that was verified as far as the index goes. `false`: nothing was stored, because the span is
    /// known to have other bytes.
    pub(crate) fn write_span(&self, span: &SpanInfo, bytes: &[u8]) -> io::Result<bool> {
        let _gate = self.enter();
        let number = span.index as usize;
        let Some(learnt) = self.learnt.as_ref().filter(|_| span.digest_of != DigestOf::Decoded) else {
            self.data.write_all_at(bytes, span.offset)?;
            self.mark(number);
            return Ok(true);
        };
        let digest = Digest::of(bytes);
        let _turn = self.learning.lock().unwrap_or_else(PoisonError::into_inner);
        if has(&self.trusted, number) {
            let known = match learnt.get(number) {
                Some(known) => known,
                None => self.hash(span.offset, span.len)?,
            };
            return Ok(known == digest);
        }
        if self.is_proven() && learnt.get(number).is_some_and(|known| known != digest) {
            return Ok(false);
        }
        self.data.write_all_at(bytes, span.offset)?;
        learnt.set(number, digest)?;
        self.mark(number);
        Ok(true)
    }

    /// Whether the index lacks digests of decoded spans (its checkpoints then are somebody else's word for ever).
    pub(crate) fn lacks_digests(&self) -> bool {
        self.learnt.is_some()
    }

    /// Whether a local span has this digest.
    pub(crate) fn agrees(&self, span: &SpanInfo, digest: Digest) -> io::Result<bool> {
        let _gate = self.enter();
        match self.learnt_digest(span.index as usize) {
            Some(known) => Ok(known == digest),
            None => Ok(self.hash(span.offset, span.len)? == digest),
        }
    }

    /// Writes bytes of a span that does not count as local before [`Layer::admit_span`]. Nobody else may be able to
    /// write it.
    pub(crate) fn write_ahead(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let _gate = self.enter();
        self.data.write_all_at(bytes, offset)
    }

    /// Counts a span as local that was written ahead since `epoch` and has this digest.
    pub(crate) fn admit_span(&self, span: &SpanInfo, digest: Digest, epoch: u64) -> io::Result<()> {
        let _gate = self.enter();
        if let Some(learnt) = &self.learnt {
            learnt.set(span.index as usize, digest)?;
        }
        // What was dropped meanwhile is not there.
        if self.epoch() == epoch {
            self.mark(span.index as usize);
        }
        Ok(())
    }

    /// Believes the index from now on, durably: what was learnt goes to the disk first.
    pub(crate) fn prove(&self) -> io::Result<()> {
        if let Some(learnt) = &self.learnt {
            learnt.sync()?;
        }
        self.standing.prove()
    }

    /// Fails all reads from now on; in `LayerStore::condemn` together with what else that means.
    pub(super) fn condemn(&self, reason: &str) -> io::Result<()> {
        self.standing.condemn(reason)
    }

    fn learnt_digest(&self, span: usize) -> Option<Digest> {
        self.learnt.as_ref()?.get(span)
    }

    /// Mirrors the present spans to the map file (not to the disk).
    pub(crate) fn save_map(&self) -> io::Result<()> {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let bits = self.local_bits();
        map.write_volatile(&bits)
    }

    fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, span: usize) {
        let bit = 1 << (span % 64);
        if self.trusted[span / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.trusted_count.fetch_add(1, Ordering::AcqRel);
        }
        self.suspect[span / 64].fetch_and(!bit, Ordering::AcqRel);
    }

    /// Whether a span can be used, after a look at it if it is suspect. The gate is held.
    fn check_span(&self, span: usize) -> io::Result<bool> {
        if has(&self.trusted, span) {
            return Ok(true);
        }
        if !has(&self.suspect, span) {
            return Ok(false);
        }
        let info = self.index.span(span);
        if self.is_intact(&info)? {
            self.mark(span);
            return Ok(true);
        }
        tracing::warn!(layer = %self.id, span, "a span did not survive the reboot and will be fetched again");
        self.suspect[span / 64].fetch_and(!(1 << (span % 64)), Ordering::AcqRel);
        Ok(false)
    }

    /// Whether a span's bytes are what the index says, or what was once learnt of them.
    fn is_intact(&self, span: &SpanInfo) -> io::Result<bool> {
        if span.digest_of != DigestOf::Decoded {
            let Some(known) = self.learnt_digest(span.index as usize) else { return Ok(false) };
            return Ok(self.hash(span.offset, span.len)? == known);
        }
        let pad = u64::from(span.pad).min(span.len);
        let mut padding = vec![0; pad as usize];
        self.data.read_exact_at(&mut padding, span.offset + span.len - pad)?;
        let clean = padding.iter().all(|b| *b == 0);
        Ok(clean && self.hash(span.offset, span.len - pad)? == span.digest)
    }

    fn hash(&self, mut at: u64, mut left: u64) -> io::Result<Digest> {
        let mut hasher = Hasher::new();
        let mut buffer = vec![0u8; 256 << 10];
        while left > 0 {
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            self.data.read_exact_at(&mut buffer[..take], at)?;
            hasher.update(&buffer[..take]);
            at += take as u64;
            left -= take as u64;
        }
        Ok(hasher.finish())
    }

    fn local_bits(&self) -> Bits {
        load(&self.trusted).iter().zip(load(&self.suspect)).map(|(t, s)| t | s).collect()
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layer({})", self.file_name)
    }
}

fn has(bits: &[AtomicU64], i: usize) -> bool {
    bits.get(i / 64).is_some_and(|w| w.load(Ordering::Acquire) & (1 << (i % 64)) != 0)
}

fn load(bits: &[AtomicU64]) -> Bits {
    bits.iter().map(|w| w.load(Ordering::Acquire)).collect()
}
