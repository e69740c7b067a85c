//! New names: files, directories, symlinks, device nodes, hard links.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};

use super::lookup::{Attr, Found, Merging};
use super::node::{Node, Part, UPPER};
use super::sys::{Dir, Real, Result, is_dir, rename, to_c};
use super::whiteout::Temp;
use super::{OpenFile, Union};

const DEFAULT_ACL: &CStr = c"system.posix_acl_default";

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User that new files belong to.
    pub uid: u32,
    /// Group that new files belong to.
    pub gid: u32,
    /// Process, 0 if unknown.
    pub pid: u32,
}

/// What to make, if not a file to be opened.
#[derive(Clone, Copy, Debug)]
pub enum New<'a> {
    /// A directory.
    Directory,
    /// A symlink to that target.
    Symlink(&'a CStr),
    /// Anything else: type bits of the mode, and device number.
    Special(u32, u64),
}

/// Mode and owner that a new file gets.
#[derive(Clone, Copy)]
struct Birth {
    mode: u32,
    uid: u32,
    gid: u32,
    /// New directories are set-group-id as the one they are in.
    inherits: bool,
    /// The directory has a default ACL, which the filesystem itself heeds.
    acl: bool,
}

impl Union {
    /// Makes a file that is not opened. `mode` is what the caller asked for, `umask` is applied here unless the
    /// directory has a default ACL.
    pub fn make(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        new: New<'_>,
        (mode, umask): (u32, u32),
        caller: Caller,
    ) -> Result<(Arc<Node>, Attr)> {
        if let New::Special(libc::S_IFCHR, 0) = new {
            // It would be a whiteout.
            return Err(Errno::EPERM);
        }
        let directory = matches!(new, New::Directory);
        self.place(parent, name, directory, (mode, umask), caller, |dir, name, mode| {
            let mode = Mode::from_bits_truncate(mode & 0o7777);
            match new {
                New::Directory => mkdirat(dir, name, mode),
                New::Symlink(target) => symlinkat(target, dir, name),
                New::Special(kind, rdev) => mknodat(dir, name, SFlag::from_bits_truncate(kind), mode, rdev),
            }
        })?;
        self.enter_new(parent, name)
    }

    /// Makes a regular file and opens it. `flags` are those of open(2).
    pub fn create(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        (mode, umask): (u32, u32),
        flags: i32,
        caller: Caller,
    ) -> Result<(Arc<Node>, Attr, OpenFile)> {
        let flags = OFlag::from_bits_truncate(flags) & super::file::KEPT_FLAGS;
        let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = self.place(parent, name, false, (mode, umask), caller, |dir, name, mode| {
            openat(dir, name, flags, Mode::from_bits_truncate(mode & 0o7777))
        })?;
        let (node, attr) = self.enter_new(parent, name)?;
        let file = OpenFile::upper(Arc::clone(&node), fd, flags);
        Ok((node, attr, file))
    }

    /// Makes a regular file without a name in a directory (`O_TMPFILE`) and opens it. [`link`](Self::link) may give it a
    /// name. `flags` are those of open(2).
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the upper layer's filesystem has no such thing.
    pub fn create_nameless(
        &self,
        parent: &Arc<Node>,
        modes: (u32, u32),
        flags: i32,
        caller: Caller,
    ) -> Result<(Arc<Node>, Attr, OpenFile)> {
        let (dir, birth) = self.expect(parent, modes, caller)?;
        let flags = OFlag::from_bits_truncate(flags) & super::file::KEPT_FLAGS;
        let flags = flags | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
        let fd = openat(&*dir, c".", flags, Mode::from_bits_truncate(birth.mode & 0o7777))?;
        let held = super::sys::hold_open(&fd)?;
        self.settle(&Real::Held(Arc::clone(&held)), birth, false)?;
        let (node, attr) = self.enter_nameless(held)?;
        let file = OpenFile::upper(Arc::clone(&node), fd, flags);
        Ok((node, attr, file))
    }

    /// Gives a file another name. The kernel holds one reference more to the node.
    pub fn link(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &CStr) -> Result<Attr> {
        self.copy_up(node)?;
        self.copy_up(parent)?;
        let dir = parent.upper_dir()?;
        let link = |to: &OwnedFd, name: &CStr| {
            node.with(|real| match real {
                Real::Named(from, old) => linkat(from, old.as_c_str(), to, name, AtFlags::empty()),
                Real::Held(fd) => {
                    use std::os::fd::AsRawFd;
                    let path = to_c(format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes());
                    linkat(AT_FDCWD, path.as_c_str(), to, name, AtFlags::AT_SYMLINK_FOLLOW)
                }
            })
        };
        match link(&dir, name) {
            Err(Errno::EEXIST) if self.whiteout_at(&dir, name)? => {
                let temp = self.temp()?;
                link(&temp.work, &temp.name)?;
                rename((&temp.work, &temp.name), (&dir, name), RenameFlags::empty())?;
                temp.keep();
            }
            other => other?,
        }
        node.named(parent, name, UPPER);
        let attr = self.attr(node)?;
        self.table.lock().again(node.id).ok_or(Errno::ESTALE)?;
        Ok(attr)
    }

