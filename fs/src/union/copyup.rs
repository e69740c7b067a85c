//! Copy-up: a file of a lower layer is made anew in the upper one, complete before it appears.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags};
use nix::sys::stat::{FileStat, Mode, SFlag, mkdirat, mknodat};
use nix::sys::time::TimeSpec;
use nix::unistd::{fdatasync, symlinkat};

use super::node::{Key, Node, Part, UPPER, key_of};
use super::sys::{Dir, Real, Result, kind_of, rename, to_c};
use super::whiteout::Temp;
use super::{Union, data};

impl Union {
    /// Sees to it that the file is in the upper layer.
    pub(super) fn copy_up(&self, node: &Arc<Node>) -> Result<()> {
        self.copy_up_data(node, None)
    }

    /// As [`copy_up`](Self::copy_up), with only the first `size` bytes of contents.
    pub(super) fn copy_up_data(&self, node: &Arc<Node>, size: Option<u64>) -> Result<()> {
        self.work()?;
        if node.is_upper() {
            return Ok(());
        }
        let _changing = node.changing();
        self.copy_up_changing(node, size)
    }

    /// Copy-up by somebody who holds the node's lock for changes.
    pub(super) fn copy_up_changing(&self, node: &Arc<Node>, size: Option<u64>) -> Result<()> {
        self.work()?;
        if node.is_upper() {
            return Ok(());
        }
        let parent = node.parent().ok_or(Errno::EROFS)?;
        let gone = node.read().gone;
        if !gone {
            self.copy_up(&parent)?;
        }
        if node.is_dir() {
            if gone {
                return Err(Errno::ENOENT);
            }
            return self.copy_up_dir(node, &parent);
        }
        let (temp, key) = node.with(|lower| self.copy_file(lower, size))?;
        // Whoever sees the new file must find the node by it.
        self.table.lock().set_copied(key, node.id);
        if node.id != node.ino() {
            // One of several names of a lower file: it parts from them.
            node.set_ino(self.number(key));
        }
        if gone {
            return self.adopt_nameless(node, &temp, key);
        }
        let upper = parent.upper_dir()?;
        let before = Real::Held(Arc::clone(&upper)).stat()?;
        let mut state = node.write();
        rename((&temp.work, &temp.name), (&upper, &state.name), RenameFlags::RENAME_NOREPLACE)?;
        temp.keep();
        state.layer = UPPER;
        state.key = key;
        let name = state.name.clone();
        drop(state);
        self.table.lock().unname(parent.id, &name);
        restore_times(&upper, &before);
        Ok(())
    }

    /// A file without a name: its copy gets none either.
    fn adopt_nameless(&self, node: &Node, temp: &Temp, key: Key) -> Result<()> {
        let held = temp.real().hold()?;
        let mut state = node.write();
        state.held = Some(held);
        state.layer = UPPER;
        state.key = key;
        Ok(())
    }

    fn copy_up_dir(&self, node: &Arc<Node>, parent: &Node) -> Result<()> {
        let upper = parent.upper_dir()?;
        let before = Real::Held(Arc::clone(&upper)).stat()?;
        let lower = Real::Held(self.part(node, 0)?.0);
        let stat = lower.stat()?;
        let temp = self.temp()?;
        mkdirat(&*temp.work, temp.name.as_c_str(), Mode::S_IRWXU)?;
        self.copy_attributes(&lower, &temp.real(), &stat)?;
        let new = temp.real().stat()?;
        let fd = super::sys::open_dir(&temp.work, &temp.name)?;
        let mut state = node.write();
        rename((&temp.work, &temp.name), (&upper, &state.name), RenameFlags::RENAME_NOREPLACE)?;
        temp.keep();
        state.parts.insert(0, Part { layer: UPPER, fd: Some(fd), xwhiteouts: false, at: None });
        state.key = key_of(&new);
        drop(state);
        restore_times(&upper, &before);
        Ok(())
    }

