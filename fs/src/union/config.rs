//! Options, and opening the layers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, RwLock};

use nix::fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, openat};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{getegid, geteuid};

use super::node::{Node, Part, State, key_of};
use super::redirect::RedirectDir;
use super::sys::{Dir, Real, open_dir};
use super::table::Table;
use super::{ROOT, Union};

/// What a union is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnionConfig {
    /// Read-only layers, top first.
    pub lower: Vec<PathBuf>,
    /// Where changes go; none makes the union read-only.
    pub upper: Option<PathBuf>,
    /// A directory on the filesystem of `upper`, for files in the making.
    pub work: Option<PathBuf>,
    /// Show every file as owned by this user.
    pub squash_uid: Option<u32>,
    /// Show every file as owned by this group.
    pub squash_gid: Option<u32>,
    /// Directories have a link count of 1.
    pub static_nlink: bool,
    /// Keep overlayfs's marks in `user.overlay.*`; chosen by itself where `trusted.*` is not allowed.
    pub userxattr: bool,
    /// Write nothing through to the disk: copy-up and fsync(2) do not wait.
    pub volatile: bool,
    /// Whether directories that a lower layer has can be renamed.
    pub redirect_dir: RedirectDir,
    /// No POSIX ACLs.
    pub noacl: bool,
    /// Names and attributes are asked again after so many seconds; never if there is no number.
    pub timeout: Option<u64>,
    /// Threads that answer sleep as soon as there is no request.
    pub no_busy_poll: bool,
    /// Options of the mount itself (`ro`, `nosuid`, `fsname=`...), not looked at here.
    pub mount_options: Vec<String>,
}

/// An option string that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A value that is missing or no number.
    #[error("the option `{0}` needs a number")]
    Number(String),
    /// A value that is none of the option's.
    #[error("the option `{0}` has a value that it can't have")]
    Value(String),
    /// An option nobody knows.
    #[error("there is no option `{0}`")]
    Unknown(String),
    /// An option that would change what is shown, and that is not implemented.
    #[error("the option `{0}` is not supported")]
    Unsupported(String),
}

/// Why a union can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum UnionError {
    /// There is nothing to show.
    #[error("a union needs a lowerdir")]
    NoLower,
    /// `upperdir` and `workdir` go together.
    #[error("upperdir needs a workdir")]
    NoWork,
    /// A directory can't be used.
    #[error("cannot use {role} {}: {source}", path.display())]
    Layer {
        /// `lowerdir`, `upperdir` or `workdir`.
        role: &'static str,
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Changes could not be renamed from one into the other.
    #[error("workdir {} and upperdir {} are not on one filesystem", work.display(), upper.display())]
    OtherFilesystem {
        /// The work directory.
        work: PathBuf,
        /// The upper directory.
        upper: PathBuf,
    },
    /// Another union uses it.
    #[error("workdir {} is in use by another union", .0.display())]
    InUse(PathBuf),
}

/// Options of fuse-overlayfs and of overlayfs that change nothing here.
const IGNORED: &[&str] = &[
    "threaded",
    "fast_ino",
    "index",
    "metacopy",
    "xino",
    "nfs_export",
    "uuid",
    "verity",
    "debug",
    "max_idle_threads",
    "clone_fd",
    "plugins",
    "fsync",
    "big_writes",
    "auto_cache",
    "nonempty",
];

/// Options handed to the mount.
const OF_MOUNT: &[&str] = &[
    "ro",
    "rw",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "diratime",
    "nodiratime",
    "dirsync",
    "sync",
    "async",
    "allow_other",
    "allow_root",
    "default_permissions",
    "fsname",
    "subtype",
    "auto_unmount",
    "context",
    "fscontext",
    "defcontext",
    "rootcontext",
];

impl UnionConfig {
    /// Takes a string of options as of `-o`, separated by commas; `\` before a comma or colon makes it part of
    /// a path.
    pub fn parse(&mut self, options: &[u8]) -> Result<(), OptionError> {
        for option in split(options, b',') {
            if !option.is_empty() {
                self.option(&option)?;
            }
        }
        Ok(())
    }

