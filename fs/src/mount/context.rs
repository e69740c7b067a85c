//! A filesystem being configured: fsopen, parameters, create, mount.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{MountError, sys};

/// fsconfig(2) takes at most this many bytes of a string, the NUL included.
const STRING_MAX: usize = 256;

/// One fsopen(2) context. Errors carry what the filesystem wrote into the context's message queue.
pub(crate) struct FsContext {
    fd: OwnedFd,
    what: String,
}

impl FsContext {
    /// Starts a mount of `fs_type`; `what` names it in errors.
    pub(crate) fn open(fs_type: &CStr, what: impl Into<String>) -> Result<Self, MountError> {
        let what = what.into();
        match sys::fsopen(fs_type) {
            Ok(fd) => Ok(Self { fd, what }),
            Err(source) => Err(MountError::Refused {
                what,
                step: format!("fsopen {}", fs_type.to_string_lossy()),
                source,
                log: String::new(),
            }),
        }
    }

    pub(crate) fn flag(&self, key: &CStr) -> Result<(), MountError> {
        sys::fsconfig_flag(self.fd.as_fd(), key).map_err(|e| self.refused(key, e))
    }

    pub(crate) fn string(&self, key: &CStr, value: &[u8]) -> Result<(), MountError> {
        let value = CString::new(value).map_err(|_| self.refused(key, invalid()))?;
        sys::fsconfig_string(self.fd.as_fd(), key, &value).map_err(|e| self.refused(key, e))
    }

    pub(crate) fn fd(&self, key: &CStr, fd: BorrowedFd<'_>) -> Result<(), MountError> {
        sys::fsconfig_fd(self.fd.as_fd(), key, fd).map_err(|e| self.refused(key, e))
    }

    /// Passes the name of a file, however long it is. `held` keeps the descriptor alive that a long
    /// name is passed by, until the mount is made.
    pub(crate) fn file(&self, key: &CStr, path: &Path, held: &mut Vec<File>) -> Result<(), MountError> {
        let bytes = path.as_os_str().as_bytes();
        if bytes.len() < STRING_MAX {
            return self.string(key, bytes);
        }
        let file = File::open(path).map_err(|e| MountError::at("open", path, e))?;
        self.string(key, fd_path(file.as_fd()).as_bytes())?;
        held.push(file);
        Ok(())
    }

    /// Makes the filesystem and mounts it detached with `attrs` (`MOUNT_ATTR_*`).
    pub(crate) fn mount(self, attrs: u64) -> Result<OwnedFd, MountError> {
        sys::fsconfig_create(self.fd.as_fd()).map_err(|e| self.refused(c"create", e))?;
        sys::fsmount(self.fd.as_fd(), attrs).map_err(|e| self.refused(c"fsmount", e))
    }

    fn refused(&self, step: &CStr, source: io::Error) -> MountError {
        MountError::Refused {
            what: self.what.clone(),
            step: step.to_string_lossy().into_owned(),
            source,
            log: self.log(),
        }
    }

    /// Drains the context's messages: one per read, each with a level prefix like `e `.
    fn log(&self) -> String {
        let mut lines = Vec::new();
        let Ok(dup) = self.fd.try_clone() else { return String::new() };
        let mut file = File::from(dup);
        let mut buf = [0u8; 1024];
        // The kernel keeps at most eight messages; the read fails with ENODATA when none is left.
        for _ in 0..8 {
            match file.read(&mut buf) {
                Ok(n) if n > 0 => {
                    let text = String::from_utf8_lossy(&buf[..n]);
                    let text = text.trim_end();
                    lines.push(text.split_once(' ').map_or(text, |(_, rest)| rest).to_owned());
                }
                _ => break,
            }
        }
        lines.join("; ")
    }
}

/// The name by which this process can open what `fd` refers to.
pub(crate) fn fd_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

#[cfg(test)]
mod root_tests {
    use super::*;

    #[test]
    fn what_the_filesystem_says_is_in_the_error() {
        let ctx = FsContext::open(c"tmpfs", "a test").expect("this test needs root (CAP_SYS_ADMIN)");
        let error = ctx.string(c"nonsense", b"1").unwrap_err().to_string();
        assert!(error.starts_with("cannot mount a test: nonsense: "), "{error}");
        assert!(error.contains("(kernel: tmpfs: Unknown parameter 'nonsense')"), "{error}");
    }

    #[test]
    fn long_names_of_files_are_passed_by_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x".repeat(250));
        std::fs::write(&path, b"").unwrap();
        let ctx = FsContext::open(c"erofs", "a test").expect("this test needs root (CAP_SYS_ADMIN)");
        let mut held = Vec::new();
        ctx.file(c"source", &path, &mut held).unwrap();
        assert_eq!(held.len(), 1);
    }
}
