//! Files in the making and whiteouts, all in the work directory until they are renamed into place.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::dir::Dir as ReadDir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags};
use nix::sys::stat::{Mode, SFlag, mknodat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::Union;
use super::sys::{Dir, Real, Result, is_dir, is_whiteout, rename, stat_at, to_c};

/// The whiteout that all others are hard links of.
const SHARED: &CStr = c"#whiteout";

/// A name in the work directory that is removed unless it was renamed away.
pub(super) struct Temp {
    pub(super) work: Dir,
    pub(super) name: CString,
    kept: bool,
}

impl Temp {
    /// The file was renamed into place.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }

    pub(super) fn real(&self) -> Real {
        Real::named(&self.work, &self.name)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.kept {
            // What can't be removed now is removed when the work directory is opened the next time.
            let _ = remove_tree(&self.work, &self.name);
        }
    }
}

impl Union {
    /// A new name in the work directory.
    pub(super) fn temp(&self) -> Result<Temp> {
        let n = self.temp.fetch_add(1, Ordering::Relaxed);
        let work = Arc::clone(self.work.as_ref().ok_or(Errno::EROFS)?);
        Ok(Temp { work, name: to_c(format!("#{n:x}").into_bytes()), kept: false })
    }

    /// Hides a name: whatever the upper layer has there is replaced by a whiteout, at once.
    pub(super) fn put_whiteout(&self, dir: &OwnedFd, name: &CStr) -> Result<()> {
        let Some(there) = stat_at(dir, name)? else { return self.link_whiteout(dir, name) };
        let temp = self.temp()?;
        self.link_whiteout(&temp.work, &temp.name)?;
        let flags = if is_dir(&there) { RenameFlags::RENAME_EXCHANGE } else { RenameFlags::empty() };
        rename((&temp.work, &temp.name), (dir, name), flags)?;
        if !is_dir(&there) {
            temp.keep();
        }
        Ok(())
    }

    fn link_whiteout(&self, dir: &OwnedFd, name: &CStr) -> Result<()> {
        let work = self.work()?;
        for _ in 0..16 {
            match linkat(work, SHARED, dir, name, AtFlags::empty()) {
                // Too many links, or none yet: make another one.
                Err(Errno::EMLINK) => {
                    let _ = unlinkat(work, SHARED, UnlinkatFlags::NoRemoveDir);
                }
                Err(Errno::ENOENT) => {}
                other => return other,
            }
            match mknodat(work, SHARED, SFlag::S_IFCHR, Mode::empty(), 0) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e),
            }
        }
        mknodat(dir, name, SFlag::S_IFCHR, Mode::empty(), 0)
    }

    /// Whether the upper layer has a whiteout there.
    pub(super) fn whiteout_at(&self, dir: &OwnedFd, name: &CStr) -> Result<bool> {
        Ok(stat_at(dir, name)?.is_some_and(|st| is_whiteout(&st)))
    }

    /// Says that nothing of lower layers is in a directory.
    pub(super) fn set_opaque(&self, dir: &Real) -> Result<()> {
        dir.set_xattr(self.opaque, b"y", 0)
    }
}

/// Removes a name with all that is below it, following nothing. Meant for directories of whiteouts.
pub(super) fn remove_tree(dir: &OwnedFd, name: &CStr) -> Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => {}
        other => return other,
    }
    match unlinkat(dir, name, UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
        other => return other,
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut list = ReadDir::openat(dir, name, flags, Mode::empty())?;
    let names: Vec<CString> = list
        .iter()
        .filter_map(|e| e.ok().map(|e| e.file_name().to_owned()))
        .filter(|n| n.as_bytes() != b"." && n.as_bytes() != b"..")
        .collect();
    let inner = super::sys::open_dir(dir, name)?;
    for name in names {
        remove_tree(&inner, &name)?;
    }
    unlinkat(dir, name, UnlinkatFlags::RemoveDir)
}
