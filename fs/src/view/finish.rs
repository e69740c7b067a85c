//! From the union's tree to a view: inodes numbered directory by directory, names sorted.

use lazyrun_index::{EntryKind, Extent, Timestamp};

use super::error::{EntryName, ViewError, printable};
use super::inode::{Extents, Ino, Inode, Kind, LayerExtent, Xattr};
use super::source::LayerEntries;
use super::tree::{IMPLICIT, NodeId, ROOT, Shape};
use super::union::Union;
use super::xattr::settable;
use super::{Name, View};

const UNSEEN: Ino = Ino::MAX;

/// Numbers inodes so that those of one directory follow each other, directories in depth-first order: who
/// reads a directory reads its inodes next.
pub(super) fn finish<L: LayerEntries + ?Sized>(union: &Union<'_, L>) -> Result<View, ViewError> {
    let mut out = Finish {
        union,
        view: View { inodes: Vec::new(), names: Vec::new(), bytes: Vec::new() },
        seen: vec![UNSEEN; union.sources.len()],
        extents: Vec::new(),
    };
    out.view.inodes.push(out.root());
    let mut todo: Vec<(NodeId, Ino)> = vec![(ROOT, 0)];
    while let Some((node, ino)) = todo.pop() {
        let from = todo.len();
        out.directory(node, ino, &mut todo)?;
        todo[from..].reverse();
    }
    out.view.inodes.shrink_to_fit();
    out.view.names.shrink_to_fit();
    out.view.bytes.shrink_to_fit();
    Ok(out.view)
}

struct Finish<'u, 'a, L: ?Sized> {
    union: &'u Union<'a, L>,
    view: View,
    /// The inode of a source that has one already: hard links.
    seen: Vec<Ino>,
    extents: Vec<LayerExtent>,
}

impl<L: LayerEntries + ?Sized> Finish<'_, '_, L> {
    fn directory(&mut self, node: NodeId, ino: Ino, todo: &mut Vec<(NodeId, Ino)>) -> Result<(), ViewError> {
        let tree = &self.union.tree;
        let mut children: Vec<NodeId> =
            tree.children(node).filter(|&c| tree.shape(c) != Shape::Absent).collect();
        children.sort_unstable_by(|&a, &b| tree.name(a).cmp(tree.name(b)));
        let first_name = self.view.names.len();
        let mut subdirectories = 0;
        for &child in &children {
            let name = tree.name(child);
            let child_ino = self.inode(child, ino)?;
            if tree.shape(child) == Shape::Directory {
                subdirectories += 1;
                todo.push((child, child_ino));
            }
            // The arena's names fit in 32 bits, and these are some of them.
            let start = self.view.bytes.len() as u32;
            self.view.bytes.extend_from_slice(name);
            self.view.names.push(Name { start, len: name.len() as u16, ino: child_ino });
        }
        let dir = &mut self.view.inodes[ino as usize];
        dir.first_name = first_name as u32;
        dir.names = children.len() as u32;
        dir.nlink = 2 + subdirectories;
        Ok(())
    }

    /// The inode of a node: a new one, or the one that another name of its link group has.
    fn inode(&mut self, node: NodeId, parent: Ino) -> Result<Ino, ViewError> {
        let item = self.union.tree.item(node);
        let ino = self.view.inodes.len() as u32;
        if item == IMPLICIT {
            self.view.inodes.push(Inode { parent, ..implicit() });
            return Ok(ino);
        }
        let seen = self.seen[item as usize];
        if seen != UNSEEN {
            self.view.inodes[seen as usize].nlink += 1;
            return Ok(seen);
        }
        self.seen[item as usize] = ino;
        let inode = self.load(item, parent)?;
        self.view.inodes.push(inode);
        Ok(ino)
    }

