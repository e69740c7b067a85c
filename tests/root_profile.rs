//! Profiles: what one start touches is there first at the next, here, elsewhere, and of the next tag.

use std::time::Duration;

use lazyrun::demo::shaper::{Shape, Shaper};
use lazyrun_fetcher::{
    ClientOptions, IndexSource, Platform, PushOptions, Reference, RegistryClient, push_indexes,
};
use serde_json::Value;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, NEXT_TAG, READ_MIDDLE, TAG, big, sha256, two_versions};
use crate::support::instance::Lazyrun;
use crate::support::wait_for;

/// Slow enough that the whole image takes ten seconds and more.
const SLOW: Shape = Shape { mbit: 20.0, rtt_ms: 5.0 };
/// Byte of the big file that the recorded start reads, far from where hydration begins.
const MIDDLE: u64 = 3000 * 4096;

fn rows(lazyrun: &Lazyrun, args: &[&str]) -> Vec<Value> {
    lazyrun.ok(args).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Runs a command in a container of the image that is gone when this returns.
fn run(lazyrun: &Lazyrun, image: &str, command: &[&str]) {
    let mut args = vec!["run", "--rm", "--network", "none", image];
    args.extend_from_slice(command);
    lazyrun.ok(&args);
}

/// The profile, once the daemon has kept it.
fn profile(lazyrun: &Lazyrun, image: &str) -> Vec<Value> {
    wait_for("the profile to be kept", Duration::from_secs(20), || {
        let finished = lazyrun.run(&["profile", "show", "--format", "json", image]);
        let lines = finished.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        (finished.code == Some(0)).then(|| lines.collect())
    })
}

/// Starts something that reads nothing of the big file, and sees its middle come while most of it is missing.
fn middle_comes_first(lazyrun: &Lazyrun, image: &str) {
    lazyrun.ok(&["run", "-d", "--name", "idle", "--network", "none", image, "sleep", "1000"]);
    let entries =
        rows(lazyrun, &["index", "inspect", "--entries", "--layer", "1", "--format", "json", image]);
    let file = entries.iter().find(|e| e["Path"] == "data/big.bin").expect("the big file");
    let wanted = file["Extents"][0][1].as_u64().expect("its place") + MIDDLE;
    let (local, all) = wait_for("the middle of the big file", Duration::from_secs(60), || {
        let spans =
            rows(lazyrun, &["index", "inspect", "--spans", "--layer", "1", "--format", "json", image]);
        let number = |span: &Value, key: &str| span[key].as_u64().expect("a number");
        let holds =
            |s: &&Value| (number(s, "Offset")..number(s, "Offset") + number(s, "Size")).contains(&wanted);
        let here = |s: &Value| s["Local"] == true;
        let found = spans.iter().find(holds).expect("a span");
        here(found).then(|| (spans.iter().filter(|s| here(s)).count(), spans.len()))
    });
    assert!(local * 2 < all, "{local} of {all} spans are here: it came with the rest");
    lazyrun.ok(&["rm", "-f", "idle"]);
}

#[test]
fn what_a_start_touches_is_shown_and_shared() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let shaper = Shaper::start(registry.addr(), SLOW).expect("start the shaper");
    registry.push(fixture.layout(), TAG, "fixture");
    let direct = format!("{}/fixture:{TAG}", registry.addr());
    let image = format!("{}/fixture:{TAG}", shaper.addr());

    let builder = Lazyrun::new();
    let why = builder.fails(1, &["profile", "show", &direct]);
    assert!(why.contains("no such image"), "{why}");
    run(&builder, &direct, &READ_MIDDLE);
    let touched = profile(&builder, &direct);
    let big_file = touched.iter().find(|t| t["Path"] == "data/big.bin").expect("the big file");
    let bytes = big_file["Touched"].as_u64().expect("a number");
    assert!((40 * 4096..2 << 20).contains(&bytes), "{bytes} bytes touched");
    assert!(touched.iter().any(|t| t["Path"] == "bin/busybox"), "{touched:?}");

    // Spans follow the profile; contents are what they were.
    let spans = |lazyrun: &Lazyrun| {
        rows(lazyrun, &["index", "inspect", "--spans", "--format", "json", &direct]).len()
    };
    let before = spans(&builder);
    builder.ok(&["index", "build", "--profile", &direct]);
    assert!(spans(&builder) > before, "{before} spans before");
    let sum = builder.ok(&["run", "--rm", "--network", "none", &direct, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");

    builder.ok(&["profile", "push", &direct]);
    let node = Lazyrun::new();
    middle_comes_first(&node, &image);
    assert!(profile(&node, &image).iter().any(|t| t["Path"] == "data/big.bin"));

    // Taken over without a start, and forgotten.
    let other = Lazyrun::new().with_options(&["--index-trust", "proven"]);
    other.ok(&["index", "build", &direct]);
    other.ok(&["profile", "pull", &direct]);
    assert_eq!(profile(&other, &direct).len(), profile(&builder, &direct).len());
    other.ok(&["profile", "rm", &direct]);
    other.fails(1, &["profile", "rm", &direct]);
    let why = other.fails(1, &["profile", "push", &direct]);
    assert!(why.contains("profile build"), "{why}");
}

#[test]
fn a_profile_is_built_by_a_start() {
    let fixture = Fixture::new();
    let (lazyrun, image) = (Lazyrun::new(), fixture.image());
    let mut args = vec!["profile", "build", &image];
    args.extend(READ_MIDDLE);
    lazyrun.ok(&args);
    assert!(profile(&lazyrun, &image).iter().any(|t| t["Path"] == "data/big.bin"));
    lazyrun.ok(&["profile", "build", &image, "true"]);
    assert!(profile(&lazyrun, &image).iter().all(|t| t["Path"] != "data/big.bin"), "the old one is gone");
}

#[test]
fn the_profile_of_one_tag_serves_the_next() {
    let layout = two_versions();
    let registry = DockerRegistry::start();
    let shaper = Shaper::start(registry.addr(), SLOW).expect("start the shaper");
    for tag in [TAG, NEXT_TAG] {
        registry.push(layout.path(), tag, "versions");
    }
    // The next tag has an index beside it, and no profile.
    Lazyrun::new().ok(&["index", "push", &format!("{}/versions:{NEXT_TAG}", registry.addr())]);
    let lazyrun = Lazyrun::new();
    run(&lazyrun, &format!("{}/versions:{TAG}", shaper.addr()), &READ_MIDDLE);
    middle_comes_first(&lazyrun, &format!("{}/versions:{NEXT_TAG}", shaper.addr()));
}

#[test]
fn a_profile_that_is_none_costs_nobody_a_start() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let builder = Lazyrun::new();
    builder.ok(&["index", "build", &image]);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let huge = br#"{"version":3,"layers":[],"touches":[[0,4294967295,4294967295,0]]}"#;
    let other = format!(r#"{{"version":3,"layers":["{}"],"touches":[[9,1,1,0]]}}"#, "0".repeat(64));
    let nonsense: [&[u8]; 3] = [b"\xff\xfe no JSON", huge, other.as_bytes()];
    for profile in nonsense {
        runtime.block_on(async {
            let client = RegistryClient::new(ClientOptions::default()).expect("a client");
            let reference: Reference = image.parse().expect("a reference");
            let resolved = client.resolve(&reference, &Platform::host()).await.expect("the image");
            let index = |diff_id: lazyrun_index::Digest| {
                IndexSource::File(builder.root().join("layers").join(diff_id.hex()).join("index"))
            };
            let indexes: Vec<_> = resolved.layers.iter().map(|l| (l.clone(), index(l.diff_id))).collect();
            let options = PushOptions { profile: Some(profile.to_vec().into()), ..PushOptions::default() };
            push_indexes(&client, &resolved, &indexes, &options).await.expect("push");
        });
        let node = Lazyrun::new();
        assert_eq!(node.ok(&["run", "--rm", &image, "cat", "/data/last"]), "behind the big file\n");
        let shown = node.ok(&["index", "inspect", &image]);
        assert!(shown.contains("lazyrun index"), "the indexes beside it are used: {shown}");
        builder.ok(&["index", "rm", &image]);
    }
}

#[test]
fn an_unchanged_image_costs_pull_always_one_request() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    registry.push(fixture.layout(), TAG, "fixture");
    let shaper = Shaper::start(registry.addr(), Shape::default()).expect("start the shaper");
    let image = format!("{}/fixture:{TAG}", shaper.addr());
    let lazyrun = Lazyrun::new();
    lazyrun.ok(&["pull", "--quiet", &image]);
    shaper.reset();
    let always = ["run", "--rm", "--pull", "always", "--network", "none", &image, "ls", "/data"];
    lazyrun.ok(&always);
    let requests = shaper.log();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(requests[0].method, "HEAD");
    // What has changed is seen.
    let changed = two_versions();
    registry.push_as(changed.path(), NEXT_TAG, "fixture", TAG);
    assert!(lazyrun.ok(&always).contains("another"), "the tag leads elsewhere now");
    drop((registry, shaper));
    lazyrun.ok(&["run", "--rm", "--network", "none", &image, "true"]);
    let why = lazyrun.fails(125, &always);
    assert!(why.contains("127.0.0.1"), "{why}");
}
