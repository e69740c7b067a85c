//! Processes killed at the worst moment.

use std::fs;
use std::time::Duration;

use lazyrun::demo::shaper::Shape;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::fixture::{Fixture, big, sha256};
use crate::support::instance::Lazyrun;
use crate::support::leaks;
use crate::support::wait_for;

/// The big file takes about five seconds.
const SLOW: Shape = Shape { mbit: 40.0, rtt_ms: 5.0 };

fn kill_daemon(lazyrun: &Lazyrun) -> i32 {
    let pid = lazyrun.daemon_pid().expect("a daemon runs");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill the daemon");
    pid
}

/// An instance that has the image's index but none of its data.
fn with_index_only(image: &str) -> Lazyrun {
    let lazyrun = Lazyrun::new();
    lazyrun.ok(&["pull", "--quiet", image]);
    lazyrun.ok(&["cache", "drop", image]);
    lazyrun
}

#[test]
fn a_reader_outlives_the_daemon() {
    let fixture = Fixture::shaped(SLOW);
    let lazyrun = with_index_only(&fixture.image());
    fixture.registry.reset();
    let reader = lazyrun.spawn(&["run", "--rm", &fixture.image(), "sha256sum", "/data/big.bin"]);
    wait_for("the reader to fetch", Duration::from_secs(60), || {
        (fixture.registry.stats().bytes_down > 4 << 20).then_some(())
    });
    let old = kill_daemon(&lazyrun);
    let (code, output) = reader.wait();
    assert_eq!(code, Some(0), "{output}");
    assert!(output.starts_with(&sha256(&big())), "{output}");
    let new = lazyrun.daemon_pid().expect("the keeper started a new daemon");
    assert_ne!(new, old);
}

#[test]
fn a_mount_outlives_the_daemon() {
    let fixture = Fixture::new();
    let lazyrun = with_index_only(&fixture.image());
    let dir = lazyrun.scratch("mount");
    lazyrun.ok(&["mount", &fixture.image(), dir.to_str().unwrap()]);
    for _ in 0..3 {
        let old = kill_daemon(&lazyrun);
        assert_eq!(fs::read_to_string(dir.join("data/last")).unwrap(), "behind the big file\n");
        wait_for("a new daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|pid| *pid != old));
    }
    assert_eq!(sha256(&fs::read(dir.join("data/big.bin")).unwrap()), sha256(&big()));
    lazyrun.ok(&["umount", dir.to_str().unwrap()]);
}

#[test]
fn a_container_outlives_the_daemon() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", "--name", "survivor", &fixture.image(), "sleep", "1000"]);
    let old = kill_daemon(&lazyrun);
    wait_for("a new daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|pid| *pid != old));
    assert!(lazyrun.ok(&["ps"]).contains("survivor"));
    assert_eq!(lazyrun.ok(&["exec", "survivor", "cat", "/data/last"]), "behind the big file\n");
    lazyrun.ok(&["rm", "-f", "survivor"]);
}

#[test]
fn a_killed_command_leaves_no_mount() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let running =
        lazyrun.spawn(&["run", "--name", "orphan", &fixture.image(), "sh", "-c", "echo up; sleep 1000"]);
    wait_for("the container to start", Duration::from_secs(60), || {
        running.output().contains("up").then_some(())
    });
    let mounts = |when: &str| {
        let found: Vec<String> =
            leaks::of_root(lazyrun.root()).into_iter().filter(|line| line.starts_with("mount")).collect();
        assert!(found.is_empty(), "{when}, on the host:\n{}", found.join("\n"));
    };
    mounts("while a container runs");
    running.kill();
    mounts("after its command was killed");
    lazyrun.ok(&["rm", "-f", "orphan"]);
    assert!(!lazyrun.ok(&["ps", "-a"]).contains("orphan"));
    lazyrun.reset();
}

#[test]
fn a_command_killed_during_the_first_stream_leaves_nothing_half_made() {
    let (fixture, lazyrun) = (Fixture::shaped(SLOW), Lazyrun::new());
    let running = lazyrun.spawn(&["run", "--rm", &fixture.image(), "true"]);
    wait_for("the stream to begin", Duration::from_secs(60), || {
        (fixture.registry.stats().bytes_down > 1 << 20).then_some(())
    });
    running.kill();
    let sum = lazyrun.ok(&["run", "--rm", &fixture.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    lazyrun.reset();
}

#[test]
fn a_daemon_killed_during_the_first_stream_leaves_nothing_half_made() {
    let (fixture, lazyrun) = (Fixture::shaped(SLOW), Lazyrun::new());
    let pull = lazyrun.spawn(&["pull", "--quiet", &fixture.image()]);
    wait_for("the stream to begin", Duration::from_secs(60), || {
        (fixture.registry.stats().bytes_down > 1 << 20).then_some(())
    });
    kill_daemon(&lazyrun);
    // The command may fail or go on with the new daemon; what counts is that the next one is right.
    drop(pull.wait());
    let sum = lazyrun.ok(&["run", "--rm", &fixture.image(), "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn a_fork_bomb_in_a_container_starves_no_reader() {
    let fixture = Fixture::new();
    let lazyrun = with_index_only(&fixture.image());
    let image = fixture.image();
    let run = |name| ["run", "-d", "--name", name, "--network", "none", "--hydrate", "never"];
    lazyrun.ok(&[&run("reader")[..], &[&image, "sleep", "1000"]].concat());
    // Without an end: some hundred shells that do nothing but start processes.
    let bomb = "for i in $(seq 200); do (while :; do /bin/true & /bin/true; done) & done; echo armed; wait";
    lazyrun.ok(&[&run("bomb")[..], &["--pids-limit", "1000", &image, "sh", "-c", bomb]].concat());
    wait_for("the bomb to be armed", Duration::from_secs(60), || {
        lazyrun.ok(&["logs", "bomb"]).contains("armed").then_some(())
    });
    fixture.registry.reset();
    let read = lazyrun.run_within(Duration::from_secs(60), &["exec", "reader", "sha256sum", "/data/big.bin"]);
    let read = read.expect("the reader starves");
    assert_eq!((read.code, read.stdout), (Some(0), format!("{}  /data/big.bin\n", sha256(&big()))));
    assert!(fixture.registry.stats().bytes_down > 4 << 20, "it was to be fetched meanwhile");
    let took = std::time::Instant::now();
    lazyrun.ok(&["rm", "--force", "bomb"]);
    assert!(took.elapsed() < Duration::from_secs(30), "{:?} to end the bomb", took.elapsed());
}
