//! Follows the spans of a known index while the blob passes: tells the caller's sink which of them are proven.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::source::{SliceSource, Source};
use crate::{Compression, Digest, DigestOf, Hasher, LayerIndex, LayerSink, Layout, SpanInfo, gzip};

/// Most bytes of a gzip header that are looked at.
const HEADER_MAX: u64 = 64 * 1024;

/// A span whose digest is not that of its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wrong {
    pub(crate) span: SpanInfo,
    pub(crate) actual: Digest,
}

/// Passes the layer file on to the caller's sink, and the spans as far as they are proven.
pub(crate) struct Claims<'a> {
    index: &'a LayerIndex,
    sink: &'a mut dyn LayerSink,
    hasher: Hasher,
    at: u64,
    /// The span that is under way and where it ends in the layer file.
    next: usize,
    end: u64,
    news: Receiver<News>,
    /// The blob's bytes below this are proven by digests of blob ranges.
    proven_blob: u64,
    /// The next span whose blob range is to be proven.
    next_blob: usize,
    /// Spans whose blob range has to be proven first: up to which byte, known once the decoder's place is.
    waiting: VecDeque<(SpanInfo, Option<u64>)>,
    /// Spans that nobody gave a digest of.
    last: Vec<SpanInfo>,
    wrong: Option<Wrong>,
}

/// What the reader's thread finds.
enum News {
    /// The compressed data starts where the first span does.
    Head,
    /// The digest of a span's blob range.
    Span(usize, Digest),
}

/// A follower for the layer file and one for the blob's own bytes. A table's layer file is not what passes: the
/// sink gets what does, and its spans are not followed.
pub(crate) fn follow<'a>(index: &'a LayerIndex, sink: &'a mut dyn LayerSink) -> (Claims<'a>, BlobTap<'a>) {
    let (tell, news) = channel();
    let followed = if index.layout() == Layout::Tar { index.span_count() } else { 0 };
    let first = (followed > 0).then(|| index.span(0));
    let claims = Claims {
        index,
        sink,
        hasher: Hasher::new(),
        at: 0,
        next: 0,
        end: first.map_or(0, |span| span.len),
        news,
        proven_blob: 0,
        next_blob: 0,
        waiting: VecDeque::new(),
        last: Vec::new(),
        wrong: None,
    };
    let start = first.map_or(0, |span| span.blob_offset);
    let head = (start > 0 && start <= HEADER_MAX && index.compression() == Compression::Gzip).then(Vec::new);
    (claims, BlobTap { index, followed, next: 0, at: 0, open: VecDeque::new(), head, start, tell })
}

impl Claims<'_> {
    /// The first span that has another digest than the index says, if the order of finding allows to say so now.
    pub(crate) fn wrong(&self) -> Option<Wrong> {
        self.wrong
    }

    /// The whole layer is proven: tells the sink the spans that had to wait for that.
    pub(crate) fn finish(mut self, blob_size: u64) -> io::Result<()> {
        let waiting = std::mem::take(&mut self.waiting).into_iter().map(|(span, _)| span);
        let mut rest: Vec<SpanInfo> = waiting.chain(std::mem::take(&mut self.last)).collect();
        rest.sort_unstable_by_key(|span| span.index);
        for span in rest {
            self.sink.span(&span)?;
        }
        self.sink.progress(blob_size);
        Ok(())
    }

    /// Bytes of the layer file that have passed.
    pub(crate) fn passed(&self) -> u64 {
        self.at
    }

    fn span_end(&mut self) -> io::Result<()> {
        let claimed = self.index.span(self.next);
        let actual = std::mem::take(&mut self.hasher).finish();
        let span = SpanInfo { digest: actual, digest_of: DigestOf::Decoded, ..claimed };
        self.next += 1;
        if self.next < self.index.span_count() {
            self.end += self.index.span(self.next).len;
        }
        match claimed.digest_of {
            // Once one is wrong, those behind it are not worth more than the blob's own digest will be.
            _ if self.wrong.is_some() => {}
            DigestOf::Decoded if claimed.digest != actual => self.note(Wrong { span: claimed, actual }),
            DigestOf::Decoded => self.sink.span(&span)?,
            DigestOf::Blob => self.waiting.push_back((span, None)),
            DigestOf::Nothing => self.last.push(span),
        }
        Ok(())
    }

    fn note(&mut self, wrong: Wrong) {
        if self.wrong.is_none_or(|known| known.span.index > wrong.span.index) {
            self.wrong = Some(wrong);
        }
    }

    /// Takes in what the reader has found by now.
    fn hear(&mut self) {
        for news in self.news.try_iter().collect::<Vec<_>>() {
            match news {
                News::Head => self.proven_blob = self.index.span(0).blob_offset,
                News::Span(i, actual) => {
                    let span = self.index.span(i);
                    if span.digest != actual {
                        self.note(Wrong { span, actual });
                    } else if i == self.next_blob && span.blob_offset <= self.proven_blob {
                        self.proven_blob = self.proven_blob.max(span.blob_offset + span.blob_len);
                        self.next_blob = i + 1;
                    }
                }
            }
        }
    }
}

