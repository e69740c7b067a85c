//! Unions mounted side by side, by the kernel and by us, and what they show.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::fuse_support::until;
use lazyrun_fs::fuse::unionfs;
use lazyrun_fs::union::{Union, UnionConfig};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::linkat;

/// The directories of a union in a place of their own.
pub(crate) struct Site {
    pub(crate) dir: tempfile::TempDir,
}

impl Site {
    pub(crate) fn new() -> Site {
        assert!(nix::unistd::geteuid().is_root(), "this test mounts filesystems and must run as root");
        let dir = tempfile::tempdir().expect("temporary directory");
        for name in ["upper", "work", "merged"] {
            std::fs::create_dir(dir.path().join(name)).expect("directory");
        }
        Site { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn kernel(&self, lower: &[PathBuf], redirect_dir: &str) -> Mounted {
        let lower: Vec<String> = lower.iter().map(|p| p.display().to_string()).collect();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off,redirect_dir={redirect_dir},metacopy=off,xino=off",
            lower.join(":"),
            self.path("upper").display(),
            self.path("work").display()
        );
        let at = self.path("merged");
        mount(Some("overlay"), &at, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .unwrap_or_else(|e| panic!("the kernel mounts no overlay ({options}): {e}"));
        Mounted { at, server: None }
    }

    pub(crate) fn config(&self, lower: &[PathBuf]) -> UnionConfig {
        UnionConfig {
            lower: lower.to_vec(),
            upper: Some(self.path("upper")),
            work: Some(self.path("work")),
            ..UnionConfig::default()
        }
    }

    pub(crate) fn ours(&self, config: UnionConfig) -> Mounted {
        let at = self.path("merged");
        let union = Union::open(config).expect("the union opens");
        let served = unionfs::mount(union, &at).expect("the union is mounted");
        let server = std::thread::spawn(move || served.run().expect("the union is served to its end"));
        Mounted { at, server: Some(server) }
    }
}

/// One lower layer and a union of it.
pub(crate) struct Case {
    pub(crate) site: Site,
    pub(crate) lower: PathBuf,
}

pub(crate) fn case(fill: impl FnOnce(&Path)) -> Case {
    let site = Site::new();
    let lower = site.path("lower");
    std::fs::create_dir(&lower).expect("directory");
    fill(&lower);
    Case { site, lower }
}

impl Case {
    pub(crate) fn config(&self) -> UnionConfig {
        self.site.config(std::slice::from_ref(&self.lower))
    }

    pub(crate) fn mount(&self) -> Mounted {
        self.site.ours(self.config())
    }

    /// Overlayfs over the same, instead.
    pub(crate) fn kernel(&self) -> Mounted {
        self.site.kernel(std::slice::from_ref(&self.lower), "off")
    }
}

/// A mount that goes when this is dropped.
pub(crate) struct Mounted {
    pub(crate) at: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Not lazily, so that what is still in use is found out; but nothing is left behind. The programs that other
        // tests start have our descriptors until they are executed.
        let busy = !until(|| umount2(&self.at, MntFlags::empty()).is_ok());
        if busy {
            let _ = umount2(&self.at, MntFlags::MNT_DETACH);
        }
        if let Some(server) = self.server.take()
            && !std::thread::panicking()
        {
            assert!(!busy, "something kept {} busy", self.at.display());
            server.join().expect("the server ends with its mount");
        }
    }
}

/// What is compared of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) size: u64,
    pub(crate) links: u64,
    pub(crate) rdev: u64,
    pub(crate) mtime: Option<(i64, i64)>,
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

pub(crate) type Seens = BTreeMap<PathBuf, Seen>;

/// Everything below a directory. `times` compares the times of files.
pub(crate) fn walk(root: &Path, times: bool) -> Seens {
    let mut out = Seens::new();
    visit(root, Path::new(""), times, &mut out);
    out
}

fn visit(root: &Path, at: &Path, times: bool, out: &mut Seens) {
    let path = root.join(at);
    let meta = match std::fs::symlink_metadata(&path) {
        // Overlayfs lists whiteouts of directories that are not merged.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
        other => other.unwrap_or_else(|e| panic!("stat {}: {e}", path.display())),
    };
    let kind = meta.file_type();
    let content = if kind.is_file() {
        std::fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
    } else if kind.is_symlink() {
        std::fs::read_link(&path).expect("target").as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    let device = kind.is_char_device() || kind.is_block_device();
    let seen = Seen {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        size: if kind.is_dir() { 0 } else { meta.size() },
        links: if kind.is_dir() { 0 } else { meta.nlink() },
        rdev: if device { meta.rdev() } else { 0 },
        mtime: (times && !kind.is_dir()).then(|| (meta.mtime(), meta.mtime_nsec())),
        content,
        xattrs: xattrs(&path),
    };
    out.insert(at.to_owned(), seen);
    if kind.is_dir() {
        let mut names: Vec<_> = std::fs::read_dir(&path)
            .unwrap_or_else(|e| panic!("list {}: {e}", path.display()))
            .map(|e| e.expect("entry").file_name())
            .collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(count, names.len(), "a name is listed twice in {}", path.display());
        for name in names {
            visit(root, &at.join(name), times, out);
        }
    }
}

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("path")
}

/// All attributes, symlinks not followed.
pub(crate) fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let path = c(path);
    let mut list = vec![0u8; 4096];
    // SAFETY: NUL-terminated path, buffer of the given size.
    let n = unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    let n = usize::try_from(n).unwrap_or(0);
    let names = list[..n].split(|b| *b == 0).filter(|n| !n.is_empty());
    names.map(|name| (name.to_vec(), get_xattr(&path, name).unwrap_or_default())).collect()
}

