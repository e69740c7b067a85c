//! Proving a table layer file: the layer's own tar is streamed and published beside it, then every file of the table
//! is compared with the tar's and copied, so that whoever uses the table has all of it local too.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use lazyrun_index::{
    Digest, DigestOf, EntryKind, EntryRef, Extent, IndexError, LayerId, LayerIndex, SpanInfo, compare,
    prove_layer,
};

use super::pump::{Failure, PumpReader};
use super::sink::{FileSink, sink_error};
use super::{Inner, Progress, blocking, hydrate, ingest, prove};
use crate::error::FetchError;
use crate::store::{Layer, Staging};

/// Bytes read at a time where only their value matters.
const PIECE: usize = 1 << 20;

pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    let tar = match own_tar(inner, layer, progress).await? {
        Some(tar) => tar,
        None => stream(inner, layer, progress).await?,
    };
    let (inner, layer) = (Arc::clone(inner), Arc::clone(layer));
    blocking("proving a layer", move || {
        let _held = (tar.pin_busy(), layer.pin_busy());
        let found = compare(layer.index(), tar.index())
            .map_or_else(|mismatch| Ok(Some(mismatch.to_string())), |()| fill(&layer, &tar))
            .map_err(|e| FetchError::store("copying", &layer.data_path(), e))?;
        if let Some(reason) = found {
            return Err(inner.store.condemn(&layer, &reason));
        }
        let stored = layer.prove().and_then(|()| layer.save_map());
        stored.map_err(|e| FetchError::store("writing", &layer.data_path(), e))
    })
    .await
}

