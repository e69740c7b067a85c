//! The tree that one layer unpacks to, with its whiteouts: what containerd would find in the layer's own
//! directory. Entries are applied in tar order; the last one of a name wins.

use std::cell::Cell;

use lazyrun_index::EntryKind;

use super::error::{EntryName, ViewError, printable};
use super::source::{Entry, LayerEntries};
use super::tree::{Full, IMPLICIT, NodeId, ROOT, Shape, Tree};
use super::union::Union;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS: &[u8] = b".wh..wh.";
/// Symlinks followed for one path, as the kernel's and containerd's limits are of this order.
const MAX_LINKS: usize = 255;
/// Path components that the symlinks of one layer may add to its paths, all entries together: else an image of a
/// few bytes, compressed, could keep us walking for hours.
const MAX_DETOUR: usize = 20_000_000;

/// A layer being unpacked into its own tree.
pub(super) struct LayerTree<'u, 'a, L: ?Sized> {
    union: &'u mut Union<'a, L>,
    layer: u16,
    source: &'a L,
    tree: Tree,
    /// Where the last entry went: tars come directory by directory.
    last_parent: Option<(&'a [u8], NodeId)>,
    /// What is left of [`MAX_DETOUR`].
    detour: Cell<usize>,
}

impl<'u, 'a, L: LayerEntries + ?Sized> LayerTree<'u, 'a, L> {
    /// Unpacks layer number `layer`; `union` holds what is below and keeps the list of attribute sources.
    pub(super) fn unpack(union: &'u mut Union<'a, L>, layer: u16, source: &'a L) -> Result<Tree, ViewError> {
        let tree = Tree::new(source.count());
        let detour = Cell::new(MAX_DETOUR);
        let mut it = LayerTree { union, layer, source, tree, last_parent: None, detour };
        for i in 0..source.count() {
            let entry = source.get(i);
            it.apply(i, &entry)?;
        }
        Ok(it.tree)
    }

