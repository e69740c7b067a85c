//! Idmapped mounts (mount_setattr(2), "ID-mapped mounts"): who owns a file is shown, and written down, as a mapping says.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe};
use serde::{Deserialize, Serialize};

use super::{MountError, clone_tree, shares_detached, sys};

/// Most ranges of a map (user_namespaces(7)).
const MAX_RANGES: usize = 340;

/// Which ids are shown for those that files have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdMap {
    /// Of users and groups.
    Ranges {
        /// Of users.
        users: Vec<IdRange>,
        /// Of groups.
        groups: Vec<IdRange>,
    },
    /// As the user namespace of this file (`/proc/PID/ns/user`) has them.
    Namespace(PathBuf),
}

/// So many ids, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first id of the files.
    pub files: u32,
    /// What that is shown as.
    pub shown: u32,
    /// How many.
    pub count: u32,
}

impl FromStr for IdMap {
    type Err = String;

    /// Takes mount(8)'s `X-mount.idmap`: the path of a user namespace, or ranges `TYPE:FILES:SHOWN:COUNT` separated by
    /// spaces, where the type is `u`, `g` or `b` (or left out) for both.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(IdMap::Namespace(text.into()));
        }
        let (mut users, mut groups) = (Vec::new(), Vec::new());
        for word in text.split_ascii_whitespace() {
            let odd = || {
                format!("{word:?} is no mapping of ids: they are like u:0:100000:65536 (or g, or b for both)")
            };
            let (kind, rest) = match word.split_once(':') {
                Some((kind @ ("u" | "g" | "b"), rest)) => (kind, rest),
                _ => ("b", word),
            };
            let numbers: Result<Vec<u32>, _> = rest.split(':').map(str::parse).collect();
            let [files, shown, count] = numbers.ok().and_then(|n| n.try_into().ok()).ok_or_else(odd)?;
            if count == 0 || files.checked_add(count).is_none() || shown.checked_add(count).is_none() {
                return Err(odd());
            }
            let range = IdRange { files, shown, count };
            if kind != "g" {
                users.push(range);
            }
            if kind != "u" {
                groups.push(range);
            }
        }
        if users.len().max(groups.len()) > MAX_RANGES {
            return Err(format!("a mapping has at most {MAX_RANGES} ranges"));
        }
        if users.is_empty() || groups.is_empty() {
            return Err("a mapping needs ranges for users and for groups".to_owned());
        }
        Ok(IdMap::Ranges { users, groups })
    }
}

/// Makes another detached mount of a tree, idmapped.
///
/// # Errors
/// When the mapping can't be had, or the filesystem below allows no such mounts.
pub fn idmapped(tree: BorrowedFd<'_>, map: &IdMap) -> Result<OwnedFd, MountError> {
    let namespace = user_namespace(map)?;
    // Where detached mounts can't be copied each serves one user.
    let tree = match shares_detached() {
        true => clone_tree(tree)?,
        false => tree.try_clone_to_owned().map_err(|e| MountError::tree("hold a mount", e))?,
    };
    sys::set_idmap(tree.as_fd(), namespace.as_fd()).map_err(|e| {
        let why = match e.raw_os_error() {
            Some(libc::EINVAL) => "map the ids of a mount, which its filesystem and this kernel do not allow",
            _ => "map the ids of a mount",
        };
        MountError::tree(why, e)
    })?;
    Ok(tree)
}

fn user_namespace(map: &IdMap) -> Result<OwnedFd, MountError> {
    match map {
        IdMap::Namespace(path) => File::open(path)
            .map(OwnedFd::from)
            .map_err(|e| MountError::at("open the user namespace", path, e)),
        IdMap::Ranges { users, groups } => make_namespace(users, groups)
            .map_err(|e| MountError::tree("make a user namespace of these ids", e)),
    }
}

/// A user namespace in which nobody is. A process has to be in it while it gets its ids.
fn make_namespace(users: &[IdRange], groups: &[IdRange]) -> io::Result<OwnedFd> {
    let ((entered, say_entered), (end, say_end)) = (pipe()?, pipe()?);
    // SAFETY: the child only makes system calls, whatever locks other threads have held.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop((entered, say_end));
            if unshare(CloneFlags::CLONE_NEWUSER).is_ok() {
                let _ = File::from(say_entered).write_all(b"!");
                let _ = File::from(end).read(&mut [0]);
            }
            // SAFETY: ends this process at once, which shares nothing with the parent.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop((say_entered, end));
            let given = || -> io::Result<OwnedFd> {
                File::from(entered).read_exact(&mut [0]).map_err(|_| {
                    io::Error::other("the kernel lets nobody have one (see user.max_user_namespaces)")
                })?;
                let own = Path::new("/proc").join(child.to_string());
                std::fs::write(own.join("uid_map"), lines(users))?;
                std::fs::write(own.join("gid_map"), lines(groups))?;
                Ok(File::open(own.join("ns/user"))?.into())
            };
            let given = given();
            drop(say_end);
            let _ = waitpid(child, None);
            given
        }
    }
}

fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.files, range.shown, range.count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_those_of_mount() {
        let range = |files, shown, count| IdRange { files, shown, count };
        let both =
            IdMap::Ranges { users: vec![range(0, 100_000, 65536)], groups: vec![range(0, 100_000, 65536)] };
        assert_eq!("b:0:100000:65536".parse(), Ok(both.clone()));
        assert_eq!("0:100000:65536".parse(), Ok(both.clone()));
        assert_eq!("u:0:100000:65536 g:0:100000:65536".parse(), Ok(both));
        assert_eq!("/proc/1/ns/user".parse(), Ok(IdMap::Namespace("/proc/1/ns/user".into())));
        for text in
            ["", "u:0:1:1", "x:0:1:1", "b:0:1", "b:0:1:0", "b:0:4294967295:2", "b:0:-1:5", "b:0:1:2:3"]
        {
            assert!(text.parse::<IdMap>().is_err(), "{text}");
        }
    }
}
