//! One layer: its index, its sparse data and which spans of it are local.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use lazyrun_index::{Digest, DigestOf, IndexError, LayerId, LayerIndex, SpanInfo};

use super::learnt::Learnt;
use super::order::BlobOrder;
use super::pins::Pins;
use super::room::{Need, Room};
use super::span_map::{Bits, SpanMap};
use super::standing::Standing;
use super::touched::Touched;
use super::{DATA, DIGESTS, GONE, INDEX, SPANS, USED};
use crate::error::FetchError;
use crate::trust::Origin;

/// A layer of the store. Shared by everybody who uses it; safe from many threads.
pub struct Layer {
    id: LayerId,
    file_name: String,
    dir: PathBuf,
    pub(super) index: LayerIndex,
    order: BlobOrder,
    standing: Standing,
    pub(super) data: File,
    /// Digests that the index lacks; `None` when it lacks none.
    learnt: Option<Learnt>,
    /// Held while a span is written whose bytes cannot be told right or wrong by the index alone.
    learning: Mutex<()>,
    /// Spans whose bytes are in `data` and verified.
    pub(super) trusted: Vec<AtomicU64>,
    pub(super) trusted_count: AtomicUsize,
    /// Spans that were written before a reboot and not looked at since.
    pub(super) suspect: Vec<AtomicU64>,
    pub(super) map: Mutex<SpanMap>,
    /// Shared by readers of `data`, exclusive for who takes spans out of `trusted` and `suspect`: what was seen
    /// present must not be punched away between the look and the read. Taken behind `fills`.
    pub(super) gate: RwLock<()>,
    /// Shared by writers of `data`, exclusive for an eviction from its first look to its last hole: what is written
    /// again must not be punched away by it.
    pub(super) fills: RwLock<()>,
    pub(super) pins: Pins,
    /// Counts evictions and `forget`s.
    pub(super) epoch: AtomicU64,
    pub(super) touched: Touched,
    /// No source has the blob any more, as far as is known.
    origin_gone: AtomicBool,
    room: Arc<Room>,
}

pub(super) enum OpenError {
    Damaged(String),
    Io(FetchError),
}

