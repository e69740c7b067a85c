//! Collects files of the host for an image, with everything they need: symlink targets, shared libraries.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use crate::elf;

/// Larger files are never looked into for shared libraries.
const MAX_ELF: u64 = 256 << 20;

/// Where the dynamic loader looks when nothing else is said (ld.so(8)), the multiarch directories first.
fn library_dirs() -> Vec<PathBuf> {
    let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
    let mut dirs: Vec<PathBuf> = vec![format!("/lib/{triple}").into(), format!("/usr/lib/{triple}").into()];
    dirs.extend(["/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"].map(PathBuf::from));
    let configured = fs::read_dir("/etc/ld.so.conf.d").into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = configured.map(|entry| entry.path()).collect();
    files.sort();
    for line in files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .flat_map(|text| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>())
    {
        if line.starts_with('/') {
            dirs.push(line.into());
        }
    }
    dirs.retain(|dir| dir.is_dir());
    dirs
}

/// A set of paths of the host, closed under symlinks and shared libraries. Paths are absolute, their parents
/// free of symlinks (`/usr/lib/x`, not `/lib/x` where `/lib` is a link).
pub(super) struct HostFiles {
    paths: BTreeSet<PathBuf>,
    library_dirs: Vec<PathBuf>,
    /// Where a library was found, so that each is searched for once.
    libraries: HashMap<OsString, Option<PathBuf>>,
}

impl HostFiles {
    pub(super) fn new() -> HostFiles {
        HostFiles { paths: BTreeSet::new(), library_dirs: library_dirs(), libraries: HashMap::new() }
    }

    /// Adds a file, what its symlinks lead to, and what the dynamic loader would load for it. Paths that do
    /// not exist are passed over: hosts differ.
    pub(super) fn add(&mut self, path: &Path) {
        let mut pending = vec![path.to_owned()];
        while let Some(path) = pending.pop() {
            let Some(path) = resolve_parent(&path) else { continue };
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if !self.paths.insert(path.clone()) {
                continue;
            }
            if metadata.is_symlink() {
                if let (Some(parent), Ok(target)) = (path.parent(), fs::read_link(&path)) {
                    pending.push(parent.join(target));
                }
            } else if metadata.is_file() && metadata.len() <= MAX_ELF {
                pending.extend(self.needs_of(&path));
            }
        }
    }

    /// Adds a directory with all it holds, except entries (at any depth) of these names.
    pub(super) fn add_tree(&mut self, dir: &Path, except: &[&str]) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if except.iter().any(|except| name == OsStr::new(except)) {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.add_tree(&path, except),
                Ok(kind) if kind.is_file() || kind.is_symlink() => self.add(&path),
                _ => {}
            }
        }
    }

    /// The paths, sorted.
    pub(super) fn into_paths(self) -> BTreeSet<PathBuf> {
        self.paths
    }

    fn needs_of(&mut self, path: &Path) -> Vec<PathBuf> {
        let Some(needs) = read_elf(path).ok().flatten().and_then(|bytes| elf::needs(&bytes.as_slice()))
        else {
            return Vec::new();
        };
        let origin = path.parent().unwrap_or(Path::new("/"));
        let own: Vec<PathBuf> = needs
            .paths
            .iter()
            .map(|path| PathBuf::from(path.to_string_lossy().replace("$ORIGIN", &origin.to_string_lossy())))
            .collect();
        let mut found: Vec<PathBuf> = needs.interpreter.into_iter().collect();
        for library in needs.libraries {
            if let Some(path) = own.iter().map(|dir| dir.join(&library)).find(|path| path.exists()) {
                found.push(path);
                continue;
            }
            let dirs = &self.library_dirs;
            let place = self
                .libraries
                .entry(library.clone())
                .or_insert_with(|| dirs.iter().map(|dir| dir.join(&library)).find(|path| path.exists()));
            found.extend(place.clone());
        }
        found
    }
}

/// A file's bytes when it begins as ELF files do.
fn read_elf(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut file = fs::File::open(path)?;
    let mut magic = [0; 4];
    if file.read(&mut magic)? < 4 || &magic != b"\x7fELF" {
        return Ok(None);
    }
    let mut bytes = magic.to_vec();
    file.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// The path with its parent free of symlinks and `..`.
fn resolve_parent(path: &Path) -> Option<PathBuf> {
    let name = match path.components().next_back()? {
        Component::Normal(name) => name,
        _ => return fs::canonicalize(path).ok(),
    };
    Some(fs::canonicalize(path.parent()?).ok()?.join(name))
}

/// A file that could fill an image.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) mtime: i64,
}

/// All regular files and symlinks below `dir` on the same filesystem, sorted by path, without the paths in
/// `except` and what lies below them.
pub(super) fn walk(dir: &Path, except: &BTreeSet<PathBuf>, found: &mut Vec<Candidate>) {
    let Ok(device) = fs::symlink_metadata(dir).map(|metadata| metadata.dev()) else { return };
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else { continue };
            let kind = metadata.file_type();
            if metadata.dev() != device || except.contains(&path) || kind.is_socket() {
                continue;
            }
            if kind.is_dir() {
                pending.push(path);
            } else if kind.is_file() || kind.is_symlink() {
                let size = if kind.is_file() { metadata.len() } else { 0 };
                found.push(Candidate { path, size, mtime: metadata.mtime() });
            }
        }
    }
    found.sort_by(|a, b| a.path.as_os_str().as_bytes().cmp(b.path.as_os_str().as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_brings_loader_and_libc() {
        let mut files = HostFiles::new();
        files.add(Path::new("/bin/ls"));
        let names: Vec<String> = files
            .into_paths()
            .iter()
            .filter_map(|path| path.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        assert!(names.iter().any(|name| name == "ls"), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("libc.so")), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("ld-linux")), "{names:?}");
    }

    #[test]
    fn symlinks_bring_their_targets() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        fs::create_dir(dir.join("real")).unwrap();
        fs::write(dir.join("real/file"), "x").unwrap();
        std::os::unix::fs::symlink("real", dir.join("alias")).unwrap();
        std::os::unix::fs::symlink("alias/file", dir.join("link")).unwrap();
        let mut files = HostFiles::new();
        files.add(&dir.join("link"));
        assert_eq!(
            files.into_paths().into_iter().collect::<Vec<_>>(),
            [dir.join("link"), dir.join("real/file")]
        );
    }
}
