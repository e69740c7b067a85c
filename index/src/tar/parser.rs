//! The state machine that bytes are pushed through.

use super::header::{Flavor, Header, device, text};
use super::path::{TARGET_MAX, clean};
use super::pax::{Pax, PaxSparse};
use super::sparse::{Content, HoleBudget, Map, MapReader};
use super::{BLOCK, Entry};
use crate::error::Name;
use crate::{EntryKind, Extent, IndexError, Timestamp};

/// Longest extended header or long name; Go's limit too.
const META_MAX: u64 = 1 << 20;
/// Largest file: ext4's limit, and far beyond any layer.
pub(crate) const FILE_MAX: i64 = 1 << 44;

/// Takes the entries, in archive order.
pub(crate) trait TarSink {
    /// An entry whose last byte has passed.
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError>;
}

/// What the body of a special header is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meta {
    Pax,
    LongName,
    LongLink,
}

#[derive(Debug)]
enum State {
    /// Collecting a header.
    Header,
    /// Collecting an extension block of an old GNU sparse header.
    SparseExtension(Box<Pending>),
    /// Collecting the map in front of PAX 1.0 sparse data.
    SparseMap(Box<Pending>, MapReader),
    /// Inside the body of a special header.
    Meta { kind: Meta, left: u64 },
    /// Inside a file's data.
    Body { entry: Box<Entry>, content: Box<Content>, left: u64 },
    /// Skipping padding, or the body of a global header.
    Skip { left: u64 },
    /// After one block of zeros: the second one, if there is more.
    End,
    /// After the archive: whatever follows is no entry.
    Trailing,
}

/// An entry whose sparse map is not complete yet.
#[derive(Debug)]
struct Pending {
    entry: Entry,
    map: Map,
    /// Bytes of body not read yet.
    stored: u64,
}

/// Reads a tar archive that is pushed in pieces.
#[derive(Debug)]
pub(crate) struct Parser {
    state: State,
    offset: u64,
    /// Where the header that is read now starts.
    header_at: u64,
    block: [u8; BLOCK],
    have: usize,
    meta: Vec<u8>,
    /// Padding after the current body.
    padding: u64,
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    hashed_holes: HoleBudget,
}

