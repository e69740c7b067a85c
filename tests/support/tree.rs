//! A file tree entry by entry (type, mode, owners, size, mtime with nanoseconds, link groups, xattrs, device
//! numbers, content) and the comparison of two of them.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, major, minor};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// A tree: entries by escaped path; the root is `.`.
pub type Tree = BTreeMap<String, Map<String, Value>>;

/// Xattrs that belong to the machinery of a union, not to the image.
const FOREIGN_XATTRS: &[&str] = &[
    "trusted.overlay.",
    "user.overlay.",
    "security.selinux",
    "trusted.sn.",
    "user.fuseoverlayfs",
    "user.rootlesscontainers",
];

/// Reads the tree below `dir` without following links. An entry that is listed but cannot be looked up is a
/// `ghost`.
pub fn scan(dir: &Path) -> Tree {
    let root = open(dir, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", dir.display()));
    let mut scan = Scan { tree: Tree::new(), groups: BTreeMap::new() };
    scan.entry(&root, OsStr::new("."), b".");
    scan.directory(&root, b"");
    for paths in scan.groups.values().filter(|paths| paths.len() > 1) {
        let first = paths.iter().min().expect("a group has members");
        for path in paths {
            let entry = scan.tree.get_mut(&escape(path)).expect("members were recorded");
            entry.insert("link".into(), escape(first).into());
        }
    }
    scan.tree
}

/// Reads a tree that was written as JSON lines.
pub fn from_json_lines(text: &str) -> Tree {
    let parse =
        |line: &str| -> Map<String, Value> { serde_json::from_str(line).expect("a JSON object a line") };
    let key = |entry: &Map<String, Value>| entry["path"].as_str().expect("a path").to_owned();
    text.lines().filter(|line| !line.is_empty()).map(parse).map(|entry| (key(&entry), entry)).collect()
}

/// Describes every difference; empty when the trees are equal. Not compared: link counts (the link groups are),
/// mtimes of the root and of directories that `expected` marks as implicit (no tar entry names them), sizes of
/// directories, and xattrs of the union's machinery.
pub fn differences(expected: &Tree, actual: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    for (path, entry) in expected {
        let Some(other) = actual.get(path) else {
            found.push(format!("missing: {path} ({})", entry["type"]));
            continue;
        };
        let implicit =
            entry.get("implicit") == Some(&Value::Bool(true)) || path == "." || unpacked_just_now(entry);
        let (left, right) = (comparable(entry, implicit), comparable(other, implicit));
        for key in left.keys().chain(right.keys().filter(|key| !left.contains_key(*key))) {
            let (a, b) = (left.get(key), right.get(key));
            if a != b {
                found.push(format!("{path}: {key} expected {} got {}", text(a), text(b)));
            }
        }
    }
    let extra = actual.iter().filter(|(path, _)| !expected.contains_key(*path));
    found.extend(extra.map(|(path, entry)| format!("extra: {path} ({})", entry["type"])));
    found
}

/// Panics with the first differences when the trees are not equal.
pub fn assert_equal(expected: &Tree, actual: &Tree) {
    let found = differences(expected, actual);
    let first = found.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
    assert!(found.is_empty(), "{} differences in {} entries:\n{first}", found.len(), expected.len());
}

/// A directory that a layer adds to without naming it gets the time of unpacking from containerd: that says
/// nothing about the image. The images of these tests are all older.
fn unpacked_just_now(entry: &Map<String, Value>) -> bool {
    let time = entry["mtime"].as_str().and_then(|t| t.split('.').next()).and_then(|t| t.parse::<u64>().ok());
    let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_secs());
    entry["type"] == "d" && time.is_some_and(|time| time + 3600 > now)
}

fn text(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), Value::to_string)
}

fn comparable(entry: &Map<String, Value>, implicit: bool) -> Map<String, Value> {
    let mut entry = entry.clone();
    for key in ["implicit", "nlink"] {
        entry.remove(key);
    }
    if implicit {
        entry.remove("mtime");
    }
    if let Some(Value::Object(xattrs)) = entry.remove("xattrs") {
        let own = |name: &str| !FOREIGN_XATTRS.iter().any(|foreign| name.starts_with(foreign));
        let own: Map<String, Value> = xattrs.into_iter().filter(|(name, _)| own(name)).collect();
        if !own.is_empty() {
            entry.insert("xattrs".into(), own.into());
        }
    }
    entry
}

struct Scan {
    tree: Tree,
    /// Paths of one inode.
    groups: BTreeMap<(u64, u64), Vec<Vec<u8>>>,
}