/// The tar layer file, if an index of it is here and its bytes can be had.
async fn own_tar(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<Option<Arc<Layer>>, FetchError> {
    let (store, id) = (inner.store.clone(), LayerId::tar(layer.diff_id()));
    let Some(tar) = blocking("opening a layer", move || store.by_id(id)).await? else { return Ok(None) };
    if tar.lie().is_some() {
        return Ok(None);
    }
    if !tar.is_hydrated() && inner.sources(&tar).is_err() {
        let store = inner.store.clone();
        drop(tar);
        blocking("removing a layer", move || store.remove(id)).await?;
        return Ok(None);
    }
    // A hydration of the table waits for one of the tar, never the other way round.
    hydrate::boxed(Arc::clone(inner), Arc::clone(&tar), Arc::clone(progress)).await?;
    Ok(Some(tar))
}

/// One pass over the blob that publishes the tar layer file.
async fn stream(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<Arc<Layer>, FetchError> {
    let (owned_inner, owned_layer, owned_progress) =
        (Arc::clone(inner), Arc::clone(layer), Arc::clone(progress));
    let tar = prove::pass(inner, layer, progress, move |reader, problem| {
        let (inner, layer) = (&owned_inner, &owned_layer);
        let staging = inner.store.stage(LayerId::tar(layer.diff_id()))?;
        match write_tar(inner, layer, &staging, reader, problem, &owned_progress) {
            Err(Pass::Lie(reason)) => {
                // The blob was good, so its tar is of use to whoever starts the image next.
                if let Ok(index) = LayerIndex::open(&staging.index_path())
                    && index.diff_id() == layer.diff_id()
                    && index.blob_digest() == layer.index().blob_digest()
                {
                    let published = inner.store.publish(staging, index.span_count(), false);
                    if let Err(error) = published {
                        tracing::warn!(layer = %layer.id(), %error, "a tar layer file could not be kept");
                    }
                }
                Err(inner.store.condemn(layer, &reason))
            }
            Err(Pass::Failed(error)) => Err(error),
            Ok(spans) => inner.store.publish(staging, spans, false),
        }
    })
    .await?;
    inner.sync_later(&tar);
    Ok(tar)
}

enum Pass {
    Lie(String),
    Failed(FetchError),
}

fn write_tar(
    inner: &Inner,
    layer: &Layer,
    staging: &Staging,
    reader: PumpReader,
    problem: &Failure,
    progress: &Arc<dyn Progress>,
) -> Result<usize, Pass> {
    let path = staging.data_path();
    let data = staging.create(&path).map_err(Pass::Failed)?;
    let out = staging.create(&staging.index_path()).map_err(Pass::Failed)?;
    let (digest, size) = (layer.index().blob_digest(), layer.index().blob_size());
    let report = |done| progress.advance(layer.diff_id(), done, size);
    let mut sink = FileSink::new(&data, inner.store.room(), &report);
    let options = inner.options.stream_of(layer.index().blob_size());
    let passed = prove_layer(layer.index(), reader, &mut sink, out, &options);
    let failed = |e| Pass::Failed(sink_error(digest, &path, e));
    sink.flush().map_err(failed)?;
    match passed {
        Ok(summary) => {
            data.set_len(summary.layer_size).map_err(failed)?;
            Ok(summary.spans as usize)
        }
        Err(IndexError::Lie(mismatch)) => Err(Pass::Lie(mismatch.to_string())),
        Err(error) => Err(Pass::Failed(ingest::layer_error(digest, error, problem, &path))),
    }
}

/// A run of the table layer file and where the same bytes are in the tar.
struct Piece {
    at: u64,
    len: u64,
    /// Entry of the table.
    claimed: usize,
    /// Entry of the tar, and byte of its file.
    entry: usize,
    file_offset: u64,
}

/// Compares the table's files with the tar's and stores what is missing; a sentence when they differ.
fn fill(table: &Layer, tar: &Layer) -> io::Result<Option<String>> {
    let pieces = match pieces(table, tar)? {
        Ok(pieces) => pieces,
        Err(reason) => return Ok(Some(reason)),
    };
    let mut ahead = pieces.iter().peekable();
    let mut here: Vec<&Piece> = Vec::new();
    for span in table.index().spans() {
        here.retain(|p| p.at + p.len > span.offset);
        while let Some(piece) = ahead.next_if(|p| p.at < span.offset + span.len) {
            here.push(piece);
        }
        if let Some(reason) = fill_span(table, tar, &span, &here)? {
            return Ok(Some(reason));
        }
    }
    Ok(None)
}

fn fill_span(table: &Layer, tar: &Layer, span: &SpanInfo, pieces: &[&Piece]) -> io::Result<Option<String>> {
    let number = span.index as usize;
    let local = table.has_span(number);
    let len = usize::try_from(span.len).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let body = len - usize::from(span.pad).min(len);
    let mut bytes = vec![0; len];
    let Some(first) = pieces.first() else {
        // No file of the view has these bytes. With a digest they can be fetched; without one nobody can tell what
        // they are, and nobody reads them.
        if !local && span.digest_of != DigestOf::Decoded {
            table.write_span(span, &bytes)?;
        }
        return Ok(None);
    };
    let mut source = Source::of(tar);
    // Up to where the bytes of the span are known.
    let mut covered = 0;
    for piece in pieces {
        let (from, to) = (piece.at.max(span.offset), (piece.at + piece.len).min(span.offset + span.len));
        // Both lie inside the span.
        let (start, stop) = ((from - span.offset) as usize, (to - span.offset) as usize);
        if start > covered {
            break;
        }
        let mut part = vec![0; stop - start];
        source.read(piece.entry, piece.file_offset + (from - piece.at), &mut part)?;
        // Files of the table may share bytes, if these are the same.
        let shared = covered.min(stop) - start;
        if bytes[start..start + shared] != part[..shared] {
            return Ok(Some(differs(table, piece.claimed)));
        }
        bytes[start..stop].copy_from_slice(&part);
        covered = covered.max(stop);
    }
    if covered < body {
        return Ok(Some(format!("span {number} has bytes that belong to no file")));
    }
    let right = match span.digest_of {
        DigestOf::Decoded => {
            let right = Digest::of(&bytes[..body]) == span.digest && bytes[body..].iter().all(|b| *b == 0);
            right && (local || table.write_span(span, &bytes)?)
        }
        DigestOf::Blob | DigestOf::Nothing => table.write_span(span, &bytes)?,
    };
    Ok((!right).then(|| differs(table, first.claimed)))
}

fn differs(table: &Layer, entry: usize) -> String {
    let path = table.index().entry(entry).path().escape_ascii().to_string();
    format!("the content of \"{path}\" is not what the layer has")
}

/// Where the bytes of all files of the table are in the tar, in the order of the table layer file.
fn pieces(table: &Layer, tar: &Layer) -> io::Result<Result<Vec<Piece>, String>> {
    let winners = |index: &LayerIndex| -> HashMap<Vec<u8>, usize> {
        index.entries().enumerate().map(|(i, e)| (e.path().to_vec(), i)).collect()
    };
    let proven = winners(tar.index());
    let mut found = Vec::new();
    let mut source = Source::of(tar);
    for (path, claimed) in winners(table.index()) {
        let file = table.index().entry(claimed);
        if file.kind() != EntryKind::File || file.size() == 0 {
            continue;
        }
        let same = |e: &EntryRef<'_>| e.kind() == EntryKind::File && e.size() == file.size();
        let Some(&entry) = proven.get(&path).filter(|&&i| same(&tar.index().entry(i))) else {
            return Ok(Err(differs(table, claimed)));
        };
        let mut at = 0;
        for Extent { file_offset, layer_offset, len } in file.extents() {
            if !source.is_zero(entry, at, file_offset)? {
                return Ok(Err(differs(table, claimed)));
            }
            at = file_offset + len;
            found.push(Piece { at: layer_offset, len, claimed, entry, file_offset });
        }
        if !source.is_zero(entry, at, file.size())? {
            return Ok(Err(differs(table, claimed)));
        }
    }
    found.sort_unstable_by_key(|p| (p.at, p.claimed));
    Ok(Ok(found))
}

/// Reads contents of files of the tar.
struct Source<'a> {
    tar: &'a Layer,
    /// The entry whose extents are at hand.
    entry: usize,
    extents: Vec<Extent>,
}

impl<'a> Source<'a> {
    fn of(tar: &'a Layer) -> Self {
        Source { tar, entry: usize::MAX, extents: Vec::new() }
    }

    /// Reads a part of a file into `buf`, which is all zero before.
    fn read(&mut self, entry: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.load(entry);
        let end = offset + buf.len() as u64;
        let first = self.extents.partition_point(|e| e.file_offset + e.len <= offset);
        for extent in self.extents[first..].iter().take_while(|e| e.file_offset < end) {
            let from = extent.file_offset.max(offset);
            let to = (extent.file_offset + extent.len).min(end);
            // Both lie inside the buffer.
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            let at = extent.layer_offset + (from - extent.file_offset);
            if self.tar.read_local(at, part)? != Some(part.len()) {
                return Err(io::Error::other("the tar layer file was dropped from the cache meanwhile"));
            }
        }
        Ok(())
    }

    /// Whether a part of a file is a hole or all zero.
    fn is_zero(&mut self, entry: usize, mut from: u64, to: u64) -> io::Result<bool> {
        while from < to {
            self.load(entry);
            // Holes may be large; only what is stored has to be looked at.
            let next = self.extents.partition_point(|e| e.file_offset + e.len <= from);
            let Some(extent) = self.extents.get(next).filter(|e| e.file_offset < to) else { return Ok(true) };
            from = from.max(extent.file_offset);
            let end = (extent.file_offset + extent.len).min(to);
            let mut buf = vec![0; usize::try_from(end - from).unwrap_or(usize::MAX).min(PIECE)];
            self.read(entry, from, &mut buf)?;
            if buf.iter().any(|b| *b != 0) {
                return Ok(false);
            }
            from += buf.len() as u64;
        }
        Ok(true)
    }

    fn load(&mut self, entry: usize) {
        if self.entry != entry {
            self.extents = self.tar.index().entry(entry).extents().collect();
            self.entry = entry;
        }
    }
}
