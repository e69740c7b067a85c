//! A directory of registries' settings, as containerd's `certs.d`.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use lazyrun_fetcher::{ClientOptions, HostFiles};

use super::quick_client;

/// Gone when dropped.
pub struct HostsDir {
    pub dir: tempfile::TempDir,
}

impl HostsDir {
    pub fn new() -> HostsDir {
        HostsDir { dir: tempfile::tempdir().unwrap() }
    }

    /// One with this `hosts.toml` for a registry.
    pub fn with(registry: &str, toml: &str) -> HostsDir {
        let hosts = HostsDir::new();
        hosts.write(registry, "hosts.toml", toml);
        hosts
    }

    /// The directory of a registry.
    pub fn of(&self, registry: &str) -> PathBuf {
        let dir = self.dir.path().join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    pub fn write(&self, registry: &str, file: &str, text: &str) {
        std::fs::write(self.of(registry).join(file), text).unwrap();
    }

    pub fn files(&self) -> HostFiles {
        HostFiles { hosts_dirs: vec![self.dir.path().to_owned()], ..HostFiles::default() }
    }

    pub fn options(&self) -> ClientOptions {
        ClientOptions { hosts: self.files(), ..quick_client() }
    }
}

/// An address at which nobody listens.
pub fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
