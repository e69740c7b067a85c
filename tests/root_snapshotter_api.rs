//! The snapshotter's service itself, where no containerd goes: many requests at once, namespaces, odd labels, newer
//! protocol than containerd 1.6 speaks.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lazyrun::snapshotter::proto::services::snapshots::v1 as api;
use lazyrun::snapshotter::proto::types::Mount;
use lazyrun_fs::mount::{self, IdMap, IdRange, OverlayOptions};
use lazyrun_index::Digest;
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::support::fixture::{Fixture, TAG};
use crate::support::instance::Lazyrun;
use crate::support::snapshotter::{Snapshotter, chain_ids};

const TARGET: &str = "containerd.io/snapshot.ref";

type Labels = BTreeMap<String, String>;

/// A client in one namespace of containerd, or in none.
struct Client {
    runtime: Runtime,
    channel: Channel,
    namespace: Option<&'static str>,
}

type Service = api::snapshots_client::SnapshotsClient<Channel>;

impl Client {
    fn connect(socket: &Path, namespace: Option<&'static str>) -> Client {
        let runtime = Runtime::new().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("an address");
        let channel = runtime.block_on(endpoint.connect()).expect("connect to the snapshotter");
        Client { runtime, channel, namespace }
    }

    fn service(&self) -> Service {
        Service::new(self.channel.clone())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(120));
        if let Some(namespace) = self.namespace {
            request.metadata_mut().insert("containerd-namespace", namespace.parse().expect("a header"));
        }
        request
    }

    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>, Status> {
        let request = api::PrepareSnapshotRequest {
            key: key.into(),
            parent: parent.into(),
            labels: labels.clone(),
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.service().prepare(self.request(request)));
        answer.map(|answer| answer.into_inner().mounts)
    }

    fn commit(&self, name: &str, key: &str, parent: &str, labels: &Labels) -> Result<(), Status> {
        let request = api::CommitSnapshotRequest {
            name: name.into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels.clone(),
            ..Default::default()
        };
        self.runtime.block_on(self.service().commit(self.request(request))).map(drop)
    }

    fn remove(&self, key: &str) -> Result<(), Status> {
        let request = api::RemoveSnapshotRequest { key: key.into(), ..Default::default() };
        self.runtime.block_on(self.service().remove(self.request(request))).map(drop)
    }

    fn stat(&self, key: &str) -> Result<api::Info, Status> {
        let request = api::StatSnapshotRequest { key: key.into(), ..Default::default() };
        let answer = self.runtime.block_on(self.service().stat(self.request(request)));
        answer.map(|answer| answer.into_inner().info.expect("what was asked for"))
    }

    fn list(&self, filters: &[&str]) -> Result<Vec<String>, Status> {
        let filters = filters.iter().map(|f| (*f).to_owned()).collect();
        let request = api::ListSnapshotsRequest { filters, ..Default::default() };
        self.runtime.block_on(async {
            let mut stream = self.service().list(self.request(request)).await?.into_inner();
            let mut names = Vec::new();
            while let Some(message) = stream.message().await? {
                names.extend(message.info.into_iter().map(|info| info.name));
            }
            Ok(names)
        })
    }
}

/// What the labels of an image's layers are made of.
struct Image {
    manifest: String,
    chains: Vec<String>,
    labels: Vec<Labels>,
}

/// The fixture's image as containerd describes its layers to a snapshotter.
fn image(fixture: &Fixture) -> Image {
    let json = |path: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(path).expect("read a document")).expect("JSON")
    };
    let index = json(&fixture.layout().join("index.json"));
    let is_ours = |m: &&Value| m["annotations"]["org.opencontainers.image.ref.name"] == TAG;
    let manifest = index["manifests"].as_array().unwrap().iter().find(is_ours).expect("the image");
    let digest = manifest["digest"].as_str().unwrap().to_owned();
    let config = json(&fixture.blob(&digest))["config"]["digest"].as_str().unwrap().to_owned();
    let config = json(&fixture.blob(&config));
    let chains = chain_ids(&config);
    let labels = chains.iter().zip(&fixture.layers).map(|(chain, layer)| {
        let label = |name: &str, value: &str| (format!("containerd.io/snapshot{name}"), value.to_owned());
        Labels::from([
            label(".ref", chain),
            label("/cri.image-ref", &fixture.image()),
            label("/cri.manifest-digest", &digest),
            label("/cri.layer-digest", &layer.digest),
        ])
    });
    Image { labels: labels.collect(), manifest: digest, chains }
}

