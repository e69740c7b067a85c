//! Layers that containerd never downloaded, brought into its content store: exported, imported elsewhere, pushed.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lazyrun::demo::shaper::Shape;
use serde_json::Value;

use crate::support::containerd::{Containerd, PROXY};
use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, TAG, corrupt, sha256};
use crate::support::indexed::Indexed;
use crate::support::snapshotter::{Snapshotter, go_program, pull};
use crate::support::wait_for;

/// Slow enough that the whole image takes some seconds.
const SLOW: Shape = Shape { mbit: 40.0, rtt_ms: 2.0 };

/// An image that a containerd has pulled lazily.
struct Pulled {
    containerd: Containerd,
    snapshotter: Snapshotter,
    image: String,
}

impl Pulled {
    fn new(image: &str) -> Pulled {
        let snapshotter = Snapshotter::start();
        // What is fetched is fetched for containerd alone.
        snapshotter.lazyrun.ok(&["hydrate", "--pause"]);
        let containerd = snapshotter.containerd_with_diffs();
        pull(&containerd, image);
        Pulled { containerd, snapshotter, image: image.to_owned() }
    }

    fn command<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        let mut command = vec!["containerd", "fetch", "--namespace", self.containerd.namespace()];
        command.extend(args);
        command
    }

    /// Fetches an image; returns how many blobs and bytes came.
    fn fetch(&self, image: &str) -> (u64, u64) {
        let said = self.snapshotter.lazyrun.ok(&self.command(&["--format", "json", image]));
        let fetched: Value = serde_json::from_str(&said).expect("JSON");
        (fetched["Fetched"].as_u64().unwrap(), fetched["Bytes"].as_u64().unwrap())
    }

    fn fails(&self, image: &str) -> String {
        self.snapshotter.lazyrun.fails(125, &self.command(&[image]))
    }

    fn has(&self, digest: &str) -> bool {
        self.containerd.output(["content", "ls", "-q"]).contains(digest)
    }

    /// The digest of the only image's manifest.
    fn manifest(&self) -> String {
        let listed = self.containerd.output(["images", "ls"]);
        let digest = listed.split_whitespace().find(|word| word.starts_with("sha256:"));
        digest.expect("an image").to_owned()
    }

    fn leases(&self) -> usize {
        let leases = self.containerd.output(["leases", "ls", "-q"]);
        leases.lines().filter(|id| id.starts_with("lazyrun-")).count()
    }

    /// Has containerd's garbage collector run to its end.
    fn collect_garbage(&self) {
        self.containerd.run(["images", "tag", &self.image, "garbage"]);
        self.containerd.remove("garbage");
    }
}

/// A blob of containerd's content store.
fn content(containerd: &Containerd, digest: &str) -> Vec<u8> {
    let output = containerd.ctr(["content", "get", digest]).output().expect("run ctr");
    assert!(output.status.success(), "{digest}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn assert_layers(containerd: &Containerd, fixture: &Fixture) {
    for layer in &fixture.layers {
        let same = content(containerd, &layer.digest) == fs::read(fixture.blob(&layer.digest)).unwrap();
        assert!(same, "layer {}", layer.digest);
    }
}

#[test]
fn a_lazy_image_is_exported_and_pushed_as_it_was() {
    let indexed = Indexed::behind(Shape::default());
    let pulled = Pulled::new(&indexed.image);
    let (containerd, image) = (&pulled.containerd, pulled.image.as_str());
    let archive = pulled.snapshotter.lazyrun.scratch("export").join("image.tar");
    let archive = archive.to_str().unwrap();
    let refused = containerd.ctr(["images", "export", archive, image]).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("not found"), "{refused:?}");

    assert_eq!(pulled.fetch(image), (3, indexed.fixture.compressed()));
    assert_layers(containerd, &indexed.fixture);
    assert_eq!((pulled.fetch(image), pulled.leases()), ((0, 0), 0));
    // As containerd's own download leaves it.
    let listed = containerd.output(["content", "ls"]);
    for layer in &indexed.fixture.layers {
        let line = listed.lines().find(|line| line.starts_with(&layer.digest)).expect("it is in the list");
        assert!(line.contains("containerd.io/distribution.source.127.0.0.1=fixture"), "{line}");
    }
    let active = containerd.output(["content", "active"]);
    assert_eq!(active.lines().count(), 1, "no upload is left open: {active}");

    containerd.run(["images", "export", archive, image]);
    let mut elsewhere = Containerd::start();
    elsewhere.run(["images", "import", archive]);
    assert_layers(&elsewhere, &indexed.fixture);
    let dir = pulled.snapshotter.lazyrun.scratch("imported");
    elsewhere.mount(image, &dir);
    assert_eq!(fs::read_to_string(dir.join("data/first")).unwrap(), "replaced\n");
    drop(elsewhere);

    let registry = DockerRegistry::start();
    let pushed = format!("{}/other/name:1", registry.addr());
    containerd.run(["images", "push", "--plain-http", &pushed, image]);
    for layer in &indexed.fixture.layers {
        assert_eq!(sha256(&registry.blob(&layer.digest)), layer.digest[7..]);
    }
}

