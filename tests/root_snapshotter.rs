//! The snapshotter under a real containerd: pulled, run, compared with overlayfs, killed in any order.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::{Shape, Shaper};
use lazyrun::ipc::fds;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::containerd::{Containerd, PROXY, version};
use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, READ_MIDDLE, TAG, big, sha256};
use crate::support::indexed::Indexed;
use crate::support::instance::{EXE, Lazyrun};
use crate::support::server::Server;
use crate::support::snapshotter::{Snapshotter, go_program, mounts_below, pull, try_pull};
use crate::support::tree::{assert_equal, scan};
use crate::support::wait_for;

/// Slow enough that the whole image takes ten seconds and more.
const SLOW: Shape = Shape { mbit: 20.0, rtt_ms: 5.0 };

/// Runs a command in a container that is removed afterwards; returns its output.
fn run(containerd: &Containerd, image: &str, command: &[&str]) -> String {
    let args = ["run", "--rm", "--snapshotter", PROXY, image, "once"];
    containerd.output(args.iter().chain(command).copied())
}

/// Names of the snapshots that containerd has.
fn snapshots(containerd: &Containerd) -> Vec<String> {
    let listed = containerd.output(["snapshots", "--snapshotter", PROXY, "ls"]);
    listed.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// Digests of the fixture's layers that containerd holds itself.
fn layers_of_containerd(containerd: &Containerd, fixture: &Fixture) -> Vec<String> {
    let content = containerd.output(["content", "ls", "-q"]);
    fixture.layers.iter().map(|l| l.digest.clone()).filter(|digest| content.contains(digest)).collect()
}

/// How often each layer's blob was asked for.
fn requests(registry: &Registry, fixture: &Fixture) -> Vec<usize> {
    let log = registry.log();
    let of = |digest: &str| log.iter().filter(|request| request.target.contains(&digest[7..])).count();
    fixture.layers.iter().map(|layer| of(&layer.digest)).collect()
}

/// Runs containerd's own tests of snapshotters; returns how many passed, failed and were skipped.
fn suite(args: &[&str]) -> (usize, usize, usize) {
    let output = Command::new(go_program("suite"))
        .args(["-test.root", "-test.v", "-test.timeout", "8m"])
        .args(args)
        .output()
        .expect("run the suite");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |what: &str| text.lines().filter(|l| l.starts_with(&format!("    --- {what}"))).count();
    let counts = (count("PASS"), count("FAIL"), count("SKIP"));
    assert!(output.status.success() && counts.1 == 0, "{counts:?}\n{text}");
    counts
}

#[test]
fn containerds_own_suite_passes() {
    // Each of its tests has a snapshotter of its own.
    let spawn = format!("{EXE} --root \"$ROOT\" snapshotter --address \"$SOCK\"");
    assert_eq!(suite(&["-spawn", &spawn]), (20, 0, 1));
}

#[test]
fn containerds_own_suite_passes_through_its_metadata() {
    let snapshotter = Snapshotter::start();
    let socket = snapshotter.socket().to_str().unwrap();
    assert_eq!(suite(&["-socket", socket, "-meta"]), (20, 0, 1));
}

#[test]
fn an_indexed_image_starts_lazily() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let shaper = Shaper::start(registry.addr(), SLOW).expect("start the shaper");
    registry.push(fixture.layout(), TAG, "fixture");
    Lazyrun::new().ok(&["index", "push", &format!("{}/fixture:{TAG}", registry.addr())]);
    let image = format!("{}/fixture:{TAG}", shaper.addr());

    let snapshotter = Snapshotter::start();
    let containerd = snapshotter.containerd();
    pull(&containerd, &image);
    assert_eq!(snapshots(&containerd).len(), 3);
    assert!(snapshotter.mounts().is_empty(), "a pull mounts nothing: {:?}", snapshotter.mounts());
    assert_eq!(run(&containerd, &image, &["cat", "/data/last"]), "behind the big file\n");
    let fetched = shaper.traffic().bytes_down;
    assert!(fetched < fixture.compressed() * 3 / 4, "{fetched} of {} bytes", fixture.compressed());
    assert_eq!(layers_of_containerd(&containerd, &fixture), Vec::<String>::new());
    containerd.remove(&image);
}

