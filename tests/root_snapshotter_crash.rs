//! The snapshotter under a containerd that is killed, collects garbage, or finds nobody there, with many requests under
//! way.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lazyrun::snapshotter::proto::services::snapshots::v1::{self as api, snapshots_client::SnapshotsClient};
use lazyrun::snapshotter::proto::types::Mount;
use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::support::containerd::{Containerd, PROXY};
use crate::support::fixture::{Fixture, big, sha256};
use crate::support::snapshotter::{Snapshotter, go_program, pull};
use crate::support::wait_for;

/// Requests at a time.
const MANY: usize = 100;

/// Sends requests to containerd's snapshots service, many at a time.
struct Client {
    runtime: Runtime,
    channel: Channel,
    namespace: String,
}

type Answer = JoinHandle<Result<Vec<Mount>, Status>>;

impl Client {
    fn connect(containerd: &Containerd) -> Client {
        Client::connect_to(containerd.socket(), containerd.namespace())
    }

    fn connect_to(socket: &Path, namespace: &str) -> Client {
        let runtime = Runtime::new().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("an address");
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Client { runtime, channel, namespace: namespace.to_owned() }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(120));
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse().expect("a header"));
        request
    }

    /// Asks for snapshots on one parent, all at once.
    fn prepare_all(&self, name: &str, parent: &str) -> Vec<Answer> {
        let one = |n: usize| {
            let request = self.request(api::PrepareSnapshotRequest {
                snapshotter: PROXY.into(),
                key: format!("{name}-{n}"),
                parent: parent.into(),
                ..Default::default()
            });
            let mut service = SnapshotsClient::new(self.channel.clone());
            self.runtime.spawn(async move { service.prepare(request).await.map(|a| a.into_inner().mounts) })
        };
        (0..MANY).map(one).collect()
    }

    fn wait(&self, answers: Vec<Answer>) -> Vec<Result<Vec<Mount>, Status>> {
        answers.into_iter().map(|answer| self.runtime.block_on(answer).expect("no panic")).collect()
    }

    /// Names of all snapshots; of the snapshotter's own, in every namespace.
    fn list(&self) -> BTreeSet<String> {
        self.runtime.block_on(async {
            let mut request =
                Request::new(api::ListSnapshotsRequest { snapshotter: PROXY.into(), ..Default::default() });
            if !self.namespace.is_empty() {
                request = self.request(request.into_inner());
            }
            let answer = SnapshotsClient::new(self.channel.clone()).list(request).await;
            let mut stream = answer.expect("a list").into_inner();
            let mut names = BTreeSet::new();
            while let Some(message) = stream.message().await.expect("a list") {
                names.extend(message.info.into_iter().map(|info| info.name));
            }
            names
        })
    }
}

/// Has containerd's garbage collector run to its end.
fn collect_garbage(containerd: &Containerd, image: &str) {
    containerd.run(["images", "tag", image, "garbage"]);
    containerd.remove("garbage");
}

/// The snapshotter has the snapshots that containerd has, and no others.
fn assert_same_snapshots(containerd: &Containerd, snapshotter: &Snapshotter) {
    let theirs = Client::connect(containerd).list();
    // containerd calls them NAMESPACE/NUMBER/NAME here.
    let ours = Client::connect_to(snapshotter.socket(), "").list();
    let names: BTreeSet<String> =
        ours.iter().map(|key| key.splitn(3, '/').last().unwrap_or_default().to_owned()).collect();
    assert_eq!((&names, ours.len()), (&theirs, theirs.len()));
}