    /// Makes something under a name that is free, or hidden by a whiteout: then in the work directory first.
    fn place<T>(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        directory: bool,
        modes: (u32, u32),
        caller: Caller,
        make: impl Fn(&OwnedFd, &CStr, u32) -> Result<T>,
    ) -> Result<T> {
        let (dir, birth) = self.expect(parent, modes, caller)?;
        match make(&dir, name, birth.mode) {
            Err(Errno::EEXIST) if self.whiteout_at(&dir, name)? => {
                self.place_over_whiteout(&dir, name, directory, birth, make)
            }
            Err(e) => Err(e),
            Ok(made) => {
                let real = Real::named(&dir, name);
                if let Err(e) = self.settle(&real, birth, false) {
                    let flag = if directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
                    let _ = unlinkat(&*dir, name, flag);
                    return Err(e);
                }
                Ok(made)
            }
        }
    }

    fn place_over_whiteout<T>(
        &self,
        dir: &Dir,
        name: &CStr,
        directory: bool,
        birth: Birth,
        make: impl Fn(&OwnedFd, &CStr, u32) -> Result<T>,
    ) -> Result<T> {
        let temp = self.temp()?;
        let nest;
        let (at, temp_name): (Dir, &CStr) = if birth.acl {
            // The filesystem itself inherits the ACL, from a directory that has the same.
            nest = self.nest(dir)?;
            (super::sys::open_dir(&nest.work, &nest.name)?, c"new")
        } else {
            (Arc::clone(&temp.work), temp.name.as_c_str())
        };
        let made = make(&at, temp_name, birth.mode)?;
        let real = Real::named(&at, temp_name);
        self.settle(&real, birth, directory)?;
        if directory {
            self.set_opaque(&real)?;
            rename((&at, temp_name), (dir, name), RenameFlags::RENAME_EXCHANGE)?;
        } else {
            rename((&at, temp_name), (dir, name), RenameFlags::empty())?;
            if !birth.acl {
                temp.keep();
            }
        }
        Ok(made)
    }

    /// A directory in the work directory with the default ACL of another one.
    fn nest(&self, dir: &Dir) -> Result<Temp> {
        let temp = self.temp()?;
        mkdirat(&*temp.work, temp.name.as_c_str(), Mode::S_IRWXU)?;
        if let Some(acl) = Real::Held(Arc::clone(dir)).xattr(DEFAULT_ACL)? {
            temp.real().set_xattr(DEFAULT_ACL, &acl, 0)?;
        }
        Ok(temp)
    }

    /// The directory of the upper layer that a new file of `parent` is to be made in, and its mode and owner.
    fn expect(&self, parent: &Arc<Node>, (mode, umask): (u32, u32), caller: Caller) -> Result<(Dir, Birth)> {
        self.copy_up(parent)?;
        let dir = parent.upper_dir()?;
        let acl = self.default_acl(parent, &dir)?;
        let mode = if acl { mode } else { mode & !umask };
        let stat = Real::Held(Arc::clone(&dir)).stat()?;
        let inherits = stat.st_mode & libc::S_ISGID != 0;
        let gid = if inherits { stat.st_gid } else { caller.gid };
        Ok((dir, Birth { mode, uid: caller.uid, gid, inherits, acl }))
    }

    /// Gives a new file its owner, and what chown(2) takes away. A directory made elsewhere inherits here.
    fn settle(&self, real: &Real, birth: Birth, elsewhere: bool) -> Result<()> {
        if (birth.uid, birth.gid) == self.own && !elsewhere && birth.mode & 0o6000 == 0 {
            // Nothing to do, but in a directory with another group, which it has inherited then.
            return Ok(());
        }
        let stat = real.stat()?;
        if (stat.st_uid, stat.st_gid) != (birth.uid, birth.gid) {
            real.chown(Some(birth.uid), Some(birth.gid))?;
        }
        let inherited = if is_dir(&stat) && birth.inherits { libc::S_ISGID } else { 0 };
        let special = birth.mode & 0o6000 | inherited;
        if special != 0 && stat.st_mode & libc::S_IFMT != libc::S_IFLNK {
            real.chmod(stat.st_mode & 0o1777 | special)?;
        }
        Ok(())
    }

    /// Whether new files in a directory inherit an ACL from it.
    fn default_acl(&self, parent: &Node, dir: &Dir) -> Result<bool> {
        if self.config.noacl {
            return Ok(false);
        }
        if let Some(known) = parent.read().default_acl {
            return Ok(known);
        }
        let real = Real::Held(Arc::clone(dir));
        let has = real.get_xattr(DEFAULT_ACL, &mut []).is_ok_and(|n| n > 0);
        parent.write().default_acl = Some(has);
        Ok(has)
    }

    fn enter_new(&self, parent: &Arc<Node>, name: &CStr) -> Result<(Arc<Node>, Attr)> {
        let stat = Real::Named(parent.upper_dir()?, name.to_owned()).stat()?;
        let found = if is_dir(&stat) {
            let part = Part { layer: UPPER, fd: None, xwhiteouts: false, at: None };
            Found::Directory(Merging::new(part, &stat))
        } else {
            Found::File { layer: UPPER, stat }
        };
        self.enter(parent, name, found).ok_or(Errno::ENOENT)
    }
}
