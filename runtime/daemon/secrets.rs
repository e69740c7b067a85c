//! Pull secrets outlive the daemon, in memory of the keeper's that has no name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;

use lazyrun_fetcher::Keychain;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Daemon;
use crate::keeper::store::Kept;

/// Under what name the keeper has them.
const NAME: &str = "pull-secrets";
/// Bytes of the most that are taken over.
const MAX: u64 = 16 << 20;

impl Daemon {
    /// Has the keeper hold what the keychain knows for the next daemon. Blocks for as long as the keeper takes to listen.
    ///
    /// # Errors
    /// The kernel's, or that the keeper is gone.
    pub(crate) fn keep_secrets(&self, keychain: &Keychain) -> io::Result<()> {
        let mut memory = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC)?);
        memory.write_all(&keychain.save())?;
        self.kept.keep(NAME, &memory.into())
    }
}

/// Takes over what an earlier daemon knew. A snapshotter that is not to have them lets the keeper forget them.
pub(super) fn take_over(
    before: &mut BTreeMap<String, OwnedFd>,
    kept: &Kept,
    keychain: &Keychain,
    wanted: bool,
) {
    let Some(fd) = before.remove(NAME) else { return };
    if !wanted {
        let _ = kept.discard(NAME);
        return;
    }
    let read = || -> Result<(), String> {
        let (mut memory, mut saved) = (File::from(fd), Vec::new());
        memory.rewind().map_err(|e| e.to_string())?;
        memory.take(MAX).read_to_end(&mut saved).map_err(|e| e.to_string())?;
        keychain.restore(&saved)
    };
    if let Err(error) = read() {
        tracing::warn!(error, "the pull secrets of the earlier daemon are lost");
    }
}