/// Snapshots that a container may have are bind mounts or overlays whose files can be read.
fn assert_usable(mounts: &[Mount]) {
    assert_eq!((mounts.len(), mounts[0].r#type.as_str()), (1, "overlay"), "{mounts:?}");
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).expect("a lower");
    assert_eq!(fs::read_to_string(Path::new(lower).join("data/first")).unwrap(), "replaced\n");
}

/// Bytes that the layers take.
fn layers_on_disk(snapshotter: &Snapshotter) -> u64 {
    let layers = snapshotter.lazyrun.root().join("layers");
    let output = Command::new("du").args(["-s", "-B1"]).arg(layers).output().expect("run du");
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().and_then(|bytes| bytes.parse().ok()).expect("a number of bytes")
}

fn end_container(containerd: &Containerd, id: &str) {
    // containerd 1.7 answers before it has found the tasks of an earlier one again.
    wait_for("the container to end", Duration::from_secs(30), || {
        let _ = containerd.ctr(["task", "kill", "--signal", "SIGKILL", id]).output();
        containerd.ctr(["task", "rm", id]).output().ok().filter(|o| o.status.success())
    });
    containerd.run(["containers", "rm", id]);
}

#[test]
fn containerd_and_daemon_die_while_a_hundred_prepare() {
    let (fixture, mut snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, mut containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    let top = containerd.top_snapshot();
    containerd.run(["run", "--detach", "--snapshotter", PROXY, &image, "long", "sleep", "600"]);
    for killed in ["daemon", "containerd", "both"] {
        let client = Client::connect(&containerd);
        if killed == "both" {
            // A container that runs while all of lazyrun is gone reads no more.
            end_container(&containerd, "long");
        }
        let answers = client.prepare_all(killed, &top);
        if killed != "containerd" {
            snapshotter.kill_daemon();
        }
        if killed == "both" {
            snapshotter.kill_all_and_restart();
        }
        if killed != "daemon" {
            containerd.kill_and_restart();
        }
        for mounts in client.wait(answers).into_iter().flatten() {
            assert_usable(&mounts);
        }
        // Whatever came of them: who asks again is answered.
        for answer in client.wait(client.prepare_all(killed, &top)) {
            match answer {
                Ok(mounts) => assert_usable(&mounts),
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{killed}: {status:?}"),
            }
        }
        if killed != "both" {
            let args = ["task", "exec", "--exec-id", killed, "long", "sha256sum", "/data/big.bin"];
            assert_eq!(containerd.output(args)[..64], sha256(&big()), "{killed}");
        }
    }
    collect_garbage(&containerd, &image);
    assert_same_snapshots(&containerd, &snapshotter);
    for key in Client::connect(&containerd).list().iter().filter(|key| !key.starts_with("sha256:")) {
        containerd.run(["snapshots", "--snapshotter", PROXY, "rm", key]);
    }
    containerd.remove(&image);
    assert_same_snapshots(&containerd, &snapshotter);
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
}

#[test]
fn many_layers_are_taken_over_while_containerd_dies() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, mut containerd) = (fixture.image(), snapshotter.containerd());
    // Pulls of one image, all at once, cut off by a crash; the next one finds nothing odd.
    let socket = containerd.socket().to_owned();
    let namespace = containerd.namespace().to_owned();
    let pulls: Vec<_> = (0..4)
        .map(|_| {
            let mut pull = std::process::Command::new(go_program("pull"));
            pull.arg(&socket).args([&namespace, PROXY, &image]).stderr(std::process::Stdio::null());
            pull.spawn().expect("start a pull")
        })
        .collect();
    wait_for("a layer", Duration::from_secs(60), || {
        let listed = Client::connect_to(snapshotter.socket(), "").list();
        (!listed.is_empty()).then_some(())
    });
    containerd.kill_and_restart();
    for mut pull in pulls {
        pull.wait().expect("the pull's end");
    }
    pull(&containerd, &image);
    let args = ["run", "--rm", "--snapshotter", PROXY, &image, "once", "cat", "/data/first"];
    assert_eq!(containerd.output(args), "replaced\n");
    collect_garbage(&containerd, &image);
    assert_same_snapshots(&containerd, &snapshotter);
    containerd.remove(&image);
    assert_same_snapshots(&containerd, &snapshotter);
}

#[test]
fn garbage_collection_leaves_what_containers_use() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    let on_disk = || layers_on_disk(&snapshotter);
    pull(&containerd, &image);
    containerd.run(["run", "--detach", "--snapshotter", PROXY, &image, "long", "sleep", "600"]);
    let exec = |id: &str| {
        let args = ["task", "exec", "--exec-id", id, "long", "sha256sum", "/data/big.bin"];
        assert_eq!(containerd.output(args)[..64], sha256(&big()), "{id}");
    };
    // The image's name goes; its snapshots stay for the container's sake.
    containerd.remove(&image);
    exec("a");
    snapshotter.kill_daemon();
    exec("b");
    assert_same_snapshots(&containerd, &snapshotter);
    let before = on_disk();
    assert!(before > big().len() as u64, "{before}");
    end_container(&containerd, "long");
    // The collector that comes for it must not meet a pull: containerd protects no snapshots that a pull finds.
    wait_for("the snapshots to be collected", Duration::from_secs(30), || {
        Client::connect(&containerd).list().is_empty().then_some(())
    });
    pull(&containerd, &image);
    containerd.remove(&image);
    assert_same_snapshots(&containerd, &snapshotter);
    // What was being streamed when the image was removed ends a moment later.
    wait_for("the disk to be freed", Duration::from_secs(30), || (on_disk() < before / 100).then_some(()));
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
}

#[test]
fn layers_in_use_are_deleted_once_they_are_not() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    let run = ["run", "-d", "--network", "none", "--name", "user", &image, "sleep", "600"];
    snapshotter.lazyrun.ok(&run);
    snapshotter.lazyrun.ok(&["exec", "user", "cat", "/data/big.bin"]);
    snapshotter.lazyrun.ok(&["rmi", "--force", &image]);
    containerd.remove(&image);
    assert_same_snapshots(&containerd, &snapshotter);
    let used = layers_on_disk(&snapshotter);
    assert!(used > big().len() as u64, "{used}");
    snapshotter.lazyrun.ok(&["rm", "--force", "user"]);
    wait_for("the disk to be freed", Duration::from_secs(30), || {
        (layers_on_disk(&snapshotter) < used / 100).then_some(())
    });
}

#[test]
fn without_a_snapshotter_a_start_fails_at_once_and_says_why() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    let (_, _lazyrun, socket) = snapshotter.end(Signal::SIGTERM);
    let args = ["run", "--rm", "--snapshotter", PROXY, &image, "once", "true"];
    let start = || {
        let began = Instant::now();
        let output = containerd.ctr(args).output().unwrap();
        assert!(
            !output.status.success() && began.elapsed() < Duration::from_secs(15),
            "{:?}",
            began.elapsed()
        );
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    // Who asks first may find a connection that was closed, and is told so; the next finds nobody.
    wait_for("the socket to be named", Duration::from_secs(30), || {
        start().contains(socket.to_str().unwrap()).then_some(())
    });
}
