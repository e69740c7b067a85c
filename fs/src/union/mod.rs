//! The writable union in userspace: what overlayfs does, without the kernel's. No word of FUSE here; the
//! adapter is [`crate::fuse::unionfs`].
//!
//! Layers are plain directories, the upper one in the format of Linux's overlayfs (`upper` and `work` can go back
//! and forth between both). Semantics are those of overlayfs with `index=off,metacopy=off`: names of a hard link group
//! part when one of them is copied up, mode and owner changes copy the data up. Unless `redirect_dir=on`, directories
//! that a lower layer has can't be renamed (`EXDEV`).
//!
//! Nothing locks the whole union while a file's data is read, written or copied up.

mod config;
mod copyup;
mod create;
mod data;
mod file;
mod flags;
mod handles;
mod lookup;
mod node;
mod readdir;
mod redirect;
mod remove;
mod rename;
mod setattr;
mod sys;
mod table;
mod whiteout;
mod xattr;

pub use config::{OptionError, UnionConfig, UnionError};
pub use create::{Caller, New};
pub use file::OpenFile;
pub use flags::EXTENDED_FLAGS;
pub use handles::Handles;
pub use lookup::Attr;
pub use node::Node;
pub use readdir::{DirEntry, OpenDir};
pub use redirect::RedirectDir;
pub use setattr::{SetAttr, SetTime};
pub use sys::Result;

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::Flock;
use nix::sys::statvfs::{Statvfs, fstatvfs};

use node::UPPER;
use sys::Dir;
use table::Table;

/// Number of the root directory.
pub const ROOT: u64 = 1;

/// A union of directories.
#[derive(Debug)]
pub struct Union {
    /// Top first. If the union is writable the first one is the upper.
    layers: Vec<Dir>,
    /// `work/work`, where files are made before they appear.
    work: Option<Dir>,
    /// Keeps other unions off the work directory.
    #[expect(dead_code, reason = "held until the union is dropped")]
    lock: Option<Flock<File>>,
    config: UnionConfig,
    /// Namespace of overlayfs's own attributes: `trusted.overlay.` or `user.overlay.`.
    prefix: &'static str,
    opaque: &'static CStr,
    table: Table,
    /// Held for writing while a directory moves, for reading while directories are opened by name.
    tree: RwLock<()>,
    /// Devices of the layers, in order of first appearance; inode numbers of the first are kept.
    devices: RwLock<Vec<u64>>,
    /// Devices of layers whose files have no inode flags.
    without_flags: Mutex<Vec<u64>>,
    temp: AtomicU64,
    /// About how many directories are held open.
    open_dirs: AtomicUsize,
    /// Who we are: files of that owner need no chown.
    own: (u32, u32),
    max_dirs: usize,
}

impl Union {
    /// Whether anything can be changed.
    pub fn is_writable(&self) -> bool {
        self.work.is_some()
    }

    /// The options that the union was made with.
    pub fn config(&self) -> &UnionConfig {
        &self.config
    }

    /// A node that the kernel knows.
    pub fn node(&self, id: u64) -> Result<Arc<Node>> {
        self.table.lock().get(id).cloned().ok_or(Errno::ESTALE)
    }

    /// Number of nodes in memory.
    pub fn known(&self) -> usize {
        self.table.lock().len()
    }

    /// The kernel gives back `count` references to each of these nodes.
    pub fn forget(&self, nodes: impl IntoIterator<Item = (u64, u64)>) {
        let mut table = self.table.lock();
        for (id, count) in nodes {
            if id != ROOT {
                table.forget(id, count);
            }
        }
    }

    /// The numbers of the filesystem that takes what is written (or of the topmost layer).
    pub fn statfs(&self) -> Result<Statvfs> {
        fstatvfs(&*self.layers[UPPER])
    }

    fn work(&self) -> Result<&OwnedFd> {
        self.work.as_deref().ok_or(Errno::EROFS)
    }

    /// Closes directories when too many are open; they are opened again by name when needed.
    fn trim_open_dirs(&self) {
        if self.open_dirs.fetch_add(1, Ordering::Relaxed) < self.max_dirs {
            return;
        }
        let _tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        for node in self.table.lock().all().filter(|n| n.is_dir()) {
            let mut state = node.write();
            if state.parent.is_some() && !state.gone {
                state.parts.iter_mut().for_each(|p| p.fd = None);
            }
        }
        self.open_dirs.store(0, Ordering::Relaxed);
    }
}
