//! Walks an upper directory of overlayfs and writes what it says as a layer.
//!
//! A container may be changing it meanwhile: each file is opened by one name below an open directory, never through a
//! symlink, and all that is said of it comes from that descriptor.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use nix::dir::Dir;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat};
use tar::EntryType;

use super::archive::{Archive, Meta, Time};
use super::error::{DiffError, shown};

/// Deeper trees have paths that nothing can unpack.
const MAX_DEPTH: usize = 2048;
/// What overlayfs says of a file in its upper directory.
const PRIVATE: &str = "trusted.overlay.";
/// How a container's own attributes of that name are kept (Linux 6.7).
const ESCAPED: &str = "trusted.overlay.overlay.";
/// Xattrs of 64 KiB and lists of them as long are the kernel's limit.
const MAX_XATTR: usize = 64 << 10;

type Result<T> = std::result::Result<T, DiffError>;
type Xattrs = Vec<(String, Vec<u8>)>;

/// Writes the layer that an upper directory makes.
///
/// # Errors
/// [`DiffError::NotOurs`] when the directory alone does not say it all, others when it can't be read or written.
pub(super) fn write<W: Write>(upper: &Path, archive: &mut Archive<W>) -> Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = open(upper, flags, Mode::empty()).map_err(|e| DiffError::read("open", b"", e))?;
    let (xattrs, opaque) = xattrs(&root, b"")?;
    drop(xattrs);
    let mut walk = Walk { archive, links: HashMap::new() };
    if opaque {
        let stat = fstat(&root).map_err(|e| DiffError::read("look at", b"", e))?;
        walk.archive.whiteout(b".wh..wh..opq", mtime(&stat))?;
    }
    // Attributes of the root itself are the snapshot's, not the container's doing: no layer has them.
    walk.all(Open::new(root, Vec::new())?)
}

struct Walk<'a, W: Write> {
    archive: &'a mut Archive<W>,
    // The first name of each file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
}

/// A directory that is being walked.
struct Open {
    fd: OwnedFd,
    path: Vec<u8>,
    // The last one is next.
    names: Vec<CString>,
}

impl Open {
    fn new(fd: OwnedFd, path: Vec<u8>) -> Result<Self> {
        let failed = |e: nix::Error| DiffError::read("list", &path, e);
        // A descriptor of its own: `Dir` closes it.
        let own = openat(&fd, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let mut dir = own.and_then(Dir::from_fd).map_err(failed)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let name = entry.map_err(failed)?.file_name().to_owned();
            if !matches!(name.as_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        // The same directory makes the same layer.
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Self { fd, path, names })
    }

    fn child(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() { name.to_vec() } else { [&self.path, b"/".as_slice(), name].concat() }
    }
}

impl<W: Write> Walk<'_, W> {
    fn all(&mut self, root: Open) -> Result<()> {
        let mut open = vec![root];
        while let Some(dir) = open.last_mut() {
            let Some(name) = dir.names.pop() else {
                open.pop();
                continue;
            };
            if let Some(below) = self.entry(dir, &name)? {
                if open.len() == MAX_DEPTH {
                    let deepest = shown(&below.path[..below.path.len().min(200)]);
                    return Err(DiffError::Impossible(format!("{deepest}… lies too deep for a layer")));
                }
                open.push(below);
            }
        }
        Ok(())
    }

    /// Writes one entry; returns it if it is a directory.
    fn entry(&mut self, dir: &Open, name: &CStr) -> Result<Option<Open>> {
        let path = dir.child(name.to_bytes());
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&dir.fd, name, flags, Mode::empty());
        let fd = match fd {
            // Deleted since the directory was listed, by a container that nobody paused.
            Err(nix::Error::ENOENT) => return Ok(None),
            fd => fd.map_err(|e| DiffError::read("open", &path, e))?,
        };
        let stat = fstat(&fd).map_err(|e| DiffError::read("look at", &path, e))?;
        let kind = stat.st_mode & libc::S_IFMT;
        if kind == libc::S_IFCHR && stat.st_rdev == 0 {
            let hidden = [b".wh.", name.to_bytes()].concat();
            self.archive.whiteout(&dir.child(&hidden), mtime(&stat))?;
            return Ok(None);
        }
        if name.to_bytes().starts_with(b".wh.") {
            return Err(DiffError::Impossible(format!(
                "{} can't be in a layer: names that begin with .wh. mean deleted files; rename or delete it",
                shown(&path)
            )));
        }
        let (xattrs, opaque) = xattrs(&fd, &path)?;
        let meta = Meta { path: &path, stat: &stat, xattrs: &xattrs };
        if kind == libc::S_IFDIR {
            self.archive.bare(&meta, EntryType::Directory)?;
            if opaque {
                self.archive.whiteout(&[&path, b"/.wh..wh..opq".as_slice()].concat(), mtime(&stat))?;
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let fd = openat(&fd, ".", flags, Mode::empty());
            return Open::new(fd.map_err(|e| DiffError::read("open", &path, e))?, path).map(Some);
        }
        self.file(&meta, &fd, kind)?;
        Ok(None)
    }

