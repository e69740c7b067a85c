//! Trees as the rig's `scan.py` prints them and compared as its `compare.py` does: from a view, from a
//! directory, from a file of JSON lines.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use lazyrun_fs::erofs::LayerContent;
use lazyrun_fs::view::{Ino, Kind, View};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

pub type Tree = BTreeMap<String, Map<String, Value>>;
const SAMPLE: u64 = 64 << 20;

pub fn escape(bytes: &[u8]) -> String {
    if let Ok(s) = std::str::from_utf8(bytes)
        && s.chars().all(|c| c >= ' ' && c != '\\' && c != '\x7f')
    {
        return s.to_owned();
    }
    bytes
        .iter()
        .map(|&b| {
            if (32..=126).contains(&b) && b != b'\\' {
                (b as char).to_string()
            } else {
                format!("\\x{b:02x}")
            }
        })
        .collect()
}

/// sha256 of contents, of samples above 64 MiB.
fn content(size: u64, mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> String {
    const M: u64 = 1 << 20;
    let mut hash = Sha256::new();
    let mut buf = vec![0; M as usize];
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    if size <= SAMPLE {
        pieces.extend((0..size.div_ceil(M)).map(|i| (i * M, M.min(size - i * M))));
    } else {
        pieces.extend((0..66).map(|i| ((size - M).min((size - M) * i / 65), M)));
    }
    for (offset, len) in pieces {
        let piece = &mut buf[..len as usize];
        if let Err(e) = read(offset, piece) {
            return format!("ERR:{e}");
        }
        hash.update(piece);
    }
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if size <= SAMPLE { hex } else { format!("sampled:{hex}") }
}

fn time(secs: i64, nanos: i64) -> String {
    format!("{secs}.{nanos:09}")
}

/// Adds `link`, the first name of each group with more than one.
fn add_links(tree: &mut Tree, groups: HashMap<u64, Vec<Vec<u8>>>) {
    for group in groups.into_values().filter(|g| g.len() > 1) {
        let first = group.iter().min().map(|p| escape(p)).unwrap_or_default();
        for path in group {
            if let Some(e) = tree.get_mut(&escape(&path)) {
                e.insert("link".into(), json!(first));
            }
        }
    }
}

/// A view, contents read through its extents.
pub fn of_view(view: &View, files: &dyn LayerContent) -> Tree {
    let mut tree = Tree::new();
    let mut groups: HashMap<u64, Vec<Vec<u8>>> = HashMap::new();
    let mut todo: Vec<(Ino, Vec<u8>)> = vec![(0, b".".to_vec())];
    while let Some((ino, path)) = todo.pop() {
        let inode = view.inode(ino);
        let mut e = Map::new();
        let kind = match inode.kind {
            Kind::File => "f",
            Kind::Directory => "d",
            Kind::Symlink => "l",
            Kind::CharDevice => "c",
            Kind::BlockDevice => "b",
            Kind::Fifo => "p",
        };
        e.insert("path".into(), json!(escape(&path)));
        e.insert("type".into(), json!(kind));
        e.insert("mode".into(), json!(format!("{:04o}", inode.mode)));
        e.insert("uid".into(), json!(inode.uid));
        e.insert("gid".into(), json!(inode.gid));
        e.insert("mtime".into(), json!(time(inode.mtime.secs, inode.mtime.nanos.into())));
        match inode.kind {
            Kind::File => {
                e.insert("size".into(), json!(inode.size));
                let sum = content(inode.size, |offset, buf| read_view(view, ino, files, offset, buf));
                e.insert("sha256".into(), json!(sum));
            }
            Kind::Symlink => {
                e.insert("size".into(), json!(inode.size));
                e.insert("target".into(), json!(escape(&inode.target)));
            }
            Kind::CharDevice | Kind::BlockDevice => {
                e.insert("rdev".into(), json!(format!("{}:{}", inode.rdev.0, inode.rdev.1)));
            }
            Kind::Directory => {
                let prefix = if ino == 0 { Vec::new() } else { [&path[..], b"/"].concat() };
                todo.extend(view.children(ino).map(|(name, child)| (child, [&prefix, name].concat())));
            }
            Kind::Fifo => {}
        }
        if inode.kind != Kind::Directory {
            e.insert("nlink".into(), json!(inode.nlink));
            groups.entry(ino.into()).or_default().push(path.clone());
        }
        if !inode.xattrs.is_empty() {
            let xattrs: Map<String, Value> =
                inode.xattrs.iter().map(|x| (escape(&x.name), json!(hex(&x.value)))).collect();
            e.insert("xattrs".into(), Value::Object(xattrs));
        }
        tree.insert(escape(&path), e);
    }
    add_links(&mut tree, groups);
    tree
}

fn read_view(view: &View, ino: Ino, files: &dyn LayerContent, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    buf.fill(0);
    let end = offset + buf.len() as u64;
    for e in view.inode(ino).extents.iter() {
        let from = e.file_offset.max(offset);
        let to = (e.file_offset + e.len).min(end);
        if from < to {
            let piece = &mut buf[(from - offset) as usize..(to - offset) as usize];
            files.read_at(e.layer, e.layer_offset + (from - e.file_offset), piece)?;
        }
    }
    Ok(())
}

/// A directory tree of the system.
pub fn of_dir(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut groups: HashMap<u64, Vec<Vec<u8>>> = HashMap::new();
    let mut todo: Vec<(PathBuf, Vec<u8>)> = vec![(root.join("."), b".".to_vec())];
    while let Some((full, path)) = todo.pop() {
        let mut e = Map::new();
        e.insert("path".into(), json!(escape(&path)));
        let meta = match fs::symlink_metadata(&full) {
            Ok(meta) => meta,
            Err(error) => {
                e.insert("type".into(), json!(format!("ghost: {error}")));
                tree.insert(escape(&path), e);
                continue;
            }
        };
        let t = meta.file_type();
        let kind = match () {
            () if t.is_file() => "f",
            () if t.is_dir() => "d",
            () if t.is_symlink() => "l",
            () if t.is_char_device() => "c",
            () if t.is_block_device() => "b",
            () if t.is_fifo() => "p",
            () => "s",
        };
        e.insert("type".into(), json!(kind));
        e.insert("mode".into(), json!(format!("{:04o}", meta.mode() & 0o7777)));
        e.insert("uid".into(), json!(meta.uid()));
        e.insert("gid".into(), json!(meta.gid()));
        e.insert("mtime".into(), json!(time(meta.mtime(), meta.mtime_nsec())));
        if t.is_file() {
            e.insert("size".into(), json!(meta.size()));
            let sum = match File::open(&full) {
                Ok(file) => {
                    // A read across the end must stop there.
                    let past = file.read_at(&mut [0; 8], meta.size()).unwrap_or(99);
                    assert_eq!(past, 0, "{full:?} has bytes past its end");
                    content(meta.size(), |offset, buf| file.read_exact_at(buf, offset))
                }
                Err(error) => format!("ERR:{error}"),
            };
            e.insert("sha256".into(), json!(sum));
        }
        if t.is_symlink() {
            e.insert("size".into(), json!(meta.size()));
            let target = fs::read_link(&full).map(|t| escape(t.as_os_str().as_bytes()));
            e.insert("target".into(), json!(target.unwrap_or_else(|e| format!("ERR:{e}"))));
        }
        if t.is_char_device() || t.is_block_device() {
            let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
            e.insert("rdev".into(), json!(format!("{major}:{minor}")));
        }
        if t.is_dir() {
            let prefix = if path == b"." { Vec::new() } else { [&path[..], b"/"].concat() };
            match fs::read_dir(&full) {
                Ok(names) => {
                    for entry in names {
                        let name = entry.expect("readdir").file_name().into_vec();
                        todo.push((
                            full.join(std::ffi::OsStr::from_bytes(&name)),
                            [&prefix[..], &name].concat(),
                        ));
                    }
                }
                Err(error) => {
                    e.insert("opendir".into(), json!(format!("ERR:{error}")));
                }
            }
        } else {
            e.insert("nlink".into(), json!(meta.nlink()));
            groups.entry(meta.ino()).or_default().push(path.clone());
        }
        let xattrs = xattrs(&full);
        if !xattrs.is_empty() {
            e.insert("xattrs".into(), Value::Object(xattrs));
        }
        tree.insert(escape(&path), e);
    }
    add_links(&mut tree, groups);
    tree
}

fn xattrs(path: &Path) -> Map<String, Value> {
    let c = CString::new(path.as_os_str().as_bytes()).expect("no NUL in a path");
    let mut names = vec![0u8; 1 << 17];
    // SAFETY: the path is NUL-terminated and the buffer as long as said.
    let len = unsafe { libc::llistxattr(c.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let mut out = Map::new();
    let Ok(len) = usize::try_from(len) else { return out };
    for name in names[..len].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let cname = CString::new(name).expect("no NUL in a name");
        let mut value = vec![0u8; 1 << 17];
        // SAFETY: both strings are NUL-terminated and the buffer as long as said.
        let len =
            unsafe { libc::lgetxattr(c.as_ptr(), cname.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let shown = match usize::try_from(len) {
            Ok(len) => hex(&value[..len]),
            Err(_) => format!("ERR:{}", io::Error::last_os_error()),
        };
        out.insert(escape(name), json!(shown));
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// JSON lines.
pub fn of_jsonl(text: &str) -> Tree {
    text.lines()
        .map(|line| {
            let e: Map<String, Value> = serde_json::from_str(line).expect("expected tree is JSON lines");
            (e["path"].as_str().expect("path").to_owned(), e)
        })
        .collect()
}

/// Differences, with the tolerance of `compare.py`: mtimes of the root and of implicit directories, link
/// counts, attributes of overlayfs itself.
pub fn compare(expected: &Tree, got: &Tree) -> Vec<String> {
    differences(expected, got, &|e, implicit| {
        let mut e = e.clone();
        e.remove("nlink");
        if e.remove("implicit").is_some() || implicit || e["path"] == "." {
            e.remove("mtime");
        }
        if let Some(Value::Object(mut xattrs)) = e.remove("xattrs") {
            let own = ["trusted.overlay.", "user.overlay.", "security.selinux"];
            xattrs.retain(|k, _| !own.iter().any(|p| k.starts_with(p)));
            if !xattrs.is_empty() {
                e.insert("xattrs".into(), Value::Object(xattrs));
            }
        }
        e
    })
}

/// Differences, without any tolerance but for the escape of overlayfs' attributes.
pub fn compare_strictly(expected: &Tree, got: &Tree) -> Vec<String> {
    differences(expected, got, &|e, _| {
        let mut e = e.clone();
        if let Some(Value::Object(xattrs)) = e.remove("xattrs") {
            let xattrs: Map<String, Value> = xattrs
                .into_iter()
                .map(|(k, v)| (k.replacen(".overlay.overlay.", ".overlay.", 1), v))
                .collect();
            e.insert("xattrs".into(), Value::Object(xattrs));
        }
        e
    })
}

type Norm<'n> = &'n dyn Fn(&Map<String, Value>, bool) -> Map<String, Value>;

fn differences(expected: &Tree, got: &Tree, norm: Norm<'_>) -> Vec<String> {
    let mut out = Vec::new();
    for path in expected.keys().chain(got.keys().filter(|k| !expected.contains_key(*k))) {
        match (expected.get(path), got.get(path)) {
            (Some(e), Some(g)) => {
                let (a, b) = (norm(e, false), norm(g, e.contains_key("implicit")));
                let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
                for key in keys {
                    if a.get(key) != b.get(key) {
                        out.push(format!("{path}: {key}: expected {:?}, got {:?}", a.get(key), b.get(key)));
                    }
                }
            }
            (Some(_), None) => out.push(format!("{path}: missing")),
            (None, _) => out.push(format!("{path}: extra")),
        }
    }
    out
}