#[test]
fn a_start_tells_where_its_time_went() {
    let indexed = Indexed::behind(SLOW);
    let (image, snapshotter) = (&indexed.image, Snapshotter::start());
    let (containerd, lazyrun) = (snapshotter.containerd(), &snapshotter.lazyrun);
    pull(&containerd, image);
    lazyrun.fails(1, &["why", image]);
    run(&containerd, image, &READ_MIDDLE);

    let told: Value = serde_json::from_str(&lazyrun.ok(&["why", "--format", "json", image])).expect("JSON");
    let start = &told["start"];
    assert_eq!((&start["what"]["snapshot"]["key"], &start["error"]), (&Value::from("once"), &Value::Null));
    assert_eq!((start["image"].as_str(), start["plan"].as_str()), (Some(image.as_str()), Some("erofs")));
    let list = |key: &str| start[key].as_array().expect("a list");
    let names: Vec<&str> = list("phases").iter().filter_map(|phase| phase["name"].as_str()).collect();
    assert_eq!(names, ["resolve", "index", "stream", "view", "run"]);
    assert!(list("layers").iter().all(|l| l["index"] == "lazyrun index (repository)"), "{start:#}");
    let of_big = list("reads").iter().find(|read| read["path"] == "data/big.bin");
    assert!(of_big.is_some_and(|read| read["layer"] == 1 && read["ok"] == true), "{start:#}");
    let by_range = |r: &&Value| r["class"] == "fault" && r["status"] == 206 && r["spans"].is_array();
    assert!(list("requests").iter().any(|request| by_range(&request)), "{start:#}");
    assert!(told["summary"]["blocked_ms"].as_f64().is_some_and(|ms| ms > 5.0), "{:#}", told["summary"]);
    let text = lazyrun.ok(&["why", image]);
    for part in ["snapshot once of containerd", "data/big.bin", "fault layer 1 span"] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }

    // Another start is another one, and both outlive the daemon.
    run(&containerd, image, &["true"]);
    let list = || lazyrun.ok(&["why", "--list", "--format", "{{.Number}} {{.What}}", image]);
    assert_eq!(list(), "1 (snapshot) once\n2 (snapshot) once\n");
    // Without those that are still being written.
    let is_whole = |entry: &fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
    let starts = || {
        let entries = fs::read_dir(lazyrun.root().join("starts")).into_iter().flatten().flatten();
        entries.filter(is_whole).count()
    };
    wait_for("both to be kept", Duration::from_secs(20), || (starts() == 2).then_some(()));
    snapshotter.kill_daemon();
    assert_eq!(list(), "1 (snapshot) once\n2 (snapshot) once\n");
    assert!(lazyrun.ok(&["why", "-n", "2", image]).contains("data/big.bin"));
}

#[test]
fn without_an_index_each_layer_is_streamed_once() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    assert_eq!(run(&containerd, &image, &["sha256sum", "/data/big.bin"])[..64], sha256(&big()));
    assert_eq!(requests(&fixture.registry, &fixture), [1, 1, 1]);
    assert_eq!(layers_of_containerd(&containerd, &fixture), Vec::<String>::new());
    // Real blocks: the layers are here now.
    let usage = containerd.output(["snapshots", "--snapshotter", PROXY, "usage", "-b"]);
    let bytes = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    let total: u64 = usage.lines().filter_map(bytes).sum();
    assert!(total > big().len() as u64 && total < 2 * big().len() as u64, "{usage}");

    // A second container reads what is here, with the registry gone.
    drop(fixture);
    assert_eq!(run(&containerd, &image, &["hello"]), "hello from a script\n");
    // What removal frees is freed, all of it.
    containerd.remove(&image);
    assert_eq!(snapshots(&containerd), Vec::<String>::new());
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
    for dir in ["layers", "views"] {
        let left: Vec<_> = fs::read_dir(snapshotter.lazyrun.root().join(dir)).unwrap().flatten().collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
}

#[test]
fn the_tree_is_that_of_overlayfs() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, mut containerd) = (fixture.image(), snapshotter.containerd());
    let (theirs, ours) = (snapshotter.lazyrun.scratch("theirs"), snapshotter.lazyrun.scratch("ours"));
    pull(&containerd, &image);
    let top = containerd.top_snapshot();
    containerd.mount_snapshot("view", "viewed", &top, &ours);
    let actual = scan(&ours);
    assert!(fs::write(ours.join("data/new"), "x").is_err(), "a view can be written to");
    try_pull(&containerd, "overlayfs", &image).expect("pull by overlayfs");
    containerd.mount(&image, &theirs);
    let expected = scan(&theirs);
    assert!(expected.len() > 350, "only {} entries", expected.len());
    assert_equal(&expected, &actual);
}

#[test]
fn plain_ctr_unpacks_as_ever() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    // From version 2 on only so is it the client that pulls.
    let local: &[&str] = if version() >= (2, 0) { &["--local"] } else { &[] };
    let pull = ["images", "pull", "--plain-http", "--snapshotter", PROXY];
    containerd.run(pull.iter().chain(local).copied().chain([image.as_str()]));
    assert_eq!(layers_of_containerd(&containerd, &fixture).len(), 3);
    assert_eq!(run(&containerd, &image, &["cat", "/data/first"]), "replaced\n");
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
}

