//! The crash-safe map of present spans.
//!
//! The file holds four slots, each a header and a bitmap, page-aligned, with a checksum and a sequence number:
//! two *durable* ones and two *volatile* ones, written in turn. A bit in a durable slot means that the data had
//! been fdatasync'ed before the slot was written and fsync'ed. A bit in a volatile slot means that the data was
//! written; that holds for as long as the machine is not rebooted, so the slot carries the boot id. After a
//! reboot volatile bits are only a hint: such a span is verified by its digest before its first use.
//!
//! The newest durable slot counts, and of the volatile ones the newest that is newer than it. So clearing is one
//! durable write, and a torn write of one slot leaves its twin: the slot before it of its kind.
//!
//! Evicting writes both kinds, durably, before a hole is punched: the durable slot without the spans that go, so that
//! no slot that is left over from before can bring them back, and a volatile one behind it with what is still there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const MAGIC: [u8; 8] = *b"LZRSPANS";
const VERSION: u32 = 1;
/// magic 8, version 4, kind 4, span count 8, sequence 8, boot id 16, crc32c 4, zero 12.
const HEADER: usize = 64;
const CRC_AT: usize = 48;
const PAGE: usize = 4096;
const DURABLE: u32 = 0;
const VOLATILE: u32 = 1;

/// One bit per span, 64 to a word.
pub(super) type Bits = Vec<u64>;

/// What a map says at open.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Spans whose data is certainly on disk.
    pub(super) trusted: Bits,
    /// Spans that were written before a reboot, to be verified before use.
    pub(super) suspect: Bits,
}

/// The open file.
pub(super) struct SpanMap {
    file: File,
    spans: usize,
    boot_id: [u8; 16],
    sequence: u64,
    /// Spans of the newest durable slot.
    durable: Bits,
    /// Where the next slot of each kind goes: over the older one.
    next: [usize; 2],
}

