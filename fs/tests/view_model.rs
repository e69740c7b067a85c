//! Random layers against a naive model of the union: paths in a map, every rule by prefix.

use std::collections::{BTreeMap, BTreeSet};

use crate::common::layer::{Item, TestLayer};
use lazyrun_fs::view::{Kind, View};
use lazyrun_index::EntryKind;
use proptest::prelude::*;

type Path = Vec<&'static str>;

#[derive(Clone, Debug)]
enum Op {
    Dir(Path),
    File(Path),
    Link(Path, Path),
    Whiteout(Path),
    Opaque(Path),
}

/// What the model knows of a path: a directory and its last entry, or a file's identity.
#[derive(Clone, Debug, PartialEq)]
enum Thing {
    Dir(Option<u32>),
    File(u32),
}

type Tree = BTreeMap<Path, Thing>;

fn below(path: &Path, dir: &Path) -> bool {
    path.len() > dir.len() && path.starts_with(dir)
}

#[derive(Default)]
struct Upper {
    tree: Tree,
    whiteouts: BTreeSet<Path>,
    opaque: BTreeSet<Path>,
}

impl Upper {
    fn parents(&mut self, path: &Path) {
        for n in 1..path.len() {
            let dir = path[..n].to_vec();
            if !matches!(self.tree.get(&dir), Some(Thing::Dir(_))) {
                self.put(&dir, Thing::Dir(None));
            }
        }
    }

    fn put(&mut self, path: &Path, thing: Thing) {
        let merges = matches!((&thing, self.tree.get(path)), (Thing::Dir(_), Some(Thing::Dir(_))));
        if !merges {
            self.tree.retain(|p, _| !below(p, path));
            self.whiteouts.retain(|p| !below(p, path));
            self.opaque.retain(|p| p != path && !below(p, path));
        }
        self.tree.insert(path.clone(), thing);
    }

    /// Whether this layer hides what is below at `path`.
    fn hides(&self, path: &Path, lower: &Tree) -> bool {
        (1..=path.len()).any(|n| {
            let prefix = path[..n].to_vec();
            let strict = n < path.len();
            let here = self.tree.get(&prefix);
            self.whiteouts.contains(&prefix)
                || strict && self.opaque.contains(&prefix)
                || matches!(here, Some(Thing::File(_)))
                || here.is_some() && matches!(lower.get(&prefix), Some(Thing::File(_)))
        })
    }

    fn over(self, lower: &Tree) -> Tree {
        let mut out: Tree = lower
            .iter()
            .filter(|(p, _)| !self.hides(p, lower))
            .map(|(p, t)| (p.clone(), t.clone()))
            .collect();
        for (path, thing) in self.tree {
            match (&thing, out.get(&path)) {
                (Thing::Dir(None), Some(Thing::Dir(_))) => {}
                _ => _ = out.insert(path, thing),
            }
        }
        out
    }
}

/// The model's union, or `None` if a hard link has no file to link to.
fn model(layers: &[Vec<Op>]) -> Option<Tree> {
    let mut lower = Tree::new();
    let mut id = 0;
    for ops in layers {
        let mut upper = Upper::default();
        for op in ops {
            id += 1;
            match op {
                Op::Dir(p) => {
                    upper.parents(p);
                    upper.put(p, Thing::Dir(Some(id)));
                }
                Op::File(p) => {
                    upper.parents(p);
                    upper.put(p, Thing::File(id));
                }
                Op::Link(p, target) => {
                    let found = match upper.tree.get(target) {
                        None if !upper.hides(target, &lower) => lower.get(target),
                        found => found,
                    };
                    let Some(Thing::File(of)) = found.cloned() else { return None };
                    upper.parents(p);
                    upper.put(p, Thing::File(of));
                    // The link's attributes are now those of the file, under all its names.
                    for thing in upper.tree.values_mut().chain(lower.values_mut()) {
                        if *thing == Thing::File(of) {
                            *thing = Thing::File(id);
                        }
                    }
                }
                Op::Whiteout(p) => {
                    upper.parents(p);
                    upper.whiteouts.insert(p.clone());
                }
                Op::Opaque(p) => {
                    let inside = [&p[..], &["x"]].concat();
                    upper.parents(&inside);
                    upper.opaque.insert(p.clone());
                }
            }
        }
        lower = upper.over(&lower);
    }
    Some(lower)
}

fn to_layers(layers: &[Vec<Op>]) -> Vec<TestLayer> {
    let mut id = 0;
    layers
        .iter()
        .map(|ops| {
            let mut l = TestLayer::default();
            for op in ops {
                id += 1;
                // The owner is the identity that the model knows.
                let marker = |p: &Path, prefix: &str| {
                    let (last, dir) = p.split_last().expect("path");
                    let mut dir = dir.to_vec();
                    let name = format!("{prefix}{last}");
                    dir.push(&name);
                    Item::new(dir.join("/"), EntryKind::File)
                };
                l.add(match op {
                    Op::Dir(p) => Item::new(p.join("/"), EntryKind::Directory).owner(id, 0),
                    Op::File(p) => Item::new(p.join("/"), EntryKind::File).owner(id, 0),
                    Op::Link(p, t) => {
                        Item::new(p.join("/"), EntryKind::Hardlink).link(t.join("/")).owner(id, 0)
                    }
                    Op::Whiteout(p) => marker(p, ".wh."),
                    Op::Opaque(p) => Item::new(format!("{}/.wh..wh..opq", p.join("/")), EntryKind::File),
                });
            }
            l
        })
        .collect()
}

fn of_view(view: &View) -> Vec<(String, bool, u32)> {
    let mut out = Vec::new();
    let mut todo = vec![(0, String::new())];
    while let Some((ino, path)) = todo.pop() {
        for (name, child) in view.children(ino) {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            let inode = view.inode(child);
            assert_eq!(view.lookup(ino, name), Some(child));
            out.push((path.clone(), inode.kind == Kind::Directory, inode.uid));
            todo.push((child, path));
        }
    }
    out.sort();
    out
}

fn of_model(tree: &Tree) -> Vec<(String, bool, u32)> {
    let mut out: Vec<_> = tree
        .iter()
        .map(|(path, thing)| {
            let path = format!("/{}", path.join("/"));
            match thing {
                Thing::Dir(id) => (path, true, id.unwrap_or(0)),
                Thing::File(id) => (path, false, *id),
            }
        })
        .collect();
    out.sort();
    out
}

fn path() -> impl Strategy<Value = Path> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => path().prop_map(Op::Dir),
        4 => path().prop_map(Op::File),
        2 => (path(), path()).prop_map(|(a, b)| Op::Link(a, b)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_union_is_the_models(layers in prop::collection::vec(prop::collection::vec(op(), 0..8), 1..5)) {
        let built = to_layers(&layers);
        let view = View::merge(&built.iter().collect::<Vec<_>>());
        match (model(&layers), view) {
            (Some(tree), Ok(view)) => {
                prop_assert_eq!(of_model(&tree), of_view(&view));
                // Link groups: as many names as the inode counts.
                for (ino, inode) in view.inodes().filter(|(_, i)| i.kind == Kind::File) {
                    let names = view.inodes().flat_map(|(d, _)| view.children(d)).filter(|&(_, i)| i == ino).count();
                    prop_assert_eq!(names, inode.nlink as usize);
                }
            }
            (None, Err(_)) => {}
            (model, view) => prop_assert!(false, "model {:?}, view {:?}", model, view.map(|v| of_view(&v))),
        }
    }
}
