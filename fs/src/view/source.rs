//! What the union needs to know of a layer.

use lazyrun_index::{EntryKind, Extent, LayerIndex, Timestamp};

/// One entry of a layer, in tar order. Whiteouts are ordinary entries here; only the union interprets them.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Clean relative path, no leading or trailing slash, no `.` or `..`; empty for the root.
    pub path: &'a [u8],
    /// What the tar says the entry is.
    pub kind: EntryKind,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Bytes of a regular file.
    pub size: u64,
    /// Target of a symlink (verbatim) or of a hard link (clean path).
    pub link: &'a [u8],
    /// Device number of a device node: major, minor.
    pub rdev: (u32, u32),
}

/// A layer as the union reads it: a [`LayerIndex`], or a list made up by a test.
pub trait LayerEntries {
    /// The layer's name in errors: its diffID.
    fn name(&self) -> String;
    /// Number of entries.
    fn count(&self) -> usize;
    /// Entry `i`, below [`count`](Self::count).
    fn get(&self, i: usize) -> Entry<'_>;
    /// Calls `each` with name and value of every extended attribute of entry `i`.
    fn each_xattr(&self, i: usize, each: &mut dyn FnMut(&[u8], &[u8]));
    /// Calls `each` with every extent of entry `i`, by ascending file offset.
    fn each_extent(&self, i: usize, each: &mut dyn FnMut(Extent));
}

impl LayerEntries for LayerIndex {
    fn name(&self) -> String {
        self.diff_id().to_string()
    }

    fn count(&self) -> usize {
        self.entry_count()
    }

    fn get(&self, i: usize) -> Entry<'_> {
        let e = self.entry(i);
        Entry {
            path: e.path(),
            kind: e.kind(),
            mode: e.mode(),
            uid: e.uid(),
            gid: e.gid(),
            mtime: e.mtime(),
            size: e.size(),
            link: e.link(),
            rdev: e.rdev(),
        }
    }

    fn each_xattr(&self, i: usize, each: &mut dyn FnMut(&[u8], &[u8])) {
        for (name, value) in self.entry(i).xattrs() {
            each(name, value);
        }
    }

    fn each_extent(&self, i: usize, each: &mut dyn FnMut(Extent)) {
        for extent in self.entry(i).extents() {
            each(extent);
        }
    }
}
