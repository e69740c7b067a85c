//! Missing bytes that are local all the same: as those of files with the same content in other layers.
//!
//! A span is put together from such files. What lies between them in the tar, headers and small files, is guessed to be
//! what lies before the same file in the other tar; the span's digest tells whether that was right. Where it was not, a
//! read that only wants bytes of files gets these alone. Nothing here is an error: what can't be had comes from the
//! registry.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use lazyrun_index::{Digest, SpanInfo};

use super::Inner;
use crate::observe::SharedSeen;
use crate::store::{Layer, LayerPin, Need, PlainFile, Search, Twin};

/// Longer spans are left to the registry: they are held in memory.
const MAX_SPAN: u64 = 32 << 20;

/// Bytes of the layer file and where the same ones are.
struct Piece {
    at: Range<u64>,
    source: Arc<Layer>,
    source_at: u64,
    /// Nothing but the span's digest says that they are the same.
    guess: bool,
}

/// Answers a read from other layers' files, if all that is missing of it is there.
pub(super) async fn read(inner: &Arc<Inner>, layer: &Arc<Layer>, offset: u64, len: usize) -> Option<Bytes> {
    if !layer.has_proven_contents() {
        return None;
    }
    let answer = on_thread(inner, layer, move |inner, layer, search| {
        let missing = layer.index().spans_covering(offset, len as u64).filter(|i| layer.lacks_span(*i));
        let fill = |i| plan(layer, search, i).is_some_and(|p| fill_span(inner, layer, i, &p, Need::Reader));
        let filled = missing.map(fill).fold(false, |any, done| any | done);
        (filled, answer(inner, layer, search, offset, len))
    });
    let (any, bytes) = answer.await?;
    if any {
        filled(inner, layer);
    }
    bytes
}

/// The bytes of a read of which all was filled that can be.
fn answer(inner: &Inner, layer: &Layer, search: &mut Search<'_>, offset: u64, len: usize) -> Option<Bytes> {
    let mut buffer = vec![0; len];
    let taken = compose(layer, search, offset, &mut buffer)?;
    if taken > 0 {
        shared(inner, layer, taken);
    }
    Some(buffer.into())
}

/// Looks for twins of a layer's files on a thread that may block; `None` when there can be none.
async fn on_thread<T: Send + 'static>(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    work: impl FnOnce(&Inner, &Layer, &mut Search<'_>) -> T + Send + 'static,
) -> Option<T> {
    let (inner, layer) = (Arc::clone(inner), Arc::clone(layer));
    let span = tracing::Span::current();
    let work = move || {
        let _of = span.enter();
        let mut search = inner.store.twins_of(&layer)?;
        Some(work(&inner, &layer, &mut search))
    };
    tokio::task::spawn_blocking(work).await.ok().flatten()
}

/// Fills what can be filled of a layer.
pub(super) async fn fill_all(inner: &Arc<Inner>, layer: &Arc<Layer>) {
    let all = std::iter::once(0..layer.index().span_count()).collect();
    let (fillable, _) = part(inner, layer, all).await;
    fill(inner, layer, &fillable).await;
}

/// Fills what can be filled of these spans, one after the other.
pub(super) async fn fill(inner: &Arc<Inner>, layer: &Arc<Layer>, spans: &[Range<usize>]) {
    for number in spans.iter().cloned().flatten().filter(|number| layer.lacks_span(*number)) {
        let Ok(room) = inner.scheduler.decode().await else { return };
        let done = on_thread(inner, layer, move |inner, layer, search| {
            let pieces = plan(layer, search, number);
            let done = pieces.is_some_and(|pieces| fill_span(inner, layer, number, &pieces, Need::Ahead));
            drop(room);
            done
        });
        if done.await == Some(true) {
            filled(inner, layer);
        }
    }
}

/// Parts ranges of spans into those that can probably be filled and the others, in the order given.
pub(super) async fn part(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    wanted: Vec<Range<usize>>,
) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    if !layer.has_proven_contents() {
        return (Vec::new(), wanted);
    }
    let spans = wanted.clone();
    let parted = on_thread(inner, layer, move |_, layer, search| {
        let (mut fillable, mut others) = (Vec::new(), Vec::new());
        for number in spans.into_iter().flatten() {
            let found = layer.lacks_span(number) && plan(layer, search, number).is_some();
            let ranges: &mut Vec<Range<usize>> = if found { &mut fillable } else { &mut others };
            match ranges.last_mut() {
                Some(last) if last.end == number => last.end += 1,
                _ => ranges.push(number..number + 1),
            }
        }
        (fillable, others)
    });
    parted.await.unwrap_or((Vec::new(), wanted))
}

/// Tells those who wait for spans.
fn filled(inner: &Arc<Inner>, layer: &Arc<Layer>) {
    inner.state(layer.id()).changed.notify_waiters();
    if layer.is_whole() {
        inner.sync_later(layer);
    }
}

