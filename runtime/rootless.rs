//! Instances of users who are not root: where their things are, and the user namespace in which their mounts work
//! (user_namespaces(7)).

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use caps::{CapSet, Capability};
use nix::fcntl::AtFlags;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{AccessFlags, faccessat, getegid, geteuid};

use crate::failure::Failure;
use crate::paths::DEFAULT_ROOT;

/// Longest name of a directory in which sockets can be made: theirs end at 108 bytes.
const LONGEST_RUN: usize = 70;

/// Whether this process may mount, be it in a user namespace of its own only.
pub fn may_mount() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).unwrap_or(false)
}

/// # Errors
/// Where this process may not mount.
pub fn need_mounts() -> Result<(), Failure> {
    if may_mount() {
        return Ok(());
    }
    Err(Failure::daemon(
        "lazyrun needs root to mount images and start containers: run it with sudo, or mount images in a user \
         namespace, which `lazyrun unshare` opens",
    ))
}

/// Whether the system's own places are this process's to write to. Those of root in a user namespace are not, unless
/// it is a container's.
fn system_wide() -> bool {
    let writable =
        |place: &str| faccessat(nix::fcntl::AT_FDCWD, place, AccessFlags::W_OK, AtFlags::AT_EACCESS).is_ok();
    writable("/run") && writable("/var/lib")
}

/// The root directory of an instance where none is given: a user's own lies where the XDG base directory
/// specification wants it.
pub fn default_root() -> PathBuf {
    if system_wide() {
        return DEFAULT_ROOT.into();
    }
    let home = || absolute("HOME").map(|home| home.join(".local/share"));
    absolute("XDG_DATA_HOME").or_else(home).map_or_else(|| DEFAULT_ROOT.into(), |data| data.join("lazyrun"))
}

/// The directory in which instances have their sockets and locks.
pub fn run_base() -> PathBuf {
    if system_wide() {
        return "/run/lazyrun".into();
    }
    let runtime = absolute("XDG_RUNTIME_DIR").filter(|dir| dir.as_os_str().len() <= LONGEST_RUN);
    runtime.map_or_else(|| format!("/tmp/lazyrun-{}", user()).into(), |dir| dir.join("lazyrun"))
}

/// Makes sure that nobody else has made the directory of this user's sockets.
///
/// # Errors
/// When it belongs to somebody else or others may write to it.
pub fn check_run_base(base: &Path) -> io::Result<()> {
    let meta = std::fs::symlink_metadata(base)?;
    if meta.is_dir() && meta.uid() == geteuid().as_raw() && meta.mode() & 0o022 == 0 {
        return Ok(());
    }
    let said = format!("{} must be a directory of this user's that nobody else can write to", base.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, said))
}

fn absolute(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// The user's id as the namespace around this one knows it, so that it is the same inside and outside.
fn user() -> u32 {
    let own = geteuid().as_raw();
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    outside(&map, own).unwrap_or(own)
}

/// What an id of a namespace with this map is outside.
fn outside(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
        let (inside, outside, count) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        let after = id.checked_sub(inside).filter(|after| *after < count)?;
        outside.checked_add(after)
    })
}

/// Enters the user and mount namespace of whoever listens on a socket.
///
/// # Errors
/// When nobody does, or the namespaces are not this user's.
pub fn join(socket: &Path) -> io::Result<()> {
    let peer = getsockopt(&UnixStream::connect(socket)?, PeerCredentials)?.pid();
    let open = |kind: &str| std::fs::File::open(format!("/proc/{peer}/ns/{kind}"));
    let (user, mount) = (open("user")?, open("mnt")?);
    let here = std::env::current_dir()?;
    setns(user.as_fd(), CloneFlags::CLONE_NEWUSER)?;
    // That leads to the root of the other namespace.
    setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?;
    std::env::set_current_dir(here)
}

/// Enters a new user and mount namespace in which this user is root. Only a process outside can give it its ids:
/// `helper`, which is told to call [`map_ids`] when its standard input ends.
///
/// # Errors
/// When the kernel does not let users have such namespaces, or the ids can't be had.
pub fn enter_new(mut helper: Command) -> io::Result<()> {
    let mut helper = helper.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let entered = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS);
    if entered.is_err() {
        let _ = helper.kill();
    }
    let mapped = helper.wait()?;
    entered?;
    if mapped.success() { Ok(()) } else { Err(io::Error::other("its user ids can't be mapped")) }
}

/// Waits until standard input ends, then gives the user namespace of a process its ids: this user's as root's, and
/// behind it those that /etc/subuid and /etc/subgid allow, if any.
///
/// # Errors
/// When the kernel refuses.
pub fn map_ids(pid: u32) -> io::Result<()> {
    io::stdin().read_to_end(&mut Vec::new())?;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let names = |id: u32| {
        let user = nix::unistd::User::from_uid(id.into()).ok().flatten();
        [Some(id.to_string()), user.map(|user| user.name)].into_iter().flatten().collect::<Vec<_>>()
    };
    let range = |file: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        subordinate(&text, &names(uid))
    };
    if let (Some(users), Some(groups)) = (range("/etc/subuid"), range("/etc/subgid")) {
        // These are setuid programs: nobody else may map ids that are not one's own.
        let by = |program: &str, own: u32, (start, count): (u32, u32)| {
            let numbers = [pid, 0, own, 1, 1, start, count].map(|n| n.to_string());
            Command::new(program).args(numbers).stdin(Stdio::null()).status().is_ok_and(|s| s.success())
        };
        if by("newuidmap", uid, users) && by("newgidmap", gid, groups) {
            return Ok(());
        }
        eprintln!(
            "lazyrun: newuidmap and newgidmap do not work: all files will be of one user; install uidmap"
        );
    }
    let write = |file: &str, text: String| std::fs::write(format!("/proc/{pid}/{file}"), text);
    write("setgroups", "deny".to_owned())?;
    write("gid_map", format!("0 {gid} 1\n"))?;
    write("uid_map", format!("0 {uid} 1\n"))
}

/// The first range that a file like /etc/subuid gives to one of these names.
fn subordinate(text: &str, names: &[String]) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next()?;
        let (start, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (names.iter().any(|n| n == name) && count > 0).then_some((start, count))
    })
}

/// The command to run where none is given: the user's shell.
pub fn shell() -> OsString {
    std::env::var_os("SHELL").filter(|shell| !shell.is_empty()).unwrap_or_else(|| "/bin/sh".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_name_inside_and_outside() {
        assert_eq!(outside("         0       1000          1\n", 0), Some(1000));
        assert_eq!(outside("0 1000 1\n1 100000 65536\n", 33), Some(100_032));
        assert_eq!(outside("0 1000 1\n", 33), None);
        assert_eq!(outside("0 0 4294967295\n", 7), Some(7));
        assert_eq!(outside("odd\n0 x 1\n", 0), None);
    }

    #[test]
    fn ranges_go_by_name_or_number() {
        let text = "bob:1:2\nalice:100000:65536\n1000:5:0\n1000:7:9\nodd\n";
        assert_eq!(subordinate(text, &["alice".into()]), Some((100_000, 65_536)));
        assert_eq!(subordinate(text, &["1000".into()]), Some((7, 9)));
        assert_eq!(subordinate(text, &["carol".into()]), None);
    }
}
