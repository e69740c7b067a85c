//! The writable unions of plan `fuse`. Each has a process of its own that serves it (`lazyrun union --device`), over the
//! view, which this daemon serves.
//!
//! Open files, files without a name and the numbers that the kernel knows files by live in that process and not in the
//! daemon, so the daemon can be killed, or replaced, without the union noticing: it waits for the view's next server
//! as any other reader does. It ends with its mount.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use lazyrun_fs::fuse::{self, FuseKind};

use crate::cli::union::READY;
use crate::ipc::fds;
use crate::proc;

/// Where the serving process finds the view.
const LOWER_FD: RawFd = 3;
/// Where it finds its FUSE connection.
const DEVICE_FD: RawFd = 4;

/// A detached, writable union of a view and an upper directory. Blocks until it is served.
///
/// # Errors
/// When the kernel refuses the mount, or what the serving process says, such as that a directory can't be used.
pub(super) fn mount(lower: BorrowedFd<'_>, upper: &Path, work: &Path) -> Result<OwnedFd> {
    let mount = fuse::mount(FuseKind::Union)?;
    let mut server =
        spawn(lower, &mount.dev, upper, work).context("starting the process that serves the union")?;
    let mut said = Vec::new();
    if let Some(mut out) = server.stdout.take() {
        out.read_to_end(&mut said).context("waiting for the process that serves the union")?;
    }
    if said != READY {
        let status = server.wait().context("waiting for the process that serves the union")?;
        let said = String::from_utf8_lossy(&said);
        bail!(
            "the union can't be served: {}",
            if said.is_empty() { status.to_string() } else { said.into() }
        );
    }
    if let Err(error) = proc::reap(server) {
        tracing::warn!(%error, "a process that serves a union won't be reaped");
    }
    Ok(mount.tree)
}

fn spawn(lower: BorrowedFd<'_>, device: &OwnedFd, upper: &Path, work: &Path) -> std::io::Result<Child> {
    let mut options = format!("lowerdir=/proc/self/fd/{LOWER_FD},upperdir=").into_bytes();
    options.extend(escaped(upper));
    options.extend(b",workdir=");
    options.extend(escaped(work));
    let mut command = Command::new("/proc/self/exe");
    command.arg0("lazyrun").args(["union", "--device", &DEVICE_FD.to_string(), "-o"]);
    command.arg(std::ffi::OsString::from_vec(options)).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    fds::place(&mut command, &[(lower, LOWER_FD), (device.as_fd(), DEVICE_FD)])?;
    fds::own_session(&mut command);
    command.spawn()
}

/// A path as an option's value.
fn escaped(path: &Path) -> Vec<u8> {
    let special = |b: &u8| matches!(b, b',' | b':' | b'\\');
    path.as_os_str()
        .as_bytes()
        .iter()
        .flat_map(|b| special(b).then_some(b'\\').into_iter().chain([*b]))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use lazyrun_fs::union::UnionConfig;

    use super::*;

    #[test]
    fn paths_come_through_the_options() {
        for path in ["/plain", "/a,b:c", r"/back\slash\,", r"/end\"] {
            let mut config = UnionConfig::default();
            config
                .parse(&[b"upperdir=".to_vec(), escaped(Path::new(path)), b",volatile".to_vec()].concat())
                .unwrap();
            assert_eq!((config.upper, config.volatile), (Some(PathBuf::from(path)), true));
        }
    }
}