    fn load(&mut self, item: u32, parent: Ino) -> Result<Inode, ViewError> {
        let source = self.union.sources[item as usize];
        let layer = self.union.layers[usize::from(source.layer)];
        let i = source.entry as usize;
        let entry = layer.get(i);
        let kind = match entry.kind {
            EntryKind::Directory => Kind::Directory,
            EntryKind::Symlink => Kind::Symlink,
            EntryKind::CharDevice => Kind::CharDevice,
            EntryKind::BlockDevice => Kind::BlockDevice,
            EntryKind::Fifo => Kind::Fifo,
            // A hard link's item is its target's.
            EntryKind::File | EntryKind::Hardlink => Kind::File,
        };
        let attributes =
            self.union.layers[usize::from(source.attributes.0)].get(source.attributes.1 as usize);
        let mut inode = Inode {
            kind,
            mode: (attributes.mode & 0o7777) as u16,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            nlink: 1,
            xattrs: xattrs(layer, i, kind),
            parent,
            ..implicit()
        };
        match kind {
            Kind::File => {
                inode.size = entry.size;
                inode.extents = self.extents(layer, i, source.layer, entry.size).ok_or_else(|| {
                    let name = EntryName {
                        layer: usize::from(source.layer) + 1,
                        diff_id: layer.name(),
                        path: printable(entry.path),
                    };
                    ViewError::BadExtents(name, entry.size)
                })?;
            }
            // Linux shows every symlink with all permissions, whatever its tar entry says.
            Kind::Symlink => {
                inode.mode = 0o777;
                inode.size = entry.link.len() as u64;
                inode.target = entry.link.into();
            }
            Kind::CharDevice | Kind::BlockDevice => inode.rdev = entry.rdev,
            Kind::Directory | Kind::Fifo => {}
        }
        Ok(inode)
    }

    /// Extents joined where they follow each other; `None` if they are not sorted, disjoint and inside the file.
    fn extents(&mut self, layer: &L, i: usize, number: u16, size: u64) -> Option<Extents> {
        let list = &mut self.extents;
        list.clear();
        let mut good = true;
        let mut end = 0u64;
        layer.each_extent(i, &mut |e: Extent| {
            let reach = e.file_offset.checked_add(e.len).filter(|&r| r <= size);
            let fits = e.layer_offset.checked_add(e.len).is_some();
            match reach {
                Some(reach) if fits && e.file_offset >= end => {
                    end = reach;
                    push_joined(list, e, number);
                }
                _ => good = false,
            }
        });
        good.then(|| Extents::from(list.as_slice()))
    }

    fn root(&self) -> Inode {
        let item = self.union.tree.item(ROOT);
        let mtime = match item {
            IMPLICIT => Timestamp { secs: 0, nanos: 0 },
            _ => {
                let source = self.union.sources[item as usize];
                self.union.layers[usize::from(source.layer)].get(source.entry as usize).mtime
            }
        };
        Inode { mtime, ..implicit() }
    }
}

fn push_joined(list: &mut Vec<LayerExtent>, e: Extent, layer: u16) {
    if e.len == 0 {
        return;
    }
    if let Some(last) = list.last_mut()
        && last.file_offset + last.len == e.file_offset
        && last.layer_offset + last.len == e.layer_offset
    {
        last.len += e.len;
        return;
    }
    list.push(LayerExtent { layer, file_offset: e.file_offset, layer_offset: e.layer_offset, len: e.len });
}

/// A directory that no entry describes.
pub(super) fn implicit() -> Inode {
    Inode {
        kind: Kind::Directory,
        mode: 0o755,
        uid: 0,
        gid: 0,
        nlink: 2,
        rdev: (0, 0),
        mtime: Timestamp { secs: 0, nanos: 0 },
        size: 0,
        target: Box::default(),
        xattrs: Box::default(),
        extents: Extents::default(),
        first_name: 0,
        names: 0,
        parent: 0,
    }
}

/// Attributes sorted by name; of a name given twice, the last value.
fn xattrs<L: LayerEntries + ?Sized>(layer: &L, i: usize, kind: Kind) -> Box<[Xattr]> {
    let mut list: Vec<Xattr> = Vec::new();
    layer.each_xattr(i, &mut |name, value| {
        if settable(kind, name, value) {
            list.push(Xattr { name: name.into(), value: value.into() });
        }
    });
    // Stable, and backwards: of equal names the last comes first, and the first stays.
    list.reverse();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list.dedup_by(|later, first| later.name == first.name);
    list.into()
}
