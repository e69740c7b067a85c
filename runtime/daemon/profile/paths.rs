//! Which files a profile is about.

use std::collections::HashMap;
use std::sync::Arc;

use lazyrun_fetcher::Layer;

use super::translate::Sources;
use super::{PAGE, PathTouches, Profile, Touch};

/// The files that a profile of these layers (bottom first) touches, in order of first touch.
pub fn paths_of(profile: &Profile, layers: &[Arc<Layer>]) -> Vec<PathTouches> {
    let mut sources: HashMap<u16, Sources<'_>> = HashMap::new();
    let mut places: HashMap<(u16, Vec<u8>), usize> = HashMap::new();
    let mut paths: Vec<PathTouches> = Vec::new();
    for touch in profile.touches() {
        let Some(layer) = layers.get(usize::from(touch.layer)) else { continue };
        let source = sources.entry(touch.layer).or_insert_with(|| Sources::of(layer));
        // Page by page: one read may reach over several files.
        for page in touch.page..touch.page.saturating_add(touch.pages) {
            let one = Touch { page, pages: 1, ..*touch };
            let (path, size) = source.file_at(one.bytes()).unwrap_or((b"-", 0));
            let place = *places.entry((touch.layer, path.to_vec())).or_insert_with(|| {
                let path = String::from_utf8_lossy(path).into_owned();
                let (layer, at_ms) = (touch.layer, touch.at_ms);
                paths.push(PathTouches { path, layer, at_ms, touched: 0, size, local: 0 });
                paths.len() - 1
            });
            let Some(entry) = paths.get_mut(place) else { continue };
            entry.touched += PAGE;
            entry.local += if is_local(layer, &one) { PAGE } else { 0 };
        }
    }
    paths
}

fn is_local(layer: &Layer, page: &Touch) -> bool {
    let bytes = page.bytes();
    layer.index().spans_covering(bytes.start, PAGE).all(|span| layer.has_span(span))
}
