//! Whether what is local is what the index says.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;

use lazyrun_index::{Digest, DigestOf, Hasher, SpanInfo};

use super::Layer;
use super::layer::has;

/// What a look at all local bytes of a layer has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Spans looked at.
    pub spans: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Numbers of the spans whose bytes are not what the index says.
    pub bad: Vec<usize>,
    /// How many of these counted as good until now. The others had been written before the machine went down, and
    /// would have been looked at before their use.
    pub trusted_bad: usize,
}

impl Layer {
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

    /// Verifies every local span, whether it counts as good or not; with `repair` those that are wrong do not count as
    /// local any more and will be fetched again. Reads and hashes all of it: not for an async task.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn check(&self, repair: bool) -> io::Result<Checked> {
        let mut found = Checked::default();
        for span in 0..self.index.span_count() {
            // Held for one span at a time: evictions wait for it.
            let _gate = self.enter();
            let trusted = has(&self.trusted, span);
            if !trusted && !has(&self.suspect, span) {
                continue;
            }
            let info = self.index.span(span);
            found.spans += 1;
            found.bytes += info.len;
            let intact = match self.is_intact(&info) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => false,
                result => result?,
            };
            if !intact {
                found.bad.push(span);
                found.trusted_bad += usize::from(trusted);
            }
        }
        if repair && !found.bad.is_empty() {
            self.distrust(&found.bad)?;
        }
        Ok(found)
    }

    /// Whether a span can be used, after a look at it if it is suspect. The gate is held.
    pub(super) fn check_span(&self, span: usize) -> io::Result<bool> {
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
        tracing::warn!(layer = %self.id(), span, "a span did not survive the reboot and will be fetched again");
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

    pub(super) fn hash(&self, mut at: u64, mut left: u64) -> io::Result<Digest> {
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
}
