//! The merged, immutable tree of an image's layers. The union rules live here and nowhere else;
//! docs/SEMANTICS.md states them. No word of FUSE or EROFS.

mod error;
mod finish;
mod inode;
mod layer;
mod source;
mod tree;
mod union;
mod xattr;

pub use error::{EntryName, ViewError};
pub use inode::{Extents, Ino, Inode, Kind, LayerExtent, Xattr};
pub use source::{Entry, LayerEntries};
pub use xattr::escaped;

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
struct Name {
    start: u32,
    len: u16,
    ino: Ino,
}

/// All files of an image. About 150 bytes per file and its name.
#[derive(Debug)]
pub struct View {
    inodes: Vec<Inode>,
    /// Directory by directory, sorted by bytes.
    names: Vec<Name>,
    bytes: Vec<u8>,
}

impl View {
    /// Merges layers, the bottom one first. The result depends on nothing but the layers.
    pub fn merge<L: LayerEntries + ?Sized>(layers: &[&L]) -> Result<View, ViewError> {
        finish::finish(&union::Union::of(layers)?)
    }

    /// Number of inodes; they are numbered from 0, the root, without gaps.
    pub fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Never: there is always a root.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }

    /// An inode. Panics when `ino` is not below [`len`](Self::len), as a slice would.
    pub fn inode(&self, ino: Ino) -> &Inode {
        &self.inodes[ino as usize]
    }

    /// The inode, if there is one of that number.
    pub fn get(&self, ino: Ino) -> Option<&Inode> {
        self.inodes.get(ino as usize)
    }

    /// All inodes in order of their numbers.
    pub fn inodes(&self) -> impl ExactSizeIterator<Item = (Ino, &Inode)> {
        self.inodes.iter().enumerate().map(|(i, inode)| (i as Ino, inode))
    }

    /// A directory's names, sorted by bytes, without `.` and `..`; empty for what is no directory.
    pub fn children(&self, ino: Ino) -> Children<'_> {
        let dir = self.inode(ino);
        let first = dir.first_name as usize;
        Children { view: self, names: &self.names[first..first + dir.names as usize] }
    }

    /// The inode of a name in a directory.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Option<Ino> {
        let names = self.children(dir).names;
        let at = names.binary_search_by(|n| self.name(n).cmp(name)).ok()?;
        Some(names[at].ino)
    }

    /// The directory that a directory lies in; the root lies in itself. Meaningless for what is no directory.
    pub fn parent(&self, dir: Ino) -> Ino {
        self.inode(dir).parent
    }

    fn name(&self, name: &Name) -> &[u8] {
        let start = name.start as usize;
        &self.bytes[start..start + usize::from(name.len)]
    }
}

/// The names of a directory.
#[derive(Clone, Copy, Debug)]
pub struct Children<'v> {
    view: &'v View,
    names: &'v [Name],
}

impl<'v> Children<'v> {
    /// How many are left.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Name number `i`, counted from the current position: what a directory offset needs.
    pub fn get(&self, i: usize) -> Option<(&'v [u8], Ino)> {
        let name = self.names.get(i)?;
        Some((self.view.name(name), name.ino))
    }
}

impl<'v> Iterator for Children<'v> {
    type Item = (&'v [u8], Ino);

    fn next(&mut self) -> Option<Self::Item> {
        let (first, rest) = self.names.split_first()?;
        self.names = rest;
        Some((self.view.name(first), first.ino))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.names.len(), Some(self.names.len()))
    }
}

impl ExactSizeIterator for Children<'_> {}
