//! Tables of other formats: those inside of layers (eStargz, zstd:chunked) and SOCI's zTOCs.

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::join_all;
use lazyrun_index::{Compression, Digest, LayerFacts, TableError, TocPlace, chunked, estargz};

use super::{ClaimedIndex, NO_ROOM, Search, table_image};
use crate::error::FetchError;
use crate::manifest::LayerDescriptor;
use crate::trust::{Origin, OriginKind, Trust};

/// Bytes from the end of an eStargz layer that are asked for at first: mostly they hold its whole table.
const TAIL: u64 = 192 << 10;

/// Takes the tables that lie inside of missing layers and whose digest the image's manifest says.
pub(super) async fn take(search: &Search<'_>) {
    let missing = search.missing();
    join_all(missing.iter().map(|layer| take_one(search, layer))).await;
}

async fn take_one(search: &Search<'_>, layer: &LayerDescriptor) {
    let annotation = |key: &str| layer.annotations.get(key).map(String::as_str);
    // What a layer's annotations say is told by name: one may be both, and zstd:chunked says more.
    let (kind, found) = match chunked::locate(annotation, layer.size) {
        Ok(Some(place)) => (OriginKind::ZstdChunked, from_place(search, layer, place, None).await),
        Ok(None) => match estargz::toc_digest(annotation) {
            Ok(Some(digest)) => (OriginKind::Estargz, from_tail(search, layer, digest).await),
            Ok(None) => return,
            Err(error) => (OriginKind::Estargz, Err(error.to_string())),
        },
        Err(error) => (OriginKind::ZstdChunked, Err(error.to_string())),
    };
    match found {
        Ok(bytes) => {
            let origin = Origin { kind, artifact: None, trust: Trust::Bound };
            search.keep(layer.diff_id, ClaimedIndex { bytes, origin });
        }
        Err(reason) => {
            let (layer, image) = (layer.digest, search.image.reference.familiar());
            search.warn(format!("the {kind} of layer {layer} of {image} cannot be used: {reason}"));
        }
    }
}

/// An eStargz layer: its last bytes say where the table is.
async fn from_tail(search: &Search<'_>, layer: &LayerDescriptor, digest: Digest) -> Result<Vec<u8>, String> {
    let start = layer.size.saturating_sub(TAIL).min(estargz::tail_range(layer.size).start);
    let tail = fetch(search, layer, start..layer.size).await?;
    let say = |e: TableError| e.to_string();
    let place = match estargz::locate(&tail, layer.size, Some(digest)).map_err(say)? {
        Some(place) => Some(place),
        // eStargz's tools also write zstd.
        None => chunked::locate_tail(&tail, layer.size, Some(digest)).map_err(say)?,
    };
    let place = place.ok_or("the layer does not end with a footer that says where it is")?;
    from_place(search, layer, place, Some((start, tail))).await
}

/// The index from a table that is found; `held` are bytes of the blob that are here already, and their place.
async fn from_place(
    search: &Search<'_>,
    layer: &LayerDescriptor,
    place: TocPlace,
    held: Option<(u64, Bytes)>,
) -> Result<Vec<u8>, String> {
    if !place.bound() {
        return Err("the image's manifest does not say its digest".to_owned());
    }
    if !search.reserve(place.max_len()) {
        return Err(NO_ROOM.to_owned());
    }
    let packed = match place.range() {
        None => table_image::fetch(search, layer, place.max_len()).await?,
        Some(range) => match held.and_then(|(start, tail)| part(&tail, start, &range)) {
            Some(part) => part,
            None => fetch(search, layer, range).await?,
        },
    };
    let layer = layer.clone();
    let make = move || {
        // A table says nothing of the blob's compression, but it is compressed as the blob is.
        let facts = facts_of(&layer, Compression::detect(&packed));
        place.index(&packed, &facts).map(|table| table.index).map_err(|e| e.to_string())
    };
    search.make(make).await?
}

/// Bytes `range` of a blob out of `bytes`, which start at `start` of it.
fn part(bytes: &Bytes, start: u64, range: &Range<u64>) -> Option<Bytes> {
    let from = usize::try_from(range.start.checked_sub(start)?).ok()?;
    let to = usize::try_from(range.end.checked_sub(start)?).ok()?;
    (from <= to && to <= bytes.len()).then(|| bytes.slice(from..to))
}

async fn fetch(search: &Search<'_>, layer: &LayerDescriptor, range: Range<u64>) -> Result<Bytes, String> {
    let _turn = search.gate.acquire().await;
    let blobs = search.client.blobs(&search.image.reference);
    blobs.range(layer.digest, range).await.map_err(|e: FetchError| e.to_string())
}

/// Turns a SOCI zTOC into an index.
pub(super) fn ztoc(bytes: &[u8], layer: &LayerDescriptor) -> Result<Vec<u8>, String> {
    let compression = match layer.media_type.as_str() {
        kind if kind.ends_with("zstd") => Compression::Zstd,
        kind if kind.ends_with("gzip") => Compression::Gzip,
        "" => Compression::Gzip,
        _ => Compression::None,
    };
    let index = lazyrun_index::soci::ztoc_to_index(bytes, &facts_of(layer, compression));
    index.map_err(|e| e.to_string())
}

fn facts_of(layer: &LayerDescriptor, compression: Compression) -> LayerFacts {
    LayerFacts { blob_digest: layer.digest, blob_size: layer.size, diff_id: layer.diff_id, compression }
}
