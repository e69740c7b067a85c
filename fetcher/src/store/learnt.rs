//! Digests of decoded spans that the index does not have, learnt as the spans arrive.
//!
//! A foreign index may know only the digest of a span's compressed bytes, or none. What such a span decodes to is
//! written down here, so that it can be verified after an unclean reboot; and once a stream has proven the layer,
//! what is written down is what the span must decode to ever after.
//!
//! The file is a header (magic 8, version 4, zero 4, span count 8, crc32c of these 4, zero 4) and 32 bytes for each
//! span, all zero while nothing is known. A torn digest fits no data and so counts as none.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lazyrun_index::Digest;

const MAGIC: [u8; 8] = *b"LZRLEARN";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const LEN: usize = 32;

/// The open file.
pub(super) struct Learnt {
    file: File,
    digests: Mutex<Vec<Option<Digest>>>,
}

impl Learnt {
    /// Opens the file, or makes one that knows nothing where there is none that fits.
    pub(super) fn open(path: &Path, spans: usize) -> io::Result<Learnt> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let size = HEADER + spans * LEN;
        let mut bytes = vec![0; size];
        if file.read_exact_at(&mut bytes, 0).is_err() || bytes[..HEADER] != header(spans) {
            bytes = vec![0; size];
            bytes[..HEADER].copy_from_slice(&header(spans));
            file.set_len(0)?;
            file.write_all_at(&bytes, 0)?;
        }
        let known = |digest: &[u8]| {
            let digest: [u8; LEN] = digest.try_into().ok()?;
            (digest != [0; LEN]).then(|| Digest::from_bytes(digest))
        };
        let digests = bytes[HEADER..].chunks_exact(LEN).map(known).collect();
        Ok(Learnt { file, digests: Mutex::new(digests) })
    }

    /// What a span is known to decode to.
    pub(super) fn get(&self, span: usize) -> Option<Digest> {
        self.lock().get(span).copied().flatten()
    }

    /// Writes down what a span decodes to.
    pub(super) fn set(&self, span: usize, digest: Digest) -> io::Result<()> {
        self.file.write_all_at(digest.as_bytes(), (HEADER + span * LEN) as u64)?;
        if let Some(place) = self.lock().get_mut(span) {
            *place = Some(digest);
        }
        Ok(())
    }

    /// Waits until all that was written down is on disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Digest>>> {
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn header(spans: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&(spans as u64).to_le_bytes());
    let crc = crc32c::crc32c(&header[..24]);
    header[24..28].copy_from_slice(&crc.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_learnt_is_read_back_and_nonsense_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("digests");
        let learnt = Learnt::open(&path, 3).unwrap();
        learnt.set(1, Digest::of(b"x")).unwrap();
        drop(learnt);
        let learnt = Learnt::open(&path, 3).unwrap();
        assert_eq!([learnt.get(0), learnt.get(1), learnt.get(3)], [None, Some(Digest::of(b"x")), None]);
        drop(learnt);
        // Another number of spans, a short file, another version: nothing is known.
        assert_eq!(Learnt::open(&path, 4).unwrap().get(1), None);
        std::fs::write(&path, b"LZR").unwrap();
        assert_eq!(Learnt::open(&path, 4).unwrap().get(1), None);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8] = 9;
        bytes[HEADER + 5] = 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Learnt::open(&path, 4).unwrap().get(0), None);
    }
}
