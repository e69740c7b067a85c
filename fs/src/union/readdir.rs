//! Listing merged directories.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::dir::{Dir as ReadDir, Type};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use super::Union;
use super::lookup::{Attr, Found};
use super::node::{Node, UPPER};
use super::sys::{Dir, Result, is_whiteout, stat_at};
use super::table::MADE_UP;

/// A name in a listing.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The name.
    pub name: CString,
    /// Inode number.
    pub ino: u64,
    /// Type bits of the mode; 0 if unknown.
    pub kind: u32,
    /// Number of the directory's part that shows the name.
    part: usize,
}

/// A directory being read. The listing is made when reading starts, and again when it is rewound, so a name that
/// is there all the time is told exactly once whatever happens meanwhile.
#[derive(Debug)]
pub struct OpenDir {
    /// The directory.
    pub node: Arc<Node>,
    list: Mutex<Option<Arc<Vec<DirEntry>>>>,
}

impl OpenDir {
    /// The listing to read from `offset` on, `.` and `..` first; offset 0 makes a new one.
    pub fn entries(&self, union: &Union, offset: u64) -> Result<Arc<Vec<DirEntry>>> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        match &*list {
            Some(list) if offset > 0 => Ok(Arc::clone(list)),
            _ => {
                let new = Arc::new(union.list(&self.node)?);
                *list = Some(Arc::clone(&new));
                Ok(new)
            }
        }
    }
}

impl Union {
    /// Starts to read a directory.
    pub fn open_dir(&self, node: Arc<Node>) -> OpenDir {
        OpenDir { node, list: Mutex::new(None) }
    }

    /// Looks up what an entry of a listing is; as [`lookup`](Union::lookup).
    pub fn lookup_entry(&self, dir: &Arc<Node>, entry: &DirEntry) -> Result<Option<(Arc<Node>, Attr)>> {
        let found = self.find_from(dir, &entry.name, entry.part)?;
        Ok(self.enter(dir, &entry.name, found))
    }

    /// Makes what a directory holds durable.
    pub fn sync_dir(&self, node: &Node) -> Result<()> {
        if !self.is_writable() || !node.is_upper() || self.config.volatile {
            return Ok(());
        }
        nix::unistd::fsync(&open_list(&self.part(node, 0)?.0)?)
    }

    /// All names of a directory, `.` and `..` first.
    fn list(&self, node: &Arc<Node>) -> Result<Vec<DirEntry>> {
        let dot = |name: &CStr, ino| DirEntry { name: name.into(), ino, kind: libc::S_IFDIR, part: 0 };
        let up = node.parent().map_or(node.ino(), |p| p.ino());
        let mut list = vec![dot(c".", node.ino()), dot(c"..", up)];
        if node.read().gone {
            return Ok(list);
        }
        let count = node.read().parts.len();
        let upper = self.is_writable() && node.is_upper();
        let mut seen: HashMap<CString, Option<usize>> = HashMap::new();
        for i in 0..count {
            let (dir, layer) = self.part(node, i)?;
            let device = fstat(&*dir)?.st_dev;
            let impure = upper && layer == UPPER && self.is_impure(&dir);
            self.each(node, i, &dir, |name, kind, ino, whiteout| {
                if let Some(above) = seen.get(name) {
                    // Copied up: the number is that of the lower file, which a look up knows.
                    if let Some(at) = above.filter(|at| upper && list[*at].part == 0) {
                        list[at].ino = 0;
                    }
                    return true;
                }
                let at = if whiteout { None } else { Some(list.len()) };
                if i + 1 < count {
                    seen.insert(name.to_owned(), at);
                }
                if !whiteout {
                    let ino = if impure && kind == libc::S_IFDIR {
                        0
                    } else if upper && layer == UPPER {
                        let known = self.table.lock().copied((device, ino)).filter(|id| *id < MADE_UP);
                        known.unwrap_or_else(|| self.number((device, ino)))
                    } else {
                        self.number((device, ino))
                    };
                    list.push(DirEntry { name: name.to_owned(), ino, kind, part: i });
                }
                true
            })?;
        }
        for entry in list.iter_mut().skip(2).filter(|entry| entry.ino == 0) {
            entry.ino = self.number_of(node, &entry.name)?;
        }
        Ok(list)
    }

    /// The inode number that a look up of a name gives.
    fn number_of(&self, node: &Arc<Node>, name: &CStr) -> Result<u64> {
        Ok(match self.find(node, name)? {
            Found::Directory(dir) => self.number(dir.number),
            found => match self.enter(node, name, found) {
                Some((child, _)) => {
                    self.forget([(child.id, 1)]);
                    child.ino()
                }
                None => 1,
            },
        })
    }

    /// Whether nothing is to be seen in a directory.
    pub(super) fn is_empty(&self, node: &Node) -> Result<bool> {
        let count = node.read().parts.len();
        let mut hidden = std::collections::HashSet::new();
        for i in 0..count {
            let (dir, _) = self.part(node, i)?;
            let mut visible = false;
            self.each(node, i, &dir, |name, _, _, whiteout| {
                if hidden.contains(name) {
                    return true;
                }
                visible = !whiteout;
                if whiteout {
                    hidden.insert(name.to_owned());
                }
                whiteout
            })?;
            if visible {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Calls `f` with name, type bits, inode number and whether it is a whiteout, of all in one part, until it
    /// returns false.
    fn each(
        &self,
        node: &Node,
        i: usize,
        dir: &Dir,
        mut f: impl FnMut(&CStr, u32, u64, bool) -> bool,
    ) -> Result<()> {
        let xwhiteouts = node.read().parts.get(i).is_some_and(|p| p.xwhiteouts);
        let mut real = ReadDir::from_fd(open_list(dir)?)?;
        for entry in real.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let mut kind = entry.file_type().map_or(0, kind_bits);
            let mut whiteout = false;
            if kind == 0 || kind == libc::S_IFCHR || (xwhiteouts && kind == libc::S_IFREG) {
                let Some(stat) = stat_at(dir, name)? else { continue };
                kind = stat.st_mode & libc::S_IFMT;
                whiteout = is_whiteout(&stat) || self.is_xwhiteout(node, i, dir, name, &stat);
            }
            if !f(name, kind, entry.ino(), whiteout) {
                break;
            }
        }
        Ok(())
    }
}

fn open_list(dir: &OwnedFd) -> Result<OwnedFd> {
    openat(dir, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

fn kind_bits(kind: Type) -> u32 {
    match kind {
        Type::Fifo => libc::S_IFIFO,
        Type::CharacterDevice => libc::S_IFCHR,
        Type::Directory => libc::S_IFDIR,
        Type::BlockDevice => libc::S_IFBLK,
        Type::File => libc::S_IFREG,
        Type::Symlink => libc::S_IFLNK,
        Type::Socket => libc::S_IFSOCK,
    }
}
