//! Debian's docker-registry on a free port with its own storage.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lazyrun_index::Digest;
use reqwest::StatusCode;

use super::TestImage;
use super::certs::{Authority, Signed};

/// A running registry; killed when dropped.
pub struct Registry {
    child: Child,
    pub address: String,
    _dir: tempfile::TempDir,
}

/// What a registry is beside an ordinary one.
#[derive(Default)]
pub struct Extra<'a> {
    /// Certificate and key: it speaks TLS.
    pub tls: Option<&'a Signed>,
    /// The authority of the clients it lets in.
    pub clients: Option<&'a Authority>,
    /// It is a pull-through mirror of the registry at this URL.
    pub mirror_of: Option<String>,
}

impl Registry {
    pub async fn start() -> Registry {
        Registry::start_as(&Extra::default()).await
    }

    pub async fn start_as(extra: &Extra<'_>) -> Registry {
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Somebody may take the port between looking and starting: try again then.
        for _ in 0..5 {
            if let Some(registry) = Registry::try_start(extra).await {
                return registry;
            }
        }
        panic!("docker-registry does not start; install Debian's package docker-registry");
    }

    async fn try_start(extra: &Extra<'_>) -> Option<Registry> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
             http: {{addr: \"{address}\"{}}}\n{}",
            dir.path().join("data").display(),
            extra.tls_config(dir.path()),
            extra
                .mirror_of
                .as_ref()
                .map_or_else(String::new, |url| format!("proxy: {{remoteurl: \"{url}\"}}\n"))
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("docker-registry is needed by this test (apt-get install docker-registry): {e}")
            });
        let mut registry = Registry { child, address, _dir: dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if registry.child.try_wait().unwrap().is_some() {
                return None;
            }
            if extra.tls.is_some() {
                // Who gets in is what the tests are about.
                if tokio::net::TcpStream::connect(&registry.address).await.is_ok() {
                    return Some(registry);
                }
            } else {
                let ping = client().get(format!("http://{}/v2/", registry.address)).send().await;
                if ping.is_ok_and(|r| r.status() == StatusCode::OK) {
                    return Some(registry);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Pushes an image; `reference` for pulling it comes back.
    pub async fn push(&self, image: &TestImage, repository: &str, tag: &str) -> String {
        self.put_blob(repository, image.config.clone()).await;
        for layer in &image.layers {
            self.put_blob(repository, layer.blob.clone()).await;
        }
        self.put_manifest(
            repository,
            tag,
            image.manifest.clone(),
            "application/vnd.oci.image.manifest.v1+json",
        )
        .await;
        format!("{}/{repository}:{tag}", self.address)
    }

    pub async fn put_blob(&self, repository: &str, blob: bytes::Bytes) {
        let start = client()
            .post(format!("http://{}/v2/{repository}/blobs/uploads/", self.address))
            .send()
            .await
            .unwrap();
        assert_eq!(start.status(), StatusCode::ACCEPTED);
        let place = start.headers()["location"].to_str().unwrap().to_owned();
        let place = if place.starts_with('/') { format!("http://{}{place}", self.address) } else { place };
        let mark = if place.contains('?') { '&' } else { '?' };
        let digest = Digest::of(&blob);
        let done = client().put(format!("{place}{mark}digest={digest}")).body(blob).send().await.unwrap();
        assert_eq!(done.status(), StatusCode::CREATED);
    }

    pub async fn put_manifest(&self, repository: &str, tag: &str, manifest: bytes::Bytes, media_type: &str) {
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.address);
        let done = client().put(url).header("content-type", media_type).body(manifest).send().await.unwrap();
        assert_eq!(done.status(), StatusCode::CREATED, "{}", done.text().await.unwrap());
    }

    /// A manifest as it lies there.
    pub async fn manifest(&self, repository: &str, name: &str) -> bytes::Bytes {
        let url = format!("http://{}/v2/{repository}/manifests/{name}", self.address);
        let accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json";
        let got = client().get(url).header("accept", accept).send().await.unwrap();
        assert_eq!(got.status(), StatusCode::OK);
        got.bytes().await.unwrap()
    }

    /// Stops it for good, to show what works without.
    pub fn stop(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Extra<'_> {
    fn tls_config(&self, dir: &Path) -> String {
        let Some(tls) = self.tls else { return String::new() };
        let (cert, key) = tls.write(dir, "server");
        let clients = self.clients.map_or_else(String::new, |clients| {
            let path = dir.join("clients.pem");
            std::fs::write(&path, &clients.pem).unwrap();
            format!(", clientcas: [\"{}\"]", path.display())
        });
        format!(", tls: {{certificate: \"{}\", key: \"{}\"{clients}}}", cert.display(), key.display())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.kill();
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}