    fn option(&mut self, option: &[u8]) -> Result<(), OptionError> {
        let (key, value) = match option.iter().position(|b| *b == b'=') {
            Some(at) => (&option[..at], &option[at + 1..]),
            None => (option, &b""[..]),
        };
        let text = || String::from_utf8_lossy(option).into_owned();
        let number = || -> Result<u64, OptionError> {
            let value = std::str::from_utf8(value).ok().and_then(|v| v.trim_end_matches(".0").parse().ok());
            value.ok_or_else(|| OptionError::Number(text()))
        };
        let id = || number().and_then(|n| u32::try_from(n).map_err(|_| OptionError::Number(text())));
        match key {
            b"lowerdir" => {
                let lower = split(value, b':').into_iter().filter(|p| !p.is_empty());
                self.lower = lower.map(|p| path(&unescape(&p))).collect();
            }
            b"upperdir" => self.upper = Some(path(&unescape(value))),
            b"workdir" => self.work = Some(path(&unescape(value))),
            b"squash_to_root" => (self.squash_uid, self.squash_gid) = (Some(0), Some(0)),
            b"squash_to_uid" => self.squash_uid = Some(id()?),
            b"squash_to_gid" => self.squash_gid = Some(id()?),
            b"static_nlink" => self.static_nlink = true,
            b"userxattr" => self.userxattr = true,
            b"volatile" => self.volatile = true,
            b"noacl" => self.noacl = true,
            b"redirect_dir" => {
                self.redirect_dir = redirect_dir(value).ok_or_else(|| OptionError::Value(text()))?;
            }
            b"busy_poll" => {
                self.no_busy_poll = match value {
                    b"on" => false,
                    b"off" => true,
                    _ => return Err(OptionError::Value(text())),
                };
            }
            b"timeout" => self.timeout = Some(number()?),
            b"uidmapping" | b"gidmapping" | b"xattr_permissions" | b"lowerdir+" | b"datadir+" => {
                return Err(OptionError::Unsupported(text()));
            }
            _ => {
                let name = std::str::from_utf8(key).unwrap_or_default();
                if OF_MOUNT.contains(&name) {
                    self.mount_options.push(String::from_utf8_lossy(&unescape(option)).into_owned());
                } else if !IGNORED.contains(&name) {
                    return Err(OptionError::Unknown(text()));
                }
            }
        }
        Ok(())
    }

    /// Whether the union can't be written: asked for, or without an upper.
    pub fn read_only(&self) -> bool {
        self.upper.is_none() || self.mount_options.iter().any(|o| o == "ro")
    }
}

// As overlayfs, which follows them unless told not to.
fn redirect_dir(value: &[u8]) -> Option<RedirectDir> {
    match value {
        b"on" => Some(RedirectDir::On),
        b"off" | b"follow" => Some(RedirectDir::Follow),
        b"nofollow" => Some(RedirectDir::NoFollow),
        _ => None,
    }
}

/// Splits at a separator that has no `\` before it. The backslashes stay.
fn split(bytes: &[u8], separator: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut escaped = false;
    for &b in bytes {
        if b == separator && !escaped {
            parts.push(Vec::new());
            continue;
        }
        escaped = b == b'\\' && !escaped;
        if let Some(last) = parts.last_mut() {
            last.push(b);
        }
    }
    parts
}

/// Takes away the backslashes that protect something.
fn unescape(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes.iter();
    while let Some(&b) = rest.next() {
        out.push(if b == b'\\' { rest.next().copied().unwrap_or(b) } else { b });
    }
    out
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()))
}

impl Union {
    /// Opens the layers. The work directory is emptied of what a crash may have left in it.
    pub fn open(config: UnionConfig) -> Result<Union, UnionError> {
        if config.lower.is_empty() {
            return Err(UnionError::NoLower);
        }
        let mut layers = Vec::with_capacity(config.lower.len() + 1);
        let mut work = None;
        if let Some(upper) = &config.upper {
            layers.push(open_layer("upperdir", upper)?);
            if !config.read_only() {
                let path = config.work.as_ref().ok_or(UnionError::NoWork)?;
                work = Some(open_work(path, upper, &layers[0])?);
            }
        }
        for lower in &config.lower {
            layers.push(open_layer("lowerdir", lower)?);
        }
        let user = config.userxattr || work.as_ref().is_some_and(|w| !trusted_works(&w.dir));
        let prefix = if user { "user.overlay." } else { "trusted.overlay." };
        let opaque = if user { c"user.overlay.opaque" } else { c"trusted.overlay.opaque" };
        let parts = layers.iter().enumerate();
        let parts =
            parts.map(|(layer, fd)| Part { layer, fd: Some(Arc::clone(fd)), xwhiteouts: false, at: None });
        let mut devices = Vec::new();
        let mut key = None;
        for (layer, path) in layers.iter().zip(config.upper.iter().chain(&config.lower)) {
            let stat = Real::Held(Arc::clone(layer)).stat();
            let stat = stat.map_err(|e| failed("lowerdir", path, e.into()))?;
            key.get_or_insert(key_of(&stat));
            if !devices.contains(&stat.st_dev) {
                devices.push(stat.st_dev);
            }
        }
        let state =
            State { name: c"/".to_owned(), parts: parts.collect(), ..State::new(0, key.unwrap_or_default()) };
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Ok(Union {
            table: Table::new(Arc::new(Node::new(ROOT, ROOT, libc::S_IFDIR, state))),
            layers,
            work: work.as_ref().map(|w| Arc::clone(&w.dir)),
            lock: work.map(|w| w.lock),
            config,
            prefix,
            opaque,
            tree: RwLock::new(()),
            devices: RwLock::new(devices),
            without_flags: Mutex::default(),
            temp: AtomicU64::new(0),
            open_dirs: AtomicUsize::new(0),
            own: (geteuid().as_raw(), getegid().as_raw()),
            max_dirs: usize::try_from(files / 2).unwrap_or(usize::MAX).clamp(64, 1 << 19),
        })
    }
}

