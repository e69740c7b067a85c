//! What a start touches and what of the image's blobs that is.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lazyrun::bench::instance::Instance;
use lazyrun::bench::measure::{drop_page_cache, output, timed};
use lazyrun::bench::report::megabytes;
use lazyrun_index::{EntryKind, LayerIndex};
use serde_json::Value;

use crate::touched::{PAGE, TouchedFile, touched_files};

/// What one start touches.
pub(crate) struct Start {
    pub(crate) files: usize,
    /// Bytes of the touched pages.
    pub(crate) pages: u64,
    /// Their share of the compressed bytes of their spans: what a perfect index would have fetched.
    pub(crate) compressed: f64,
    /// Compressed bytes of all spans that hold a touched page.
    pub(crate) spans: u64,
    /// Compressed bytes of the image.
    pub(crate) blobs: u64,
}

impl fmt::Display for Start {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "the start touches {} of pages in {} files, {} compressed; their spans are {} of the image's {}",
            megabytes(self.pages),
            self.files,
            megabytes(self.compressed as u64),
            megabytes(self.spans),
            megabytes(self.blobs)
        )
    }
}

/// The same start by two indexes.
pub(crate) struct Starts {
    /// One that knows nothing of it.
    pub(crate) plain: Start,
    /// One whose spans follow its profile.
    pub(crate) along: Start,
}

/// Starts the image on a complete instance, without readahead, and sees what it touched.
pub(crate) fn measure(exe: &Path, image: &str, args: &[String]) -> Starts {
    let instance = Instance::fresh(exe, None, &[]).expect("an instance");
    instance.run(["index", "build", image]).expect("index the image");
    let dir = tempfile::tempdir().expect("a mount point");
    let mut mount = instance.command(["mount", "--union", "erofs", image]);
    timed(mount.arg(dir.path())).expect("mount the image");
    let bdi = backing_device(dir.path()).expect("the view's backing device");
    fs::write(bdi.join("read_ahead_kb"), "0").expect("turn readahead off");
    drop_page_cache().expect("root may empty the page cache");
    // Containers of one image share the view, and so its page cache.
    let mut run = instance.command(["run", "--rm", "--network", "none", "--union", "erofs", image]);
    timed(run.args(args)).expect("a start");
    let touched = touched_files(dir.path()).expect("see what was touched");
    let plain = account(&touched, &layers(&instance, image));
    timed(instance.command(["umount"]).arg(dir.path())).expect("unmount the image");
    timed(instance.command(["profile", "build", image]).args(args)).expect("record a start");
    instance.run(["index", "build", "--profile", image]).expect("build the index along the profile");
    Starts { plain, along: account(&touched, &layers(&instance, image)) }
}

/// The directory of the backing device of a mount that is no block device's.
fn backing_device(mount: &Path) -> io::Result<PathBuf> {
    let dev = fs::metadata(mount)?.dev();
    let number = format!("{}:{}", libc::major(dev), libc::minor(dev));
    // EROFS on a file names its device `erofs-N` and not by the number of the filesystem, so the newest is ours.
    let numbered = Path::new("/sys/class/bdi").join(number);
    if numbered.exists() {
        return Ok(numbered);
    }
    let mut newest: Option<(u64, PathBuf)> = None;
    for entry in fs::read_dir("/sys/class/bdi")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(n) = name.to_str().and_then(|n| n.strip_prefix("erofs-")?.parse().ok()) else { continue };
        if newest.as_ref().is_none_or(|(best, _)| n > *best) {
            newest = Some((n, entry.path()));
        }
    }
    newest.map(|(_, path)| path).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The indexes of the image's layers, top first.
fn layers(instance: &Instance, image: &str) -> Vec<LayerIndex> {
    let told = output(&mut instance.command(["inspect", image])).expect("inspect the image");
    let told: Value = serde_json::from_slice(&told).expect("JSON");
    let diff_ids = told.pointer("/0/Config/rootfs/diff_ids").and_then(Value::as_array);
    let diff_ids = diff_ids.expect("a list of layers");
    let mut found: Vec<LayerIndex> = diff_ids
        .iter()
        .map(|id| {
            let hex = id.as_str().and_then(|id| id.strip_prefix("sha256:")).expect("a diffID");
            let path = instance.root().join("root/layers").join(hex).join("index");
            LayerIndex::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        })
        .collect();
    found.reverse();
    found
}

fn account(touched: &[TouchedFile], layers: &[LayerIndex]) -> Start {
    let mut entries: HashMap<&[u8], (usize, usize)> = HashMap::new();
    for (number, layer) in layers.iter().enumerate() {
        for (i, entry) in layer.entries().enumerate() {
            entries.entry(entry.path()).or_insert((number, i));
        }
    }
    let mut start = Start { files: touched.len(), pages: 0, compressed: 0.0, spans: 0, blobs: 0 };
    start.blobs = layers.iter().map(LayerIndex::blob_size).sum();
    let mut spans = HashSet::new();
    for file in touched {
        let Some((number, extents)) = extents(layers, &entries, &file.path) else { continue };
        let layer = &layers[number];
        for page in &file.pages {
            let (from, to) = (page * PAGE, (page + 1) * PAGE);
            for extent in &extents {
                let (from, to) = (from.max(extent.file_offset), to.min(extent.file_offset + extent.len));
                if from >= to {
                    continue;
                }
                start.pages += to - from;
                let place = extent.layer_offset + (from - extent.file_offset);
                let covering = layer.spans_covering(place, to - from);
                let span = layer.span(covering.start);
                start.compressed += (to - from) as f64 * span.blob_len as f64 / span.len as f64;
                spans.extend(covering.map(|span| (number, span)));
            }
        }
    }
    start.spans = spans.iter().map(|&(number, span)| layers[number].span(span).blob_len).sum();
    start
}

/// The layer that shows a file, and where the file's bytes are in it. Hard links share them.
fn extents<'a>(
    layers: &'a [LayerIndex],
    entries: &HashMap<&'a [u8], (usize, usize)>,
    path: &[u8],
) -> Option<(usize, Vec<lazyrun_index::Extent>)> {
    let mut at = *entries.get(path)?;
    for _ in 0..2 {
        let entry = layers[at.0].entry(at.1);
        match entry.kind() {
            EntryKind::File => return Some((at.0, entry.extents().collect())),
            EntryKind::Hardlink => at = *entries.get(entry.link())?,
            _ => return None,
        }
    }
    None
}