    fn apply(&mut self, i: usize, entry: &Entry<'a>) -> Result<(), ViewError> {
        let (dir, base) = split(entry.path);
        if base.is_empty() {
            // The root is always 0755 root:root, as containerd makes it; only its time is taken.
            if entry.kind == EntryKind::Directory {
                let item = self.item(i, entry)?;
                self.tree.set_item(ROOT, item);
            }
            return Ok(());
        }
        if base == OPAQUE {
            let dir = self.directory(dir, entry)?;
            self.tree.set_opaque(dir);
            return Ok(());
        }
        if base.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(ViewError::BadWhiteout(self.name(entry)));
            }
            let dir = self.directory(dir, entry)?;
            return self.tree.whiteout(dir, hidden).map_err(|f| self.full(&f, entry));
        }
        if entry.kind == EntryKind::Hardlink {
            return self.hard_link(dir, base, i, entry);
        }
        let dir = self.directory(dir, entry)?;
        if entry.kind == EntryKind::CharDevice && entry.rdev == (0, 0) {
            return self.overlay_whiteout(dir, base, entry);
        }
        let item = self.item(i, entry)?;
        let shape = match entry.kind {
            EntryKind::Directory => Shape::Directory,
            EntryKind::Symlink => Shape::Symlink,
            _ => Shape::Other,
        };
        match self.tree.find(dir, base) {
            Some(old) if shape == Shape::Directory && self.tree.shape(old) == Shape::Directory => {
                self.tree.set_item(old, item);
                Ok(())
            }
            _ => self.put(dir, base, shape, item, entry).map(|_| ()),
        }
    }

    /// Character device 0:0 is overlayfs' own whiteout, and would act as one under any overlay mount.
    fn overlay_whiteout(&mut self, dir: NodeId, base: &[u8], entry: &Entry<'a>) -> Result<(), ViewError> {
        self.put(dir, base, Shape::Absent, IMPLICIT, entry)?;
        self.tree.whiteout(dir, base).map_err(|f| self.full(&f, entry))
    }

    fn hard_link(
        &mut self,
        dir: &'a [u8],
        base: &'a [u8],
        i: usize,
        entry: &Entry<'a>,
    ) -> Result<(), ViewError> {
        let (shape, item) = self
            .look_up(entry.link, entry)?
            .ok_or_else(|| ViewError::LinkToNothing(self.name(entry), printable(entry.link)))?;
        if shape == Shape::Directory {
            return Err(ViewError::LinkToDirectory(self.name(entry), printable(entry.link)));
        }
        let dir = self.directory(dir, entry)?;
        self.union.set_attributes(item, self.layer, i);
        self.put(dir, base, shape, item, entry).map(|_| ())
    }

    /// The directory at `path` in this layer, made where missing. Symlinks of this same layer are followed
    /// inside the image's root; what lower layers have does not matter here, and anything else of this layer
    /// that stands in the way becomes a directory.
    fn directory(&mut self, path: &'a [u8], entry: &Entry<'a>) -> Result<NodeId, ViewError> {
        if let Some((last, node)) = self.last_parent
            && last == path
        {
            return Ok(node);
        }
        let mut at = ROOT;
        let mut walk = Walk::of(path);
        while let Some(step) = walk.next() {
            let Step::Down(name) = step else {
                at = self.tree.parent(at);
                continue;
            };
            let found = self.tree.find(at, name).map(|n| (n, self.tree.shape(n)));
            at = match found {
                Some((node, Shape::Directory)) => node,
                Some((node, Shape::Symlink)) => {
                    let target = self.union.link_target(self.tree.item(node));
                    self.follow(target, &mut walk, entry)?;
                    if target.starts_with(b"/") { ROOT } else { at }
                }
                _ => self.put(at, name, Shape::Directory, IMPLICIT, entry)?,
            };
        }
        self.last_parent = Some((path, at));
        Ok(at)
    }

    /// What `path` is in the union of this layer so far and all below. Symlinks in the middle are followed
    /// inside the image's root, the last component is not.
    fn look_up(&self, path: &'a [u8], entry: &Entry<'a>) -> Result<Option<(Shape, u32)>, ViewError> {
        let mut trail = vec![Cursor { here: Some(ROOT), below: Some(ROOT) }];
        let mut walk = Walk::of(path);
        while let Some(step) = walk.next() {
            let Step::Down(name) = step else {
                trail.truncate(trail.len().saturating_sub(1).max(1));
                continue;
            };
            let Some(at) = trail.last() else { return Ok(None) };
            let (shape, item, next) = self.step(at, name);
            match shape {
                Shape::Absent => return Ok(None),
                Shape::Directory => trail.push(next),
                _ if walk.ahead.is_empty() => return Ok(Some((shape, item))),
                Shape::Other => return Ok(None),
                Shape::Symlink => {
                    let target = self.union.link_target(item);
                    self.follow(target, &mut walk, entry)?;
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                }
            }
        }
        Ok(Some((Shape::Directory, IMPLICIT)))
    }

    /// Puts a symlink's target in front of what is left of a path.
    fn follow(&self, target: &'a [u8], walk: &mut Walk<'a>, entry: &Entry<'a>) -> Result<(), ViewError> {
        let before = walk.ahead.len();
        walk.ahead.extend(target.rsplit(|&b| b == b'/'));
        walk.links += 1;
        match self.detour.get().checked_sub(walk.ahead.len() - before) {
            Some(left) if walk.links <= MAX_LINKS => {
                self.detour.set(left);
                Ok(())
            }
            _ => Err(ViewError::SymlinkLoop(self.name(entry))),
        }
    }

    fn step(&self, at: &Cursor, name: &[u8]) -> (Shape, u32, Cursor) {
        let here = at.here.and_then(|dir| self.tree.find(dir, name));
        let hidden = here.is_some_and(|n| self.tree.is_whiteout(n))
            || at.here.is_some_and(|dir| self.tree.is_opaque(dir));
        let lower = &self.union.tree;
        let below = at
            .below
            .filter(|_| !hidden)
            .and_then(|dir| lower.find(dir, name))
            .filter(|&n| lower.shape(n) != Shape::Absent);
        match here.filter(|&n| self.tree.shape(n) != Shape::Absent) {
            Some(n) => {
                let below = below.filter(|&b| lower.shape(b) == Shape::Directory);
                (self.tree.shape(n), self.tree.item(n), Cursor { here: Some(n), below })
            }
            None => match below {
                Some(b) => (lower.shape(b), lower.item(b), Cursor { here: None, below: Some(b) }),
                None => (Shape::Absent, IMPLICIT, Cursor { here: None, below: None }),
            },
        }
    }

    fn put(
        &mut self,
        dir: NodeId,
        name: &[u8],
        shape: Shape,
        item: u32,
        entry: &Entry<'a>,
    ) -> Result<NodeId, ViewError> {
        let put = self.tree.put(dir, name, shape, item).map_err(|f| self.full(&f, entry))?;
        if put.replaced {
            self.last_parent = None;
        }
        Ok(put.id)
    }

    fn item(&mut self, i: usize, entry: &Entry<'a>) -> Result<u32, ViewError> {
        self.union.add_source(self.layer, i).map_err(|f| self.full(&f, entry))
    }

    fn full(&self, _: &Full, entry: &Entry<'_>) -> ViewError {
        ViewError::TooLarge(self.name(entry))
    }

    fn name(&self, entry: &Entry<'_>) -> EntryName {
        EntryName {
            layer: usize::from(self.layer) + 1,
            diff_id: self.source.name(),
            path: printable(entry.path),
        }
    }
}

/// A directory of the union while a layer is unpacked: its node in the layer and in the union below.
struct Cursor {
    here: Option<NodeId>,
    below: Option<NodeId>,
}

/// A path being walked.
struct Walk<'a> {
    /// The components still to go, the next one last.
    ahead: Vec<&'a [u8]>,
    /// Symlinks followed so far.
    links: usize,
}

/// One component of a path that leads somewhere.
enum Step<'a> {
    Up,
    Down(&'a [u8]),
}

impl<'a> Walk<'a> {
    fn of(path: &'a [u8]) -> Self {
        Walk { ahead: path.rsplit(|&b| b == b'/').collect(), links: 0 }
    }

    fn next(&mut self) -> Option<Step<'a>> {
        loop {
            match self.ahead.pop()? {
                b"" | b"." => {}
                b".." => return Some(Step::Up),
                name => return Some(Step::Down(name)),
            }
        }
    }
}

/// A clean path's directory and last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}