fn code<T>(result: Result<T, Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}

/// Takes all layers of an image over.
fn take_over(client: &Client, image: &Image) {
    let mut parent = String::new();
    for (i, labels) in image.labels.iter().enumerate() {
        let result = client.prepare(&format!("extract-{i}"), &parent, labels);
        assert_eq!(code(result), Code::AlreadyExists, "layer {i}");
        parent.clone_from(&image.chains[i]);
    }
}

#[test]
fn a_hundred_ask_for_one_chain() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, client) = (image(&fixture), Client::connect(snapshotter.socket(), Some("a")));
    fixture.registry.reset();
    let mut parent = String::new();
    for (i, labels) in image.labels.iter().enumerate() {
        let asked = (0..100).map(|n| {
            let request = api::PrepareSnapshotRequest {
                key: format!("extract-{i}-{n}"),
                parent: parent.clone(),
                labels: labels.clone(),
                ..Default::default()
            };
            let (mut service, request) = (client.service(), client.request(request));
            client.runtime.spawn(async move { service.prepare(request).await.map(drop) })
        });
        let asked: Vec<_> = asked.collect();
        for answer in asked {
            let answer = client.runtime.block_on(answer).expect("no panic");
            assert_eq!(code(answer), Code::AlreadyExists);
        }
        parent.clone_from(&image.chains[i]);
    }
    let mut listed = client.list(&[]).unwrap();
    listed.sort();
    let mut chains = image.chains.clone();
    chains.sort();
    assert_eq!(listed, chains, "each layer is there once, and no half-made snapshot");
    // Containers, too, start all at once.
    let asked: Vec<_> = (0..30)
        .map(|n| {
            let request = api::PrepareSnapshotRequest {
                key: format!("container-{n}"),
                parent: parent.clone(),
                ..Default::default()
            };
            let (mut service, request) = (client.service(), client.request(request));
            client.runtime.spawn(async move { service.prepare(request).await.map(|a| a.into_inner().mounts) })
        })
        .collect();
    for answer in asked {
        let mounts = client.runtime.block_on(answer).expect("no panic").expect("a snapshot");
        assert_eq!((mounts.len(), mounts[0].r#type.as_str()), (1, "overlay"));
    }
    assert_eq!(snapshotter.mounts().len(), 1, "one view for all: {:?}", snapshotter.mounts());
    let manifests = fixture.registry.log().iter().filter(|r| r.target.contains("/manifests/")).count();
    assert!(manifests <= 2, "{manifests} requests for one manifest");
}

#[test]
fn namespaces_are_kept_apart() {
    let snapshotter = Snapshotter::start();
    let connect = |namespace| Client::connect(snapshotter.socket(), namespace);
    let (a, b, all) = (connect(Some("a")), connect(Some("b")), connect(None));
    let none = Labels::new();
    a.prepare("same", "", &none).expect("prepare");
    b.prepare("same", "", &none).expect("the key is free in another namespace");
    a.prepare("mine", "", &none).expect("prepare");
    assert_eq!(code(b.stat("mine")), Code::NotFound);
    assert_eq!(code(b.remove("mine")), Code::NotFound);
    a.commit("base", "mine", "", &none).expect("commit");
    assert_eq!(code(b.prepare("x", "base", &none)), Code::NotFound);
    assert_eq!(a.list(&[]).unwrap(), ["base", "same"]);
    assert_eq!(b.list(&["kind==active"]).unwrap(), ["same"]);
    // containerd's garbage collector names no namespace and means all.
    let mut listed = all.list(&[]).unwrap();
    listed.sort();
    assert_eq!(listed, ["base", "same", "same"]);
    assert_eq!(code(all.remove("same")), Code::FailedPrecondition, "which one?");
    assert_eq!(code(all.remove("base")), Code::Ok);
    assert_eq!(code(a.stat("base")), Code::NotFound);
}

#[test]
fn refusals_have_the_codes_that_containerd_knows() {
    let snapshotter = Snapshotter::start();
    let client = Client::connect(snapshotter.socket(), Some("a"));
    let none = Labels::new();
    client.prepare("active", "", &none).expect("prepare");
    assert_eq!(code(client.prepare("active", "", &none)), Code::AlreadyExists);
    assert_eq!(code(client.prepare("x", "active", &none)), Code::InvalidArgument, "not committed");
    assert_eq!(code(client.prepare("x", "nothing", &none)), Code::NotFound);
    assert_eq!(code(client.prepare("", "", &none)), Code::InvalidArgument);
    let long = Labels::from([("a".into(), "b".repeat(5000))]);
    assert_eq!(code(client.prepare("x", "", &long)), Code::InvalidArgument);
    assert_eq!(code(client.commit("active", "active", "", &none)), Code::AlreadyExists);
    assert_eq!(code(client.commit("c", "nothing", "", &none)), Code::NotFound);
    assert_eq!(code(client.commit("", "active", "", &none)), Code::InvalidArgument);
    client.commit("c", "active", "", &none).expect("commit");
    client.prepare("on", "c", &none).expect("prepare");
    assert_eq!(code(client.remove("c")), Code::FailedPrecondition);
    assert_eq!(code(client.commit("d", "c", "", &none)), Code::FailedPrecondition);
    assert_eq!(code(client.list(&["name=="])), Code::InvalidArgument);
    assert_eq!(client.list(&["name~=^o,parent==c", "labels.none"]).unwrap(), ["on"]);
    let mounts = api::MountsRequest { key: "c".into(), ..Default::default() };
    let answer = client.runtime.block_on(client.service().mounts(client.request(mounts)));
    assert_eq!(code(answer), Code::FailedPrecondition);
    // Made by nobody's hand: refused requests leave no directories.
    let dirs = std::fs::read_dir(snapshotter.lazyrun.root().join("snapshots")).unwrap().flatten();
    assert_eq!(dirs.filter(|entry| entry.path().is_dir()).count(), 2);
}

#[test]
fn what_cannot_be_had_is_left_to_containerd() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, client) = (image(&fixture), Client::connect(snapshotter.socket(), Some("a")));
    let changed = |name: &str, value: &str| {
        let mut labels = image.labels[0].clone();
        labels.insert(format!("containerd.io/snapshot{name}"), value.into());
        labels
    };
    let other = Digest::of(b"something else").to_string();
    let dead = format!("127.0.0.1:{}/x:1", crate::support::server::free_port());
    for (i, (name, value)) in [
        (".ref", other.as_str()),
        ("/cri.layer-digest", &other),
        ("/cri.manifest-digest", &other),
        ("/cri.manifest-digest", "nonsense"),
        ("/cri.image-ref", "an odd\nname"),
        ("/cri.image-ref", &dead),
        ("/cri.image-ref", "oci-archive:x"),
    ]
    .into_iter()
    .enumerate()
    {
        let mounts = client.prepare(&format!("extract-{i}"), "", &changed(name, value)).expect(value);
        assert_eq!(
            (mounts[0].r#type.as_str(), mounts[0].options[0].as_str()),
            ("bind", "rw"),
            "{name}={value}"
        );
    }
    // On what was unpacked everything is unpacked.
    client.commit(&image.chains[0], "extract-0", "", &image.labels[0]).expect("commit");
    let mounts = client.prepare("next", &image.chains[0], &image.labels[1]).expect("prepare");
    assert_eq!(mounts[0].r#type, "overlay");
    // A layer on a parent that it does not belong on is nobody's.
    let client = Client::connect(snapshotter.socket(), Some("b"));
    take_over(&client, &image);
    let wrong = client.prepare("wrong", &image.chains[0], &image.labels[2]);
    assert_eq!(code(wrong), Code::InvalidArgument);
}

#[test]
fn layers_are_staged_for_parallel_unpacking() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, client) = (image(&fixture), Client::connect(snapshotter.socket(), Some("a")));
    // containerd 2.2 asks for all layers at once, without their parents, and tells those when it commits.
    let mut staged = Vec::new();
    for i in [2, 1] {
        let mounts = client.prepare(&format!("extract-{i}"), "", &image.labels[i]).expect("staged");
        assert!(mounts.last().unwrap().options.contains(&"ro".to_owned()), "{mounts:?}");
        staged.push(i);
    }
    assert_eq!(code(client.prepare("extract-0", "", &image.labels[0])), Code::AlreadyExists);
    for i in [1, 2] {
        client
            .commit(&image.chains[i], &format!("extract-{i}"), &image.chains[i - 1], &image.labels[i])
            .expect("commit");
    }
    assert_eq!(client.stat(&image.chains[2]).unwrap().parent, image.chains[1]);
    let mounts = client.prepare("container", &image.chains[2], &Labels::new()).expect("prepare");
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).expect("a lower");
    assert_eq!(std::fs::read_to_string(Path::new(lower).join("data/first")).unwrap(), "replaced\n");
    // Once more, now that all are there.
    assert_eq!(code(client.prepare("extract-9", &image.chains[0], &image.labels[1])), Code::AlreadyExists);
    assert!(!image.manifest.is_empty() && image.labels[0].contains_key(TARGET) && staged.len() == 2);
}