    /// Makes a copy of what is no directory in the work directory.
    fn copy_file(&self, lower: &Real, size: Option<u64>) -> Result<(Temp, Key)> {
        let stat = lower.stat()?;
        let temp = self.temp()?;
        let (work, name) = (&*temp.work, temp.name.as_c_str());
        match kind_of(&stat) {
            libc::S_IFREG => {
                let to = create(work, &temp.name)?;
                self.copy_contents(lower, &to, &stat, size)?;
            }
            libc::S_IFLNK => {
                let target = to_c(lower.read_link()?);
                symlinkat(target.as_c_str(), work, name)?;
            }
            kind => {
                let kind = SFlag::from_bits_truncate(kind);
                mknodat(work, name, kind, Mode::empty(), stat.st_rdev)?;
            }
        }
        self.copy_attributes(lower, &temp.real(), &stat)?;
        let key = key_of(&temp.real().stat()?);
        Ok((temp, key))
    }

    fn copy_contents(&self, lower: &Real, to: &OwnedFd, stat: &FileStat, size: Option<u64>) -> Result<()> {
        let whole = u64::try_from(stat.st_size).unwrap_or(0);
        let size = size.map_or(whole, |s| s.min(whole));
        if size == 0 {
            return Ok(());
        }
        let from = open_lower(lower)?;
        data::copy(&from, to, size, size == whole)?;
        // The name must not appear on the disk before the contents.
        if self.config.volatile { Ok(()) } else { fdatasync(to) }
    }

    /// Owner, attributes, flags, mode and times, in the order in which none undoes another.
    fn copy_attributes(&self, from: &Real, to: &Real, stat: &FileStat) -> Result<()> {
        if (stat.st_uid, stat.st_gid) != self.own {
            to.chown(Some(stat.st_uid), Some(stat.st_gid))?;
        }
        let link = kind_of(stat) == libc::S_IFLNK;
        for name in self.xattrs_to_copy(from)? {
            let Some(value) = from.xattr(&name)? else { continue };
            match to.set_xattr(&name, &value, 0) {
                // Labels are the security module's business.
                Err(Errno::EOPNOTSUPP | Errno::EPERM) if name.as_bytes().starts_with(b"security.") => {}
                other => other?,
            }
        }
        self.copy_flags(from, to, stat);
        if !link {
            to.chmod(stat.st_mode)?;
        }
        let (atime, mtime) = times(stat);
        to.set_times(&atime, &mtime)
    }

    /// Names of the attributes that go with a file: all but overlayfs's own marks.
    fn xattrs_to_copy(&self, from: &Real) -> Result<Vec<CString>> {
        let list = match from.list_xattr() {
            Err(Errno::EOPNOTSUPP) => return Ok(Vec::new()),
            other => other?,
        };
        let names = list.split(|b| *b == 0).filter(|n| !n.is_empty());
        Ok(names.filter(|n| !self.is_mark(n)).map(|n| to_c(n.to_vec())).collect())
    }
}

/// Opens a lower file for reading, without a trace if we may.
pub(super) fn open_lower(lower: &Real) -> Result<OwnedFd> {
    match lower.open(OFlag::O_RDONLY | OFlag::O_NOATIME) {
        Err(Errno::EPERM) => lower.open(OFlag::O_RDONLY),
        other => other,
    }
}

fn create(work: &OwnedFd, name: &CString) -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::openat(work, name.as_c_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)
}

fn times(stat: &FileStat) -> (TimeSpec, TimeSpec) {
    (TimeSpec::new(stat.st_atime, stat.st_atime_nsec), TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec))
}

/// A directory does not look changed because something in it was copied up.
pub(super) fn restore_times(dir: &Dir, before: &FileStat) {
    let (atime, mtime) = times(before);
    // Only the looks: nothing is lost if it fails.
    let _ = Real::Held(Arc::clone(dir)).set_times(&atime, &mtime);
}
