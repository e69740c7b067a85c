//! The registry that misbehaves (`tests/tools/evil_registry.py`), serving an OCI layout. The tests of the whole program
//! use this file, too.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

/// Below the workspace's root, wherever in it the tests are that use this file.
const PROGRAM: &str = "tests/tools/evil_registry.py";

/// A running one; killed when dropped.
pub struct Evil {
    child: Child,
    pub address: String,
    /// Port that redirects lead to.
    pub storage: u16,
    http: reqwest::Client,
    _dir: tempfile::TempDir,
}

fn program() -> PathBuf {
    let dirs = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().take(2);
    dirs.map(|dir| dir.join(PROGRAM)).find(|path| path.exists()).expect("the registry's program")
}

/// What it counted since the last change of its faults.
#[derive(Deserialize)]
pub struct EvilStats {
    pub requests: u64,
    /// How often each fault was met.
    pub faults: HashMap<String, u64>,
}

/// One request in its log.
#[derive(Deserialize)]
pub struct EvilRequest {
    pub p: String,
    pub port: u16,
    pub auth: bool,
}

impl Evil {
    /// All faults that the program knows.
    fn faults() -> Vec<String> {
        let output = Command::new("python3").arg(program()).arg("--list-faults").output();
        let output = output.unwrap_or_else(|e| panic!("python3 is needed by this test: {e}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// The faults that no case of a table begins with.
    pub fn missing_in<'a>(table: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let firsts: Vec<&str> = table.into_iter().filter_map(|faults| faults.split(' ').next()).collect();
        let has = |fault: &str| {
            let mut rests = firsts.iter().filter_map(|first| first.strip_prefix(fault));
            rests.any(|rest| rest.is_empty() || rest.starts_with([':', ',']))
        };
        Evil::faults().into_iter().filter(|fault| !has(fault)).collect()
    }

    /// Serves a layout under any name of a repository.
    pub async fn serve(layout: &Path) -> Evil {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let ports = dir.path().join("ports");
        let child = Command::new("python3")
            .arg(program())
            .arg(layout)
            .args(["--quiet", "--port", "0", "--portfile"])
            .arg(&ports)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("python3 is needed by this test: {e}"));
        let deadline = Instant::now() + Duration::from_secs(30);
        let text = loop {
            let text = std::fs::read_to_string(&ports).unwrap_or_default();
            if text.ends_with('\n') {
                break text;
            }
            assert!(Instant::now() < deadline, "the registry does not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let (port, storage) = text.trim().split_once(' ').unwrap();
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        Evil {
            child,
            address: format!("127.0.0.1:{port}"),
            storage: storage.parse().unwrap(),
            http,
            _dir: dir,
        }
    }

    /// From now on these faults, with all counts and logs begun anew.
    pub async fn misbehave(&self, faults: &[String]) {
        self.control("POST", "reset", String::new()).await;
        self.control("PUT", "faults", json!(faults).to_string()).await;
    }

    pub async fn stats(&self) -> EvilStats {
        serde_json::from_slice(&self.control("GET", "stats", String::new()).await).unwrap()
    }

    pub async fn log(&self) -> Vec<EvilRequest> {
        serde_json::from_slice(&self.control("GET", "log", String::new()).await).unwrap()
    }

    async fn control(&self, method: &str, what: &str, body: String) -> Vec<u8> {
        let url = format!("http://{}/_evil/{what}", self.address);
        let request = self.http.request(method.parse().unwrap(), url).body(body);
        let response = request.send().await.unwrap();
        assert!(response.status().is_success(), "{what}");
        response.bytes().await.unwrap().to_vec()
    }
}

impl Drop for Evil {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
