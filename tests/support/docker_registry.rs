//! Debian's docker-registry with a storage of its own on a free port.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::server::{Server, free_port};
use super::wait_for;

/// A running registry.
pub struct DockerRegistry {
    addr: SocketAddr,
    // Killed before its storage is removed: fields drop in this order.
    server: Option<Server>,
    dir: TempDir,
}

impl DockerRegistry {
    /// Starts an empty one and waits until it answers.
    pub fn start() -> DockerRegistry {
        DockerRegistry::start_with("")
    }

    /// Starts one that fetches what it is asked for from another, and keeps it.
    pub fn mirror_of(origin: &DockerRegistry) -> DockerRegistry {
        DockerRegistry::start_with(&format!("proxy: {{remoteurl: \"http://{}\"}}\n", origin.addr))
    }

    fn start_with(more: &str) -> DockerRegistry {
        let dir = tempfile::tempdir().expect("a directory for the registry");
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\n\
             log: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}\n\
             http: {{addr: \"{addr}\"}}\n\
             {more}",
            dir.path().join("storage").display()
        );
        fs::write(&config, text).expect("write the registry's configuration");
        let mut registry = DockerRegistry { addr, server: None, dir };
        registry.start_again();
        registry
    }

    /// Stops it; connections are refused from now on.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// Starts it again where it was.
    pub fn start_again(&mut self) {
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(self.dir.path().join("config.yml")).env("OTEL_TRACES_EXPORTER", "none");
        let mut server = Server::start(&mut command, &self.dir.path().join("log"));
        wait_for("docker-registry to listen", Duration::from_secs(30), || {
            server.assert_alive();
            TcpStream::connect(self.addr).ok()
        });
        self.server = Some(server);
    }

    /// Sends it a signal: one that is stopped by SIGSTOP takes connections and says nothing.
    pub fn signal(&self, signal: Signal) {
        let pid = self.server.as_ref().expect("a running registry").pid();
        kill(Pid::from_raw(pid as i32), signal).expect("signal the registry");
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The bytes of a blob or manifest that it has.
    pub fn blob(&self, digest: &str) -> Vec<u8> {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = self.dir.path().join("storage/docker/registry/v2/blobs/sha256");
        fs::read(blobs.join(&hex[..2]).join(hex).join("data")).expect("a blob of the registry")
    }

    /// Pushes one tag of an OCI layout and returns the reference, `127.0.0.1:PORT/NAME:TAG`.
    pub fn push(&self, layout: &Path, tag: &str, name: &str) -> String {
        self.push_as(layout, tag, name, tag)
    }

    /// As `push`, under another tag.
    pub fn push_as(&self, layout: &Path, tag: &str, name: &str, as_tag: &str) -> String {
        let reference = format!("{}/{name}:{as_tag}", self.addr);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false", "--insecure-policy"])
            .arg(format!("oci:{}:{tag}", layout.display()))
            .arg(format!("docker://{reference}"))
            .output()
            .expect("skopeo is needed: run tests/tools/deps.sh");
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
        reference
    }
}
