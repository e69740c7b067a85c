//! What a name in a merged directory is.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::sys::stat::FileStat;

use super::node::{Key, Node, Part, State, UPPER, key_of};
use super::redirect::{Redirect, real_path};
use super::sys::{Dir, Real, Result, is_dir, is_whiteout, kind_of, stat_at};
use super::table::{MADE_UP, Nodes};
use super::{ROOT, Union};

/// Attributes as the union shows them.
#[derive(Clone, Copy, Debug)]
pub struct Attr {
    /// The number by which requests name the file.
    pub id: u64,
    /// As stat(2) is to show it: `st_ino` is stable over copy-up and unique in the union.
    pub stat: FileStat,
}

/// What the layers have under a name.
pub(super) enum Found {
    Nothing,
    File { layer: usize, stat: FileStat },
    Directory(Merging),
}

/// A directory that is being put together from the layers, top first.
pub(super) struct Merging {
    pub(super) parts: Vec<Part>,
    /// Of the topmost.
    pub(super) stat: FileStat,
    pub(super) number: Key,
    /// The upper one's mark.
    pub(super) redirect: Option<Redirect>,
}

impl Merging {
    pub(super) fn new(part: Part, stat: &FileStat) -> Self {
        Merging { parts: vec![part], stat: *stat, number: key_of(stat), redirect: None }
    }

    /// One more.
    pub(super) fn push(&mut self, writable: bool, part: Part, stat: &FileStat) {
        // A directory keeps the number of its topmost lower part, whether copied up or not.
        if self.parts.len() == 1 && self.parts[0].layer == UPPER && writable {
            self.number = key_of(stat);
        }
        self.parts.push(part);
    }
}

impl Union {
    /// Looks a name up; the kernel holds one reference more to the node that is returned.
    pub fn lookup(&self, parent: &Arc<Node>, name: &CStr) -> Result<Option<(Arc<Node>, Attr)>> {
        let found = self.find(parent, name)?;
        Ok(self.enter(parent, name, found))
    }

    /// Looks a name up in all layers that the directory is merged of.
    pub(super) fn find(&self, parent: &Arc<Node>, name: &CStr) -> Result<Found> {
        self.find_from(parent, name, 0)
    }

    /// As [`find`](Self::find), in the directory's parts from number `first` on.
    pub(super) fn find_from(&self, parent: &Arc<Node>, name: &CStr, first: usize) -> Result<Found> {
        if !parent.is_dir() {
            return Err(Errno::ENOTDIR);
        }
        let count = parent.read().parts.len();
        let mut dir: Option<Merging> = None;
        // What it is called in the layer, if a higher one says so.
        let mut renamed: Option<CString> = None;
        for i in first..count {
            let (at, layer) = self.part(parent, i)?;
            let name = renamed.as_deref().unwrap_or(name);
            let Some(stat) = stat_at(&at, name)? else { continue };
            let real = Real::named(&at, name);
            if !is_dir(&stat) {
                if dir.is_some() || is_whiteout(&stat) || self.is_xwhiteout(parent, i, &at, name, &stat) {
                    break;
                }
                self.has_contents(&real, &stat, layer)?;
                return Ok(Found::File { layer, stat });
            }
            let redirect = self.redirect_of(&real, layer)?;
            // Opaque marks of the lowest layer hide nothing.
            let opacity =
                if i + 1 < count || redirect.is_some() { self.opacity(&real) } else { Opacity::None };
            let path = renamed.is_some().then(|| self.path_in(parent, layer, name)).transpose()?;
            let part = Part { layer, fd: None, xwhiteouts: opacity == Opacity::Whiteouts, at: path };
            let merging = self.merge(&mut dir, part, &stat);
            if opacity == Opacity::Opaque {
                break;
            }
            let Some(redirect) = redirect else { continue };
            if layer == UPPER && self.is_writable() {
                merging.redirect = Some(redirect.clone());
            }
            match redirect {
                Redirect::Beside(name) => renamed = Some(name),
                Redirect::At(path) => {
                    self.merge_at(layer + 1, path, merging)?;
                    break;
                }
            }
        }
        Ok(dir.map_or(Found::Nothing, Found::Directory))
    }