#[test]
fn what_is_built_stands_on_the_image() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, mut containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    let top = containerd.top_snapshot();
    let dir = snapshotter.lazyrun.scratch("built");
    let unmount = || nix::mount::umount(&dir).expect("unmount the snapshot");
    let ctr = ["snapshots", "--snapshotter", PROXY];
    containerd.mount_snapshot("prepare", "active", &top, &dir);
    fs::write(dir.join("data/last"), "changed\n").unwrap();
    fs::remove_dir_all(dir.join("data/small")).unwrap();
    unmount();
    containerd.run(ctr.into_iter().chain(["commit", "built", "active"]));
    // Nothing is removed that something stands on.
    let refused = containerd.ctr(ctr.into_iter().chain(["rm", &top])).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("child"), "{said}");
    snapshotter.kill_daemon();
    containerd.mount_snapshot("prepare", "again", "built", &dir);
    assert_eq!(fs::read_to_string(dir.join("data/last")).unwrap(), "changed\n");
    assert_eq!(fs::read_to_string(dir.join("data/first")).unwrap(), "replaced\n");
    assert!(!dir.join("data/small").exists());
    unmount();
    containerd.mount_snapshot("view", "viewed", "built", &dir);
    assert_eq!(fs::read_to_string(dir.join("data/last")).unwrap(), "changed\n");
    assert_eq!(fs::write(dir.join("x"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
    unmount();
    assert_eq!(snapshotter.mounts().len(), 1, "one view below all of them");
    for key in ["viewed", "again", "built"] {
        containerd.run(ctr.into_iter().chain(["rm", key]));
    }
    // containerd's garbage collector comes with the image's removal.
    containerd.remove(&image);
    assert_eq!(snapshots(&containerd), Vec::<String>::new());
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
}

#[test]
fn a_container_outlives_the_daemon_and_containerd() {
    let (fixture, snapshotter) = (Fixture::shaped(SLOW), Snapshotter::start());
    let image = fixture.image();
    let mut containerd = snapshotter.containerd();
    // An index and no bytes: what the container reads has to come while all around it dies.
    pull(&containerd, &image);
    assert_eq!(run(&containerd, &image, &["true"]), "");
    snapshotter.lazyrun.ok(&["cache", "drop"]);
    containerd.run(["run", "--detach", "--snapshotter", PROXY, &image, "long", "sleep", "600"]);
    let exec = |containerd: &Containerd, id: &str, path: &str| {
        containerd.output(["task", "exec", "--exec-id", id, "long", "sha256sum", path])[..64].to_owned()
    };
    snapshotter.kill_daemon();
    assert_eq!(exec(&containerd, "a", "/data/last"), sha256(b"behind the big file\n"));
    containerd.kill_and_restart();
    assert_eq!(exec(&containerd, "b", "/data/big.bin"), sha256(&big()));
    assert_eq!(snapshots(&containerd).len(), 4);
    snapshotter.kill_daemon();
    assert_eq!(run(&containerd, &image, &["cat", "/data/first"]), "replaced\n");
    // Removed while it is mounted: the container goes on, the directory is gone.
    containerd.run(["snapshots", "--snapshotter", PROXY, "rm", "long"]);
    assert_eq!(exec(&containerd, "c", "/data/first"), sha256(b"replaced\n"));
    containerd.run(["task", "kill", "--signal", "SIGKILL", "long"]);
    wait_for("the container to end", Duration::from_secs(30), || {
        containerd.ctr(["task", "rm", "long"]).output().ok().filter(|o| o.status.success())
    });
    containerd.run(["containers", "rm", "long"]);
    containerd.remove(&image);
    assert_eq!(snapshots(&containerd), Vec::<String>::new());
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
}

#[test]
fn a_crashed_node_starts_again_without_the_registry() {
    let (fixture, mut snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, mut containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    containerd.run(["run", "--detach", "--snapshotter", PROXY, &image, "long", "sleep", "600"]);
    // Everything at once; the mounts in the table lead nowhere now, as after a reboot there are none.
    snapshotter.kill_all_and_restart();
    containerd.kill_and_restart();
    drop(fixture);
    // containerd 1.7 answers before it has found the tasks of an earlier one again, and may clean one up itself.
    wait_for("the container to end", Duration::from_secs(30), || {
        let _ = containerd.ctr(["task", "kill", "--signal", "SIGKILL", "long"]).output();
        let _ = containerd.ctr(["task", "rm", "long"]).output();
        let listed = containerd.ctr(["task", "ls", "-q"]).output().ok();
        listed.filter(|o| o.status.success() && o.stdout.is_empty())
    });
    assert_eq!(run(&containerd, &image, &["cat", "/data/last"]), "behind the big file\n");
    // The old container's snapshot has its view again.
    containerd.run(["task", "start", "--detach", "long"]);
    let sum = containerd.output(["task", "exec", "--exec-id", "a", "long", "sha256sum", "/data/big.bin"]);
    assert_eq!(sum[..64], sha256(&big()));
    containerd.run(["task", "kill", "--signal", "SIGKILL", "long"]);
    wait_for("the container to end", Duration::from_secs(30), || {
        containerd.ctr(["task", "rm", "long"]).output().ok().filter(|o| o.status.success())
    });
    containerd.run(["containers", "rm", "long"]);
}

#[test]
fn a_containerd_that_cannot_see_the_mounts_is_told() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let unshared = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "containerd"]);
        command
    };
    let containerd = Containerd::with_snapshotter_as(unshared, snapshotter.socket());
    pull(&containerd, &fixture.image());
    let args = ["run", "--rm", "--snapshotter", PROXY, &fixture.image(), "once", "true"];
    let output = containerd.ctr(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("mount namespace"), "{said}");
    assert!(said.contains("rshared"), "it says what to do: {said}");
}

