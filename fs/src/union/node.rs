//! Files of the union that the kernel knows, and where their real files are.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use nix::sys::stat::FileStat;

use super::redirect::{Redirect, open_path};
use super::sys::{Dir, Real, Result};

/// Number of the upper layer, if there is one.
pub(super) const UPPER: usize = 0;

/// A real file's device and inode number.
pub(super) type Key = (u64, u64);

pub(super) fn key_of(st: &FileStat) -> Key {
    (st.st_dev, st.st_ino)
}

/// A directory of one layer that is part of a merged directory.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) layer: usize,
    /// Opened at first use, and closed again when there are too many.
    pub(super) fd: Option<Dir>,
    /// Regular files in it may be whiteouts by attribute (`overlay.opaque` is `x`).
    pub(super) xwhiteouts: bool,
    /// Its path from the layer's root, where it is not in the parent's part under the directory's name.
    pub(super) at: Option<Vec<CString>>,
}

/// A file of the union. The lock order is: a node before its parent, and never two that are not so related,
/// except under the tree lock held for writing.
#[derive(Debug)]
pub struct Node {
    /// The number that the kernel calls it by.
    pub(super) id: u64,
    /// The number that it is told to have.
    ino: AtomicU64,
    /// Type bits of the mode; they never change.
    pub(super) kind: u32,
    /// Held for reading while a system call uses the name, for writing while the name changes.
    state: RwLock<State>,
    /// Held while the real file is replaced or removed: copy-up, unlink, rename.
    changing: Mutex<()>,
}

/// Where the real file is.
#[derive(Debug)]
pub(super) struct State {
    /// The directory that the name is in; none for the root.
    pub(super) parent: Option<Arc<Node>>,
    pub(super) name: CString,
    /// Layer of what is no directory.
    pub(super) layer: usize,
    /// Directories that a directory is merged of, top first; empty for what is none.
    pub(super) parts: Vec<Part>,
    /// What the upper directory says of where the lower ones are.
    pub(super) redirect: Option<Redirect>,
    /// The real file that attributes come from.
    pub(super) key: Key,
    /// The file itself, when it has no name any more.
    pub(super) held: Option<Arc<OwnedFd>>,
    /// It was unlinked: nothing can be made in it and no name of it copied up.
    pub(super) gone: bool,
    /// Whether new files inherit an ACL from this directory, when known.
    pub(super) default_acl: Option<bool>,
}

impl Node {
    pub(super) fn new(id: u64, ino: u64, kind: u32, state: State) -> Self {
        Node { id, ino: AtomicU64::new(ino), kind, state: RwLock::new(state), changing: Mutex::new(()) }
    }

    /// Number of the node in requests of the kernel.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn ino(&self) -> u64 {
        self.ino.load(Ordering::Relaxed)
    }

    /// It is another file now than the one whose number it had.
    pub(super) fn set_ino(&self, ino: u64) {
        self.ino.store(ino, Ordering::Relaxed);
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn parent(&self) -> Option<Arc<Node>> {
        self.read().parent.clone()
    }

    /// Whether all that is changed of it is changed in the upper layer already.
    pub(super) fn is_upper(&self) -> bool {
        self.read().top() == UPPER
    }

    /// The open directory of its part number `i`, and the layer that is in.
    pub(super) fn part(&self, i: usize) -> Result<(Dir, usize)> {
        let (layer, parent, name, at) = {
            let state = self.read();
            let part = state.parts.get(i).ok_or(Errno::ENOENT)?;
            if let Some(fd) = &part.fd {
                return Ok((Arc::clone(fd), part.layer));
            }
            (part.layer, state.parent.clone().ok_or(Errno::ENOENT)?, state.name.clone(), part.at.clone())
        };
        let fd = match at {
            Some(path) => open_path(&root_of(parent).layer_dir(layer)?, &path)?,
            None => super::sys::open_dir(&*parent.layer_dir(layer)?, &name)?,
        };
        if let Some(part) = self.write().parts.iter_mut().find(|p| p.layer == layer) {
            part.fd = Some(Arc::clone(&fd));
        }
        Ok((fd, layer))
    }

    /// The open directory of its part in `layer`.
    pub(super) fn layer_dir(&self, layer: usize) -> Result<Dir> {
        let i = self.read().parts.iter().position(|p| p.layer == layer).ok_or(Errno::ENOENT)?;
        Ok(self.part(i)?.0)
    }

    /// The upper part, in which names can be made.
    pub(super) fn upper_dir(&self) -> Result<Dir> {
        self.layer_dir(UPPER)
    }

    /// This is a name of the file: its name, if it has none.
    pub(super) fn named(&self, parent: &Arc<Node>, name: &CStr, layer: usize) {
        let mut state = self.write();
        if state.held.is_some() {
            state.parent = Some(Arc::clone(parent));
            state.name = name.to_owned();
            state.layer = layer;
            state.held = None;
            state.gone = false;
        }
    }

    /// Calls `f` with the real file that attributes come from, which keeps its name meanwhile.
    pub(super) fn with<T>(&self, f: impl FnOnce(&Real) -> Result<T>) -> Result<T> {
        if self.is_dir() {
            return f(&Real::Held(self.part(0)?.0));
        }
        let state = self.read();
        f(&state.real()?)
    }
}

fn root_of(mut node: Arc<Node>) -> Arc<Node> {
    while let Some(parent) = node.parent() {
        node = parent;
    }
    node
}

impl State {
    /// Of a file of a layer that has no name, or is the root.
    pub(super) fn new(layer: usize, key: Key) -> Self {
        State {
            parent: None,
            name: CString::default(),
            layer,
            parts: Vec::new(),
            redirect: None,
            key,
            held: None,
            gone: false,
            default_acl: None,
        }
    }

    /// The topmost layer that the file is in.
    pub(super) fn top(&self) -> usize {
        self.parts.first().map_or(self.layer, |p| p.layer)
    }

    /// The real file of what is no directory.
    pub(super) fn real(&self) -> Result<Real> {
        if let Some(held) = &self.held {
            return Ok(Real::Held(Arc::clone(held)));
        }
        let parent = self.parent.as_ref().ok_or(Errno::ENOENT)?;
        Ok(Real::Named(parent.layer_dir(self.layer)?, self.name.clone()))
    }

    /// Whether this is where the node's name is.
    pub(super) fn is_at(&self, parent: &Arc<Node>, name: &CStr) -> bool {
        self.held.is_none()
            && self.name.as_c_str() == name
            && self.parent.as_ref().is_some_and(|p| Arc::ptr_eq(p, parent))
    }
}
