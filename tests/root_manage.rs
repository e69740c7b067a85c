//! The commands around containers and images.

use std::time::Duration;

use crate::support::fixture::{Fixture, TAG};
use crate::support::instance::Lazyrun;
use crate::support::wait_for;

#[test]
fn a_container_from_start_to_removal() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let id = lazyrun.ok(&["run", "-d", "--name", "one", &fixture.image(), "sleep", "1000"]);
    let id = id.strip_suffix('\n').expect("one line");
    assert!(id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()), "the full id: {id}");
    let listed = lazyrun.ok(&["ps"]);
    assert!(listed.contains("one") && listed.contains(&id[..12]), "{listed}");
    lazyrun.ok(&["stop", "-t", "1", "one"]);
    assert!(!lazyrun.ok(&["ps"]).contains("one"));
    assert!(lazyrun.ok(&["ps", "-a"]).contains("one"));
    lazyrun.ok(&["rm", &id[..12]]);
    assert!(!lazyrun.ok(&["ps", "-a"]).contains("one"));
}

#[test]
fn a_name_is_taken_once() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", "--name", "one", &fixture.image(), "sleep", "1000"]);
    let why = lazyrun.fails(125, &["run", "-d", "--name", "one", &fixture.image(), "sleep", "1000"]);
    assert!(why.contains("one"), "{why}");
    lazyrun.ok(&["rm", "-f", "one"]);
    lazyrun.ok(&["run", "--rm", "--name", "one", &fixture.image(), "true"]);
    lazyrun.ok(&["run", "--rm", "--name", "one", &fixture.image(), "true"]);
}

#[test]
fn a_running_container_is_not_removed_by_accident() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", "--name", "busy", &fixture.image(), "sleep", "1000"]);
    assert_ne!(lazyrun.run(&["rm", "busy"]).code, Some(0));
    assert_ne!(lazyrun.run(&["rmi", &fixture.image()]).code, Some(0));
    lazyrun.ok(&["rm", "-f", "busy"]);
}

#[test]
fn kill_sends_signals() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let script = "trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.1; done";
    lazyrun.ok(&["run", "-d", "--name", "trap", &fixture.image(), "sh", "-c", script]);
    wait_for("the trap", Duration::from_secs(30), || {
        lazyrun.ok(&["logs", "trap"]).contains("ready").then_some(())
    });
    lazyrun.ok(&["kill", "-s", "USR1", "trap"]);
    wait_for("the signal to arrive", Duration::from_secs(30), || {
        lazyrun.ok(&["logs", "trap"]).contains("got it").then_some(())
    });
    wait_for("the end", Duration::from_secs(30), || (!lazyrun.ok(&["ps"]).contains("trap")).then_some(()));
    assert!(lazyrun.ok(&["inspect", "trap"]).contains('7'));
}

#[test]
fn logs_keep_both_streams() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let script = "echo out; echo err >&2";
    let finished = lazyrun.run(&["run", "--name", "talk", &fixture.image(), "sh", "-c", script]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let logs = lazyrun.run(&["logs", "talk"]);
    assert_eq!((logs.stdout.as_str(), logs.stderr.as_str()), ("out\n", "err\n"), "{logs:#?}");
}

#[test]
fn exec_joins_a_container() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", "--name", "host", "-e", "MARK=here", &fixture.image(), "sleep", "1000"]);
    assert_eq!(lazyrun.ok(&["exec", "host", "sh", "-c", "echo $MARK"]), "here\n");
    assert_eq!(lazyrun.ok(&["exec", "-e", "MARK=there", "host", "sh", "-c", "echo $MARK"]), "there\n");
    assert_eq!(lazyrun.ok(&["exec", "-w", "/tmp", "host", "pwd"]), "/tmp\n");
    assert_eq!(lazyrun.ok(&["exec", "-u", "1000", "host", "id", "-u"]), "1000\n");
    assert_eq!(lazyrun.run(&["exec", "host", "sh", "-c", "exit 9"]).code, Some(9));
    assert_eq!(lazyrun.run(&["exec", "host", "no-such-command"]).code, Some(127));
    let processes = lazyrun.ok(&["exec", "host", "ps"]);
    assert!(processes.contains("sleep 1000"), "{processes}");
    let finished = lazyrun.run_with_input(&["exec", "-i", "host", "cat"], "through exec\n");
    assert_eq!(finished.stdout, "through exec\n", "{finished:#?}");
}

#[test]
fn inspect_tells_state_and_image() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let id = lazyrun.ok(&["run", "-d", "--name", "seen", &fixture.image(), "sleep", "1000"]);
    let text = lazyrun.ok(&["inspect", "seen"]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("inspect prints JSON");
    assert!(text.contains(id.trim()) && text.contains(&fixture.image()), "{value:#}");
}

#[test]
fn images_come_and_go() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["pull", &fixture.image()]);
    let listed = lazyrun.ok(&["images"]);
    assert!(listed.contains("fixture") && listed.contains(TAG), "{listed}");
    lazyrun.ok(&["rmi", &fixture.image()]);
    assert!(!lazyrun.ok(&["images"]).contains("fixture"));
    fixture.registry.reset();
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    assert!(fixture.registry.stats().bytes_down > fixture.compressed() / 2, "its layers were still there");
}

#[test]
fn info_starts_no_daemon() {
    let lazyrun = Lazyrun::new();
    let info = lazyrun.info();
    for field in ["version", "daemon_pid", "root", "mount_plan", "bridge"] {
        assert!(info.get(field).is_some(), "no {field} in {info}");
    }
    assert_eq!(lazyrun.daemon_pid(), None);
    assert_eq!(info["root"].as_str(), lazyrun.root().to_str());
    assert!(lazyrun.ok(&["version"]).contains(env!("CARGO_PKG_VERSION")));
    assert!(lazyrun.ok(&["doctor"]).contains("erofs"));
}

#[test]
fn a_reset_leaves_nothing() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", &fixture.image(), "sleep", "1000"]);
    let dir = lazyrun.scratch("mount");
    lazyrun.ok(&["mount", &fixture.image(), dir.to_str().unwrap()]);
    lazyrun.reset();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "the mount is still there");
}
