//! Names in a tree: one arena of nodes, one buffer of names, one hash table for all directories.
//!
//! Used twice: for the tree that one layer unpacks to, and for the union of the layers so far. Nodes are
//! never reused; replacing a name makes a new node, so whatever hung below the old one is unreachable.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

/// Index of a node.
pub(super) type NodeId = u32;
/// The root directory.
pub(super) const ROOT: NodeId = 0;
const NONE: u32 = u32::MAX;
/// The item of a directory that no entry describes.
pub(super) const IMPLICIT: u32 = u32::MAX;

/// What is at a name, as far as path resolution cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Nothing (any more): a removed name, or a name that is only whited out.
    Absent,
    Directory,
    Symlink,
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    parent: NodeId,
    name_start: u32,
    name_len: u16,
    shape: Shape,
    /// Hides what lower layers have under this name.
    whiteout: bool,
    /// Hides what lower layers have in this directory.
    opaque: bool,
    first_child: NodeId,
    next_sibling: NodeId,
    next_same_hash: NodeId,
    /// Source of the attributes, counted by the union; [`IMPLICIT`] if none.
    item: u32,
}

/// What [`Tree::put`] did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Put {
    /// The new node.
    pub(super) id: NodeId,
    /// Whether it took the place of something.
    pub(super) replaced: bool,
}

/// The arena is full: more than 32 bits can number.
#[derive(Debug)]
pub(super) struct Full;

/// The table's keys are hashes already.
#[derive(Clone, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(b);
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = v;
    }
}

#[derive(Clone, Default)]
struct IdentityState;

impl BuildHasher for IdentityState {
    type Hasher = Identity;
    fn build_hasher(&self) -> Identity {
        Identity::default()
    }
}

/// See the module's words.
pub(super) struct Tree {
    nodes: Vec<Node>,
    names: Vec<u8>,
    /// Hash of (parent, name) to the newest node with that hash.
    table: HashMap<u64, NodeId, IdentityState>,
    /// Keyed, because names are foreign and must not be able to collide on purpose.
    keyed: RandomState,
}

impl Tree {
    pub(super) fn new(capacity: usize) -> Self {
        let mut nodes = Vec::with_capacity(capacity.saturating_add(1));
        nodes.push(Node {
            parent: ROOT,
            name_start: 0,
            name_len: 0,
            shape: Shape::Directory,
            whiteout: false,
            opaque: false,
            first_child: NONE,
            next_sibling: NONE,
            next_same_hash: NONE,
            item: IMPLICIT,
        });
        Tree {
            nodes,
            names: Vec::new(),
            table: HashMap::with_capacity_and_hasher(capacity, IdentityState),
            keyed: RandomState::new(),
        }
    }

    fn hash(&self, parent: NodeId, name: &[u8]) -> u64 {
        let mut h = self.keyed.build_hasher();
        h.write_u32(parent);
        h.write(name);
        h.finish()
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// The newest node under that name, which may be [`Shape::Absent`].
    pub(super) fn find(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        let mut at = *self.table.get(&self.hash(parent, name))?;
        while at != NONE {
            let node = self.node(at);
            if node.parent == parent && self.name(at) == name {
                return Some(at);
            }
            at = node.next_same_hash;
        }
        None
    }

    /// Puts a new node under a name. An older node of that name, and all below it, is gone; a whiteout stays.
    pub(super) fn put(&mut self, parent: NodeId, name: &[u8], shape: Shape, item: u32) -> Result<Put, Full> {
        let mut whiteout = false;
        let mut reuse = None;
        let mut replaced = false;
        if let Some(old) = self.find(parent, name) {
            whiteout = self.node(old).whiteout;
            replaced = self.node(old).shape != Shape::Absent;
            reuse = Some((self.node(old).name_start, self.node(old).name_len));
            self.nodes[old as usize].shape = Shape::Absent;
            self.nodes[old as usize].whiteout = false;
        }
        let id = u32::try_from(self.nodes.len()).ok().filter(|&id| id < NONE).ok_or(Full)?;
        let (name_start, name_len) = match reuse {
            Some(same) => same,
            None => {
                let start = u32::try_from(self.names.len()).map_err(|_| Full)?;
                let len = u16::try_from(name.len()).map_err(|_| Full)?;
                self.names.extend_from_slice(name);
                (start, len)
            }
        };
        let hash = self.hash(parent, name);
        let next_same_hash = self.table.insert(hash, id).unwrap_or(NONE);
        self.nodes.push(Node {
            parent,
            name_start,
            name_len,
            shape,
            whiteout,
            opaque: false,
            first_child: NONE,
            next_sibling: self.node(parent).first_child,
            next_same_hash,
            item,
        });
        self.nodes[parent as usize].first_child = id;
        Ok(Put { id, replaced })
    }

    /// Notes that lower layers' entry of that name is hidden.
    pub(super) fn whiteout(&mut self, parent: NodeId, name: &[u8]) -> Result<(), Full> {
        let id = match self.find(parent, name) {
            Some(id) => id,
            None => self.put(parent, name, Shape::Absent, IMPLICIT)?.id,
        };
        self.nodes[id as usize].whiteout = true;
        Ok(())
    }

    /// Takes a node away, and with it all below.
    pub(super) fn remove(&mut self, id: NodeId) {
        self.nodes[id as usize].shape = Shape::Absent;
    }

    /// Takes everything in a directory away.
    pub(super) fn clear(&mut self, dir: NodeId) {
        let mut at = std::mem::replace(&mut self.nodes[dir as usize].first_child, NONE);
        while at != NONE {
            self.nodes[at as usize].shape = Shape::Absent;
            at = self.node(at).next_sibling;
        }
    }

    pub(super) fn set_opaque(&mut self, dir: NodeId) {
        self.nodes[dir as usize].opaque = true;
    }

    pub(super) fn set_item(&mut self, id: NodeId, item: u32) {
        self.nodes[id as usize].item = item;
    }

    pub(super) fn shape(&self, id: NodeId) -> Shape {
        self.node(id).shape
    }

    pub(super) fn is_whiteout(&self, id: NodeId) -> bool {
        self.node(id).whiteout
    }

    /// The root is never opaque: see docs/SEMANTICS.md.
    pub(super) fn is_opaque(&self, id: NodeId) -> bool {
        id != ROOT && self.node(id).opaque
    }

    pub(super) fn item(&self, id: NodeId) -> u32 {
        self.node(id).item
    }

    pub(super) fn parent(&self, id: NodeId) -> NodeId {
        self.node(id).parent
    }

    pub(super) fn name(&self, id: NodeId) -> &[u8] {
        let n = self.node(id);
        let start = n.name_start as usize;
        &self.names[start..start + usize::from(n.name_len)]
    }

    /// All nodes ever put into a directory since it was last cleared, absent ones too, in no useful order.
    pub(super) fn children(&self, dir: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let mut at = self.node(dir).first_child;
        std::iter::from_fn(move || {
            let id = (at != NONE).then_some(at)?;
            at = self.node(id).next_sibling;
            Some(id)
        })
    }
}
