//! The nodes that the kernel holds references to, by number.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::node::{Key, Node};

/// Numbers from here on are given to nodes that can't have a real file's number.
pub(super) const MADE_UP: u64 = 1 << 63;

/// All nodes.
#[derive(Debug)]
pub(super) struct Table(Mutex<Nodes>);

/// The table, locked.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Entry>,
    /// Copied-up files keep the number they had, also when the kernel has forgotten them in between: real file in
    /// the upper layer -> node.
    copied: HashMap<Key, u64>,
    /// Nodes with a number that nothing but their name leads to.
    by_name: HashMap<(u64, CString), u64>,
    /// Forgotten by the kernel, but files below them are not.
    lingering: HashSet<u64>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    lookups: u64,
}

impl Table {
    pub(super) fn new(root: Arc<Node>) -> Self {
        let entry = Entry { node: root, lookups: 1 };
        Table(Mutex::new(Nodes {
            nodes: HashMap::from([(entry.node.id, entry)]),
            copied: HashMap::new(),
            by_name: HashMap::new(),
            lingering: HashSet::new(),
            next: MADE_UP,
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Nodes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes {
    pub(super) fn get(&self, id: u64) -> Option<&Arc<Node>> {
        self.nodes.get(&id).map(|e| &e.node)
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values().map(|e| &e.node)
    }

    /// One more reference of the kernel.
    pub(super) fn again(&mut self, id: u64) -> Option<Arc<Node>> {
        let entry = self.nodes.get_mut(&id)?;
        entry.lookups += 1;
        self.lingering.remove(&id);
        Some(Arc::clone(&entry.node))
    }

    /// A new node with one reference of the kernel.
    pub(super) fn insert(&mut self, node: Node) -> Arc<Node> {
        let node = Arc::new(node);
        self.nodes.insert(node.id, Entry { node: Arc::clone(&node), lookups: 1 });
        node
    }

    /// A number for a node that only its name leads to.
    pub(super) fn make_up(&mut self, parent: u64, name: &CStr) -> u64 {
        let id = self.next_number();
        self.by_name.insert((parent, name.to_owned()), id);
        id
    }

    /// A number that no other node has or had.
    pub(super) fn next_number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    pub(super) fn made_up(&self, parent: u64, name: &CStr) -> Option<u64> {
        if self.by_name.is_empty() {
            return None;
        }
        self.by_name.get(&(parent, name.to_owned())).copied()
    }

    /// A name no longer leads to the node with a made-up number that it led to.
    pub(super) fn unname(&mut self, parent: u64, name: &CStr) {
        if !self.by_name.is_empty() {
            self.by_name.remove(&(parent, name.to_owned()));
        }
    }

    pub(super) fn copied(&self, key: Key) -> Option<u64> {
        self.copied.get(&key).copied()
    }

    /// A node's real file is `key` from now on.
    pub(super) fn set_copied(&mut self, key: Key, id: u64) {
        self.copied.insert(key, id);
    }

    /// Takes `count` references of the kernel back.
    pub(super) fn forget(&mut self, id: u64, count: u64) {
        let Some(entry) = self.nodes.get_mut(&id) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0 {
            self.drop_unused(id);
        }
        if self.lingering.len() > 1024 {
            for id in std::mem::take(&mut self.lingering) {
                self.drop_unused(id);
            }
        }
    }

    /// Drops a node that nobody knows, and its parents if only it knew them.
    fn drop_unused(&mut self, id: u64) {
        let mut id = id;
        while let Some(entry) = self.nodes.get(&id) {
            if entry.lookups > 0 {
                return;
            }
            if Arc::strong_count(&entry.node) > 1 {
                self.lingering.insert(id);
                return;
            }
            self.lingering.remove(&id);
            let Some(entry) = self.nodes.remove(&id) else { return };
            let state = entry.node.read();
            if state.gone && self.copied.get(&state.key) == Some(&id) {
                self.copied.remove(&state.key);
            }
            let Some(parent) = &state.parent else { return };
            if id >= MADE_UP {
                self.by_name.remove(&(parent.id, state.name.clone()));
            }
            let up = parent.id;
            drop(state);
            drop(entry);
            id = up;
        }
    }
}

impl Nodes {
    /// A name moved; `new` is what was at the new name, and whether it is a directory that is at the old one now.
    pub(super) fn renamed(
        &mut self,
        (old, old_is_dir): (u64, bool),
        new: Option<(u64, bool)>,
        from: (&Arc<Node>, &CStr),
        to: (&Arc<Node>, &CStr),
    ) {
        self.unname(from.0.id, from.1);
        self.unname(to.0.id, to.1);
        if old >= MADE_UP && old_is_dir {
            self.by_name.insert((to.0.id, to.1.to_owned()), old);
        }
        if let Some((new, true)) = new.filter(|n| n.0 >= MADE_UP) {
            self.by_name.insert((from.0.id, from.1.to_owned()), new);
        }
    }
}