fn failed(role: &'static str, path: &Path, source: io::Error) -> UnionError {
    UnionError::Layer { role, path: path.to_owned(), source }
}

fn open_layer(role: &'static str, path: &Path) -> Result<Dir, UnionError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let fd = openat(AT_FDCWD, path, flags, Mode::empty()).map_err(|e| failed(role, path, e.into()))?;
    // statvfs(2) does not take a descriptor of O_PATH before Linux 3.12; everything here is younger.
    Ok(Arc::new(fd))
}

struct Work {
    dir: Dir,
    lock: Flock<File>,
}

fn open_work(path: &Path, upper: &Path, upper_fd: &Dir) -> Result<Work, UnionError> {
    let fail = |e: io::Error| failed("workdir", path, e);
    let work = File::open(path).map_err(fail)?;
    let device = |fd: &OwnedFd| nix::sys::stat::fstat(fd.as_fd()).map(|s| s.st_dev);
    let owned = work.try_clone().map_err(fail)?.into();
    if device(&owned).map_err(|e| fail(e.into()))? != device(upper_fd).map_err(|e| fail(e.into()))? {
        return Err(UnionError::OtherFilesystem { work: path.into(), upper: upper.into() });
    }
    let lock =
        Flock::lock(work, FlockArg::LockExclusiveNonblock).map_err(|_| UnionError::InUse(path.to_owned()))?;
    let inner = path.join("work");
    match std::fs::remove_dir_all(&inner) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    mkdirat(&owned, c"work", Mode::S_IRWXU).map_err(|e| fail(e.into()))?;
    let dir = open_dir(&owned, c"work").map_err(|e| fail(e.into()))?;
    Ok(Work { dir, lock })
}

/// Whether this process may use the `trusted` namespace of extended attributes.
fn trusted_works(work: &Dir) -> bool {
    let real = Real::Held(Arc::clone(work));
    let name = c"trusted.overlay.probe";
    real.set_xattr(name, b"y", 0).and_then(|()| real.remove_xattr(name)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_as_podman_passes_them() {
        let mut config = UnionConfig::default();
        let options =
            br"lowerdir=/a:/b\:c:/d\,e,upperdir=/u,workdir=/w,volatile,nodev,fsname=x,squash_to_uid=7";
        config.parse(options).unwrap();
        let lower: Vec<PathBuf> = ["/a", "/b:c", "/d,e"].iter().map(PathBuf::from).collect();
        assert_eq!(config.lower, lower);
        assert_eq!((config.upper, config.work), (Some("/u".into()), Some("/w".into())));
        assert_eq!((config.squash_uid, config.squash_gid, config.volatile), (Some(7), None, true));
        assert_eq!(config.mount_options, ["nodev", "fsname=x"]);
    }

    #[test]
    fn busy_polling_can_be_turned_off() {
        for (option, off) in [("busy_poll=off", true), ("busy_poll=on", false), ("ro", false)] {
            let mut config = UnionConfig::default();
            config.parse(option.as_bytes()).unwrap();
            assert_eq!(config.no_busy_poll, off, "{option}");
        }
        let refused = UnionConfig::default().parse(b"busy_poll=2").unwrap_err();
        assert_eq!(refused, OptionError::Value("busy_poll=2".into()));
    }

    #[test]
    fn what_is_no_option_is_said() {
        let parse = |o: &[u8]| UnionConfig::default().parse(o).unwrap_err().to_string();
        assert_eq!(parse(b"squash_to_uid=x"), "the option `squash_to_uid=x` needs a number");
        assert_eq!(parse(b"ro,frobnicate=1"), "there is no option `frobnicate=1`");
        assert_eq!(parse(b"uidmapping=0:1:2"), "the option `uidmapping=0:1:2` is not supported");
    }

    #[test]
    fn a_union_needs_its_directories() {
        let no = Union::open(UnionConfig::default()).unwrap_err();
        assert_eq!(no.to_string(), "a union needs a lowerdir");
        let dir = tempfile::tempdir().unwrap();
        let config = UnionConfig {
            lower: vec![dir.path().into()],
            upper: Some(dir.path().into()),
            ..UnionConfig::default()
        };
        assert_eq!(Union::open(config).unwrap_err().to_string(), "upperdir needs a workdir");
    }
}
