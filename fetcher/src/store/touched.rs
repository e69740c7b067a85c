//! When spans were last of use: kept in memory, written down now and then.
//!
//! The file is a header (magic 8, version 4, crc32c of the header 4, span count 8, time of the layer's last use 8,
//! crc32c of the times 4, zero 4) and a time for each span, milliseconds since 1970, 0 for never. It only orders what
//! is evicted, so it is not waited for, and a file that is torn or of another layer counts as nothing known.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

const MAGIC: [u8; 8] = *b"LZRTOUCH";
const VERSION: u32 = 1;
const HEADER: usize = 40;
/// Uses within so many milliseconds are one.
const COARSE: u64 = 64;

/// The times of one layer.
pub(super) struct Touched {
    spans: Vec<AtomicU64>,
    /// Of the layer as a whole: of any span, or of an image that has it.
    layer: AtomicU64,
    dirty: AtomicBool,
}

impl Touched {
    /// Reads what is written down.
    pub(super) fn open(path: &Path, spans: usize) -> Touched {
        let (layer, times) = read(path, spans).unwrap_or_else(|| (changed(path), vec![0; spans]));
        // After the clock was set back nothing may look younger than everything to come.
        let now = now();
        Touched {
            spans: times.into_iter().map(|t| AtomicU64::new(t.min(now))).collect(),
            layer: AtomicU64::new(layer.min(now)),
            dirty: AtomicBool::new(false),
        }
    }

    /// A span is of use now.
    pub(super) fn touch(&self, span: usize) {
        let now = now();
        if let Some(time) = self.spans.get(span)
            && now.abs_diff(time.load(Relaxed)) >= COARSE
        {
            time.store(now, Relaxed);
            self.layer.store(now, Relaxed);
            self.dirty.store(true, Relaxed);
        }
    }

    /// The layer is of use now.
    pub(super) fn touch_layer(&self) {
        self.layer.store(now(), Relaxed);
        self.dirty.store(true, Relaxed);
    }

    /// When a span was last of use; 0 for never.
    pub(super) fn span(&self, span: usize) -> u64 {
        self.spans.get(span).map_or(0, |time| time.load(Relaxed))
    }

    /// When the layer was last of use.
    pub(super) fn layer(&self) -> u64 {
        self.layer.load(Relaxed)
    }

    /// Writes down what has changed.
    pub(super) fn save(&self, path: &Path) -> io::Result<()> {
        if !self.dirty.swap(false, Relaxed) {
            return Ok(());
        }
        let times: Vec<u8> = self.spans.iter().flat_map(|t| t.load(Relaxed).to_le_bytes()).collect();
        let mut file = header(self.spans.len(), self.layer(), crc32c::crc32c(&times)).to_vec();
        file.extend_from_slice(&times);
        let new = path.with_extension("new");
        fs::write(&new, &file).and_then(|()| fs::rename(&new, path)).inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })
    }
}

/// When a layer that is not open was last of use.
pub(super) fn of_layer(path: &Path) -> u64 {
    let header = || -> io::Result<[u8; HEADER]> {
        let mut bytes = [0; HEADER];
        File::open(path)?.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let time = header().ok().and_then(|h| parse(&h)).map_or_else(|| changed(path), |(_, time, _)| time);
    time.min(now())
}

/// Where nothing is written down: when something of the layer was last made.
fn changed(path: &Path) -> u64 {
    let time = path.parent().and_then(|dir| fs::metadata(dir).ok()?.modified().ok());
    time.map_or(0, millis)
}

fn now() -> u64 {
    millis(SystemTime::now())
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

fn header(spans: usize, layer: u64, times: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&(spans as u64).to_le_bytes());
    header[24..32].copy_from_slice(&layer.to_le_bytes());
    header[32..36].copy_from_slice(&times.to_le_bytes());
    let crc = crc32c::crc32c(&header);
    header[12..16].copy_from_slice(&crc.to_le_bytes());
    header
}

/// Spans, time of the layer and checksum of the times.
fn parse(bytes: &[u8; HEADER]) -> Option<(u64, u64, u32)> {
    let number = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let (spans, layer) = (number(16)?, number(24)?);
    let times = u32::from_le_bytes(bytes[32..36].try_into().ok()?);
    (header(usize::try_from(spans).ok()?, layer, times) == *bytes).then_some((spans, layer, times))
}

fn read(path: &Path, spans: usize) -> Option<(u64, Vec<u64>)> {
    let size = HEADER + spans * 8;
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.len() != size as u64 {
        return None;
    }
    let mut bytes = Vec::with_capacity(size);
    file.take(size as u64).read_to_end(&mut bytes).ok()?;
    let (head, times) = bytes.split_at_checked(HEADER)?;
    let (count, layer, crc) = parse(head.try_into().ok()?)?;
    if count != spans as u64 || crc32c::crc32c(times) != crc {
        return None;
    }
    times
        .chunks_exact(8)
        .map(|t| t.try_into().map(u64::from_le_bytes).ok())
        .collect::<Option<_>>()
        .map(|t| (layer, t))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_back_and_nonsense_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("used");
        let touched = Touched::open(&path, 3);
        assert_eq!([0, 1, 2, 9].map(|i| touched.span(i)), [0; 4]);
        touched.save(&path).unwrap();
        assert!(!path.exists(), "nothing to say");
        touched.touch(1);
        touched.touch(9);
        let time = touched.span(1);
        assert!(time > 0 && touched.layer() == time);
        touched.save(&path).unwrap();
        let again = Touched::open(&path, 3);
        assert_eq!([0, 1, 2].map(|i| again.span(i)), [0, time, 0]);
        assert_eq!((again.layer(), of_layer(&path)), (time, time));
        // Another number of spans, a flipped byte, a short file.
        assert_eq!(Touched::open(&path, 4).span(1), 0);
        let whole = fs::read(&path).unwrap();
        for at in [0, 9, 30, 50] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, bytes).unwrap();
            assert_eq!(Touched::open(&path, 3).span(1), 0, "byte {at}");
        }
        fs::write(&path, &whole[..20]).unwrap();
        assert_eq!(Touched::open(&path, 3).span(1), 0);
        assert!(of_layer(&path) > 0, "the directory's own time");
    }

    #[test]
    fn times_to_come_are_cut_to_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("used");
        let times = u64::MAX.to_le_bytes();
        let mut file = header(1, u64::MAX, crc32c::crc32c(&times)).to_vec();
        file.extend_from_slice(&times);
        fs::write(&path, file).unwrap();
        let touched = Touched::open(&path, 1);
        assert!(touched.span(0) <= now() && touched.layer() <= now() && of_layer(&path) <= now());
    }
}