    fn file(&mut self, meta: &Meta<'_>, fd: &OwnedFd, kind: u32) -> Result<()> {
        // A socket is nothing without the process that listens.
        if kind == libc::S_IFSOCK {
            return Ok(());
        }
        if meta.stat.st_nlink > 1 {
            let inode = (meta.stat.st_dev, meta.stat.st_ino);
            if let Some(first) = self.links.get(&inode) {
                // With its attributes: who unpacks sets the owner once more, and that clears capabilities.
                return Ok(self.archive.link(meta, EntryType::Link, first)?);
            }
            self.links.insert(inode, meta.path.to_vec());
        }
        match kind {
            libc::S_IFREG => self.regular(meta, fd),
            libc::S_IFLNK => {
                let target =
                    readlinkat(fd, c"").map_err(|e| DiffError::read("read the link", meta.path, e))?;
                Ok(self.archive.link(meta, EntryType::Symlink, &target.into_vec())?)
            }
            libc::S_IFCHR => Ok(self.archive.bare(meta, EntryType::Char)?),
            libc::S_IFBLK => Ok(self.archive.bare(meta, EntryType::Block)?),
            _ => Ok(self.archive.bare(meta, EntryType::Fifo)?),
        }
    }

    fn regular(&mut self, meta: &Meta<'_>, fd: &OwnedFd) -> Result<()> {
        let file = File::open(fd_path(fd)).map_err(|e| DiffError::read("open", meta.path, e))?;
        self.archive.file(meta, &file).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => DiffError::Write(error),
            _ => DiffError::read("read", meta.path, error),
        })
    }
}

fn mtime(stat: &FileStat) -> Time {
    Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec }
}

// By this path a call reaches what a descriptor refers to, whatever it is: also a symlink itself.
fn fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The xattrs of a file that belong into a layer, sorted, and whether overlayfs calls the directory opaque.
fn xattrs(fd: &OwnedFd, path: &[u8]) -> Result<(Xattrs, bool)> {
    let at = fd_path(fd);
    let (mut found, mut opaque) = (Vec::new(), false);
    let names = match grow(|buffer| rustix::fs::listxattr(&at, buffer)) {
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok((found, false)),
        names => names.map_err(|e| DiffError::read("list the xattrs of", path, e))?,
    };
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // Others can't be written as a record of PAX.
        let Some(name) = std::str::from_utf8(name).ok().filter(|name| !name.contains('=')) else { continue };
        let kept = kept_as(name);
        if kept.is_none() && !name.starts_with(PRIVATE) {
            continue;
        }
        let value = match grow(|buffer| rustix::fs::getxattr(&at, name, buffer)) {
            Err(rustix::io::Errno::NODATA) => continue,
            value => value.map_err(|e| DiffError::read("read an xattr of", path, e))?,
        };
        match kept {
            Some(kept) => found.push((kept, value)),
            None => opaque |= means_opaque(name, &value, path)?,
        }
    }
    found.sort_unstable();
    Ok((found, opaque))
}

/// The name of an xattr in the layer; `None` for one that stays on this machine.
fn kept_as(name: &str) -> Option<String> {
    if let Some(own) = name.strip_prefix(ESCAPED) {
        return Some(format!("{PRIVATE}{own}"));
    }
    // Labels of SELinux are the host's policy.
    (!name.starts_with(PRIVATE) && name != "security.selinux").then(|| name.to_owned())
}

/// Whether what overlayfs says of a directory is that it is opaque.
fn means_opaque(name: &str, value: &[u8], path: &[u8]) -> Result<bool> {
    match (&name[PRIVATE.len()..], value) {
        ("opaque", b"y") => Ok(true),
        // Content that lies elsewhere, or whiteouts of another form: told by walking through the mount only.
        ("redirect" | "metacopy" | "whiteout" | "opaque", _) => {
            Err(DiffError::not_ours(format!("{} has the attribute {name}", shown(path))))
        }
        _ => Ok(false),
    }
}

fn grow(
    read: impl Fn(&mut [u8]) -> std::result::Result<usize, rustix::io::Errno>,
) -> std::result::Result<Vec<u8>, rustix::io::Errno> {
    let mut small = [0; 256];
    match read(&mut small) {
        Err(rustix::io::Errno::RANGE) => {}
        len => return len.map(|len| small[..len].to_vec()),
    }
    let mut buffer = vec![0; MAX_XATTR];
    let len = read(&mut buffer)?;
    buffer.truncate(len);
    Ok(buffer)
}
