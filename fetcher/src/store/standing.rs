//! What a layer's index is worth: built here, claimed by somebody, claimed and proven since, or a lie.
//!
//! The layer's directory says so. `origin` is there while an adopted index is not proven, and holds the reason once
//! it turned out to be a lie. Proving renames it to `adopted`. Neither file: the index was built here.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use lazyrun_index::Digest;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::trust::Origin;

const ORIGIN: &str = "origin";
const ADOPTED: &str = "adopted";
const NEW: &str = "origin.new";
const VERSION: u32 = 1;
/// Far more than a record takes.
const MAX_RECORD: u64 = 64 << 10;

/// Both files, as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    /// sha256 of the adopted index.
    index: Digest,
    origin: Origin,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lie: Option<String>,
}

/// The state of one layer.
pub(super) struct Standing {
    /// The layer's directory, by descriptor: its name may be given to another layer.
    dir: File,
    record: Option<Record>,
    proven: AtomicBool,
    lie: OnceLock<String>,
}

impl Standing {
    /// Reads the state. A record that cannot be understood is an error of kind `InvalidData`.
    pub(super) fn open(dir: &Path) -> io::Result<Standing> {
        let (record, proven) = match read(&dir.join(ORIGIN))? {
            Some(record) => (Some(record), false),
            None => (read(&dir.join(ADOPTED))?, true),
        };
        let lie = OnceLock::new();
        if let Some(reason) = record.as_ref().and_then(|r| r.lie.clone()) {
            let _ = lie.set(reason);
        }
        Ok(Standing { dir: File::open(dir)?, record, proven: AtomicBool::new(proven), lie })
    }

    /// Marks the layer that is being made in `dir` as adopted and not proven.
    pub(super) fn claim(dir: &Path, index: Digest, origin: &Origin) -> io::Result<()> {
        let record = Record { version: VERSION, index, origin: origin.clone(), lie: None };
        write(&File::open(dir)?, &record)
    }

    /// The file name of the layer in a directory of all: `id`, for an adopted one with a part of its index's digest,
    /// because whoever adopts another index of the layer later must not get what was read by this one.
    pub(super) fn file_name(&self, id: &str) -> String {
        self.record.as_ref().map_or_else(|| id.to_owned(), |record| adopted_name(id, record))
    }

    pub(super) fn origin(&self) -> Option<&Origin> {
        self.record.as_ref().map(|r| &r.origin)
    }

    pub(super) fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Acquire)
    }

    pub(super) fn lie(&self) -> Option<&str> {
        self.lie.get().map(String::as_str)
    }

    /// Believes the index from now on, durably.
    pub(super) fn prove(&self) -> io::Result<()> {
        if !self.is_proven() {
            let dir = self.dir.as_fd();
            renameat(dir, ORIGIN, dir, ADOPTED)?;
            self.dir.sync_all()?;
            self.proven.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Never believes the index again. That holds at once, and durably if no error comes.
    pub(super) fn condemn(&self, reason: &str) -> io::Result<()> {
        let reason = self.lie.get_or_init(|| reason.to_owned());
        let Some(record) = &self.record else { return Ok(()) };
        write(&self.dir, &Record { lie: Some(reason.clone()), ..record.clone() })
    }
}

/// [`Standing::file_name`] of a layer that is not open.
pub(super) fn file_name_in(dir: &Path, id: &str) -> io::Result<String> {
    let record = match read(&dir.join(ORIGIN))? {
        Some(record) => Some(record),
        None => read(&dir.join(ADOPTED))?,
    };
    Ok(record.map_or_else(|| id.to_owned(), |record| adopted_name(id, &record)))
}

fn adopted_name(id: &str, record: &Record) -> String {
    format!("{id}.{}", &record.index.hex()[..16])
}

fn read(path: &Path) -> io::Result<Option<Record>> {
    let damaged = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    match fs::metadata(path) {
        Ok(meta) if meta.len() > MAX_RECORD => {
            return Err(damaged(format!("{} is too long", path.display())));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    }
    let record: Record =
        serde_json::from_slice(&fs::read(path)?).map_err(|e| damaged(format!("{}: {e}", path.display())))?;
    if record.version != VERSION {
        return Err(damaged(format!("{} has version {}", path.display(), record.version)));
    }
    Ok(Some(record))
}

/// Replaces `origin` in the directory, atomically and durably.
fn write(dir: &File, record: &Record) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(dir.as_fd(), NEW, flags, Mode::from_bits_truncate(0o644))?);
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    renameat(dir.as_fd(), NEW, dir.as_fd(), ORIGIN)?;
    dir.sync_all()
}
