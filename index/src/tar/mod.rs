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

pub(crate) use parser::{Parser, TarSink};
pub(crate) use path::check_clean;

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
