//! Whether what lazyrun mounts below its root can be seen by containerd.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::Rows;
use crate::daemon::mounts::fields_in_table;

const WHAT: &str = "mount propagation";

/// The mount that a path is on, by a mount table.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    /// The group in which mounts below it are shared.
    shared: Option<u32>,
    /// The group from which it receives mounts.
    master: Option<u32>,
}

pub(super) fn check(containerd: &Path, daemon: Option<u32>, root: &Path, rows: &mut Rows) {
    // Of the process that listens; containerd is not started by a socket of systemd's.
    let peer = UnixStream::connect(containerd).ok().and_then(|s| getsockopt(&s, PeerCredentials).ok());
    let Some(pid) = peer.map(|peer| peer.pid()).filter(|pid| *pid > 0) else {
        rows.warning(
            WHAT,
            format!(
                "containerd can't be reached at {}, so it is not seen whether mounts get there",
                containerd.display()
            ),
            "check again as root when containerd runs",
        );
        return;
    };
    let ours = daemon.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let theirs = pid.to_string();
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    match (namespace(&ours), namespace(&theirs)) {
        (Some(ours), Some(theirs)) if ours == theirs => {
            rows.ok(WHAT, format!("containerd (process {pid}) is in the mount namespace of lazyrun"));
            return;
        }
        (Some(_), Some(_)) => {}
        _ => {
            rows.warning(WHAT, "the mount namespaces can't be looked at", "check again as root");
            return;
        }
    }
    let table = |pid: &str| std::fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    match judge(&table(&ours), &table(&theirs), root) {
        Ok(point) => rows.ok(
            WHAT,
            format!("containerd (process {pid}) has a mount namespace of its own, which receives mounts of {}", point.display()),
        ),
        Err(why) => rows.error(
            WHAT,
            format!("containerd (process {pid}) has a mount namespace of its own, and {why}: no lazy image can start"),
            format!(
                "run both in one namespace, or share the directory with `mount --bind --make-rshared {root} {root}` \
                 before containerd's namespace is made (docs/OPERATIONS.md, Mount propagation)",
                root = root.display()
            ),
        ),
    }
}

/// Whether mounts made at `root` in one table arrive in the other; the mount by which they do.
fn judge(ours: &[u8], theirs: &[u8], root: &Path) -> Result<PathBuf, String> {
    let shown = root.display();
    let own = covering(ours, root).ok_or_else(|| format!("the mount of {shown} can't be found"))?;
    let Some(group) = own.shared else {
        return Err(format!("{shown} is on {}, which is not shared", own.point.display()));
    };
    match covering(theirs, root) {
        Some(there) if there.shared == Some(group) || there.master == Some(group) => Ok(own.point),
        _ => Err(format!("{shown} is there on a mount that receives nothing from {}", own.point.display())),
    }
}

/// The mount that covers a path.
fn covering(mountinfo: &[u8], path: &Path) -> Option<Mount> {
    let (point, fields) =
        path.ancestors().find_map(|point| Some((point, fields_in_table(mountinfo, point)?)))?;
    let mut mount = Mount { point: point.to_owned(), shared: None, master: None };
    for field in fields.iter().skip(6).take_while(|field| **field != b"-") {
        let text = std::str::from_utf8(field).unwrap_or_default();
        match text.split_once(':') {
            Some(("shared", group)) => mount.shared = group.parse().ok(),
            Some(("master", group)) => mount.master = group.parse().ok(),
            _ => {}
        }
    }
    Some(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &[u8] = b"20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        21 20 8:2 / /var/lib/lazy\\040run rw - ext4 /dev/sdb1 rw\n\
        22 20 8:3 / /data rw shared:7 - ext4 /dev/sdc1 rw\n";

    #[test]
    fn mounts_arrive_where_they_are_shared() {
        let theirs =
            b"30 1 8:1 / / rw master:1 - ext4 /dev/sda1 rw\n31 30 8:3 / /data rw - ext4 /dev/sdc1 rw\n";
        let judged = |root: &str| judge(OURS, theirs, Path::new(root));
        assert_eq!(judged("/var/lib/lazyrun"), Ok("/".into()));
        assert!(judged("/var/lib/lazy run").unwrap_err().contains("not shared"));
        assert!(judged("/data/lazyrun").unwrap_err().contains("receives nothing"));
        assert_eq!(judge(OURS, OURS, Path::new("/data/x")), Ok("/data".into()));
        assert!(judge(b"", OURS, Path::new("/data/x")).is_err());
    }
}
