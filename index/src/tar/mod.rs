//! The tar reader: v7, ustar, GNU and PAX archives (POSIX.1-2001 pax, GNU tar manual "Basic Tar Format").
//!
//! Bytes are pushed in as they come; entries come out as soon as their last byte has passed. Where readers
//! differ, the choices follow Go's `archive/tar`, which containerd and docker unpack with:
//! a GNU long name wins over a PAX path, the last of several PAX headers replaces those before,
//! global PAX headers are ignored, links, devices and directories have no body whatever their size field says.

mod header;
mod parser;
mod path;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

pub(crate) use header::{Header, check_device};
pub(crate) use parser::{FILE_MAX, Parser, TarSink};
pub(crate) use path::{TARGET_MAX, check_clean, clean};
pub(crate) use pax::{Pax, XATTR_NAME_MAX, XATTR_VALUE_MAX, XATTRS_MAX};
pub(crate) use sparse::PIECES_MAX;

use crate::builder::NewEntry;
use crate::{Digest, EntryKind, Extent, Timestamp};

/// Size of headers and the unit that bodies are padded to.
pub(crate) const BLOCK: usize = 512;

/// An entry as read from the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) size: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) rdev: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) extents: Vec<Extent>,
    pub(crate) content: Option<Digest>,
}

impl Entry {
    /// The extended attributes for [`Entry::view`].
    pub(crate) fn xattr_refs(&self) -> Vec<(&[u8], &[u8])> {
        self.xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect()
    }

    /// The entry as writers and comparers take it.
    pub(crate) fn view<'a>(&'a self, xattrs: &'a [(&'a [u8], &'a [u8])]) -> NewEntry<'a> {
        NewEntry {
            path: &self.path,
            kind: self.kind,
            mode: self.mode.into(),
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            size: self.size,
            link: &self.link,
            rdev: self.rdev,
            xattrs,
            extents: &self.extents,
            content: self.content,
        }
    }
}