fn get_xattr(path: &CString, name: &[u8]) -> Option<Vec<u8>> {
    let name = CString::new(name).ok()?;
    let mut value = vec![0u8; 4096];
    // SAFETY: NUL-terminated strings, buffer of the given size.
    let n = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(n).ok()?);
    Some(value)
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8], flags: i32) -> Result<(), i32> {
    let (path, name) = (c(path), CString::new(name).expect("name"));
    // SAFETY: NUL-terminated strings, value of the given size.
    let ret =
        unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    if ret == 0 { Ok(()) } else { Err(nix::errno::Errno::last_raw()) }
}

pub(crate) fn remove_xattr(path: &Path, name: &str) -> Result<(), i32> {
    let (path, name) = (c(path), CString::new(name).expect("name"));
    // SAFETY: NUL-terminated strings.
    let ret = unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) };
    if ret == 0 { Ok(()) } else { Err(nix::errno::Errno::last_raw()) }
}

/// What differs, one line each.
pub(crate) fn differences(a: &Seens, b: &Seens) -> Vec<String> {
    let mut out = Vec::new();
    for (path, seen) in a {
        match b.get(path) {
            None => out.push(format!("{}: only on the left", path.display())),
            Some(other) if other != seen => out.push(format!("{}: {seen:?}\n    {other:?}", path.display())),
            _ => {}
        }
    }
    out.extend(
        b.keys().filter(|p| !a.contains_key(*p)).map(|p| format!("{}: only on the right", p.display())),
    );
    out
}

nix::ioctl_read_bad!(fs_get_flags, nix::request_code_read!(b'f', 1, size_of::<libc::c_long>()), u32);
nix::ioctl_write_ptr_bad!(fs_set_flags, nix::request_code_write!(b'f', 2, size_of::<libc::c_long>()), u32);

/// Opens a file or directory itself, to ask something of it.
fn ask(path: &Path) -> nix::Result<std::os::fd::OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
}

/// The inode flags of a file or directory.
pub(crate) fn get_flags(path: &Path) -> nix::Result<u32> {
    let (fd, mut flags) = (ask(path)?, 0);
    // SAFETY: an open descriptor, and an `int` to write to.
    unsafe { fs_get_flags(fd.as_raw_fd(), &raw mut flags) }.map(|_| flags)
}

/// Sets the inode flags of a file or directory.
pub(crate) fn set_flags(path: &Path, flags: u32) -> nix::Result<()> {
    let fd = ask(path)?;
    // SAFETY: an open descriptor, and an `int` to read.
    unsafe { fs_set_flags(fd.as_raw_fd(), &raw const flags) }.map(drop)
}

/// Gives an open file a name, as open(2) says of `O_TMPFILE`.
pub(crate) fn link_open(file: &File, to: &Path) -> nix::Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, from.as_str(), AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)
}
