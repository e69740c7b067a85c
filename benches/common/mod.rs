//! What the benches of layers share: where layers come from, and the peak memory of a process.

#![allow(dead_code, reason = "each bench uses a part")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lazyrun::bench::report::megabytes;
use lazyrun::demo::image::{self, HostImageOptions, TAG};
use serde_json::Value;

/// An OCI layout and a tag in it.
pub(crate) struct LocalImage {
    pub(crate) layout: PathBuf,
    pub(crate) tag: String,
}

impl LocalImage {
    /// `DIR[:TAG]`, or an image of this machine's own files, made once and kept in cargo's directory.
    pub(crate) fn find(layout: Option<&str>) -> LocalImage {
        if let Some(layout) = layout {
            let (dir, tag) = layout.rsplit_once(':').unwrap_or((layout, TAG));
            return LocalImage { layout: dir.into(), tag: tag.into() };
        }
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-image");
        let image = image::build(&cache, &HostImageOptions::default()).expect("make an image");
        LocalImage { layout: image.layout, tag: TAG.into() }
    }

    /// The layers' blobs, bottom first.
    pub(crate) fn blobs(&self) -> Vec<PathBuf> {
        let index = self.json(&self.layout.join("index.json"));
        let named = |manifest: &&Value| {
            manifest["annotations"]["org.opencontainers.image.ref.name"] == self.tag.as_str()
        };
        let manifests = index["manifests"].as_array().expect("a list of manifests");
        let found =
            manifests.iter().find(named).unwrap_or_else(|| panic!("no tag {} in the layout", self.tag));
        let manifest = self.json(&self.blob(found));
        let blobs: Vec<PathBuf> =
            manifest["layers"].as_array().expect("a list of layers").iter().map(|l| self.blob(l)).collect();
        let bytes: u64 = blobs.iter().map(|blob| size(blob)).sum();
        eprintln!("{} layers, {} compressed", blobs.len(), megabytes(bytes));
        blobs
    }

    fn blob(&self, descriptor: &Value) -> PathBuf {
        let digest = descriptor["digest"].as_str().expect("a digest").replace(':', "/");
        self.layout.join("blobs").join(digest)
    }

    fn json(&self, path: &Path) -> Value {
        let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&text).expect("JSON")
    }
}

/// A file's length in bytes.
pub(crate) fn size(path: &Path) -> u64 {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).len()
}

/// The most memory a process ever had resident and what it has now, in KiB.
pub(crate) fn memory(pid: &str) -> io::Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    };
    Ok((field("VmHWM:"), field("VmRSS:")))
}
