//! Where an instance keeps its things: one root directory, one run directory derived from it.

use std::io;
use std::path::{Path, PathBuf};

use lazyrun_index::Digest;

use crate::rootless;

/// The default root directory of an instance that root runs.
pub const DEFAULT_ROOT: &str = "/var/lib/lazyrun";

/// The directories and sockets of one instance.
///
/// Everything durable lies under the root. Sockets lie in a run directory whose name is a short hash of
/// the root, because a socket's path is limited to 108 bytes and a root may be deeper than that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
    run: PathBuf,
}

impl Paths {
    /// The paths of the instance at `root`, which need not exist yet.
    ///
    /// # Errors
    /// When the root's parent can't be resolved or the current directory is gone.
    pub fn new(root: &Path) -> io::Result<Self> {
        let absolute = std::path::absolute(root)?;
        // The nearest directory that exists is resolved, so that two spellings of one root are one instance.
        let root = resolve_existing(&absolute);
        let hash = Digest::of(root.as_os_str().as_encoded_bytes()).hex();
        Ok(Self { run: rootless::run_base().join(&hash[..8]), root })
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of sockets and locks.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The daemon's control socket.
    pub fn control(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// Held by whoever is starting the instance.
    pub fn start_lock(&self) -> PathBuf {
        self.run.join("start.lock")
    }

    /// Held by the keeper for as long as it lives.
    pub fn keeper_lock(&self) -> PathBuf {
        self.run.join("keeper.lock")
    }

    /// The daemon's log file.
    pub fn log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// Layer files and their indexes.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Metadata images of merged views.
    pub fn views(&self) -> PathBuf {
        self.root.join("views")
    }

    /// What starts of images touched.
    pub fn profiles(&self) -> PathBuf {
        self.root.join("profiles")
    }

    /// Timelines of starts.
    pub fn starts(&self) -> PathBuf {
        self.root.join("starts")
    }

    /// Manifests and configs, by digest.
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs").join("sha256")
    }

    /// One directory for each container.
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// One directory for each writable mount made by `lazyrun mount --rw`, and the records of all mounts.
    pub fn mounts(&self) -> PathBuf {
        self.root.join("mounts")
    }

    /// One directory for each snapshot of containerd's, and the database of snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// What the store of layers may take of the disk.
    pub fn cache_limits(&self) -> PathBuf {
        self.root.join("cache.json")
    }

    /// What is kept of hydration.
    pub fn hydration(&self) -> PathBuf {
        self.root.join("hydration.json")
    }

    /// The metadata database.
    pub fn meta(&self) -> PathBuf {
        self.root.join("meta.db")
    }

    /// The socket of a container's shim.
    pub fn shim_socket(&self, id: &str) -> PathBuf {
        self.run.join(format!("{}.sock", &id[..id.len().min(12)]))
    }

    /// Makes all directories; the root and the run directory only for their owner.
    ///
    /// # Errors
    /// The I/O error with the path it struck.
    pub fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let make = |path: &Path| {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|e| io::Error::new(e.kind(), format!("creating {}: {e}", path.display())))
        };
        make(&self.root)?;
        make(&self.run)?;
        self.run.parent().map_or(Ok(()), rootless::check_run_base)?;
        for dir in
            [self.layers(), self.views(), self.profiles(), self.blobs(), self.containers(), self.mounts()]
        {
            make(&dir)?;
        }
        make(&self.starts())?;
        Ok(())
    }
}

fn resolve_existing(path: &Path) -> PathBuf {
    let mut rest = Vec::new();
    let mut head = path;
    loop {
        if let Ok(real) = head.canonicalize() {
            return rest.iter().rev().fold(real, |p, c| p.join(c));
        }
        match (head.parent(), head.file_name()) {
            (Some(parent), Some(name)) => {
                rest.push(name.to_owned());
                head = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_root_keeps_socket_paths_short() {
        let deep = PathBuf::from("/tmp").join("d".repeat(200)).join("e".repeat(200));
        let paths = Paths::new(&deep).expect("paths");
        let socket = paths.shim_socket(&"a".repeat(64));
        assert!(socket.as_os_str().len() < 108 && paths.control().as_os_str().len() < 108);
    }

    #[test]
    fn two_spellings_are_one_instance() {
        let a = Paths::new(Path::new("/tmp/x-no-such")).expect("paths");
        let b = Paths::new(Path::new("/tmp/../tmp/x-no-such")).expect("paths");
        assert_eq!(a, b);
        assert_ne!(a.run(), Paths::new(Path::new("/tmp/y")).expect("paths").run());
    }
}