impl Layer {
    pub(super) fn open(
        dir: &Path,
        id: LayerId,
        boot_id: [u8; 16],
        room: Arc<Room>,
    ) -> Result<Layer, OpenError> {
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
            fills: RwLock::default(),
            pins: Pins::default(),
            epoch: AtomicU64::new(0),
            touched: Touched::open(&dir.join(USED), spans),
            origin_gone: AtomicBool::new(dir.join(GONE).exists()),
            room,
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
        for span in self.index.spans_covering(offset, len as u64) {
            if !self.check_span(span)? {
                return Ok(None);
            }
            self.touched.touch(span);
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

    /// Makes what is local survive a power cut: writes the data out, then the durable map. Blocks on the disk.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn sync(&self) -> io::Result<()> {
        self.save_touched();
        let epoch = self.epoch();
        let bits = load(&self.trusted);
        self.data.sync_data()?;
        if let Some(learnt) = &self.learnt {
            learnt.sync()?;
        }
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        // What was evicted meanwhile must not become durable.
        if self.epoch() != epoch {
            return Ok(());
        }
        map.write_durable(&bits)?;
        // Spans that came meanwhile, or still wait for their check, are in no durable slot.
        let now = self.local_bits();
        if now == bits { Ok(()) } else { map.write_volatile(&now) }
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

    /// The number of evictions and `forget`s so far.
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

    /// Stores a span that was verified as far as the index goes and that nobody waits for; see
    /// [`Layer::write_span_for`].
    pub(crate) fn write_span(&self, span: &SpanInfo, bytes: &[u8]) -> io::Result<bool> {
        self.write_span_for(Need::Ahead, span, bytes)
    }

    /// Stores a span that was verified as far as the index goes. `false`: nothing was stored, because the span is
    /// known to have other bytes. Evicts other spans where there is no room; blocks on the disk.
    pub(crate) fn write_span_for(&self, need: Need, span: &SpanInfo, bytes: &[u8]) -> io::Result<bool> {
        let number = span.index as usize;
        let stored = self.room.with_room(span.offset, bytes.len(), need, || {
            let _fills = self.fill();
            self.put_span(span, bytes)
        });
        match &stored {
            Ok(true) if need == Need::Reader => self.touched.touch(number),
            Ok(_) => {}
            Err(_) => self.discard_leftover(number),
        }
        stored
    }

    fn put_span(&self, span: &SpanInfo, bytes: &[u8]) -> io::Result<bool> {
        let number = span.index as usize;
        let Some(learnt) = self.learnt.as_ref().filter(|_| span.digest_of != DigestOf::Decoded) else {
            if !has(&self.trusted, number) {
                self.data.write_all_at(bytes, span.offset)?;
                self.mark(number);
            }
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
        self.room.with_room(offset, bytes.len(), Need::Ahead, || {
            let _fills = self.fill();
            self.data.write_all_at(bytes, offset)
        })
    }

    /// Counts a span as local that was written ahead since `epoch` and has this digest.
    pub(crate) fn admit_span(&self, span: &SpanInfo, digest: Digest, epoch: u64) -> io::Result<()> {
        let _fills = self.fill();
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

    /// What a span's bytes are known to have as their digest.
    pub(crate) fn digest_of_bytes(&self, span: &SpanInfo) -> Option<Digest> {
        match span.digest_of {
            DigestOf::Decoded => (span.pad == 0).then_some(span.digest),
            DigestOf::Blob | DigestOf::Nothing => self.learnt_digest(span.index as usize),
        }
    }

    pub(super) fn learnt_digest(&self, span: usize) -> Option<Digest> {
        self.learnt.as_ref()?.get(span)
    }

    /// Mirrors the present spans to the map file (not to the disk).
    pub(crate) fn save_map(&self) -> io::Result<()> {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let bits = self.local_bits();
        map.write_volatile(&bits)
    }

    /// When the layer was last of use is now. For whoever starts something from an image that has it.
    pub fn touch(&self) {
        self.touched.touch_layer();
    }

    /// These spans are about to be of use.
    pub(crate) fn touch_spans(&self, spans: Range<usize>) {
        spans.for_each(|span| self.touched.touch(span));
    }

    /// Writes down when spans were last of use, if that has changed. Losing it only costs the order of eviction.
    pub(super) fn save_touched(&self) {
        if let Err(error) = self.touched.save(&self.dir.join(USED)) {
            tracing::debug!(layer = %self.id, %error, "when spans were last of use can't be written down");
        }
    }

    /// Whether no source has the layer's blob any more, as far as is known: then what is here can't be fetched again.
    pub fn is_origin_gone(&self) -> bool {
        self.origin_gone.load(Ordering::Relaxed)
    }

    /// Remembers whether the blob can still be had, over restarts too.
    pub(crate) fn set_origin_gone(&self, gone: bool) {
        if self.origin_gone.swap(gone, Ordering::Relaxed) == gone {
            return;
        }
        let path = self.dir.join(GONE);
        let done = if gone { File::create(&path).map(drop) } else { std::fs::remove_file(&path) };
        if let Err(error) = done {
            tracing::warn!(layer = %self.id, %error, "that a layer's origin is gone, or is back, can't be written down");
        }
    }

    fn fill(&self) -> RwLockReadGuard<'_, ()> {
        self.fills.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mark(&self, span: usize) {
        let bit = 1 << (span % 64);
        if self.trusted[span / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.trusted_count.fetch_add(1, Ordering::AcqRel);
        }
        self.suspect[span / 64].fetch_and(!bit, Ordering::AcqRel);
    }

    pub(super) fn local_bits(&self) -> Bits {
        load(&self.trusted).iter().zip(load(&self.suspect)).map(|(t, s)| t | s).collect()
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.save_touched();
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layer({})", self.file_name)
    }
}

pub(super) fn has(bits: &[AtomicU64], i: usize) -> bool {
    bits.get(i / 64).is_some_and(|w| w.load(Ordering::Acquire) & (1 << (i % 64)) != 0)
}

pub(super) fn load(bits: &[AtomicU64]) -> Bits {
    bits.iter().map(|w| w.load(Ordering::Acquire)).collect()
}
