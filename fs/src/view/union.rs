//! Layers laid over each other, bottom first.

use super::error::ViewError;
use super::layer::LayerTree;
use super::source::LayerEntries;
use super::tree::{Full, IMPLICIT, NodeId, ROOT, Shape, Tree};

/// Where an inode's attributes and contents come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    pub(super) layer: u16,
    pub(super) entry: u32,
    /// Layer and entry whose mode, owner and time hold: those of the last hard link, which unpackers apply to
    /// the file that all its names share.
    pub(super) attributes: (u16, u32),
}

/// The tree of the layers so far. An item is an index into `sources`; names of one hard link group share it.
pub(super) struct Union<'a, L: ?Sized> {
    pub(super) layers: &'a [&'a L],
    pub(super) tree: Tree,
    pub(super) sources: Vec<Source>,
}

impl<'a, L: LayerEntries + ?Sized> Union<'a, L> {
    /// Merges all layers, bottom first.
    pub(super) fn of(layers: &'a [&'a L]) -> Result<Self, ViewError> {
        // One EROFS device per layer and one for the appendix, with some room for what may come.
        if layers.len() > 65_000 {
            return Err(ViewError::TooManyLayers(layers.len()));
        }
        let widest = layers.iter().map(|l| l.count()).max().unwrap_or(0);
        let mut union = Union { layers, tree: Tree::new(widest), sources: Vec::with_capacity(widest) };
        for (number, &layer) in layers.iter().enumerate() {
            // Cannot fail after the check above.
            let number = u16::try_from(number).unwrap_or(u16::MAX);
            let upper = LayerTree::unpack(&mut union, number, layer)?;
            union.lay_over(&upper).map_err(|Full| {
                ViewError::TooLarge(super::error::EntryName {
                    layer: usize::from(number) + 1,
                    diff_id: layer.name(),
                    path: String::new(),
                })
            })?;
        }
        Ok(union)
    }

    pub(super) fn add_source(&mut self, layer: u16, entry: usize) -> Result<u32, Full> {
        let item = u32::try_from(self.sources.len()).ok().filter(|&i| i != IMPLICIT).ok_or(Full)?;
        let entry = u32::try_from(entry).map_err(|_| Full)?;
        self.sources.push(Source { layer, entry, attributes: (layer, entry) });
        Ok(item)
    }

    /// A hard link to `item` says what the attributes of the file are from here on.
    pub(super) fn set_attributes(&mut self, item: u32, layer: u16, entry: usize) {
        if let (Some(source), Ok(entry)) = (self.sources.get_mut(item as usize), u32::try_from(entry)) {
            source.attributes = (layer, entry);
        }
    }

    /// The target of the symlink whose attributes come from `item`.
    pub(super) fn link_target(&self, item: u32) -> &'a [u8] {
        let source = self.sources[item as usize];
        self.layers[usize::from(source.layer)].get(source.entry as usize).link
    }

    /// Whiteouts and opaque marks first, then what the layer has: they hide only what is below, wherever in
    /// the layer they stood.
    fn lay_over(&mut self, upper: &Tree) -> Result<(), Full> {
        if upper.item(ROOT) != IMPLICIT {
            self.tree.set_item(ROOT, upper.item(ROOT));
        }
        let mut todo: Vec<(NodeId, NodeId)> = vec![(ROOT, ROOT)];
        while let Some((from, to)) = todo.pop() {
            if upper.is_opaque(from) {
                self.tree.clear(to);
            }
            for child in upper.children(from) {
                let name = upper.name(child);
                let old = self.tree.find(to, name).filter(|&n| self.tree.shape(n) != Shape::Absent);
                let old = match old {
                    Some(n) if upper.is_whiteout(child) => {
                        self.tree.remove(n);
                        None
                    }
                    other => other,
                };
                let item = upper.item(child);
                match upper.shape(child) {
                    Shape::Absent => {}
                    Shape::Directory => {
                        let dir = match old {
                            Some(n) if self.tree.shape(n) == Shape::Directory => {
                                if item != IMPLICIT {
                                    self.tree.set_item(n, item);
                                }
                                n
                            }
                            _ => self.tree.put(to, name, Shape::Directory, item)?.id,
                        };
                        todo.push((child, dir));
                    }
                    shape => {
                        self.tree.put(to, name, shape, item)?;
                    }
                }
            }
        }
        Ok(())
    }
}