#[test]
fn credentials_are_those_of_the_command_line() {
    let fixture = Fixture::guarded("user", "secret");
    let image = image(&fixture);
    // Without them the layers are left to containerd.
    let snapshotter = Snapshotter::start();
    let client = Client::connect(snapshotter.socket(), Some("a"));
    client.prepare("extract", "", &image.labels[0]).expect("unpack it yourself");
    drop((client, snapshotter));
    let config = Lazyrun::new();
    let dir = config.scratch("docker");
    let auth = serde_json::json!({"auths": {fixture.registry.addr().to_string(): {"username": "user", "password": "secret"}}});
    std::fs::write(dir.join("config.json"), auth.to_string()).expect("write the credentials");
    let snapshotter = Snapshotter::with_env(&[("DOCKER_CONFIG", &dir)]);
    let client = Client::connect(snapshotter.socket(), Some("a"));
    take_over(&client, &image);
    client.prepare("container", &image.chains[2], &Labels::new()).expect("a container");
    // The record of an image has how its registry is talked to, not the secret.
    snapshotter.kill_daemon();
    client.prepare("another", &image.chains[2], &Labels::new()).expect("a container");
    let database = std::fs::read(snapshotter.lazyrun.root().join("snapshots/snapshots.db")).unwrap();
    let has = |text: &[u8]| database.windows(text.len()).any(|w| w == text);
    assert!(has(image.chains[0].as_bytes()) && !has(b"secret"));
}

