//! Images made on the fly, a real registry and a server that misbehaves on demand.
#![allow(dead_code, unreachable_pub)] // each test binary uses its own part

pub mod artifacts;
pub mod certs;
pub mod claim;
pub mod evil;
pub mod fake;
pub mod hosts;
pub mod pull;
pub mod registry;
pub mod server;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use lazyrun_fetcher::{ClientOptions, FetchOptions, Fetcher, LayerStore, Platform, Progress, RegistryClient};
use lazyrun_index::{Digest, StreamOptions};
use serde_json::json;

/// One layer: its tar and how it lies in the registry.
#[derive(Clone)]
pub struct TestLayer {
    pub tar: Vec<u8>,
    pub blob: Bytes,
    pub media_type: &'static str,
}

impl TestLayer {
    pub fn gzip(tar: Vec<u8>) -> Self {
        let blob = gzip(&tar).into();
        TestLayer { tar, blob, media_type: "application/vnd.oci.image.layer.v1.tar+gzip" }
    }

    pub fn plain(tar: Vec<u8>) -> Self {
        let blob = tar.clone().into();
        TestLayer { tar, blob, media_type: "application/vnd.oci.image.layer.v1.tar" }
    }

    /// One frame, as `zstd` and the builders write it: nothing in it can be entered.
    pub fn zstd(tar: Vec<u8>) -> Self {
        let blob = filter("zstd", &["-q", "-c"], &tar).into();
        TestLayer { tar, blob, media_type: "application/vnd.oci.image.layer.v1.tar+zstd" }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    pub fn diff_id(&self) -> Digest {
        Digest::of(&self.tar)
    }
}

/// An image that can be pushed or served.
#[derive(Clone)]
pub struct TestImage {
    pub layers: Vec<TestLayer>,
    pub config: Bytes,
    pub manifest: Bytes,
}

impl TestImage {
    pub fn new(layers: Vec<TestLayer>) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|l| l.diff_id().to_string()).collect();
        let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = Bytes::from(config.to_string());
        let descriptors: Vec<_> = layers
            .iter()
            .map(|l| json!({"mediaType": l.media_type, "digest": l.digest().to_string(), "size": l.blob.len()}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(&config).to_string(), "size": config.len()},
            "layers": descriptors});
        TestImage { layers, config, manifest: Bytes::from(manifest.to_string()) }
    }

    /// Two gzip layers of a few hundred KiB.
    pub fn small(seed: u64) -> Self {
        TestImage::new(vec![TestLayer::gzip(tar(seed, 6, 90_000)), TestLayer::gzip(tar(seed + 1, 3, 50_000))])
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    pub fn blob(&self, digest: &str) -> Option<Bytes> {
        if Digest::of(&self.config).to_string() == digest {
            return Some(self.config.clone());
        }
        self.layers.iter().find(|l| l.digest().to_string() == digest).map(|l| l.blob.clone())
    }
}

/// An OCI layout of images; the first has the tag `v1`, the second `v2`.
pub fn layout(images: &[TestImage]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| std::fs::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();
    let mut manifests = Vec::new();
    for (i, image) in images.iter().enumerate() {
        put(&image.manifest);
        put(&image.config);
        image.layers.iter().for_each(|layer| put(&layer.blob));
        manifests.push(json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.digest().to_string(), "size": image.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": format!("v{}", i + 1)}}));
    }
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    std::fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
    dir
}

/// A tar of `files` files of `size` bytes each, half random and half text, the same for the same seed.
pub fn tar(seed: u64, files: usize, size: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for i in 0..files {
        let mut content = Vec::with_capacity(size);
        while content.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
            content.extend_from_slice(format!("{:8}", i % 10).as_bytes());
        }
        content.truncate(size);
        let mut header = tar::Header::new_gnu();
        header.set_size(size as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, format!("dir/file-{seed}-{i}"), content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    filter("gzip", &["-n", "-c"], bytes)
}

pub fn filter(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program} is needed by this test: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let mut out = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    writer.join().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    out
}

/// A store, a client and a fetcher with small spans and short waits.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub client: RegistryClient,
    pub fetcher: Fetcher,
}

impl Bench {
    pub fn new() -> Self {
        Bench::with(quick_client(), quick_fetch())
    }

    pub fn with(client: ClientOptions, fetch: FetchOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = LayerStore::open(dir.path()).unwrap();
        Bench { client: RegistryClient::new(client).unwrap(), fetcher: Fetcher::new(store, fetch), dir }
    }

    pub async fn resolve(&self, name: &str) -> lazyrun_fetcher::ResolvedImage {
        self.client.resolve(&name.parse().unwrap(), &amd64()).await.unwrap()
    }

    /// Names of everything in the store's directory.
    pub fn left_behind(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.layers_dir()).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    pub fn layers_dir(&self) -> PathBuf {
        self.dir.path().join("layers")
    }
}

pub fn amd64() -> Platform {
    "linux/amd64".parse().unwrap()
}

pub fn quick_client() -> ClientOptions {
    ClientOptions {
        stall_timeout: Duration::from_millis(400),
        retries: 3,
        retry_base: Duration::from_millis(5),
        max_retry_wait: Duration::from_secs(2),
        ..ClientOptions::default()
    }
}

pub fn quick_fetch() -> FetchOptions {
    FetchOptions {
        stream: StreamOptions { span_size: 32 << 10, span_len: 256 << 10, ..StreamOptions::default() },
        fault_timeout: Duration::from_secs(10),
        ..FetchOptions::default()
    }
}

/// Progress that remembers the last figures.
#[derive(Default)]
pub struct LastProgress(pub Mutex<(u64, u64)>);

impl Progress for LastProgress {
    fn advance(&self, _: Digest, done: u64, total: u64) {
        *self.0.lock().unwrap() = (done, total);
    }
}

pub fn no_progress() -> Arc<dyn Progress> {
    Arc::new(lazyrun_fetcher::NoProgress)
}