#[test]
fn it_ends_cleanly_on_signals() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
        let containerd = snapshotter.containerd();
        pull(&containerd, &fixture.image());
        let ours = snapshotter.lazyrun.scratch("ours");
        let mut containerd = containerd;
        let top = containerd.top_snapshot();
        containerd.mount_snapshot("view", "viewed", &top, &ours);
        assert_eq!(snapshotter.mounts().len(), 1);
        let root = snapshotter.lazyrun.root().to_owned();
        let (code, _lazyrun, socket) = snapshotter.end(signal);
        assert_eq!((code, socket.exists()), (Some(0), false));
        let run = lazyrun::paths::Paths::new(&root).expect("paths").run().to_owned();
        assert!(!run.exists(), "{} is left", run.display());
        assert_eq!(mounts_below(&root), Vec::<String>::new());
        // What the test itself has mounted goes before the instance is searched for leftovers.
        drop(containerd);
    }
}

/// Starts the snapshotter as systemd does, by a shell that becomes it.
fn by_systemd(lazyrun: &Lazyrun, listener: &UnixListener, notify: &Path) -> Server {
    let mut command = Command::new("sh");
    let script = "export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$0\" --root \"$1\" snapshotter";
    command.args(["-c", script, EXE]).arg(lazyrun.root()).env("NOTIFY_SOCKET", notify);
    // Descriptor 3 is where systemd puts the first socket.
    fds::place(&mut command, &[(listener.as_fd(), 3)]).expect("place the socket");
    Server::start(&mut command, &lazyrun.scratch("log").join("snapshotter"))
}

#[test]
fn systemd_is_told_and_may_open_the_socket() {
    let lazyrun = Lazyrun::new();
    let dir = lazyrun.scratch("run");
    let notify = UnixDatagram::bind(dir.join("notify")).expect("bind");
    notify.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let listener = UnixListener::bind(dir.join("s")).expect("bind");
    let (path, socket) = (dir.join("notify"), dir.join("s"));
    let mut server = by_systemd(&lazyrun, &listener, &path);
    let told = |word: &str| {
        let mut said = [0; 256];
        let len = notify.recv(&mut said).expect("to be told");
        std::str::from_utf8(&said[..len]).unwrap().trim() == word
    };
    // Descriptors to be stored come before that.
    while !told("READY=1") {}
    server.assert_alive();
    let containerd = Containerd::with_snapshotter(&socket);
    assert_eq!(snapshots(&containerd), Vec::<String>::new());
    drop(containerd);
    drop(server);
    assert!(socket.exists(), "systemd's socket is not ours to delete");
}

#[test]
fn a_second_one_is_refused() {
    let snapshotter = Snapshotter::start();
    let root = snapshotter.lazyrun.root().to_str().unwrap().to_owned();
    let socket = snapshotter.socket().to_str().unwrap().to_owned();
    let other = Lazyrun::new();
    let why = other.fails(125, &["snapshotter", "--address", &socket]);
    assert!(why.contains(&socket) && why.contains("somebody else"), "{why}");
    let elsewhere = format!("{socket}2");
    let output =
        Command::new(EXE).args(["--root", &root, "snapshotter", "--address", &elsewhere]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(125) && said.contains("already has"), "{said}");
    assert!(!Path::new(&elsewhere).exists());
}
