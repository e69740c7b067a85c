//! Paths inside a container's root. Every one is resolved by the kernel with `RESOLVE_IN_ROOT`, so that no
//! symlink of an image, however it changes meanwhile, leads outside.

use super::error::{Attempt, ContainerError, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// How often a resolution is tried again when a concurrent rename disturbs it (`EAGAIN`).
const RETRIES: u32 = 64;

/// The path without `.`, `..` and leading `/`, as a container's root would see it; empty for the root.
pub(crate) fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => drop(out.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}

/// Opens `path` as seen from `root`.
pub(crate) fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let inner = clean(path);
    let inner = if inner.as_os_str().is_empty() { Path::new(".") } else { inner.as_path() };
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let mut how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
    if flags.contains(OFlag::O_CREAT) {
        how = how.mode(mode);
    }
    for _ in 0..RETRIES {
        match openat2(root, inner, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// An `O_PATH` descriptor of whatever is at `path` (a final symlink is followed inside the root).
pub(crate) fn open_path(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    open(root, path, OFlag::O_PATH, Mode::empty())
}

/// The directory at `path`, made with its parents (0755) where missing.
pub(crate) fn ensure_dir(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    match open(root, path, flags, Mode::empty()) {
        Err(Errno::ENOENT) => {}
        other => return other.attempt(|| format!("open directory {} in the container", path.display())),
    }
    let mut prefix = PathBuf::new();
    let mut dir = open(root, Path::new("/"), flags, Mode::empty()).attempt(|| "open the container's root")?;
    for name in &clean(path) {
        prefix.push(name);
        dir = match open(root, &prefix, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                match mkdirat(dir.as_fd(), name, Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(e) => {
                        return Err(e).attempt(|| format!("create {} in the container", prefix.display()));
                    }
                }
                open(root, &prefix, flags, Mode::empty())
            }
            other => other,
        }
        .attempt(|| format!("open directory /{} in the container", prefix.display()))?;
    }
    Ok(dir)
}

/// A file at `path` to mount over, made empty with its parents where nothing exists.
pub(crate) fn ensure_file(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    match open_path(root, path) {
        Err(Errno::ENOENT) => {}
        other => return other.attempt(|| format!("open {} in the container", path.display())),
    }
    if let Some(parent) = clean(path).parent() {
        ensure_dir(root, parent)?;
    }
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    open(root, path, flags, Mode::from_bits_truncate(0o644))
        .and_then(|_| open_path(root, path))
        .attempt(|| format!("create file {} in the container", path.display()))
}

/// The content of a regular file of at most `limit` bytes; `None` when there is none.
pub(crate) fn read_file(root: BorrowedFd<'_>, path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match open(root, path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
        Err(e) => return Err(e).attempt(|| format!("open {} in the container", path.display())),
    };
    let what = || format!("read {} in the container", path.display());
    let meta = file.metadata().attempt(what)?;
    if !meta.is_file() {
        return Err(ContainerError::Invalid(format!(
            "{} in the container is not a regular file",
            path.display()
        )));
    }
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content).attempt(what)?;
    if content.len() as u64 > limit {
        let message = format!("{} in the container is larger than {limit} bytes", path.display());
        return Err(ContainerError::Invalid(message));
    }
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root(dir: &Path) -> OwnedFd {
        OwnedFd::from(File::open(dir).unwrap())
    }

    #[test]
    fn clean_keeps_paths_inside() {
        assert_eq!(clean(Path::new("/a/../../b/./c")), Path::new("b/c"));
        assert_eq!(clean(Path::new("/..")), Path::new(""));
    }

    #[test]
    fn directories_are_made_behind_links_but_never_outside() {
        let tmp = tempfile::tempdir().unwrap();
        let inner = tmp.path().join("root");
        std::fs::create_dir_all(inner.join("real")).unwrap();
        symlink("/real", inner.join("link")).unwrap();
        symlink("../../../outside", inner.join("up")).unwrap();
        let fd = root(&inner);
        ensure_dir(fd.as_fd(), Path::new("/link/x/y")).unwrap();
        assert!(inner.join("real/x/y").is_dir());
        // "up" dangles inside the root: refused, and nothing appears beside the root.
        assert!(ensure_dir(fd.as_fd(), Path::new("/up/x")).is_err());
        assert!(!tmp.path().join("outside").exists());
        ensure_file(fd.as_fd(), Path::new("/link/new/file")).unwrap();
        assert!(inner.join("real/new/file").is_file());
    }

    #[test]
    fn reading_is_bounded_and_only_of_regular_files() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("f"), vec![b'x'; 100]).unwrap();
        symlink("/etc/passwd", tmp.path().join("p")).unwrap();
        let fd = root(tmp.path());
        assert!(read_file(fd.as_fd(), Path::new("f"), 99).is_err());
        assert_eq!(read_file(fd.as_fd(), Path::new("f"), 100).unwrap().unwrap().len(), 100);
        assert!(read_file(fd.as_fd(), Path::new("p"), 1 << 20).unwrap().is_none());
        assert!(read_file(fd.as_fd(), Path::new("/"), 10).is_err());
    }
}