impl SpanMap {
    /// Makes a new, empty map.
    pub(super) fn create(path: &Path, spans: usize, boot_id: [u8; 16]) -> io::Result<SpanMap> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        // Written rather than left sparse: on a full disk the map must still be able to forget.
        file.write_all_at(&vec![0; slot_size(spans) * 4], 0)?;
        Ok(SpanMap::of(file, spans, boot_id))
    }

    fn of(file: File, spans: usize, boot_id: [u8; 16]) -> SpanMap {
        SpanMap { file, spans, boot_id, sequence: 0, durable: vec![0; words(spans)], next: [0, 0] }
    }

    /// Opens a map; one that is missing or unreadable is made anew and empty.
    pub(super) fn open(path: &Path, spans: usize, boot_id: [u8; 16]) -> io::Result<(SpanMap, Loaded)> {
        let empty = || vec![0; words(spans)];
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok((
                    SpanMap::create(path, spans, boot_id)?,
                    Loaded { trusted: empty(), suspect: empty() },
                ));
            }
            Err(e) => return Err(e),
        };
        let mut map = SpanMap::of(file, spans, boot_id);
        let slots: Vec<Slot> = (0..4).filter_map(|i| map.read_slot(i)).collect();
        map.sequence = slots.iter().map(|s| s.sequence).max().unwrap_or(0);
        let newest = |kind| slots.iter().filter(move |s| s.kind == kind).max_by_key(|s| s.sequence);
        let durable = newest(DURABLE);
        let volatile = newest(VOLATILE).filter(|v| durable.is_none_or(|d| v.sequence > d.sequence));
        for (kind, next) in [DURABLE, VOLATILE].into_iter().zip(&mut map.next) {
            *next = newest(kind).map_or(0, |s| 1 - s.place % 2);
        }
        map.durable = durable.map_or_else(empty, |s| s.bits.clone());
        let mut trusted = map.durable.clone();
        let mut suspect = empty();
        if let Some(volatile) = volatile {
            let same_boot = volatile.boot_id == boot_id && boot_id != [0; 16];
            for (i, word) in volatile.bits.iter().enumerate() {
                if same_boot {
                    // Newer than the durable slot, so it also knows what is gone since.
                    trusted[i] = *word;
                } else {
                    trusted[i] &= *word;
                    suspect[i] = *word & !trusted[i];
                }
            }
        }
        Ok((map, Loaded { trusted, suspect }))
    }

    /// Records present spans without waiting for the disk.
    pub(super) fn write_volatile(&mut self, bits: &[u64]) -> io::Result<()> {
        self.write_slot(VOLATILE, bits, self.sequence + 1)
    }

    /// Records spans whose data is on disk, and waits until the record is.
    pub(super) fn write_durable(&mut self, bits: &[u64]) -> io::Result<()> {
        self.write_slot(DURABLE, bits, self.sequence + 1)?;
        self.sync()?;
        self.durable = bits.to_vec();
        Ok(())
    }

    /// Records, durably, that the spans `gone` are not present and that of the others those in `left` are. Once it
    /// returns their bytes may be thrown away: no crash makes a later life believe in them.
    pub(super) fn write_evicted(&mut self, gone: &[u64], left: &[u64]) -> io::Result<()> {
        let durable: Bits = self.durable.iter().zip(gone).map(|(d, g)| d & !g).collect();
        // The one that counts beside the other first: a process that is killed in between forgets nothing else.
        let sequence = self.sequence;
        self.write_slot(VOLATILE, left, sequence + 2)?;
        self.write_slot(DURABLE, &durable, sequence + 1)?;
        self.sync()?;
        self.durable = durable;
        Ok(())
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn write_slot(&mut self, kind: u32, bits: &[u64], sequence: u64) -> io::Result<()> {
        let mut slot = vec![0u8; HEADER + words(self.spans) * 8];
        slot[..8].copy_from_slice(&MAGIC);
        slot[8..12].copy_from_slice(&VERSION.to_le_bytes());
        slot[12..16].copy_from_slice(&kind.to_le_bytes());
        slot[16..24].copy_from_slice(&(self.spans as u64).to_le_bytes());
        slot[24..32].copy_from_slice(&sequence.to_le_bytes());
        slot[32..48].copy_from_slice(&self.boot_id);
        for (to, word) in slot[HEADER..].chunks_exact_mut(8).zip(bits) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&slot);
        slot[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        let next = self.next[kind as usize];
        let place = kind as usize * 2 + next;
        self.file.write_all_at(&slot, (place * slot_size(self.spans)) as u64)?;
        self.next[kind as usize] = 1 - next;
        self.sequence = self.sequence.max(sequence);
        Ok(())
    }

    /// A slot, if it is whole and fits.
    fn read_slot(&self, place: usize) -> Option<Slot> {
        let mut slot = vec![0u8; HEADER + words(self.spans) * 8];
        self.file.read_exact_at(&mut slot, (place * slot_size(self.spans)) as u64).ok()?;
        let crc = u32::from_le_bytes(slot[CRC_AT..CRC_AT + 4].try_into().ok()?);
        slot[CRC_AT..CRC_AT + 4].fill(0);
        let number = |at: usize| slot[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let version = u32::from_le_bytes(slot[8..12].try_into().ok()?);
        let fits = slot[..8] == MAGIC && version == VERSION && number(16)? == self.spans as u64;
        if !fits || crc32c::crc32c(&slot) != crc {
            return None;
        }
        let mut bits: Bits = slot[HEADER..]
            .chunks_exact(8)
            .map(|w| w.try_into().map(u64::from_le_bytes))
            .collect::<Result<_, _>>()
            .ok()?;
        for (word, mask) in bits.iter_mut().zip(full(self.spans)) {
            *word &= mask;
        }
        Some(Slot {
            place,
            kind: u32::from_le_bytes(slot[12..16].try_into().ok()?),
            sequence: number(24)?,
            boot_id: slot[32..48].try_into().ok()?,
            bits,
        })
    }
}

struct Slot {
    place: usize,
    kind: u32,
    sequence: u64,
    boot_id: [u8; 16],
    bits: Bits,
}

/// Words that hold `spans` bits.
pub(super) fn words(spans: usize) -> usize {
    spans.div_ceil(64)
}

/// The bitmap with all `spans` bits set.
pub(super) fn full(spans: usize) -> Bits {
    let mut bits = vec![u64::MAX; words(spans)];
    if let Some(last) = bits.last_mut()
        && !spans.is_multiple_of(64)
    {
        *last = (1 << (spans % 64)) - 1;
    }
    bits
}

fn slot_size(spans: usize) -> usize {
    (HEADER + words(spans) * 8).next_multiple_of(PAGE)
}

/// This boot's id; all zeros (which matches nothing) when the kernel does not tell.
pub(super) fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&hex, 16).unwrap_or(0).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: [u8; 16] = [1; 16];
    const LATER: [u8; 16] = [2; 16];

    fn load(path: &Path, boot: [u8; 16]) -> Loaded {
        SpanMap::open(path, 70, boot).unwrap().1
    }

    fn loaded(trusted: [u64; 2], suspect: [u64; 2]) -> Loaded {
        Loaded { trusted: trusted.to_vec(), suspect: suspect.to_vec() }
    }

    #[test]
    fn volatile_bits_hold_until_reboot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spans");
        let mut map = SpanMap::create(&path, 70, BOOT).unwrap();
        map.write_volatile(&[0b11, 0]).unwrap();
        map.write_volatile(&[0b111, 1]).unwrap();
        assert_eq!(load(&path, BOOT), loaded([0b111, 1], [0, 0]));
        assert_eq!(load(&path, LATER), loaded([0, 0], [0b111, 1]));
        assert_eq!(load(&path, [0; 16]), loaded([0, 0], [0b111, 1]));
    }

    #[test]
    fn durable_bits_survive_and_clearing_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spans");
        let mut map = SpanMap::create(&path, 70, BOOT).unwrap();
        map.write_volatile(&[0b11, 0]).unwrap();
        map.write_durable(&[0b01, 0]).unwrap();
        assert_eq!(load(&path, LATER), loaded([0b01, 0], [0, 0]));
        map.write_volatile(&[0b111, 0]).unwrap();
        assert_eq!(load(&path, LATER), loaded([0b01, 0], [0b110, 0]));
        map.write_durable(&[0, 0]).unwrap();
        assert_eq!(load(&path, BOOT), loaded([0, 0], [0, 0]));
    }

    #[test]
    fn a_torn_slot_leaves_its_twin() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spans");
        let mut map = SpanMap::create(&path, 70, BOOT).unwrap();
        map.write_volatile(&[0b1, 0]).unwrap(); // place 2
        map.write_volatile(&[0b11, 0]).unwrap(); // place 3
        map.file.write_all_at(&[0xff], (3 * slot_size(70) + HEADER) as u64).unwrap();
        assert_eq!(load(&path, BOOT), loaded([0b1, 0], [0, 0]));
    }

    /// Whatever slots were written between two of a kind, the second one never takes the place of the first.
    #[test]
    fn a_torn_durable_slot_leaves_the_one_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spans");
        let mut map = SpanMap::create(&path, 70, BOOT).unwrap();
        map.write_durable(&[0b111, 0]).unwrap(); // place 0
        map.write_evicted(&[0b100, 0], &[0b11, 0]).unwrap(); // place 1
        for _ in 0..3 {
            map.write_volatile(&[0b11, 0]).unwrap();
        }
        map.write_durable(&[0b1011, 0]).unwrap(); // place 0
        map.file.write_all_at(&[0xff], HEADER as u64).unwrap();
        drop(map);
        assert_eq!(load(&path, LATER), loaded([0b11, 0], [0, 0]));
        // Also not after the file was opened anew.
        let (mut map, _) = SpanMap::open(&path, 70, LATER).unwrap();
        map.write_durable(&[0b1, 0]).unwrap();
        map.file.write_all_at(&[0xff], HEADER as u64).unwrap();
        assert_eq!(load(&path, LATER), loaded([0b11, 0], [0, 0]));
    }

    #[test]
    fn evicted_spans_stay_away_and_the_others_stay_what_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spans");
        let mut map = SpanMap::create(&path, 70, BOOT).unwrap();
        map.write_durable(&[0b1111, 0]).unwrap();
        map.write_volatile(&[0b111_1111, 0]).unwrap();
        // One that was durable goes, and one that was not.
        map.write_evicted(&[0b10_0001, 0], &[0b101_1110, 0]).unwrap();
        assert_eq!(load(&path, BOOT), loaded([0b101_1110, 0], [0, 0]));
        assert_eq!(load(&path, LATER), loaded([0b1110, 0], [0b101_0000, 0]));
        // Every slot that may be torn when the power goes later (the one just waited for may not): none of those left
        // over from before brings an evicted one back.
        for place in [0, 2, 3] {
            let whole = std::fs::read(&path).unwrap();
            map.file.write_all_at(&[0xff], (place * slot_size(70) + HEADER) as u64).unwrap();
            let Loaded { trusted, .. } = load(&path, LATER);
            assert_eq!(trusted[0] & 0b10_0001, 0, "slot {place}");
            std::fs::write(&path, whole).unwrap();
            map = SpanMap::open(&path, 70, BOOT).unwrap().0;
        }
        // Fetched again it counts, but has to be verified after a reboot.
        map.write_volatile(&[0b101_1111, 0]).unwrap();
        assert_eq!(load(&path, LATER), loaded([0b1110, 0], [0b101_0001, 0]));
    }

    #[test]
    fn nonsense_is_an_empty_map() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spans");
        assert_eq!(load(&path, BOOT), loaded([0, 0], [0, 0]));
        std::fs::write(&path, vec![0xa5; 4 * PAGE]).unwrap();
        assert_eq!(load(&path, BOOT), loaded([0, 0], [0, 0]));
        std::fs::write(&path, b"").unwrap();
        assert_eq!(load(&path, BOOT), loaded([0, 0], [0, 0]));
        // A map of another number of spans does not fit either.
        SpanMap::create(&path, 3, BOOT).unwrap().write_volatile(&[0b111]).unwrap();
        assert_eq!(load(&path, BOOT), loaded([0, 0], [0, 0]));
    }
}