impl Scan {
    fn directory(&mut self, dir: &OwnedFd, prefix: &[u8]) {
        for name in names(dir) {
            let path = [prefix, name.as_bytes()].concat();
            if !self.entry(dir, &name, &path) {
                continue;
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
            match openat(dir, name.as_os_str(), flags, Mode::empty()) {
                Ok(child) => self.directory(&child, &[&path[..], b"/"].concat()),
                Err(error) => {
                    let entry = self.tree.get_mut(&escape(&path)).expect("it was just recorded");
                    entry.insert("opendir".into(), format!("ERR:{}", error as i32).into());
                }
            }
        }
    }

    /// Records one entry; says whether it is a directory.
    fn entry(&mut self, dir: &OwnedFd, name: &OsStr, path: &[u8]) -> bool {
        let mut entry = Map::new();
        entry.insert("path".into(), escape(path).into());
        let stat = match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(error) => {
                entry.insert("type".into(), "ghost".into());
                entry.insert("errno".into(), (error as i32).into());
                self.tree.insert(escape(path), entry);
                return false;
            }
        };
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        attributes(&mut entry, &stat, kind);
        if kind == SFlag::S_IFREG {
            entry.insert("sha256".into(), content(dir, name, &stat).into());
        }
        if kind == SFlag::S_IFLNK {
            let target =
                readlinkat(dir, name).map_or_else(|error| error.to_string(), |t| escape(t.as_bytes()));
            entry.insert("target".into(), target.into());
        }
        if kind != SFlag::S_IFDIR {
            self.groups.entry((stat.st_dev, stat.st_ino)).or_default().push(path.to_vec());
        }
        let xattrs = xattrs(dir, name);
        if !xattrs.is_empty() {
            entry.insert("xattrs".into(), xattrs.into());
        }
        self.tree.insert(escape(path), entry);
        kind == SFlag::S_IFDIR
    }
}

fn attributes(entry: &mut Map<String, Value>, stat: &FileStat, kind: SFlag) {
    let letter = match kind {
        SFlag::S_IFREG => "f",
        SFlag::S_IFDIR => "d",
        SFlag::S_IFLNK => "l",
        SFlag::S_IFCHR => "c",
        SFlag::S_IFBLK => "b",
        SFlag::S_IFIFO => "p",
        _ => "s",
    };
    entry.insert("type".into(), letter.into());
    entry.insert("mode".into(), format!("{:04o}", stat.st_mode & 0o7777).into());
    entry.insert("uid".into(), stat.st_uid.into());
    entry.insert("gid".into(), stat.st_gid.into());
    entry.insert("mtime".into(), format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec).into());
    if kind == SFlag::S_IFREG || kind == SFlag::S_IFLNK {
        entry.insert("size".into(), stat.st_size.into());
    }
    if kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK {
        entry.insert("rdev".into(), format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev)).into());
    }
}

fn names(dir: &OwnedFd) -> Vec<OsString> {
    // A descriptor of its own: listing moves the offset, and the path may be longer than any call takes.
    let own =
        openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).expect("reopen a directory");
    let mut listing = nix::dir::Dir::from_fd(own).expect("list a directory");
    let mut names: Vec<OsString> = listing
        .iter()
        .map(|entry| entry.expect("read a directory").file_name().to_bytes().to_vec())
        .filter(|name| name != b"." && name != b"..")
        .map(OsString::from_vec)
        .collect();
    names.sort();
    names
}

fn content(dir: &OwnedFd, name: &OsStr, stat: &FileStat) -> String {
    let opened = openat(dir, name, OFlag::O_RDONLY | OFlag::O_NOFOLLOW, Mode::empty());
    let fd = match opened {
        Ok(fd) => fd,
        Err(error) => return format!("ERR:{}", error as i32),
    };
    let mut file = File::from(fd);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                hash.update(&buffer[..len]);
                total += len as i64;
            }
            Err(error) => return format!("ERR:{}", error.raw_os_error().unwrap_or(0)),
        }
    }
    if total != stat.st_size {
        return format!("SHORT:{total}");
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn xattrs(dir: &OwnedFd, name: &OsStr) -> Map<String, Value> {
    let path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    let Ok(path) = CString::new([&path[..], name.as_bytes()].concat()) else { return Map::new() };
    let mut list = vec![0u8; 1 << 16];
    // SAFETY: the path is NUL-terminated and the buffer has the length that is given.
    let len = unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    let Ok(len) = usize::try_from(len) else { return Map::new() };
    list.truncate(len);
    let mut found = Map::new();
    for name in
        list.split_inclusive(|byte| *byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok())
    {
        let mut value = vec![0u8; 1 << 16];
        // SAFETY: both strings are NUL-terminated and the buffer has the length that is given.
        let len =
            unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let value = match usize::try_from(len) {
            Ok(len) => value[..len].iter().map(|byte| format!("{byte:02x}")).collect(),
            Err(_) => format!("ERR:{}", Errno::last_raw()),
        };
        found.insert(name.to_string_lossy().into_owned(), json!(value));
    }
    found
}

/// A path as text: control bytes, backslashes and all of a name that is not UTF-8 as `\xNN`.
pub fn escape(bytes: &[u8]) -> String {
    if let Ok(text) = std::str::from_utf8(bytes)
        && text.chars().all(|c| u32::from(c) >= 32 && c != '\\' && c != '\x7f')
    {
        return text.to_owned();
    }
    let one = |byte: &u8| match byte {
        b'\\' | ..=31 | 127.. => format!("\\x{byte:02x}"),
        _ => char::from(*byte).to_string(),
    };
    bytes.iter().map(one).collect()
}
