//! Changing attributes.

use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::time::TimeSpec;
use nix::unistd::ftruncate;

use super::create::Caller;
use super::lookup::Attr;
use super::node::Node;
use super::sys::{Real, Result};
use super::{OpenFile, Union};

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// The present.
    Now,
    /// Seconds and nanoseconds since 1970.
    At(i64, u32),
}

/// The attributes to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size of a regular file.
    pub size: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of last modification.
    pub mtime: Option<SetTime>,
}

impl Union {
    /// Changes attributes; `file` is the open file it was asked through, if any.
    pub fn set_attr(
        &self,
        node: &Arc<Node>,
        set: &SetAttr,
        file: Option<&OpenFile>,
        caller: Caller,
    ) -> Result<Attr> {
        match set.size {
            Some(size) => self.copy_up_data(node, Some(size))?,
            None => self.copy_up(node)?,
        }
        if node.is_dir() {
            apply(&Real::Held(self.part(node, 0)?.0), set, file, caller)?;
        } else {
            node.with(|real| apply(real, set, file, caller))?;
        }
        self.attr(node)
    }
}

fn apply(real: &Real, set: &SetAttr, file: Option<&OpenFile>, caller: Caller) -> Result<()> {
    if let Some(size) = set.size {
        let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
        match file.and_then(OpenFile::writable) {
            Some(fd) => ftruncate(fd, size)?,
            None => ftruncate(real.open(OFlag::O_WRONLY | OFlag::O_NONBLOCK)?, size)?,
        }
        if set.mode.is_none() {
            drop_set_ids(real, caller)?;
        }
    }
    if set.uid.is_some() || set.gid.is_some() {
        real.chown(set.uid, set.gid)?;
    }
    if let Some(mode) = set.mode {
        real.chmod(mode)?;
    }
    if set.atime.is_some() || set.mtime.is_some() {
        let time = |t: Option<SetTime>| match t {
            None => TimeSpec::UTIME_OMIT,
            Some(SetTime::Now) => TimeSpec::UTIME_NOW,
            Some(SetTime::At(s, ns)) => TimeSpec::new(s, i64::from(ns)),
        };
        real.set_times(&time(set.atime), &time(set.mtime))?;
    }
    Ok(())
}

/// Contents changed: takes the set-id bits away, unless the caller may keep them. We may, so the filesystem does
/// not do it.
pub(super) fn drop_set_ids(real: &Real, caller: Caller) -> Result<()> {
    let mode = real.stat()?.st_mode;
    let mut keep = mode & 0o7777 & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        keep &= !libc::S_ISGID;
    }
    if keep == mode & 0o7777 || may_keep_set_ids(caller) {
        return Ok(());
    }
    real.chmod(keep)
}

/// Whether the caller has `CAP_FSETID`. Rarely asked: only for files that have such bits.
fn may_keep_set_ids(caller: Caller) -> bool {
    const CAP_FSETID: u64 = 4;
    let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", caller.pid)) else { return false };
    let caps = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    caps.and_then(|c| u64::from_str_radix(c.trim(), 16).ok()).is_some_and(|c| c & 1 << CAP_FSETID != 0)
}
