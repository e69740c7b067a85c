//! What the snapshotter costs with many layers and many containers: `make bench-containerd` prints the figures.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lazyrun::demo::layout::{Encoding, ImageSettings, LayerBlob, LayerWriter, Layout};
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use lazyrun::snapshotter::proto::services::snapshots::v1::{self as api, snapshots_client::SnapshotsClient};
use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

use crate::support::containerd::PROXY;
use crate::support::fixture::{TAG, big, sha256};
use crate::support::indexed::Indexed;
use crate::support::snapshotter::{Snapshotter, chain_ids, pull};

/// Layers of the large image; containerd's own limit of overlayfs is near.
const LAYERS: usize = 128;
/// All its layers are snapshots within this.
const PREPARED_WITHIN: Duration = Duration::from_millis(500);
/// Containers that start at once.
const CONTAINERS: usize = 100;
/// Most memory of the daemon meanwhile, in bytes.
const MAX_RESIDENT: u64 = 96 << 20;

fn many_layers() -> (TempDir, Vec<LayerBlob>) {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let layer = |i: usize| {
        let mut tar = tar::Builder::new(layout.layer(Encoding::Gzip(6)).expect("start a layer"));
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(8);
        let content = format!("{i:08}");
        tar.append_data(&mut header, format!("file-{i}"), content.as_bytes()).expect("write a layer");
        tar.into_inner().and_then(LayerWriter::finish).expect("finish a layer")
    };
    let layers: Vec<LayerBlob> = (0..LAYERS).map(layer).collect();
    layout.add_image(TAG, &layers, &ImageSettings::default()).expect("write the manifest");
    (dir, layers)
}

/// The digests by which containerd names layers: of the manifest, and the chainIDs.
fn names(dir: &TempDir) -> (String, Vec<String>) {
    let read = |path: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.path().join(path)).expect("read a document")).expect("JSON")
    };
    let blob = |digest: &Value| read(&format!("blobs/sha256/{}", &digest.as_str().unwrap()[7..]));
    let manifest = read("index.json")["manifests"][0]["digest"].clone();
    let config = blob(&blob(&manifest)["config"]["digest"]);
    let chains = chain_ids(&config);
    (manifest.as_str().unwrap().to_owned(), chains)
}

#[test]
#[ignore = "wants an idle machine: make bench-containerd"]
fn a_hundred_and_twenty_eight_layers_are_taken_over_in_half_a_second() {
    let (dir, layers) = many_layers();
    let registry = Registry::serve(dir.path(), Shape::default()).expect("serve the image");
    let (manifest, chains) = names(&dir);
    let image = registry.reference("many", TAG);
    let mut rounds = Vec::new();
    for _ in 0..5 {
        let snapshotter = Snapshotter::start();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", snapshotter.socket().display()));
        let took = runtime.block_on(async {
            let channel = endpoint.expect("an address").connect().await.expect("connect");
            let mut service = SnapshotsClient::new(channel);
            let (began, mut parent) = (Instant::now(), String::new());
            for (i, (chain, layer)) in chains.iter().zip(&layers).enumerate() {
                let label =
                    |name: &str, value: &str| (format!("containerd.io/snapshot{name}"), value.to_owned());
                let labels = [
                    label(".ref", chain),
                    label("/cri.image-ref", &image),
                    label("/cri.manifest-digest", &manifest),
                    label("/cri.layer-digest", &layer.digest),
                ];
                let mut request = Request::new(api::PrepareSnapshotRequest {
                    key: format!("extract-{i}"),
                    parent,
                    labels: labels.into_iter().collect(),
                    ..Default::default()
                });
                request.metadata_mut().insert("containerd-namespace", "a".parse().expect("a header"));
                let answer = service.prepare(request).await;
                assert_eq!(answer.err().map(|status| status.code()), Some(Code::AlreadyExists), "layer {i}");
                parent = chain.clone();
            }
            began.elapsed()
        });
        rounds.push(took);
    }
    rounds.sort();
    println!("Prepare of {LAYERS} layers: median {:?}, all {rounds:?}", rounds[2]);
    assert!(rounds[2] <= PREPARED_WITHIN, "{rounds:?}");
}

/// The most memory that a process ever had resident, in bytes.
fn peak_resident(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon's status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("its peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

#[test]
#[ignore = "wants an idle machine: make bench-containerd"]
fn a_hundred_containers_start_at_once() {
    let indexed = Indexed::behind(Shape { mbit: 200.0, rtt_ms: 5.0 });
    let snapshotter = Snapshotter::start();
    snapshotter.lazyrun.ok(&["hydrate", "--pause"]);
    let containerd = snapshotter.containerd();
    pull(&containerd, &indexed.image);
    let (before, began) = (indexed.shaper.traffic().bytes_down, Instant::now());
    let children: Vec<_> = (0..CONTAINERS)
        .map(|n| {
            let id = format!("c{n}");
            let args =
                ["run", "--rm", "--snapshotter", PROXY, &indexed.image, &id, "sha256sum", "/data/big.bin"];
            let mut run: Command = containerd.ctr(args);
            run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start a container")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().expect("the container's end");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.starts_with(&sha256(&big())), "{said}{}", String::from_utf8_lossy(&output.stderr));
    }
    let took = began.elapsed();
    let resident = peak_resident(snapshotter.lazyrun.daemon_pid().expect("a daemon"));
    let fetched = indexed.shaper.traffic().bytes_down - before;
    let image = indexed.fixture.compressed();
    println!(
        "{CONTAINERS} containers: {took:?}, daemon at most {} KiB resident, {fetched} bytes for {image}",
        resident >> 10
    );
    assert!(resident <= MAX_RESIDENT, "{} KiB were resident", resident >> 10);
    // Headers come on top, and what was asked for by a second request because the first was slow.
    assert!(fetched < image * 21 / 20, "{fetched} of {image} bytes: something came twice");
    containerd.remove(&indexed.image);
}
