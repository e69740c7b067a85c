//! What a file looked like when it was read, to see whether it has changed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::MAX_FILE;
use crate::error::FetchError;

/// A path and what was there; `None`: nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    path: PathBuf,
    seen: Option<(SystemTime, u64, u64)>,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> Stamp {
        use std::os::unix::fs::MetadataExt as _;
        let meta = std::fs::metadata(path).ok();
        let seen = meta.and_then(|m| Some((m.modified().ok()?, m.len(), m.ino())));
        Stamp { path: path.to_owned(), seen }
    }

    /// Whether the path looks as it did.
    pub(crate) fn holds(&self) -> bool {
        Stamp::of(&self.path) == *self
    }

    pub(crate) fn exists(&self) -> bool {
        self.seen.is_some()
    }
}

/// Reads files and notes what they looked like before.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    pub(crate) stamps: Vec<Stamp>,
}

impl Reader {
    /// Whether something is at the path.
    pub(crate) fn exists(&mut self, path: &Path) -> bool {
        let stamp = Stamp::of(path);
        let exists = stamp.exists();
        self.stamps.push(stamp);
        exists
    }

    /// The text of a file; `None` if there is none.
    pub(crate) fn text(&mut self, path: &Path) -> Result<Option<String>, FetchError> {
        self.stamps.push(Stamp::of(path));
        let bytes = match read_small(path) {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(FetchError::bad_config(path, None, error.to_string())),
        };
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(FetchError::bad_config(path, None, "it is not text in UTF-8")),
        }
    }

    /// Names in a directory, sorted; none if there is no such directory.
    pub(crate) fn list(&mut self, dir: &Path) -> Result<Vec<PathBuf>, FetchError> {
        self.stamps.push(Stamp::of(dir));
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(FetchError::bad_config(dir, None, error.to_string())),
        };
        let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        found.sort();
        Ok(found)
    }
}

/// A file of at most 1 MiB.
pub(crate) fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
    }
    Ok(bytes)
}