#[test]
fn a_pod_in_a_user_namespace_gets_its_ids_mapped() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, client) = (image(&fixture), Client::connect(snapshotter.socket(), Some("a")));
    take_over(&client, &image);
    let labels = [("uidmapping", "0:100000:65536"), ("gidmapping", "0:200000:65536")];
    let labels = labels.map(|(name, value)| (format!("containerd.io/snapshot/{name}"), value.to_owned()));
    let mounts = client.prepare("pod", image.chains.last().unwrap(), &labels.into()).expect("a snapshot");
    let value = |name: &str| mounts[0].options.iter().find_map(|option| option.strip_prefix(name));
    assert_eq!((value("uidmap="), value("gidmap=")), (Some("0:100000:65536"), Some("0:200000:65536")));
    let dir = |name: &str| PathBuf::from(value(name).expect("a directory"));
    let [lower, upper, work] = ["lowerdir=", "upperdir=", "workdir="].map(dir);
    let owner = |path: &Path| std::fs::symlink_metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!(owner(&upper), (100_000, 200_000));
    // As containerd does it: what lies below is mapped, and the upper directory is the pod's already.
    let ranges = |shown| vec![IdRange { files: 0, shown, count: 65536 }];
    let map = IdMap::Ranges { users: ranges(100_000), groups: ranges(200_000) };
    let lower = File::open(lower).expect("open the view");
    let lower = mount::idmapped(lower.as_fd(), &map).expect("an idmapped view");
    let root = mount::overlay(lower.as_fd(), &upper, &work, &OverlayOptions::default()).expect("an overlay");
    let point = snapshotter.lazyrun.scratch("pod");
    mount::attach(root.as_fd(), &point).expect("attach");
    let busybox = point.join("bin/busybox");
    let seen = owner(&busybox);
    let line = format!("echo x > {0}/new && chown 100000:200000 {0}/new", point.display());
    let wrote = Command::new("sh").args(["-c", &line]).uid(100_000).gid(200_000).status();
    mount::detach(&point).expect("detach");
    assert_eq!(seen, (100_000, 200_000));
    assert!(wrote.expect("run sh").success());
    assert_eq!(owner(&upper.join("new")), (100_000, 200_000));
    // What is no mapping is refused, and nothing is left of it.
    let odd = [("uidmapping", "nonsense"), ("gidmapping", "0:1:1")];
    let odd = odd.map(|(name, value)| (format!("containerd.io/snapshot/{name}"), value.to_owned()));
    let refused = client.prepare("odd", image.chains.last().unwrap(), &odd.into());
    assert_eq!(code(refused), Code::InvalidArgument);
    assert_eq!(code(client.stat("odd")), Code::NotFound);
}