/// Puts a span together and stores it. Whether it did.
fn fill_span(inner: &Inner, layer: &Layer, number: usize, pieces: &[Piece], need: Need) -> bool {
    let span = layer.index().span(number);
    let Some(bytes) = put_together(layer, &span, pieces) else { return false };
    match layer.write_span_for(need, &span, &bytes) {
        Ok(true) => {}
        Ok(false) => return false,
        Err(error) => {
            tracing::debug!(layer = %layer.id(), span = number, %error, "a span of known content can't be stored");
            return false;
        }
    }
    let _ = layer.save_map();
    shared(inner, layer, span.len);
    true
}

/// Where the bytes of a span are, if those of all its files are anywhere.
fn plan(layer: &Layer, search: &mut Search<'_>, number: usize) -> Option<Vec<Piece>> {
    let span = layer.index().span(number);
    if span.len > MAX_SPAN || layer.digest_of_bytes(&span).is_none() {
        return None;
    }
    let end = span.offset + span.len;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = span.offset;
    for file in around(search, span.offset..end) {
        if at >= end {
            break;
        }
        let content = file.offset.clamp(at, end)..file.end().min(end);
        let lead = file.offset.saturating_sub(at);
        let part = part_of(&file, &content);
        let Some((twin, led)) = find(search, &file, lead, &part) else {
            if part.is_empty() { break } else { return None }
        };
        if lead > 0 && led {
            let at = at..content.start;
            pieces.push(Piece {
                at,
                source: Arc::clone(&twin.layer),
                source_at: twin.offset - lead,
                guess: true,
            });
        }
        if !part.is_empty() {
            let source_at = twin.offset + part.start;
            at = content.end;
            pieces.push(Piece { at: content, source: twin.layer, source_at, guess: false });
        }
    }
    let last = pieces.iter().rfind(|piece| !piece.guess)?;
    if at < end && pieces.last().is_some_and(|piece| piece.at.end == at) {
        // No file behind it tells: what comes after the last one there may come here as well.
        let source_at = last.source_at + (last.at.end - last.at.start);
        let source = Arc::clone(&last.source);
        pieces.push(Piece { at: at..end, source, source_at, guess: true });
    }
    Some(pieces)
}

/// The files that have any of these bytes, and the next one.
fn around(search: &Search<'_>, bytes: Range<u64>) -> Vec<PlainFile> {
    let mut files = Vec::new();
    for file in search.files_from(bytes.start) {
        let behind = file.offset >= bytes.end;
        files.push(file);
        if behind {
            break;
        }
    }
    files
}

/// Which bytes of a file these bytes of the layer file are; none if they are not of the file.
fn part_of(file: &PlainFile, bytes: &Range<u64>) -> Range<u64> {
    let (start, end) = (bytes.start.max(file.offset), bytes.end.min(file.end()));
    if start < end { start - file.offset..end - file.offset } else { 0..0 }
}

/// A twin, if there is one with as much in front of it as here; `false` if there is only another one.
fn find(search: &mut Search<'_>, file: &PlainFile, lead: u64, part: &Range<u64>) -> Option<(Twin, bool)> {
    if let Some(twin) = search.find(file, lead, part) {
        return Some((twin, true));
    }
    (lead > 0 && !part.is_empty()).then(|| search.find(file, 0, part)).flatten().map(|twin| (twin, false))
}

/// The bytes of a span, if they are what its digest says.
fn put_together(layer: &Layer, span: &SpanInfo, pieces: &[Piece]) -> Option<Vec<u8>> {
    let _held = hold(pieces);
    let mut bytes = vec![0; usize::try_from(span.len).ok()?];
    for piece in pieces {
        // All pieces lie inside the span.
        let place =
            &mut bytes[(piece.at.start - span.offset) as usize..(piece.at.end - span.offset) as usize];
        if !copy(piece, place) && !piece.guess {
            return None;
        }
    }
    let right = layer.digest_of_bytes(span) == Some(Digest::of(&bytes));
    right.then_some(bytes)
}

/// Answers a read of which spans are missing that can't be filled, if it wants nothing but files of them. Returns how
/// many bytes came from other layers.
fn compose(layer: &Layer, search: &mut Search<'_>, offset: u64, buffer: &mut [u8]) -> Option<u64> {
    let end = offset.checked_add(buffer.len() as u64)?;
    let (mut at, mut taken) = (offset, 0);
    while at < end {
        let span = layer.index().span(layer.index().spans_covering(at, 1).next()?);
        let stop = end.min(span.offset + span.len);
        // Both lie inside the buffer.
        let place = |bytes: &Range<u64>| (bytes.start - offset) as usize..(bytes.end - offset) as usize;
        if !layer.lacks_span(span.index as usize) {
            let here = &mut buffer[place(&(at..stop))];
            (layer.read_local(at, here).ok()? == Some(here.len())).then_some(())?;
            at = stop;
            continue;
        }
        let file = search.files_from(at).next()?;
        let piece = at..stop.min(file.end());
        if file.offset > at {
            return None;
        }
        let part = part_of(&file, &piece);
        let twin = search.find(&file, 0, &part)?;
        let here = &mut buffer[place(&piece)];
        let piece =
            Piece { at: piece, source_at: twin.offset + part.start, source: twin.layer, guess: false };
        let _held = hold(std::slice::from_ref(&piece));
        copy(&piece, here).then_some(())?;
        taken += here.len() as u64;
        at = piece.at.end;
    }
    Some(taken)
}

