//! What the daemon counts: that it is right, that scrapers can read it, and where it can be had.

use std::process::Command;
use std::time::Duration;

use lazyrun::demo::shaper::Shape;

use crate::support::fixture::{Fixture, READ_MIDDLE};
use crate::support::indexed::Indexed;
use crate::support::instance::Lazyrun;
use crate::support::prometheus::Metrics;
use crate::support::server::free_port;
use crate::support::wait_for;

/// Slow enough that the middle of the big file is read long before hydration gets there.
const SLOW: Shape = Shape { mbit: 60.0, rtt_ms: 5.0 };

fn curl(args: &[&str]) -> String {
    let output = Command::new("curl").args(["-sS", "--max-time", "30"]).args(args).output();
    let output = output.expect("curl is needed: run tests/tools/deps.sh");
    assert!(output.status.success(), "curl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn run_middle(lazyrun: &Lazyrun, image: &str) {
    let mut args = vec!["run", "--rm", "--network", "none", image];
    args.extend(READ_MIDDLE);
    lazyrun.ok(&args);
}

#[test]
fn a_lazy_start_is_counted_to_the_byte() {
    let indexed = Indexed::behind(SLOW);
    let (fixture, shaper, image) = (&indexed.fixture, &indexed.shaper, indexed.image.clone());

    let address = format!("127.0.0.1:{}", free_port());
    let lazyrun = Lazyrun::new().with_env("LAZYRUN_METRICS_ADDRESS", &address);
    run_middle(&lazyrun, &image);
    let url = format!("http://{address}/metrics");
    let scrape = || Metrics::parse(&curl(&[&url]));
    // Until all is here and nothing is on its way.
    let (metrics, traffic) = wait_for("the image to be hydrated", Duration::from_secs(120), || {
        let traffic = shaper.traffic();
        let metrics = scrape();
        let of_image = [("image", image.as_str())];
        let whole = metrics.sum("lazyrun_image_local_bytes", &of_image)
            == metrics.sum("lazyrun_image_bytes", &of_image);
        let over = metrics.sum("lazyrun_fetch_requests_total", &[]) == traffic.requests as f64;
        (whole && over && shaper.traffic() == traffic).then_some((metrics, traffic))
    });
    let sum = |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels);

    let faults = sum("lazyrun_faults_total", &[("result", "ok")]);
    assert!(faults > 0.0, "the middle was fetched on demand");
    assert_eq!(sum("lazyrun_faults_total", &[("result", "error")]), 0.0);
    assert_eq!(sum("lazyrun_fault_duration_seconds_count", &[]), faults);
    let layers = metrics.values("lazyrun_fault_duration_seconds_count", "layer");
    let short: Vec<&str> = fixture.layers.iter().map(|layer| &layer.diff_id[7..19]).collect();
    assert!(short.iter().all(|layer| layers.contains(*layer)), "{layers:?} has not all of {short:?}");
    let of_layer =
        |layer| sum("lazyrun_fault_duration_seconds_count", &[("image", &image), ("layer", layer)]);
    assert!(of_layer(short[1]) > 0.0, "the layer with the big file had faults");
    assert_eq!(short.iter().map(|layer| of_layer(layer)).sum::<f64>(), faults, "none under other");
    assert!(sum("lazyrun_fault_duration_seconds_sum", &[("layer", short[1])]) > 0.005, "a round trip");

    // Bytes by class are what passed, but for the heads of the answers.
    let fetched = sum("lazyrun_fetched_bytes_total", &[]);
    let (passed, requests) = (traffic.bytes_down as f64, traffic.requests as f64);
    // Where a slow machine made a second request worth while, the slower one's bytes were not read to the end.
    let hedges = sum("lazyrun_registry_hedges_total", &[]);
    let most = fetched + 1000.0 * requests + hedges * f64::from(8 << 20);
    assert!(fetched <= passed && passed <= most, "{fetched} of {passed} bytes in {requests} requests");
    let class = |class| sum("lazyrun_fetched_bytes_total", &[("class", class)]);
    assert!(class("fault") > 160_000.0 && class("metadata") > 1000.0, "{metrics:?}");
    assert_eq!(class("stream"), 0.0, "it has indexes");
    assert!(class("prefetch") < 4e6, "of what a start needs only the program was known: {metrics:?}");
    assert!(class("hydrate") > fixture.compressed() as f64 * 0.9, "the indexes were proven");

    let host = shaper.addr().to_string();
    let answers = |status| sum("lazyrun_registry_requests_total", &[("host", &host), ("status", status)]);
    assert_eq!(sum("lazyrun_registry_requests_total", &[("host", &host)]), requests);
    // 404 is how a registry says that nothing is there.
    assert!(answers("2xx") + answers("4xx") >= requests - hedges, "{metrics:?}");
    assert_eq!(sum("lazyrun_registry_window", &[("host", &host)]), 64.0);
    for none in ["retries", "throttled", "tokens", "redirects"] {
        assert_eq!(sum(&format!("lazyrun_registry_{none}_total"), &[]), 0.0, "{none}");
    }
    let (hits, misses) =
        (sum("lazyrun_reads_total", &[("result", "hit")]), sum("lazyrun_reads_total", &[("result", "miss")]));
    assert!(misses >= faults && hits + misses == sum("lazyrun_fuse_requests_total", &[("kind", "read")]));
    assert!(sum("lazyrun_served_bytes_total", &[]) >= 160_000.0);
    assert!(sum("lazyrun_spans_decoded_total", &[]) > 0.0 && sum("lazyrun_decode_seconds_total", &[]) > 0.0);
    assert_eq!(sum("lazyrun_cache_spans", &[("state", "missing")]), 0.0);
    assert!(sum("lazyrun_cache_bytes", &[]) > 24e6);
    assert_eq!(sum("lazyrun_view_build_duration_seconds_count", &[]), 1.0);
    assert_eq!(sum("lazyrun_starts_total", &[("result", "ok")]), 1.0);
    assert_eq!(sum("lazyrun_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    let usage = |name| sum(name, &[]);
    assert!(usage("process_resident_memory_bytes") > 1e6 && usage("process_open_fds") > 5.0);

    // The control socket tells the same things, OpenMetrics is OpenMetrics, and there is nothing else.
    assert_eq!(Metrics::parse(&lazyrun.ok(&["metrics"])).families(), metrics.families());
    let open = curl(&["-i", "-H", "Accept: application/openmetrics-text", &url]);
    assert!(open.to_lowercase().contains("content-type: application/openmetrics-text; version=1.0.0"));
    assert!(open.ends_with("\n# EOF\n") && open.contains("# TYPE lazyrun_faults counter\n"), "{open}");
    assert_eq!(open.split("\r\n\r\n").nth(1).map(|text| text.lines().last()), Some(Some("# EOF")));
    let status = |args: &[&str]| curl(&[&["-o", "/dev/null", "-w", "%{http_code}"], args].concat());
    assert_eq!(status(&[&format!("http://{address}/other")]), "404");
    assert_eq!(status(&["-X", "POST", "-d", "x", &url]), "405");

    // With the image go its labels; what was counted stays.
    lazyrun.ok(&["rmi", &image]);
    let after = scrape();
    assert!(!after.values("lazyrun_fault_duration_seconds_count", "image").contains(&image));
    assert_eq!(after.sum("lazyrun_fault_duration_seconds_count", &[("image", "other")]), faults);
}

#[test]
fn metrics_are_where_they_were_asked_for() {
    let fixture = Fixture::new();
    let quiet = Lazyrun::new();
    let why = quiet.fails(1, &["metrics"]);
    assert!(why.contains("no lazyrun daemon"), "{why}");

    let bad = Lazyrun::new().with_env("LAZYRUN_METRICS_ADDRESS", "here");
    let why = bad.fails(125, &["run", "--rm", &fixture.image(), "true"]);
    assert!(why.contains("metrics address \"here\""), "{why}");
    drop(bad.with_env("LAZYRUN_METRICS_ADDRESS", ""));

    let first = Lazyrun::new();
    let socket = first.scratch("metrics").join("sock");
    let path = socket.to_str().expect("UTF-8");
    let first = first.with_env("LAZYRUN_METRICS_ADDRESS", &format!("unix:{path}"));
    first.ok(&["run", "-d", "--name", "one", "--network", "none", &fixture.image(), "sleep", "1000"]);
    let scrape = || Metrics::parse(&curl(&["--unix-socket", path, "http://localhost/metrics"]));
    assert_eq!(scrape().sum("lazyrun_containers", &[("state", "running")]), 1.0);

    // Somebody else's address is not taken; a daemon that takes over listens where the dead one did.
    let second = Lazyrun::new().with_env("LAZYRUN_METRICS_ADDRESS", &format!("unix:{path}"));
    let why = second.fails(125, &["pull", "--quiet", &fixture.image()]);
    assert!(why.contains(path) && why.contains("--metrics-address"), "{why}");
    let why = second.fails(125, &["daemon"]);
    assert!(why.contains(path) && why.contains("--metrics-address"), "in the foreground: {why}");
    drop(second.with_env("LAZYRUN_METRICS_ADDRESS", ""));
    let old = first.daemon_pid().expect("a daemon");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old), nix::sys::signal::Signal::SIGKILL).expect("kill");
    wait_for("a new daemon", Duration::from_secs(30), || first.daemon_pid().filter(|pid| *pid != old));
    let metrics = wait_for("its metrics", Duration::from_secs(30), || {
        let output =
            Command::new("curl").args(["-sS", "--unix-socket", path, "http://localhost/metrics"]).output();
        let output = output.expect("curl");
        output.status.success().then(|| Metrics::parse(&String::from_utf8(output.stdout).expect("UTF-8")))
    });
    assert_eq!(metrics.sum("lazyrun_containers", &[("state", "running")]), 1.0);
    assert!(metrics.values("lazyrun_image_bytes", "image").contains(&fixture.image()), "taken over");
    first.ok(&["rm", "-f", "one"]);
}
