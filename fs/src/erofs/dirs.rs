//! Directory blocks: entries, then their names, sorted by bytes as the kernel's binary search wants them.

use super::format::{BLOCK, DIRENT, dirent};
use crate::view::{Ino, Kind, View};

/// A directory's names in order, `.` and `..` among them.
pub(super) fn sorted(view: &View, dir: Ino) -> impl Iterator<Item = (&[u8], Ino)> + Clone {
    let special: [(&[u8], Ino); 2] = [(b".", dir), (b"..", view.parent(dir))];
    let mut special = special.into_iter().peekable();
    let mut names = view.children(dir).peekable();
    std::iter::from_fn(move || match (special.peek(), names.peek()) {
        (Some(s), Some(n)) if s.0 < n.0 => special.next(),
        (Some(_), None) => special.next(),
        _ => names.next(),
    })
}

/// Size of a directory: its last block counts only as far as it is used.
pub(super) fn size(view: &View, dir: Ino) -> u64 {
    let mut blocks = 0;
    let mut used = 0;
    for (name, _) in sorted(view, dir) {
        let need = (DIRENT + name.len()) as u64;
        if used + need > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += need;
    }
    blocks * BLOCK + used
}

/// Appends the directory's bytes to `out`, [`size`] of them.
pub(super) fn encode(view: &View, dir: Ino, nid: impl Fn(Ino) -> u64, out: &mut Vec<u8>) {
    let mut names = sorted(view, dir).peekable();
    while names.peek().is_some() {
        let block = out.len();
        let rest = names.clone();
        let mut count = 0;
        let mut used = 0;
        while let Some((name, _)) = names.next_if(|(name, _)| used + DIRENT + name.len() <= BLOCK as usize) {
            used += DIRENT + name.len();
            count += 1;
        }
        let mut name_offset = count * DIRENT;
        for (name, ino) in rest.clone().take(count) {
            out.extend_from_slice(&dirent(nid(ino), name_offset as u16, file_type(view.inode(ino).kind)));
            name_offset += name.len();
        }
        for (name, _) in rest.take(count) {
            out.extend_from_slice(name);
        }
        if names.peek().is_some() {
            out.resize(block + BLOCK as usize, 0);
        }
    }
}

/// The kernel's `FT_*`.
fn file_type(kind: Kind) -> u8 {
    match kind {
        Kind::File => 1,
        Kind::Directory => 2,
        Kind::CharDevice => 3,
        Kind::BlockDevice => 4,
        Kind::Fifo => 5,
        Kind::Symlink => 7,
    }
}