/// Keeps what the pieces are made of.
fn hold(pieces: &[Piece]) -> Vec<LayerPin> {
    let mut held: Vec<LayerPin> = Vec::new();
    for piece in pieces {
        if !held.iter().any(|pin| pin.is_of(&piece.source)) {
            held.push(piece.source.pin_busy());
        }
    }
    held
}

/// Reads a piece, if it is still there.
fn copy(piece: &Piece, place: &mut [u8]) -> bool {
    let from = piece.source_at..piece.source_at.saturating_add(place.len() as u64);
    piece.source.has_bytes(from.clone())
        && piece.source.read_local(from.start, place).is_ok_and(|read| read == Some(place.len()))
}

fn shared(inner: &Inner, layer: &Layer, bytes: u64) {
    inner.counters.shared_bytes.fetch_add(bytes, Relaxed);
    inner.options.watch.shared(&SharedSeen { layer: layer.id(), bytes });
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::fetch::{FetchOptions, Fetcher};
    use crate::store::LayerStore;
    use crate::store::tests::publish;

    /// A tar of these files; `seed` makes their contents.
    fn tar_of(files: &[(&str, u32)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, seed) in files {
            let content: Vec<u8> = (0..150_000u32)
                .map(|i| ((i + seed * 7919).wrapping_mul(2_654_435_761) >> 13) as u8)
                .collect();
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, content.as_slice()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    /// A fetcher that knows no registry, a layer that is whole, and one that has the same files, none of them local.
    fn setting() -> (tempfile::TempDir, Fetcher, Arc<Layer>, Arc<Layer>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let store = LayerStore::open(dir.path()).unwrap();
        let whole = publish(&store, &tar_of(&[("other", 1), ("a", 2), ("b", 3), ("c", 2)]));
        let made = tar_of(&[("a", 2), ("b", 3), ("c", 2), ("new", 5)]);
        let empty = publish(&store, &made);
        empty.forget().unwrap();
        (dir, Fetcher::new(store, FetchOptions::default()), whole, empty, made)
    }

    fn planned(fetcher: &Fetcher, layer: &Layer, number: usize) -> Option<Vec<Piece>> {
        plan(layer, &mut fetcher.store().twins_of(layer).unwrap(), number)
    }

    #[tokio::test]
    async fn what_goes_between_look_and_copy_is_not_used() {
        let (_dir, fetcher, whole, empty, made) = setting();
        let inner = &fetcher.inner;
        let pieces = planned(&fetcher, &empty, 2).unwrap();
        whole.forget().unwrap();
        assert!(!fill_span(inner, &empty, 2, &pieces, Need::Reader) && empty.lacks_span(2));
        assert!(planned(&fetcher, &empty, 2).is_none());
        let span = empty.index().span(2);
        assert!(read(inner, &empty, span.offset, span.len as usize).await.is_none());
        assert_eq!(fetcher.stats().shared_bytes, 0);
        // Back again it is.
        assert_eq!(publish_again(&fetcher, &whole), whole.id());
        let bytes = read(inner, &empty, span.offset, span.len as usize).await.unwrap();
        assert!(made[span.offset as usize..][..bytes.len()] == bytes[..] && bytes.len() as u64 == span.len);
        assert_eq!(fetcher.stats().shared_bytes, span.len);
    }

    /// The same layer as a stream would bring it once more.
    fn publish_again(fetcher: &Fetcher, layer: &Layer) -> lazyrun_index::LayerId {
        fetcher.store().remove(layer.id()).unwrap();
        publish(fetcher.store(), &tar_of(&[("other", 1), ("a", 2), ("b", 3), ("c", 2)])).id()
    }

    #[tokio::test]
    async fn bytes_that_are_not_what_they_should_be_do_not_pass() {
        let (_dir, fetcher, whole, empty, _) = setting();
        let pieces = planned(&fetcher, &empty, 2).unwrap();
        let wrong = std::fs::OpenOptions::new().write(true).open(whole.data_path()).unwrap();
        wrong.write_all_at(&[1, 2, 3], pieces[0].source_at + 100).unwrap();
        assert!(!fill_span(&fetcher.inner, &empty, 2, &pieces, Need::Reader) && empty.lacks_span(2));
    }

    #[tokio::test]
    async fn only_what_is_shared_is_filled() {
        let (_dir, fetcher, _whole, empty, made) = setting();
        fill_all(&fetcher.inner, &empty).await;
        let spans = empty.index().span_count();
        let last = empty.index().spans_covering(made.len() as u64 - 150_000, 1).start;
        for number in 0..spans {
            // The first header is what lies before the same file there; only the new file is not there.
            assert_eq!(empty.has_span(number), number < last, "span {number} of {spans}");
        }
        assert!(empty.check(false).unwrap().bad.is_empty());
    }
}