    fn merge<'d>(&self, dir: &'d mut Option<Merging>, part: Part, stat: &FileStat) -> &'d mut Merging {
        match dir {
            Some(merging) => {
                merging.push(self.is_writable(), part, stat);
                merging
            }
            None => dir.insert(Merging::new(part, stat)),
        }
    }

    /// The path of a name in a directory's part.
    fn path_in(&self, parent: &Node, layer: usize, name: &CStr) -> Result<Vec<CString>> {
        let _tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let mut path = real_path(parent, layer)?;
        path.push(name.to_owned());
        Ok(path)
    }

    /// The open directory of a node's part, with the tree locked while directories are opened by name.
    pub(super) fn part(&self, node: &Node, i: usize) -> Result<(Dir, usize)> {
        if let Some(Part { fd: Some(fd), layer, .. }) = node.read().parts.get(i) {
            return Ok((Arc::clone(fd), *layer));
        }
        self.trim_open_dirs();
        let _tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        node.part(i)
    }

    pub(super) fn opacity(&self, dir: &Real) -> Opacity {
        let mut value = [0u8; 2];
        match dir.get_xattr(self.opaque, &mut value) {
            Ok(1) if value[0] == b'y' => Opacity::Opaque,
            Ok(1) if value[0] == b'x' => Opacity::Whiteouts,
            _ => Opacity::None,
        }
    }

    pub(super) fn is_xwhiteout(
        &self,
        parent: &Node,
        i: usize,
        at: &Dir,
        name: &CStr,
        stat: &FileStat,
    ) -> bool {
        if kind_of(stat) != libc::S_IFREG || stat.st_size != 0 {
            return false;
        }
        let marked = parent.read().parts.get(i).is_some_and(|p| p.xwhiteouts);
        let mark =
            if self.prefix.starts_with('u') { c"user.overlay.whiteout" } else { c"trusted.overlay.whiteout" };
        marked && Real::named(at, name).get_xattr(mark, &mut []).is_ok()
    }

    /// Whether a lower layer shows something under a name, so that removing the name needs a whiteout.
    pub(super) fn lower_has(&self, parent: &Arc<Node>, name: &CStr) -> Result<bool> {
        let first = usize::from(parent.is_upper());
        if first >= parent.read().parts.len() {
            return Ok(false);
        }
        Ok(!matches!(self.find_from(parent, name, first)?, Found::Nothing))
    }

    /// The node of what was found, with one more reference of the kernel.
    pub(super) fn enter(&self, parent: &Arc<Node>, name: &CStr, found: Found) -> Option<(Arc<Node>, Attr)> {
        let (stat, key, number) = match &found {
            Found::Nothing => return None,
            Found::File { stat, .. } => (*stat, key_of(stat), key_of(stat)),
            Found::Directory(dir) => (dir.stat, key_of(&dir.stat), dir.number),
        };
        let ino = self.number(number);
        let mut table = self.table.lock();
        let known = self.known_id(&table, parent, name, &found, key);
        // A copied-up file keeps the number of the file it was copied from.
        let ino = known.filter(|id| *id < MADE_UP).unwrap_or(ino);
        let id = known.unwrap_or(ino);
        if let Some(node) = table.get(id).cloned() {
            if same(&node, parent, name, &found, key) {
                table.again(id);
                return Some((Arc::clone(&node), self.attr_of(&node, stat)));
            }
            // Another file has the number: layers that overlap, or a name of a broken link group.
            let id = table.make_up(parent.id, name);
            return Some(self.insert(&mut table, (id, ino), parent, name, found, stat));
        }
        let shared = matches!(&found, Found::File { layer, .. } if *layer != UPPER && stat.st_nlink > 1);
        let id = if shared && self.is_writable() && id == ino { table.make_up(parent.id, name) } else { id };
        Some(self.insert(&mut table, (id, ino), parent, name, found, stat))
    }

    /// The number of a node that is not known by its real file's.
    fn known_id(&self, table: &Nodes, parent: &Node, name: &CStr, found: &Found, key: Key) -> Option<u64> {
        match found {
            Found::File { layer: UPPER, .. } if self.is_writable() => {
                table.copied(key).or_else(|| table.made_up(parent.id, name))
            }
            _ => table.made_up(parent.id, name),
        }
    }

    /// Whether a node stands for this real file.
    pub(super) fn known_by_key(&self, key: Key, layer: usize) -> bool {
        let number = self.number(key);
        let node = {
            let table = self.table.lock();
            let copied = if layer == UPPER { table.copied(key) } else { None };
            table.get(copied.unwrap_or(number)).cloned()
        };
        node.is_some_and(|node| node.read().key == key)
    }

    fn insert(
        &self,
        table: &mut Nodes,
        (id, ino): (u64, u64),
        parent: &Arc<Node>,
        name: &CStr,
        found: Found,
        stat: FileStat,
    ) -> (Arc<Node>, Attr) {
        let (layer, parts, redirect) = match found {
            Found::File { layer, .. } => (layer, Vec::new(), None),
            Found::Directory(dir) => (dir.parts[0].layer, dir.parts, dir.redirect),
            Found::Nothing => (UPPER, Vec::new(), None),
        };
        let state = State {
            parent: Some(Arc::clone(parent)),
            name: name.to_owned(),
            parts,
            redirect,
            ..State::new(layer, key_of(&stat))
        };
        let node = table.insert(Node::new(id, ino, kind_of(&stat), state));
        let attr = self.attr_of(&node, stat);
        (node, attr)
    }

    /// The node of a new file of the upper layer that has no name, with one reference of the kernel.
    pub(super) fn enter_nameless(&self, held: Arc<OwnedFd>) -> Result<(Arc<Node>, Attr)> {
        let stat = Real::Held(Arc::clone(&held)).stat()?;
        let ino = self.number(key_of(&stat));
        let state = State { held: Some(held), gone: true, ..State::new(UPPER, key_of(&stat)) };
        let mut table = self.table.lock();
        let id = if table.get(ino).is_some() { table.next_number() } else { ino };
        let node = table.insert(Node::new(id, ino, kind_of(&stat), state));
        Ok((Arc::clone(&node), self.attr_of(&node, stat)))
    }

    /// Attributes of a node.
    pub fn attr(&self, node: &Node) -> Result<Attr> {
        let stat =
            if node.is_dir() { Real::Held(self.part(node, 0)?.0).stat()? } else { node.with(Real::stat)? };
        Ok(self.attr_of(node, stat))
    }

    /// A real file's attributes as the union shows them.
    pub(super) fn attr_of(&self, node: &Node, mut stat: FileStat) -> Attr {
        stat.st_ino = node.ino();
        if node.is_dir() && (node.read().parts.len() > 1 || self.config.static_nlink) {
            stat.st_nlink = 1;
        }
        if let Some(uid) = self.config.squash_uid {
            stat.st_uid = uid;
        }
        if let Some(gid) = self.config.squash_gid {
            stat.st_gid = gid;
        }
        Attr { id: node.id, stat }
    }

    /// The inode number to show for a real file: its own on the first layer's filesystem, one with the
    /// filesystem's number in the upper bits on others.
    pub(super) fn number(&self, (dev, ino): Key) -> u64 {
        let known = |devices: &Vec<u64>| devices.iter().position(|d| *d == dev);
        let at = known(&self.devices.read().unwrap_or_else(PoisonError::into_inner));
        let at = at.unwrap_or_else(|| {
            let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
            known(&devices).unwrap_or_else(|| {
                devices.push(dev);
                devices.len() - 1
            })
        });
        // Bit 62 keeps them apart from the root's number and from the first filesystem's.
        let high = (at as u64 & 0xff) << 54;
        if at == 0 && ino != ROOT { ino & !(3 << 62) } else { (1 << 62) | (high ^ (ino & !(3 << 62))) }
    }

    /// A symlink's target.
    pub fn read_link(&self, node: &Node) -> Result<Vec<u8>> {
        node.with(Real::read_link)
    }
}

/// What the `opaque` mark of a directory says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Opacity {
    None,
    Opaque,
    Whiteouts,
}

/// Whether the node of that number is what was found.
fn same(node: &Arc<Node>, parent: &Arc<Node>, name: &CStr, found: &Found, key: Key) -> bool {
    match found {
        Found::Nothing => false,
        Found::Directory(_) => node.is_dir() && node.read().is_at(parent, name),
        Found::File { layer, .. } => {
            let state = node.read();
            if state.key != key || node.is_dir() {
                return false;
            }
            let lost = state.held.is_some();
            drop(state);
            if lost {
                node.named(parent, name, *layer);
            }
            true
        }
    }
}