#[test]
fn what_is_fetched_stays_for_as_long_as_the_image() {
    let indexed = Indexed::behind(Shape::default());
    let pulled = Pulled::new(&indexed.image);
    let (containerd, layers) = (&pulled.containerd, &indexed.fixture.layers);
    // A client that was told to drop layers after unpacking leaves no trace of them in the manifest's labels.
    let manifest = pulled.manifest();
    for i in 0..layers.len() {
        let label = format!("containerd.io/gc.ref.content.l.{i}=");
        containerd.run(["content", "label", &manifest, &label]);
    }
    assert_eq!(pulled.fetch(&pulled.image).0, 3);
    pulled.collect_garbage();
    assert_layers(containerd, &indexed.fixture);
    containerd.remove(&pulled.image);
    let left = containerd.output(["content", "ls", "-q"]);
    assert_eq!(left, "");
}

#[test]
fn a_name_that_was_given_later_leads_to_where_the_image_came_from() {
    let indexed = Indexed::behind(Shape::default());
    let pulled = Pulled::new(&indexed.image);
    pulled.containerd.run(["images", "tag", &pulled.image, "docker.io/library/mine:latest"]);
    pulled.containerd.remove(&pulled.image);
    // By its short name, too.
    assert_eq!(pulled.fetch("mine").0, 3);
    assert_layers(&pulled.containerd, &indexed.fixture);
    // As an image that was made of it: nothing is noted, but the layers are known.
    pulled.containerd.remove("docker.io/library/mine:latest");
    pull(&pulled.containerd, &pulled.image);
    pulled.containerd.run(["images", "tag", &pulled.image, "docker.io/library/made:latest"]);
    pulled.containerd.remove(&pulled.image);
    let manifest = pulled.manifest();
    pulled.containerd.run(["content", "label", &manifest, "containerd.io/distribution.source.127.0.0.1="]);
    assert_eq!(pulled.fetch("made").0, 3);
    assert_layers(&pulled.containerd, &indexed.fixture);
}

#[test]
fn what_another_namespace_has_is_not_downloaded_again() {
    let indexed = Indexed::behind(Shape::default());
    let pulled = Pulled::new(&indexed.image);
    assert_eq!(pulled.fetch(&pulled.image).0, 3);
    let (socket, other) = (pulled.containerd.socket(), format!("{}-other", pulled.containerd.namespace()));
    let pull = Command::new(go_program("pull")).arg(socket).args([&other, PROXY, &pulled.image]).output();
    assert!(pull.is_ok_and(|output| output.status.success()));
    let before = indexed.shaper.traffic().bytes_down;
    let args = ["containerd", "fetch", "-n", &other, "--format", "{{.Fetched}} {{.Bytes}}", &pulled.image];
    assert_eq!(pulled.snapshotter.lazyrun.ok(&args), "3 0\n");
    assert_eq!(indexed.shaper.traffic().bytes_down, before);
    for layer in &indexed.fixture.layers {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(socket).args(["--namespace", &other, "content", "get", &layer.digest]);
        assert_eq!(sha256(&ctr.output().unwrap().stdout), layer.digest[7..]);
    }
}

