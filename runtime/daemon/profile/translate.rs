//! A profile of one image in the terms of another: of the next tag of a repository, say.
//!
//! A touch of a file's bytes is a touch of the same bytes in the file that has the same content, wherever that lies in
//! the other image, or else in the file of the same path. Layers that both have need no translation.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use lazyrun_fetcher::Layer;
use lazyrun_index::{Digest, EntryKind, EntryRef, Extent};

use super::{PAGE, Profile, Touch};

/// Translates a profile of the layers `from` into one of the layers `to` (both bottom first); `None` when nothing of it
/// is left.
pub fn translate(profile: &Profile, from: &[Arc<Layer>], to: &[Arc<Layer>]) -> Option<Profile> {
    let targets = Targets::of(to);
    let mut sources: Vec<Option<Sources<'_>>> = from.iter().map(|_| None).collect();
    let mut touches = Vec::new();
    for touch in profile.touches() {
        let Some(layer) = from.get(usize::from(touch.layer)) else { continue };
        if let Some(same) = to.iter().position(|l| l.id() == layer.id()) {
            touches.extend(u16::try_from(same).map(|layer| Touch { layer, ..*touch }));
            continue;
        }
        let source = sources[usize::from(touch.layer)].get_or_insert_with(|| Sources::of(layer));
        source.translate(touch, &targets, &mut touches);
    }
    let layers = to.iter().map(|l| l.id()).collect();
    (!touches.is_empty()).then(|| Profile::new(layers, touches))
}

/// The files of a layer by where their bytes lie.
pub struct Sources<'a> {
    /// Ascending by the extent's place in the layer file.
    extents: Vec<(Extent, EntryRef<'a>)>,
}

impl<'a> Sources<'a> {
    /// Those of a layer.
    pub fn of(layer: &'a Layer) -> Self {
        let files = layer.index().entries().filter(|e| e.kind() == EntryKind::File);
        let mut extents: Vec<_> = files.flat_map(|e| e.extents().map(move |extent| (extent, e))).collect();
        extents.sort_unstable_by_key(|(extent, _)| extent.layer_offset);
        Self { extents }
    }

    /// The files that have any of these bytes of the layer file.
    fn within(&self, bytes: Range<u64>) -> impl Iterator<Item = &(Extent, EntryRef<'a>)> {
        let first =
            self.extents.partition_point(|(e, _)| e.layer_offset.saturating_add(e.len) <= bytes.start);
        self.extents.iter().skip(first).take_while(move |(e, _)| e.layer_offset < bytes.end)
    }

    /// Paths of the files that have any of these bytes, one for each extent.
    pub fn files_at(&self, bytes: Range<u64>) -> impl Iterator<Item = &'a [u8]> {
        self.within(bytes).map(|(_, entry)| entry.path())
    }

    /// Path and length of the first file that has any of these bytes.
    pub(super) fn file_at(&self, bytes: Range<u64>) -> Option<(&'a [u8], u64)> {
        self.within(bytes).next().map(|(_, entry)| (entry.path(), entry.size()))
    }

    fn translate(&self, touch: &Touch, targets: &Targets<'_>, touches: &mut Vec<Touch>) {
        let bytes = touch.bytes();
        for (extent, entry) in self.within(bytes.clone()) {
            let start = bytes.start.max(extent.layer_offset) - extent.layer_offset + extent.file_offset;
            let end =
                bytes.end.min(extent.layer_offset + extent.len) - extent.layer_offset + extent.file_offset;
            let Some((layer, target)) = targets.find(entry) else { continue };
            touches.extend(target.extents().filter_map(|e| touch_in(layer, &e, start, end, touch.at_ms)));
        }
    }
}

/// The pages of the layer file that hold the bytes `start..end` of a file, as far as they are in one extent.
pub(in crate::daemon) fn touch_in(
    layer: u16,
    extent: &Extent,
    start: u64,
    end: u64,
    at_ms: u32,
) -> Option<Touch> {
    let (start, end) =
        (start.max(extent.file_offset), end.min(extent.file_offset.saturating_add(extent.len)));
    if start >= end {
        return None;
    }
    let (from, to) = (
        extent.layer_offset + (start - extent.file_offset),
        extent.layer_offset + (end - extent.file_offset),
    );
    let page = u32::try_from(from / PAGE).ok()?;
    let pages = u32::try_from(to.div_ceil(PAGE) - from / PAGE).ok()?;
    Some(Touch { layer, page, pages, at_ms })
}

/// The files of an image by content and by path.
struct Targets<'a> {
    by_content: HashMap<Digest, (u16, EntryRef<'a>)>,
    by_path: HashMap<&'a [u8], (u16, EntryRef<'a>)>,
}

impl<'a> Targets<'a> {
    fn of(layers: &'a [Arc<Layer>]) -> Self {
        let (mut by_content, mut by_path) = (HashMap::new(), HashMap::new());
        for (number, layer) in layers.iter().enumerate() {
            let Ok(number) = u16::try_from(number) else { break };
            for entry in layer.index().entries().filter(|e| e.kind() == EntryKind::File) {
                // The upper layer wins, as in the view.
                by_path.insert(entry.path(), (number, entry));
                if let Some(content) = entry.content() {
                    by_content.insert(content, (number, entry));
                }
            }
        }
        Self { by_content, by_path }
    }

    fn find(&self, entry: &EntryRef<'_>) -> Option<(u16, EntryRef<'a>)> {
        let same = entry.content().and_then(|content| self.by_content.get(&content));
        same.or_else(|| self.by_path.get(entry.path())).copied()
    }
}
