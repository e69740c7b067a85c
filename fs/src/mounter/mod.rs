//! Mounts made in a short-lived helper process (`lazyrun mounter`).
//!
//! Mounting a view opens layer files on our own FUSE mount. The daemon serves that mount, so it must never
//! wait for such an open itself: the helper does, in a mount namespace of its own, and sends the detached
//! mount back. A helper that hangs is killed, and with it goes whatever it had half made. What else is done with
//! files of that mount is done here as well.

mod child;
mod wire;

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use child::main;

use crate::mount::{IdMap, MountError, OverlayOptions};
use crate::plan::Probes;

/// How long a mount may take before the helper is killed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What the helper is asked to do. The descriptors that belong to it are sent beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Mount an EROFS view. Descriptor: the flat FUSE mount, if any device is on it.
    Erofs {
        /// The image file.
        image: PathBuf,
        /// Its extra devices in device-table order.
        devices: Vec<Device>,
        /// Read the devices past the page cache.
        directio: bool,
    },
    /// Mount a writable overlay. Descriptor: the view to go below.
    Overlay {
        /// The upper directory.
        upper: PathBuf,
        /// The work directory, on the same filesystem.
        work: PathBuf,
        /// How to mount it.
        options: OverlayOptions,
    },
    /// Make another mount of a view, idmapped. Descriptor: the view.
    Idmap {
        /// The mapping.
        map: IdMap,
    },
    /// Have the kernel let go of what it caches of layer files. Descriptor: the flat FUSE mount.
    LetGo {
        /// Their names in it.
        layers: Vec<String>,
    },
    /// Have the kernel forget what it caches of files. Descriptor: the `/dev/fuse` of their filesystem.
    Invalidate {
        /// Their inode numbers.
        inodes: Vec<u64>,
    },
    /// Try every mount plan with real mounts.
    Probe {
        /// The directory that upper directories and images will be in.
        root: PathBuf,
    },
}

/// Where a device of an EROFS view is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// A name in the flat FUSE mount.
    Flat(String),
    /// A plain file, for layers that are hydrated and for the appendix.
    Local(PathBuf),
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Mounted,
    Done,
    Probed(Probes),
    Failed(String),
}

/// Starts helpers. Its calls block until the helper is done, so an async caller runs them on a thread.
#[derive(Clone, Debug)]
pub struct Mounter {
    exe: PathBuf,
    args: Vec<OsString>,
    timeout: Duration,
}

impl Mounter {
    /// A client whose helpers are `exe mounter`.
    pub fn new(exe: PathBuf) -> Self {
        Self { exe, args: vec!["mounter".into()], timeout: TIMEOUT }
    }

    /// Uses other arguments than `mounter` to make `exe` call [`main`].
    pub fn with_args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// Kills a helper after this time instead of 30 seconds.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Has the helper make a mount and returns it, detached.
    pub fn mount(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<OwnedFd, MountError> {
        match self.call(request, fds)? {
            (Answer::Mounted, mut fds) if fds.len() == 1 => Ok(fds.remove(0)),
            (Answer::Failed(sentence), _) => Err(MountError::Remote(sentence)),
            _ => Err(MountError::Helper("sent an answer that does not fit the request".into())),
        }
    }

    /// Has the kernel let go of what it caches of layer files in the flat FUSE mount, but for pages that are being read:
    /// unlike an invalidation by the server, which waits for those, and its process with it should it be killed.
    ///
    /// # Errors
    /// When a file can't be opened, or the helper fails.
    pub fn let_go(&self, flat: BorrowedFd<'_>, layers: Vec<String>) -> Result<(), MountError> {
        self.have_done(&Request::LetGo { layers }, flat)
    }

    /// Has the kernel forget what it caches of files of a FUSE filesystem, by their inode numbers. Waits for reads of them
    /// that are under way, but only so long; they are forgotten then when those end.
    ///
    /// # Errors
    /// The kernel's, or when the helper fails.
    pub fn invalidate(&self, dev: BorrowedFd<'_>, inodes: Vec<u64>) -> Result<(), MountError> {
        self.have_done(&Request::Invalidate { inodes }, dev)
    }

    fn have_done(&self, request: &Request, fd: BorrowedFd<'_>) -> Result<(), MountError> {
        match self.call(request, &[fd])? {
            (Answer::Done, _) => Ok(()),
            (Answer::Failed(sentence), _) => Err(MountError::Remote(sentence)),
            _ => Err(MountError::Helper("sent an answer that does not fit the request".into())),
        }
    }

    /// Has the helper try every mount plan in `root`.
    pub fn probe(&self, root: &Path) -> Result<Probes, MountError> {
        match self.call(&Request::Probe { root: root.to_owned() }, &[])? {
            (Answer::Probed(probes), _) => Ok(probes),
            (Answer::Failed(sentence), _) => Err(MountError::Remote(sentence)),
            _ => Err(MountError::Helper("sent an answer that does not fit the request".into())),
        }
    }

    fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), MountError> {
        let helper = |e: io::Error| MountError::Helper(format!("{} failed: {e}", self.exe.display()));
        let (mut socket, theirs) = UnixStream::pair().map_err(helper)?;
        let child = Command::new(&self.exe)
            .args(&self.args)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| MountError::Helper(format!("{} cannot be started: {e}", self.exe.display())))?;
        // Killed and reaped on every way out of here.
        let mut guard = Reaper { child: Some(child) };
        let deadline = Instant::now() + self.timeout;
        socket.set_write_timeout(Some(self.timeout)).map_err(helper)?;
        let answer = wire::send(&mut socket, request, fds).and_then(|()| {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            socket.set_read_timeout(Some(left))?;
            wire::receive::<Answer>(&mut socket)
        });
        match answer {
            Ok(answer) => Ok(answer),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(MountError::Helper(format!(
                    "did not answer within {} s and was killed",
                    self.timeout.as_secs_f32()
                )))
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                drop(socket);
                let how = guard.wait(Duration::from_secs(2));
                let how = how.map_or_else(|| "closed its socket".to_owned(), |s| format!("ended ({s})"));
                Err(MountError::Helper(format!("{how} without an answer")))
            }
            Err(e) => Err(helper(e)),
        }
    }
}

/// Owns a helper process: whatever happens, it is killed and waited for.
struct Reaper {
    child: Option<Child>,
}

impl Reaper {
    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        let deadline = Instant::now() + limit;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => {
                    self.child = None;
                    return Some(status);
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                _ => return None,
            }
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
        }
        self.wait(Duration::from_millis(500));
        let Some(mut child) = self.child.take() else { return };
        // A helper stuck in a FUSE request that a server has read but not answered cannot die before
        // the answer comes: it must not hold up the caller.
        let reaping = std::thread::Builder::new().name("reap-mounter".into());
        if let Err(e) = reaping.spawn(move || child.wait()) {
            tracing::warn!("a mount helper cannot be reaped: {e}");
        }
    }
}
