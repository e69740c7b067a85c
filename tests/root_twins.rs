//! Two images of which most files are the same, in layers that are not: what one has, the other need not fetch.

use std::time::Duration;

use lazyrun::demo::shaper::{Shape, Shaper};
use serde_json::Value;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{BIG, NEXT_TAG, TAG, big, sha256, two_versions};
use crate::support::instance::Lazyrun;
use crate::support::prometheus::Metrics;
use crate::support::wait_for;

/// Throws away what is local of the images that nobody runs.
fn evict_idle(lazyrun: &Lazyrun) {
    let evicted = wait_for("the next version's layer to be evicted", Duration::from_secs(30), || {
        let text = lazyrun.ok(&["system", "prune", "--force", "--cache", "--format", "json"]);
        let report: Value = serde_json::from_str(&text).expect("JSON");
        report["Evicted"].as_u64().filter(|bytes| *bytes > 0)
    });
    assert!(evicted > BIG as u64 * 9 / 10, "only {evicted} bytes were evicted");
}

fn metrics(lazyrun: &Lazyrun) -> Metrics {
    Metrics::parse(&lazyrun.ok(&["metrics"]))
}

#[test]
fn the_next_version_starts_from_the_files_of_the_one_that_runs() {
    let layout = two_versions();
    let mut registry = DockerRegistry::start();
    let shaper = Shaper::start(registry.addr(), Shape::default()).expect("start the shaper");
    let [old, new] = [TAG, NEXT_TAG].map(|tag| {
        registry.push(layout.path(), tag, "app");
        format!("{}/app:{tag}", shaper.addr())
    });
    let lazyrun = Lazyrun::new();
    lazyrun.ok(&["pull", "--quiet", &old]);
    lazyrun.ok(&["pull", "--quiet", &new]);
    lazyrun.ok(&["run", "-d", "--name", "old", "--network", "none", &old, "sleep", "1000"]);
    evict_idle(&lazyrun);

    shaper.reset();
    let run = ["run", "--rm", "--network", "none", &new];
    let sum = lazyrun.ok(&[&run[..], &["sha256sum", "/data/big.bin"]].concat());
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    let of_image = [("image", new.as_str())];
    let metrics = wait_for("the next version to be whole", Duration::from_secs(60), || {
        let metrics = metrics(&lazyrun);
        let whole = metrics.sum("lazyrun_image_local_bytes", &of_image)
            == metrics.sum("lazyrun_image_bytes", &of_image);
        whole.then_some(metrics)
    });
    // A file of 3 MB is new, and what lies around it.
    let came = shaper.traffic().bytes_down;
    assert!(came > 3_000_000 && came < 7_000_000, "{came} bytes came");
    let shared = metrics.sum("lazyrun_shared_bytes_total", &of_image);
    assert!(shared > BIG as f64 * 0.9, "only {shared} bytes are shared");
    assert_eq!(metrics.sum("lazyrun_shared_bytes_total", &[]), shared, "none for another image");
    let report = lazyrun.ok(&["system", "check", "--format", "json"]);
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["Bad"], Value::Array(Vec::new()), "{report}");

    // With nobody to ask: all that is read is in the other image.
    evict_idle(&lazyrun);
    registry.stop();
    let tail = BIG - (3 << 20);
    let sum =
        lazyrun.ok(&[&run[..], &["sh", "-c", &format!("tail -c {tail} /data/big.bin | sha256sum")]].concat());
    assert!(sum.starts_with(&sha256(&big()[BIG - tail..])), "{sum}");
    lazyrun.ok(&["rm", "-f", "old"]);
}
