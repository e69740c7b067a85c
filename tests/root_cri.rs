//! The kubelet's side of containerd: pods whose images are behind pull secrets, pulled lazily.

use std::time::Duration;

use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use crate::support::containerd::{Containerd, PROXY};
use crate::support::cri::{
    ContainerConfig, CreateContainer, Cri, Exec, Executed, Id, ImageStatus, Images, LinuxSandbox,
    NamespaceOptions, Nothing, OneImage, PodMetadata, PodSandbox, RunPod, SandboxSecurity, named,
};
use crate::support::fixture::{self, BIG, Fixture, TAG, big, sha256};
use crate::support::snapshotter::Snapshotter;
use crate::support::wait_for;

const SECRET: Option<(&str, &str)> = Some(("ann", "s3cret"));

/// A node: the snapshotter with the image service, and containerd with CRI.
struct Node {
    // Stopped in this order.
    containerd: Containerd,
    images: Cri,
    runtime: Cri,
    snapshotter: Snapshotter,
    _pause: (tempfile::TempDir, Registry),
}

impl Node {
    fn start() -> Node {
        let pause = fixture::sleeping();
        let registry = Registry::serve(pause.path(), Shape::default()).expect("serve the pause image");
        let snapshotter = Snapshotter::with_flags(&["--cri-keychain"]);
        let containerd = snapshotter.containerd_with_cri(&registry.reference("pause", TAG));
        let (images, runtime) = (Cri::at(snapshotter.socket()), Cri::at(containerd.socket()));
        wait_for("CRI to serve", Duration::from_secs(30), || {
            images.image::<_, Images>("ListImages", Nothing {}).ok()
        });
        Node { containerd, images, runtime, snapshotter, _pause: (pause, registry) }
    }

    /// What containerd has of layers, in bytes: a manifest and a config are small.
    fn content(&self) -> Vec<String> {
        let listed = self.containerd.output(["--namespace", "k8s.io", "content", "ls", "--quiet"]);
        listed.lines().map(str::to_owned).collect()
    }

    /// Starts a pod of an image, has it read its big file, and removes it.
    fn sum_in_a_pod(&self, image: &str) -> String {
        let Id { id: pod_id } = self.runtime.run("RunPodSandbox", RunPod { config: Some(pod()) });
        let config = ContainerConfig {
            metadata: Some(PodMetadata { name: "main".into(), ..PodMetadata::default() }),
            image: Some(named(image)),
            command: ["sleep", "1000"].map(str::to_owned).to_vec(),
        };
        let create = CreateContainer { pod: pod_id.clone(), config: Some(config), sandbox: Some(pod()) };
        let Id { id } = self.runtime.run("CreateContainer", create);
        let _: Nothing = self.runtime.run("StartContainer", Id { id: id.clone() });
        let cmd = ["sha256sum", "/data/big.bin"].map(str::to_owned).to_vec();
        let Executed { stdout, stderr, exit_code } =
            self.runtime.run("ExecSync", Exec { container: id, cmd });
        assert_eq!(exit_code, 0, "{}", String::from_utf8_lossy(&stderr));
        let _: Nothing = self.runtime.run("StopPodSandbox", Id { id: pod_id.clone() });
        let _: Nothing = self.runtime.run("RemovePodSandbox", Id { id: pod_id });
        String::from_utf8_lossy(&stdout)[..64].to_owned()
    }

    fn snapshots(&self) -> usize {
        let args = ["--namespace", "k8s.io", "snapshots", "--snapshotter", PROXY, "ls"];
        self.containerd.output(args).lines().count() - 1
    }
}

fn pod() -> PodSandbox {
    let security = SandboxSecurity { namespaces: Some(NamespaceOptions { network: 2 }) };
    PodSandbox {
        metadata: Some(PodMetadata { name: "pod".into(), uid: "1".into(), namespace: "test".into() }),
        hostname: String::new(),
        linux: Some(LinuxSandbox { security: Some(security) }),
    }
}

