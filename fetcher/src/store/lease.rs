//! Whether anybody else has a layer file open, and keeping it so while bytes of it are thrown away.
//!
//! A view that reads a layer file without FUSE has it open in the kernel. Who mounts such a view pins the layer first
//! (see `pins`), so this is the second lock on the same door: it also holds when the process that pinned is gone and
//! what it mounted is still there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

/// Which signal the kernel sends (linux/fcntl.h); libc does not name it.
const F_SETSIG: i32 = 10;
/// How often and how long to wait for files that are just being closed: the kernel unmounts on its own time.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// A write lease (fcntl(2), `F_SETLEASE`): while it is held nobody else has the file open, and who opens it waits.
pub(super) struct Lease<'a>(Option<&'a File>);

impl<'a> Lease<'a> {
    /// `None` when somebody else has the file open. Where the file system has no leases, nothing can be told, and
    /// nothing is held.
    pub(super) fn take(file: &'a File) -> io::Result<Option<Lease<'a>>> {
        // Who breaks a lease sends a signal, SIGIO by default, which kills; SIGURG is ignored by default.
        control(file, F_SETSIG, libc::SIGURG)?;
        match control(file, libc::F_SETLEASE, libc::F_WRLCK) {
            Ok(()) => Ok(Some(Lease(Some(file)))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => {
                tracing::debug!(%error, "no lease of a layer file");
                Ok(Some(Lease(None)))
            }
        }
    }

    /// As [`Lease::take`], after a wait for those who are just closing it.
    pub(super) fn wait(file: &'a File) -> io::Result<Option<Lease<'a>>> {
        for _ in 0..TRIES {
            if let Some(lease) = Lease::take(file)? {
                return Ok(Some(lease));
            }
            std::thread::sleep(PAUSE);
        }
        Lease::take(file)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0
            && let Err(error) = control(file, libc::F_SETLEASE, libc::F_UNLCK)
        {
            tracing::warn!(%error, "the lease of a layer file can't be given back");
        }
    }
}

fn control(file: &File, command: i32, argument: i32) -> io::Result<()> {
    // SAFETY: both commands take an int and touch no memory of this process; the descriptor is open. nix has no
    // F_SETLEASE and no F_SETSIG.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
