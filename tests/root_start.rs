//! Starting an image before it is local: without an index, with one, and with the registry gone.

use std::time::Duration;

use lazyrun::demo::shaper::Shape;

use crate::support::fixture::{BIG, Fixture, big, sha256};
use crate::support::instance::Lazyrun;
use crate::support::wait_for;

/// Slow enough that the whole image takes ten seconds and more.
const SLOW: Shape = Shape { mbit: 20.0, rtt_ms: 5.0 };

#[test]
fn a_first_start_streams_every_layer_once() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    assert_eq!(lazyrun.ok(&["run", "--rm", &fixture.image(), "cat", "/data/last"]), "behind the big file\n");
    for layer in &fixture.layers {
        let requests =
            fixture.registry.log().into_iter().filter(|each| each.target.contains(&layer.digest[7..]));
        let whole: Vec<_> = requests.collect();
        assert_eq!(whole.len(), 1, "a layer without an index comes in one stream: {whole:#?}");
    }
    let fetched = fixture.registry.stats().bytes_down;
    assert!(fetched < fixture.compressed() + 100_000, "{fetched} bytes for {}", fixture.compressed());
}

#[test]
fn a_start_with_an_index_fetches_what_it_touches() {
    let (fixture, lazyrun) = (Fixture::shaped(SLOW), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["pull", "--quiet", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    fixture.registry.reset();
    assert_eq!(lazyrun.ok(&["run", "--rm", &image, "cat", "/data/last"]), "behind the big file\n");
    let (fetched, log) = (fixture.registry.stats().bytes_down, fixture.registry.log());
    assert!(log.iter().any(|request| request.range.is_some()), "nothing came by range: {log:#?}");
    assert!(fetched < fixture.compressed() * 3 / 4, "{fetched} of {} bytes", fixture.compressed());
}

#[test]
fn faults_bring_the_right_bytes() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["pull", "--quiet", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    let sums = lazyrun.ok(&[
        "run",
        "--rm",
        &image,
        "sh",
        "-c",
        "sha256sum </data/big.bin; cat /data/small/* | wc -c",
    ]);
    assert!(sums.starts_with(&sha256(&big())), "{sums}");
    let small: usize = (0..300).map(|i| 64 + 37 * i).sum();
    assert_eq!(sums.lines().nth(1), Some(small.to_string().as_str()));
}

#[test]
fn reads_at_random_places_are_right() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["pull", "--quiet", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    let places: Vec<usize> = (0..40).map(|i| (i * 7_654_321) % (BIG / 1000)).collect();
    let script: String = places
        .iter()
        .map(|at| format!("dd if=/data/big.bin bs=1000 skip={at} count=1 2>/dev/null;"))
        .collect();
    let sum = lazyrun.ok(&["run", "--rm", &image, "sh", "-c", &format!("({script}) | sha256sum")]);
    let big = big();
    let wanted: Vec<u8> = places.iter().flat_map(|at| big[at * 1000..at * 1000 + 1000].to_vec()).collect();
    assert!(sum.starts_with(&sha256(&wanted)), "{sum}");
}

#[test]
fn an_index_can_be_built_ahead() {
    // Slow enough that hydration has not come to the middle of the big file when that is read.
    let shape = Shape { mbit: 100.0, rtt_ms: 5.0 };
    let (fixture, lazyrun) = (Fixture::shaped(shape), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["index", "build", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    fixture.registry.reset();
    let middle = ["dd", "if=/data/big.bin", "of=/dev/null", "bs=4096", "skip=5000", "count=1"];
    let run = ["run", "--rm", "--network", "none", &image];
    lazyrun.ok(&[&run[..], &middle].concat());
    let log = fixture.registry.log();
    assert!(log.iter().any(|request| request.range.is_some()), "{log:#?}");
}

#[test]
fn a_hydrated_image_needs_no_registry() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["pull", "--quiet", &image]);
    drop(fixture);
    let sum = lazyrun.ok(&["run", "--rm", &image, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    lazyrun.ok(&["run", "--rm", "--pull", "never", &image, "true"]);
    // Nor after the daemon is gone.
    let pid = lazyrun.daemon_pid().expect("a daemon");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let sum = lazyrun.ok(&["run", "--rm", &image, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn a_lazy_start_hydrates_in_the_background() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&["pull", "--quiet", &image]);
    lazyrun.ok(&["cache", "drop", &image]);
    lazyrun.ok(&["run", "-d", "--name", "sleeper", &image, "sleep", "1000"]);
    let mut last = (0, std::time::Instant::now());
    wait_for("the transfers to end", Duration::from_secs(120), || {
        let bytes = fixture.registry.stats().bytes_down;
        if bytes != last.0 {
            last = (bytes, std::time::Instant::now());
        }
        (bytes > BIG as u64 && last.1.elapsed() > Duration::from_secs(2)).then_some(())
    });
    drop(fixture);
    let sum = lazyrun.ok(&["exec", "sleeper", "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn pull_never_refuses_what_is_not_there() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let why = lazyrun.fails(125, &["run", "--rm", "--pull", "never", &fixture.image(), "true"]);
    assert!(why.contains(&fixture.image()), "{why}");
    assert_eq!(fixture.registry.stats().requests, 0);
}
