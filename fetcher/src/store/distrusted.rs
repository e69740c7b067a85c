//! The claims that turned out to be lies: they are never adopted again.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use super::sync_dir;
use crate::trust::{Origin, OriginKind};

const VERSION: u32 = 1;
/// So many are remembered; the oldest are forgotten first.
const MAX: usize = 4096;

/// One claim.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Claim {
    kind: OriginKind,
    /// Manifest of the artifact; none where the blob itself held the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact: Option<Digest>,
    /// The blob that the claim is about.
    blob: Digest,
    reason: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    claims: Vec<Claim>,
}

/// The list and its file.
pub(super) struct Distrusted {
    path: PathBuf,
    claims: Mutex<Vec<Claim>>,
}

impl Distrusted {
    /// Reads the list. One that cannot be read is an error: forgetting it would mean to believe liars.
    pub(super) fn open(path: PathBuf) -> io::Result<Distrusted> {
        let claims = match fs::read(&path) {
            Ok(bytes) => parse(&bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e),
        };
        Ok(Distrusted { path, claims: Mutex::new(claims) })
    }

    /// Why a claim about a blob is not to be believed, if it isn't.
    pub(super) fn reason(&self, origin: &Origin, blob: Digest) -> Option<String> {
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |c: &&Claim| match (c.artifact, origin.artifact) {
            (Some(theirs), Some(ours)) => theirs == ours,
            (None, None) => c.kind == origin.kind && c.blob == blob,
            _ => false,
        };
        claims.iter().find(same).map(|c| c.reason.clone())
    }

    /// All artifacts on the list.
    pub(super) fn artifacts(&self) -> HashSet<Digest> {
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.iter().filter_map(|c| c.artifact).collect()
    }

    /// Remembers a lie, durably.
    pub(super) fn add(&self, origin: &Origin, blob: Digest, reason: &str) -> io::Result<()> {
        if self.reason(origin, blob).is_some() {
            return Ok(());
        }
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if claims.len() >= MAX {
            claims.remove(0);
        }
        claims.push(Claim { kind: origin.kind, artifact: origin.artifact, blob, reason: reason.to_owned() });
        let content = Content { version: VERSION, claims: claims.clone() };
        write(&self.path, &serde_json::to_vec(&content)?)
    }
}

fn parse(bytes: &[u8]) -> io::Result<Vec<Claim>> {
    let content: Content = serde_json::from_slice(bytes)?;
    if content.version != VERSION {
        let reason = format!("the list of distrusted indexes has version {}", content.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(content.claims)
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_dir(path.parent().unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::Trust;

    #[test]
    fn lies_are_remembered_by_artifact_or_by_blob() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("distrusted.json");
        let origin = |kind, artifact| Origin { kind, artifact, trust: Trust::Repository };
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let list = Distrusted::open(path.clone()).unwrap();
        list.add(&origin(OriginKind::SociV1, Some(one)), one, "bad").unwrap();
        list.add(&origin(OriginKind::Estargz, None), one, "worse").unwrap();
        drop(list);
        let list = Distrusted::open(path.clone()).unwrap();
        assert_eq!(list.reason(&origin(OriginKind::SociV1, Some(one)), two).as_deref(), Some("bad"));
        assert_eq!(list.reason(&origin(OriginKind::SociV1, Some(two)), one), None);
        assert_eq!(list.reason(&origin(OriginKind::Estargz, None), one).as_deref(), Some("worse"));
        assert_eq!(list.reason(&origin(OriginKind::Estargz, None), two), None);
        std::fs::write(&path, b"{}").unwrap();
        assert!(Distrusted::open(path).is_err());
    }
}