impl Parser {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Header,
            offset: 0,
            header_at: 0,
            block: [0; BLOCK],
            have: 0,
            meta: Vec::new(),
            padding: 0,
            pax: None,
            long_name: None,
            long_link: None,
            hashed_holes: HoleBudget::default(),
        }
    }

    /// Takes the next bytes of the archive.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], sink: &mut impl TarSink) -> Result<(), IndexError> {
        while !bytes.is_empty() {
            let n = match &mut self.state {
                State::Header | State::SparseExtension(_) | State::SparseMap(..) | State::End => {
                    let n = bytes.len().min(BLOCK - self.have);
                    self.block[self.have..self.have + n].copy_from_slice(&bytes[..n]);
                    self.have += n;
                    n
                }
                State::Meta { left, .. } => {
                    let n = at_most(bytes.len(), *left);
                    self.meta.extend_from_slice(&bytes[..n]);
                    *left -= n as u64;
                    n
                }
                State::Body { content, left, .. } => {
                    let n = at_most(bytes.len(), *left);
                    content.update(&bytes[..n]);
                    *left -= n as u64;
                    n
                }
                State::Skip { left } => {
                    let n = at_most(bytes.len(), *left);
                    *left -= n as u64;
                    n
                }
                State::Trailing => bytes.len(),
            };
            self.offset += n as u64;
            bytes = &bytes[n..];
            self.step(sink)?;
        }
        Ok(())
    }

    /// Ends the archive: an error if that is inside an entry.
    pub(crate) fn finish(&self) -> Result<(), IndexError> {
        let inside = match &self.state {
            State::Header if self.have > 0 => "a header".into(),
            State::Header if self.announced() => "an extended header whose entry is missing".into(),
            State::Header | State::End | State::Trailing => return Ok(()),
            // The data is complete, only its padding is not.
            State::Skip { left } if *left < BLOCK as u64 => return Ok(()),
            State::Skip { .. } => "a global header".into(),
            State::Meta { .. } => "an extended header".into(),
            State::SparseExtension(p) | State::SparseMap(p, _) => {
                format!("the sparse map of {}", Name::new(&p.entry.path))
            }
            State::Body { entry, .. } => format!("the data of {}", Name::new(&entry.path)),
        };
        Err(IndexError::TarTruncated { offset: self.offset, inside })
    }

    fn announced(&self) -> bool {
        self.pax.is_some() || self.long_name.is_some() || self.long_link.is_some()
    }

    /// Goes on from a state whose bytes are complete.
    fn step(&mut self, sink: &mut impl TarSink) -> Result<(), IndexError> {
        let complete = self.have == BLOCK;
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header if complete => {
                self.have = 0;
                self.header_at = self.offset - BLOCK as u64;
                self.header(sink)
            }
            State::SparseExtension(mut pending) if complete => {
                self.have = 0;
                let more = pending.map.add_old(&self.block, false).map_err(|e| refuse(&pending.entry, e))?;
                self.old_sparse(pending, more, sink)
            }
            State::SparseMap(mut pending, mut reader) if complete => {
                self.have = 0;
                pending.stored = pending
                    .stored
                    .checked_sub(BLOCK as u64)
                    .ok_or_else(|| refuse(&pending.entry, "its sparse map is longer than its data"))?;
                match reader.block(&self.block).map_err(|e| refuse(&pending.entry, e))? {
                    Some(map) => {
                        pending.map = map;
                        self.sparse_body(*pending, sink)
                    }
                    None => {
                        self.state = State::SparseMap(pending, reader);
                        Ok(())
                    }
                }
            }
            State::End if complete => {
                self.have = 0;
                if self.block.iter().any(|&c| c != 0) {
                    return Err(self.bad_header("a single block of zeros is followed by something else"));
                }
                self.state = State::Trailing;
                Ok(())
            }
            State::Meta { kind, left: 0 } => self.meta(kind),
            State::Body { mut entry, content, left: 0 } => {
                entry.content = content.finish();
                self.skip(self.padding);
                sink.entry(&entry)
            }
            State::Skip { left: 0 } => Ok(()),
            unfinished => {
                self.state = unfinished;
                Ok(())
            }
        }
    }

    fn skip(&mut self, left: u64) {
        self.state = if left == 0 { State::Header } else { State::Skip { left } };
    }

    fn bad_header(&self, reason: impl Into<String>) -> IndexError {
        IndexError::TarHeader { offset: self.header_at, reason: reason.into() }
    }

    fn header(&mut self, sink: &mut impl TarSink) -> Result<(), IndexError> {
        if self.block.iter().all(|&c| c == 0) {
            if self.announced() {
                return Err(self.bad_header("an extended header is followed by no entry"));
            }
            self.state = State::End;
            return Ok(());
        }
        let header = Header::parse(&self.block).map_err(|e| self.bad_header(e))?;
        let meta = match header.flag {
            b'x' => Some(Meta::Pax),
            b'L' => Some(Meta::LongName),
            b'K' => Some(Meta::LongLink),
            b'g' => None,
            _ => return self.entry(header, sink),
        };
        let size = u64::try_from(header.size).map_err(|_| self.bad_header("the size is negative"))?;
        self.padding = padding(size);
        let Some(kind) = meta else {
            let left =
                size.checked_add(self.padding).ok_or_else(|| self.bad_header("the size is too large"))?;
            self.skip(left);
            return Ok(());
        };
        if size > META_MAX {
            return Err(self.bad_header(format!("an extended header of {size} bytes is over {META_MAX}")));
        }
        self.meta.clear();
        if size == 0 {
            return self.meta(kind);
        }
        self.state = State::Meta { kind, left: size };
        Ok(())
    }

    /// The body of a special header is complete.
    fn meta(&mut self, kind: Meta) -> Result<(), IndexError> {
        match kind {
            Meta::Pax => self.pax = Some(Pax::parse(&self.meta).map_err(|e| self.bad_header(e))?),
            Meta::LongName => self.long_name = Some(text(&self.meta).to_vec()),
            Meta::LongLink => self.long_link = Some(text(&self.meta).to_vec()),
        }
        self.meta.clear();
        self.meta.shrink_to(4096);
        self.skip(self.padding);
        Ok(())
    }

    fn entry(&mut self, header: Header, sink: &mut impl TarSink) -> Result<(), IndexError> {
        let pax = self.pax.take().unwrap_or_default();
        let long_name = self.long_name.take().filter(|n| !n.is_empty());
        let long_link = self.long_link.take().filter(|n| !n.is_empty());
        let link = long_link.or(pax.link).unwrap_or(header.link);
        let mut name = long_name.or(pax.path).unwrap_or(header.name);
        let flag = match header.flag {
            // Archives older than ustar mark directories by a trailing slash only.
            0 if name.ends_with(b"/") => b'5',
            b'0' if header.flavor == Flavor::V7 && name.ends_with(b"/") => b'5',
            0 | b'7' => b'0',
            flag => flag,
        };
        if let (b'0', Some(sparse)) = (flag, &pax.sparse.name) {
            name.clone_from(sparse);
        }
        let fail = |reason: String| IndexError::Entry { name: Name::new(&name), reason };
        let id = |what, value: i64| match u32::try_from(value) {
            // The highest number means "no id" to the kernel.
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(fail(format!("the {what} {value} is out of range"))),
        };
        let mut entry = Entry {
            path: clean(&name).map_err(fail)?,
            kind: EntryKind::File,
            mode: header.mode,
            uid: id("uid", pax.uid.unwrap_or(header.uid))?,
            gid: id("gid", pax.gid.unwrap_or(header.gid))?,
            mtime: pax.mtime.unwrap_or(Timestamp { secs: header.mtime, nanos: 0 }),
            size: 0,
            link: Vec::new(),
            rdev: (0, 0),
            xattrs: pax.xattrs,
            extents: Vec::new(),
            content: None,
        };
        let size = pax.size.unwrap_or(header.size);
        match flag {
            b'0' | b'S' => return self.file(entry, flag, header.flavor, size, &pax.sparse, sink),
            b'1' => {
                entry.kind = EntryKind::Hardlink;
                entry.link = clean(&link).map_err(|e| fail(format!("bad hard link target: {e}")))?;
                if entry.link.is_empty() {
                    return Err(fail("its hard link target is the root directory".into()));
                }
            }
            b'2' => {
                entry.kind = EntryKind::Symlink;
                if link.is_empty() || link.len() > TARGET_MAX || link.contains(&0) {
                    return Err(fail(format!("its symbolic link target has {} bytes or a NUL", link.len())));
                }
                entry.link = link;
            }
            b'3' | b'4' => {
                entry.kind = if flag == b'3' { EntryKind::CharDevice } else { EntryKind::BlockDevice };
                entry.rdev = device(&self.block, header.flavor).map_err(fail)?;
            }
            b'5' => entry.kind = EntryKind::Directory,
            b'6' => entry.kind = EntryKind::Fifo,
            other => {
                return Err(fail(format!("entries of type '{}' are not supported", other.escape_ascii())));
            }
        }
        if entry.path.is_empty() && entry.kind != EntryKind::Directory {
            return Err(fail("the name means the root, but the entry is no directory".into()));
        }
        sink.entry(&entry)
    }

    fn file(
        &mut self,
        mut entry: Entry,
        flag: u8,
        flavor: Flavor,
        size: i64,
        sparse: &PaxSparse,
        sink: &mut impl TarSink,
    ) -> Result<(), IndexError> {
        if entry.path.is_empty() {
            return Err(refuse(&entry, "the name means the root, but the entry is no directory"));
        }
        let stored = limit(size).map_err(|e| refuse(&entry, e))?;
        self.padding = padding(stored);
        if flag == b'S' {
            if flavor != Flavor::Gnu {
                return Err(refuse(&entry, "an old GNU sparse entry has no GNU header"));
            }
            let size = Map::old_size(&self.block).map_err(|e| refuse(&entry, e))?;
            entry.size = limit(size).map_err(|e| refuse(&entry, e))?;
            let mut map = Map::default();
            let more = map.add_old(&self.block, true).map_err(|e| refuse(&entry, e))?;
            return self.old_sparse(Box::new(Pending { entry, map, stored }), more, sink);
        }
        let version = match (sparse.major, sparse.minor) {
            (Some(1), Some(0)) => true,
            (None | Some(0), None | Some(0 | 1)) => false,
            (major, minor) => {
                let (major, minor) = (major.unwrap_or(0), minor.unwrap_or(0));
                return Err(refuse(&entry, format!("GNU.sparse version {major}.{minor} is not known")));
            }
        };
        if version {
            let size = sparse.size.ok_or_else(|| refuse(&entry, "GNU.sparse.realsize is missing"))?;
            entry.size = limit(size).map_err(|e| refuse(&entry, e))?;
            let pending = Box::new(Pending { entry, map: Map::default(), stored });
            self.state = State::SparseMap(pending, MapReader::default());
            return Ok(());
        }
        if let Some(numbers) = &sparse.map {
            let size = sparse.size.ok_or_else(|| refuse(&entry, "GNU.sparse.size is missing"))?;
            entry.size = limit(size).map_err(|e| refuse(&entry, e))?;
            let map = Map::from_numbers(numbers).map_err(|e| refuse(&entry, e))?;
            return self.sparse_body(Pending { entry, map, stored }, sink);
        }
        entry.size = stored;
        if stored > 0 {
            entry.extents.push(Extent { file_offset: 0, layer_offset: self.offset, len: stored });
        }
        self.body(entry, stored, false, sink)
    }

    fn old_sparse(
        &mut self,
        pending: Box<Pending>,
        more: bool,
        sink: &mut impl TarSink,
    ) -> Result<(), IndexError> {
        if more {
            self.state = State::SparseExtension(pending);
            return Ok(());
        }
        self.sparse_body(*pending, sink)
    }

    /// The map of a sparse file is complete and its data begins.
    fn sparse_body(&mut self, pending: Pending, sink: &mut impl TarSink) -> Result<(), IndexError> {
        let Pending { mut entry, map, stored } = pending;
        entry.extents = map.extents(entry.size, stored, self.offset).map_err(|e| refuse(&entry, e))?;
        self.body(entry, stored, true, sink)
    }

    fn body(
        &mut self,
        mut entry: Entry,
        stored: u64,
        sparse: bool,
        sink: &mut impl TarSink,
    ) -> Result<(), IndexError> {
        let content = Content::new(entry.size, &entry.extents, sparse, self.offset, &mut self.hashed_holes);
        if stored == 0 {
            entry.content = content.finish();
            self.skip(self.padding);
            return sink.entry(&entry);
        }
        self.state = State::Body { entry: Box::new(entry), content: Box::new(content), left: stored };
        Ok(())
    }
}

fn at_most(len: usize, left: u64) -> usize {
    usize::try_from(left).map_or(len, |left| left.min(len))
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn limit(size: i64) -> Result<u64, String> {
    match u64::try_from(size) {
        Ok(value) if size <= FILE_MAX => Ok(value),
        _ => Err(format!("the size {size} is out of range")),
    }
}

fn refuse(entry: &Entry, reason: impl Into<String>) -> IndexError {
    IndexError::Entry { name: Name::new(&entry.path), reason: reason.into() }
}
