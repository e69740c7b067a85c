//! Paths in a view, as a process finds them whose root it is (path_resolution(7)).

use lazyrun_fs::view::{Ino, Kind, View};

use super::File;

/// Symlinks that are followed on the way, as the kernel does.
const MAX_LINKS: usize = 40;

/// The regular file at an absolute path.
pub(super) fn file(view: &View, path: &[u8]) -> Option<File> {
    let (ino, path) = find(view, path)?;
    (view.inode(ino).kind == Kind::File).then_some(File { ino, path, named: false })
}

/// What is at an absolute path, and its path without symlinks.
pub(super) fn find(view: &View, path: &[u8]) -> Option<(Ino, Vec<u8>)> {
    let mut way: Vec<(Ino, Vec<u8>)> = Vec::new();
    let mut rest = names(path);
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == b".." {
            way.pop();
            continue;
        }
        let dir = way.last().map_or(0, |(ino, _)| *ino);
        let ino = view.lookup(dir, &name)?;
        let inode = view.inode(ino);
        if inode.kind != Kind::Symlink {
            way.push((ino, name));
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        if inode.target.starts_with(b"/") {
            way.clear();
        }
        rest.extend(names(&inode.target));
    }
    let ino = way.last().map_or(0, |(ino, _)| *ino);
    let mut path: Vec<u8> = Vec::new();
    for (_, name) in way {
        path.push(b'/');
        path.extend(name);
    }
    Some((ino, path))
}

/// The names of a path, the last one first.
fn names(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.rsplit(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    names.map(<[u8]>::to_vec).collect()
}
