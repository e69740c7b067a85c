//! What a view says about one file.

use lazyrun_index::Timestamp;

/// Number of an inode in its view; 0 is the root.
pub type Ino = u32;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

impl Kind {
    /// The file type bits of `st_mode`.
    pub fn mode_bits(self) -> u32 {
        match self {
            Kind::File => 0o100_000,
            Kind::Directory => 0o040_000,
            Kind::Symlink => 0o120_000,
            Kind::CharDevice => 0o020_000,
            Kind::BlockDevice => 0o060_000,
            Kind::Fifo => 0o010_000,
        }
    }
}

/// Contents of a file that lie in one piece in one layer file. What no extent covers is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExtent {
    /// The layer, 0 at the bottom.
    pub layer: u16,
    /// Where in the file, in bytes.
    pub file_offset: u64,
    /// Where in the layer file, in bytes.
    pub layer_offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// The extents of a file, by ascending offset; a slice in all but memory, for nearly all files have one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents(Repr);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Repr {
    #[default]
    None,
    One(LayerExtent),
    Many(Box<[LayerExtent]>),
}

impl From<&[LayerExtent]> for Extents {
    fn from(list: &[LayerExtent]) -> Self {
        Extents(match list {
            [] => Repr::None,
            [one] => Repr::One(*one),
            many => Repr::Many(many.into()),
        })
    }
}

impl std::ops::Deref for Extents {
    type Target = [LayerExtent];

    fn deref(&self) -> &[LayerExtent] {
        match &self.0 {
            Repr::None => &[],
            Repr::One(one) => std::slice::from_ref(one),
            Repr::Many(many) => many,
        }
    }
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name, namespace included, as the image has it: see [`escaped`](super::escaped) before serving it
    /// below an overlay.
    pub name: Box<[u8]>,
    /// Value.
    pub value: Box<[u8]>,
}

/// A file of the view. Names of one hard link group share an inode.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Type.
    pub kind: Kind,
    /// Permission bits, 07777.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Names of the inode in the view; of a directory 2 and one per subdirectory.
    pub nlink: u32,
    /// Device number of a device node: major, minor.
    pub rdev: (u32, u32),
    /// Modification time.
    pub mtime: Timestamp,
    /// Bytes of a regular file or of a symlink's target, 0 otherwise.
    pub size: u64,
    /// A symlink's target.
    pub target: Box<[u8]>,
    /// Extended attributes, sorted by name.
    pub xattrs: Box<[Xattr]>,
    /// Where a regular file's contents are.
    pub extents: Extents,
    /// Of a directory: where its names are.
    pub(super) first_name: u32,
    pub(super) names: u32,
    /// Of a directory: the directory it lies in.
    pub(super) parent: Ino,
}

#[cfg(test)]
impl Inode {
    /// A regular file, for tests of what reads views.
    pub(crate) fn for_test(size: u64, extents: &[LayerExtent]) -> Inode {
        Inode { kind: Kind::File, size, extents: extents.into(), ..super::finish::implicit() }
    }
}