#[test]
fn a_pod_starts_lazily_from_an_image_behind_its_secret() {
    let fixture = Fixture::guarded("ann", "s3cret");
    let node = Node::start();
    let image = fixture.image();
    for wrong in [None, Some(("ann", "wrong"))] {
        let status = node.images.pull(&image, wrong).expect_err("the registry wants a password");
        assert!(status.message().contains("401") || status.message().contains("uthori"), "{status:?}");
    }
    node.images.pull(&image, SECRET).expect("pull");
    for layer in &fixture.layers {
        assert!(!node.content().contains(&layer.digest), "containerd has a layer: {:?}", node.content());
    }
    // Its secret is for that repository alone.
    let other = fixture.registry.reference("other", TAG);
    node.images.pull(&other, None).expect_err("no secret for another repository");
    // A wrong one takes nothing away from those who had the right one.
    node.images.pull(&image, Some(("ann", "wrong"))).expect_err("a wrong password");

    assert_eq!(node.sum_in_a_pod(&image), sha256(&big()));
    // The next daemon has the secret too: what was let go of is fetched again.
    wait_for("the view to be taken down", Duration::from_secs(30), || {
        node.snapshotter.mounts().is_empty().then_some(())
    });
    node.snapshotter.lazyrun.ok(&["cache", "drop"]);
    node.snapshotter.kill_daemon();
    let before = fixture.registry.stats().bytes_down;
    assert_eq!(node.sum_in_a_pod(&image), sha256(&big()));
    let fetched = fixture.registry.stats().bytes_down - before;
    assert!(fetched >= BIG as u64, "it was fetched with the secret: {fetched}");

    let status: ImageStatus =
        node.images.image("ImageStatus", OneImage { image: Some(named(&image)) }).expect("ask");
    assert!(status.image.is_some_and(|found| found.repo_tags.contains(&image)));
    let pause = node.snapshots();
    let _: Nothing =
        node.images.image("RemoveImage", OneImage { image: Some(named(&image)) }).expect("remove");
    wait_for("the snapshots of the image to go", Duration::from_secs(30), || {
        (node.snapshots() < pause).then_some(())
    });
}

#[test]
fn what_passes_is_what_containerd_says() {
    let node = Node::start();
    let images = |cri: &Cri| cri.image::<_, Images>("ListImages", Nothing {}).map(|all| all.images.len());
    assert_eq!(images(&node.images).expect("images"), images(&node.runtime).expect("images"));
    // The version of CRI that old kubelets speak passes as well, and what containerd does not know is its to refuse.
    let old = Cri::version_at("v1alpha2", node.snapshotter.socket());
    let direct = Cri::version_at("v1alpha2", node.containerd.socket());
    let told = [&old, &direct].map(|cri| images(cri).map_err(|status| status.code()));
    assert_eq!(told[0], told[1]);
    let unknown =
        |cri: &Cri| cri.image::<_, Nothing>("FlyToTheMoon", Nothing {}).expect_err("no such method");
    let (ours, theirs) = (unknown(&node.images), unknown(&node.runtime));
    assert_eq!((ours.code(), ours.message()), (theirs.code(), theirs.message()));
    // The runtime service is not the snapshotter's to serve.
    let refused =
        node.images.call::<_, Nothing>("RuntimeService", "Status", Nothing {}).expect_err("not served");
    assert_eq!(refused.code(), Code::Unimplemented);
    let missing = node.images.pull("127.0.0.1:1/none:1", SECRET).expect_err("nobody is there");
    assert!(missing.message().contains("127.0.0.1:1"), "{missing:?}");
    kill(Pid::from_raw(node.containerd.pid()), Signal::SIGKILL).expect("kill containerd");
    let gone = wait_for("containerd to be gone", Duration::from_secs(10), || images(&node.images).err());
    assert_eq!(gone.code(), Code::Unavailable);
    assert!(gone.message().contains("containerd does not answer at"), "{gone:?}");
}

#[test]
fn without_the_option_nothing_is_forwarded() {
    let snapshotter = Snapshotter::start();
    let cri = Cri::at(snapshotter.socket());
    let refused = cri.image::<_, Images>("ListImages", Nothing {}).expect_err("not served");
    assert_eq!(refused.code(), Code::Unimplemented);
}