#[test]
fn a_fetch_that_breaks_off_is_resumed() {
    let indexed = Indexed::behind(SLOW);
    let mut pulled = Pulled::new(&indexed.image);
    let big = &indexed.fixture.layers[1];
    // Megabytes of it that containerd has.
    let written = |containerd: &Containerd| -> f64 {
        let reference = format!("layer-{}", big.digest);
        let active = containerd.output(["content", "active"]);
        let line = active.lines().find(|line| line.starts_with(&reference));
        let size = line.and_then(|line| line.split_whitespace().nth(1)?.strip_suffix("MB"));
        size.map_or(0.0, |size| size.parse().expect("a number"))
    };
    let start = |pulled: &Pulled| {
        let mut command = pulled.snapshotter.lazyrun.command(&pulled.command(&[&pulled.image]));
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start the fetch")
    };
    // The command is killed.
    let mut child = start(&pulled);
    let some = 12.0;
    wait_for("some of the layer", Duration::from_secs(60), || {
        (written(&pulled.containerd) > some).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!pulled.has(&big.digest));
    pulled.collect_garbage();
    assert!(written(&pulled.containerd) > some, "garbage collection leaves what can be resumed");
    // The daemon is killed, then containerd, while it is under way.
    let mut child = start(&pulled);
    pulled.snapshotter.kill_daemon();
    child.wait().unwrap();
    let before = indexed.shaper.traffic().bytes_down;
    let child = start(&pulled);
    wait_for("bytes", Duration::from_secs(60), || {
        (indexed.shaper.traffic().bytes_down > before + (1 << 20)).then_some(())
    });
    pulled.containerd.kill_and_restart();
    let mut child = child;
    assert!(child.wait().unwrap().success(), "it outlives a restart of containerd");
    assert_layers(&pulled.containerd, &indexed.fixture);
    let brought = indexed.shaper.traffic().bytes_down - before;
    // Each time it broke off what was on its way was lost.
    assert!(brought < big.size - (6 << 20), "{brought} bytes of {}", big.size);
    assert_eq!((pulled.fetch(&pulled.image), pulled.leases()), ((0, 0), 0));
}

#[test]
fn blobs_are_kept_without_being_asked() {
    let indexed = Indexed::behind(Shape::default());
    let snapshotter = Snapshotter::with_flags(&["--keep-blobs=background"]);
    let mut containerd = snapshotter.containerd_with_diffs();
    pull(&containerd, &indexed.image);
    let has_all = |containerd: &Containerd| {
        let content = containerd.output(["content", "ls", "-q"]);
        indexed.fixture.layers.iter().all(|layer| content.contains(&layer.digest)).then_some(())
    };
    let limit = Duration::from_secs(60);
    wait_for("all layers", limit, || has_all(&containerd));
    assert_layers(&containerd, &indexed.fixture);
    let leases = |containerd: &Containerd| containerd.output(["leases", "ls", "-q"]).contains("lazyrun-");
    wait_for("the lease to be ended", limit, || (!leases(&containerd)).then_some(()));
    // Pulled again, with containerd and the daemon dying meanwhile.
    containerd.remove(&indexed.image);
    assert!(has_all(&containerd).is_none());
    pull(&containerd, &indexed.image);
    containerd.kill_and_restart();
    snapshotter.kill_daemon();
    wait_for("all layers again", limit, || has_all(&containerd));
    assert_layers(&containerd, &indexed.fixture);
}

#[test]
fn a_removed_image_leaves_nothing_behind() {
    let indexed = Indexed::behind(SLOW);
    let snapshotter = Snapshotter::with_flags(&["--keep-blobs=background"]);
    let containerd = snapshotter.containerd_with_diffs();
    pull(&containerd, &indexed.image);
    let left = || {
        let active = containerd.output(["content", "active"]).lines().count() - 1;
        let leases = containerd.output(["leases", "ls", "-q"]).matches("lazyrun-").count();
        (active, leases)
    };
    let limit = Duration::from_secs(60);
    wait_for("the download to begin", limit, || (left() > (0, 0)).then_some(()));
    containerd.remove(&indexed.image);
    // Uploads go with the garbage collection that the lease's end brings.
    wait_for("the lease to be ended", limit, || (left().1 == 0).then_some(()));
}

#[test]
fn two_at_once_fetch_each_layer_once() {
    let indexed = Indexed::behind(SLOW);
    let pulled = Pulled::new(&indexed.image);
    let before = indexed.shaper.traffic().bytes_down;
    let children: Vec<_> = (0..3)
        .map(|_| {
            let mut command = pulled.snapshotter.lazyrun.command(&pulled.command(&[&pulled.image]));
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start the fetch")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let brought = indexed.shaper.traffic().bytes_down - before;
    assert!(brought < indexed.fixture.compressed() * 11 / 10, "{brought}");
    assert_layers(&pulled.containerd, &indexed.fixture);
    assert_eq!(pulled.leases(), 0);
}

#[test]
fn other_bytes_than_the_manifest_says_are_not_kept() {
    let fixture = Fixture::new();
    let pulled = Pulled::new(&fixture.image());
    // All of it is here before the registry begins to lie.
    let args = ["run", "--rm", "--snapshotter", PROXY, &pulled.image, "once", "true"];
    pulled.containerd.run(args);
    corrupt(&fixture.blob(&fixture.layers[1].digest));
    let why = pulled.fails(&pulled.image);
    assert!(why.contains(&fixture.layers[1].digest) && why.contains("other bytes"), "{why}");
    // The other layers are there.
    let has: Vec<bool> = fixture.layers.iter().map(|layer| pulled.has(&layer.digest)).collect();
    assert_eq!(has, [true, false, true]);
    let active = pulled.containerd.output(["content", "active"]);
    assert_eq!(active.lines().count(), 1, "{active}");
}

#[test]
fn what_cannot_be_done_is_said() {
    let fixture = Fixture::new();
    let pulled = Pulled::new(&fixture.image());
    let lazyrun = &pulled.snapshotter.lazyrun;
    let why = lazyrun.fails(1, &pulled.command(&["no/such:1"]));
    assert!(why.contains("no/such:1") && why.contains(pulled.containerd.namespace()), "{why}");
    let nowhere = lazyrun.scratch("nowhere").join("s");
    let why = lazyrun.fails(125, &pulled.command(&["--address", nowhere.to_str().unwrap(), &pulled.image]));
    assert!(why.contains(nowhere.to_str().unwrap()), "{why}");
    // The registry is gone.
    let host = pulled.image.split('/').next().unwrap().to_owned();
    drop(fixture);
    let why = pulled.fails(&pulled.image);
    assert!(why.contains(&host), "{why}");
    let other = crate::support::instance::Lazyrun::new();
    let why = other.fails(125, &["containerd", "fetch", "x"]);
    assert!(why.contains("no snapshotter runs"), "{why}");
    assert!(!other.root().exists(), "nothing is started for it");
}

#[test]
fn one_image_that_fails_does_not_keep_others_from_being_fetched() {
    let fixture = Fixture::new();
    let pulled = Pulled::new(&fixture.image());
    let images = ["no/such:1", &pulled.image, "no/other:1"];
    let why = pulled.snapshotter.lazyrun.fails(1, &pulled.command(&images));
    assert!(why.contains("no/such:1"), "{why}");
    assert_layers(&pulled.containerd, &fixture);
}

#[test]
fn all_variants_are_fetched_when_asked_for() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    // Two variants that share their bytes but for the configs.
    let index = two_variants(&fixture, &registry);
    let image = format!("{}/fixture:many", registry.addr());
    let pulled = Pulled::new(&image);
    assert_eq!(pulled.fetch(&image).0, 3);
    let other: Vec<String> =
        ["manifest", "config"].iter().map(|kind| index[kind].as_str().unwrap().to_owned()).collect();
    assert!(other.iter().all(|digest| !pulled.has(digest)), "only this machine's variant");
    let said = pulled.snapshotter.lazyrun.ok(&pulled.command(&[
        "--all-platforms",
        "--format",
        "{{.Fetched}}",
        &image,
    ]));
    assert_eq!(said, "1\n", "the other config");
    let why =
        pulled.snapshotter.lazyrun.fails(125, &pulled.command(&["--platform", "linux/riscv64", &image]));
    assert!(why.contains("no variant for linux/riscv64"), "{why}");
    pulled.collect_garbage();
    assert!(other.iter().all(|digest| pulled.has(digest)));
    // Now all of it can be pushed, which wants every variant.
    let pushed = format!("{}/copy:many", registry.addr());
    pulled.containerd.run(["images", "push", "--plain-http", &pushed, &image]);
}

/// Pushes the fixture's image and a variant of it for another platform; returns the digests of that one.
fn two_variants(fixture: &Fixture, registry: &DockerRegistry) -> Value {
    registry.push(fixture.layout(), TAG, "fixture");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/two_variants.py");
    let output = Command::new("python3")
        .arg(script)
        .args([&format!("http://{}/v2/fixture", registry.addr()), TAG, "many"])
        .output()
        .expect("python3 is needed: run tests/tools/deps.sh");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}
