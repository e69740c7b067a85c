//! What an instance remembers, in `<root>/network/`: `subnet` (the choice, kept for good), `state.json` (which
//! container has which address and ports; true for one boot only, because interfaces do not survive a
//! reboot) and `lock`.
//!
//! `state.json` is replaced atomically but not fsynced: a crash of a process leaves the old or the new file,
//! and a power failure leaves a file of another boot, which counts as empty. That saves the start of every
//! container a disk flush.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::NetworkError;
use super::instance::Attachment;
use super::ipam::Subnet;

type Result<T> = std::result::Result<T, NetworkError>;

/// The content of `state.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    boot_id: String,
    /// Last address given out.
    pub(super) last: Option<Ipv4Addr>,
    /// The table in the kernel may differ from what the records say.
    pub(super) table_stale: bool,
    /// By container id. Written before anything is created in the kernel and removed after everything is
    /// gone there, so a crash can leave a record without an interface but never the other way round.
    pub(super) containers: BTreeMap<String, Attachment>,
}

/// The instance's directory, locked against every other process and thread.
pub(super) struct Store {
    dir: PathBuf,
    /// What is remembered; [`Store::save`] makes changes last.
    pub(super) state: State,
    /// The state file could not be understood, so `state` is empty.
    pub(super) damaged: bool,
    _lock: Flock<File>,
}

impl Store {
    /// Waits for the lock and reads the state.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let dir = root.join("network");
        fs::create_dir_all(&dir).map_err(|e| NetworkError::file("create", &dir, e))?;
        let path = dir.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let mut file = file.map_err(|e| NetworkError::file("open", &path, e))?;
        let lock = loop {
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(lock) => break lock,
                Err((again, nix::errno::Errno::EINTR)) => file = again,
                Err((_, e)) => return Err(NetworkError::file("lock", path, e.into())),
            }
        };
        let (state, damaged) = read_state(&dir.join("state.json"))?;
        Ok(Self { dir, state, damaged, _lock: lock })
    }

    pub(super) fn state_path(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    /// Writes the state.
    pub(super) fn save(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.state)
            .map_err(|e| NetworkError::file("write", self.state_path(), e.into()))?;
        replace(&self.state_path(), &text, false)
    }

    /// The subnet chosen earlier, if any that can be read.
    pub(super) fn subnet(&self) -> Option<Subnet> {
        read_subnet(&self.dir)
    }

    /// Remembers the subnet for good.
    pub(super) fn set_subnet(&self, subnet: Subnet) -> Result<()> {
        replace(&self.dir.join("subnet"), format!("{subnet}\n").as_bytes(), true)
    }

    /// Forgets everything. The lock file stays, others may be waiting on it.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.state = State { boot_id: boot_id()?, ..State::default() };
        self.damaged = false;
        for name in ["state.json", "subnet"] {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(NetworkError::file("remove", path, e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The subnet remembered in `<root>/network`, read without the lock (the file is replaced atomically).
pub(super) fn read_subnet(dir: &Path) -> Option<Subnet> {
    fs::read_to_string(dir.join("subnet")).ok()?.trim().parse().ok()
}

fn read_state(path: &Path) -> Result<(State, bool)> {
    let boot_id = boot_id()?;
    let fresh = || State { boot_id: boot_id.clone(), ..State::default() };
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((fresh(), false)),
        Err(e) => return Err(NetworkError::file("read", path, e)),
    };
    match serde_json::from_slice::<State>(&bytes) {
        Ok(state) if state.boot_id == boot_id => Ok((state, false)),
        Ok(_) => Ok((fresh(), false)),
        Err(_) => Ok((fresh(), true)),
    }
}

fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|e| NetworkError::file("read", path, e))?;
    Ok(text.trim().to_owned())
}

fn replace(path: &Path, content: &[u8], durable: bool) -> Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        if durable && let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|e| NetworkError::file("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_another_boot_is_empty_and_damage_is_told() {
        let root = tempfile::tempdir().unwrap();
        let mut store = Store::open(root.path()).unwrap();
        store.state.last = Some(Ipv4Addr::new(10, 0, 0, 9));
        store.save().unwrap();
        let path = store.state_path();
        drop(store);
        assert_eq!(Store::open(root.path()).unwrap().state.last, Some(Ipv4Addr::new(10, 0, 0, 9)));

        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(boot_id().unwrap().as_str(), "another")).unwrap();
        let store = Store::open(root.path()).unwrap();
        assert!(store.state.last.is_none() && !store.damaged);
        drop(store);

        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(Store::open(root.path()).unwrap().damaged);
    }

    #[test]
    fn the_subnet_is_remembered_until_cleared() {
        let root = tempfile::tempdir().unwrap();
        let mut store = Store::open(root.path()).unwrap();
        assert_eq!(store.subnet(), None);
        let subnet = "10.130.4.0/24".parse().unwrap();
        store.set_subnet(subnet).unwrap();
        assert_eq!(store.subnet(), Some(subnet));
        store.clear().unwrap();
        assert_eq!(store.subnet(), None);
    }
}