impl LayerSink for Claims<'_> {
    fn data(&mut self, offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        debug_assert_eq!(offset, self.at);
        if self.index.layout() == Layout::Table {
            self.sink.data(offset, bytes)?;
            self.at += bytes.len() as u64;
            return Ok(());
        }
        while !bytes.is_empty() {
            // What follows the last claimed span belongs to no span, but it is part of the layer file.
            let left = if self.at < self.end { self.end - self.at } else { u64::MAX };
            let n = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
            let (now, later) = bytes.split_at(n);
            self.sink.data(self.at, now)?;
            let inside = self.at < self.end;
            self.at += n as u64;
            bytes = later;
            if inside {
                self.hasher.update(now);
                if self.at == self.end {
                    self.span_end()?;
                }
            }
        }
        Ok(())
    }

    /// The spans that come here are the new index's, not those followed.
    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        Ok(())
    }

    fn progress(&mut self, blob_bytes: u64) {
        for (_, need) in self.waiting.iter_mut().filter(|(_, need)| need.is_none()) {
            *need = Some(blob_bytes);
        }
        self.sink.progress(blob_bytes);
    }
}

impl Claims<'_> {
    /// Tells the sink the spans whose blob ranges are proven by now.
    pub(crate) fn advance(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.hear();
        while let Some((span, need)) = self.waiting.front() {
            let known = self.wrong.is_none_or(|wrong| wrong.span.index > span.index);
            if !known || need.is_none_or(|need| need > self.proven_blob) {
                break;
            }
            self.sink.span(span)?;
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Takes in all that the reader has found, at the end of the blob.
    pub(crate) fn hear_all(&mut self) {
        self.hear();
    }
}

/// Hashes the blob ranges of spans as the blob is read.
pub(crate) struct BlobTap<'a> {
    index: &'a LayerIndex,
    followed: usize,
    /// The next span whose range has not begun.
    next: usize,
    at: u64,
    /// Ranges that have begun: span, hasher, bytes left. As ranges of a tar's spans share at most one byte, they are few.
    open: VecDeque<(usize, Hasher, u64)>,
    /// The blob's first bytes, if the first span does not start with the blob.
    head: Option<Vec<u8>>,
    start: u64,
    tell: Sender<News>,
}

impl BlobTap<'_> {
    /// The blob's next bytes.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.header(bytes);
        for (_, hasher, left) in &mut self.open {
            let n = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
            hasher.update(&bytes[..n]);
            *left -= n as u64;
        }
        let end = self.at + bytes.len() as u64;
        while self.next < self.followed {
            let span = self.index.span(self.next);
            if span.blob_offset >= end {
                break;
            }
            // A range that starts before what is at hand cannot be hashed any more; its span waits for the end.
            if span.digest_of == DigestOf::Blob && span.blob_offset >= self.at {
                let rest = &bytes[(span.blob_offset - self.at) as usize..];
                let n = usize::try_from(span.blob_len).map_or(rest.len(), |len| len.min(rest.len()));
                let mut hasher = Hasher::new();
                hasher.update(&rest[..n]);
                self.open.push_back((self.next, hasher, span.blob_len - n as u64));
            }
            self.next += 1;
            self.close();
        }
        self.close();
        self.at = end;
    }

    /// Reports the ranges that are complete, in the order of the spans.
    fn close(&mut self) {
        while self.open.front().is_some_and(|(_, _, left)| *left == 0) {
            if let Some((i, hasher, _)) = self.open.pop_front() {
                // Nobody listens any more after an error.
                let _ = self.tell.send(News::Span(i, hasher.finish()));
            }
        }
    }

    /// A gzip header in front of the first span has no digest, but it must not move the start of the data.
    fn header(&mut self, bytes: &[u8]) {
        let Some(head) = &mut self.head else { return };
        let left = self.start as usize - head.len();
        head.extend_from_slice(&bytes[..left.min(bytes.len())]);
        if head.len() as u64 == self.start {
            let mut source = SliceSource::new(head, 0);
            let starts = gzip::member_follows(&mut source).is_ok_and(|follows| follows)
                && gzip::read_header(&mut source).is_ok()
                && source.offset() == self.start;
            if starts {
                let _ = self.tell.send(News::Head);
            }
            self.head = None;
        }
    }
}
