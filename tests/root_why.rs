//! Where the time of a start went, and what the log tells and does not tell.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazyrun::demo::shaper::Shape;
use serde_json::Value;

use crate::support::fixture::{Fixture, READ_MIDDLE, TAG, write};
use crate::support::indexed::Indexed;
use crate::support::instance::Lazyrun;
use crate::support::server::Server;
use crate::support::wait_for;

const SLOW: Shape = Shape { mbit: 40.0, rtt_ms: 10.0 };

fn why(lazyrun: &Lazyrun, name: &str) -> Value {
    serde_json::from_str(&lazyrun.ok(&["why", "--format", "json", name])).expect("JSON")
}

/// The timeline, once the container's end is in it.
fn ended(lazyrun: &Lazyrun, name: &str) -> Value {
    wait_for("the end of the container to be recorded", Duration::from_secs(20), || {
        let told = why(lazyrun, name);
        (told["start"]["recording"] == false && told["start"]["exit"].is_object()).then_some(told)
    })
}

fn list<'a>(value: &'a Value, key: &str) -> &'a Vec<Value> {
    value[key].as_array().unwrap_or_else(|| panic!("no list {key} in {value:#}"))
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value:#}"))
}

#[test]
fn a_start_tells_where_its_time_went() {
    let indexed = Indexed::behind(SLOW);
    let (shaper, image) = (&indexed.shaper, indexed.image.clone());
    let lazyrun = Lazyrun::new();
    let unknown = lazyrun.fails(1, &["why", &image]);
    assert!(unknown.contains("no such container or image"), "{unknown}");
    let mut args = vec!["run", "--rm", "--name", "first", "--network", "none", &image];
    args.extend(READ_MIDDLE);
    lazyrun.ok(&args);

    // By the name of a container that is gone, or by its image.
    let told = ended(&lazyrun, "first");
    let (start, summary) = (&told["start"], &told["summary"]);
    assert_eq!(ended(&lazyrun, &image)["start"]["began"], start["began"]);
    assert_eq!((start["image"].as_str(), start["plan"].as_str()), (Some(image.as_str()), Some("erofs")));
    assert_eq!((&start["exit"]["code"], &start["error"]), (&Value::from(0), &Value::Null));

    let phases = list(start, "phases");
    let names: Vec<&str> = phases.iter().filter_map(|phase| phase["name"].as_str()).collect();
    assert_eq!(names, ["resolve", "index", "stream", "view", "network", "bundle", "rootfs", "shim", "run"]);
    assert!(phases.windows(2).all(|pair| pair[0]["end_ms"] == pair[1]["start_ms"]), "{phases:#?}");
    let total = number(summary, "total_ms");
    let parts: f64 = list(summary, "parts").iter().map(|part| number(part, "ms")).sum();
    assert!((parts - total).abs() < total * 0.01, "the parts make {parts} of {total} ms");
    assert_eq!(number(&phases[8], "end_ms"), total);
    let run = |what: &str| list(summary, "parts").iter().any(|part| part["what"] == what);
    assert!(run("manifest and config: network") && run("reads: network"), "{summary:#}");

    let layers = list(start, "layers");
    assert!(layers.iter().all(|l| l["index"] == "lazyrun index (repository)"), "{layers:#?}");
    assert_eq!((layers.len(), &start["profile"]), (3, &Value::from("none")));
    assert!(list(summary, "not_lazy").iter().all(|reason| reason.as_str().unwrap().contains("profile")));

    let reads = list(start, "reads");
    let of_big: Vec<&Value> = reads.iter().filter(|read| read["path"] == "data/big.bin").collect();
    assert!(!of_big.is_empty() && reads.iter().all(|read| read["path"] != "-"), "{reads:#?}");
    let id = start["what"]["container"]["id"].as_str().expect("an id");
    for read in &of_big {
        assert_eq!((read["layer"].as_u64(), read["ok"].as_bool()), (Some(1), Some(true)));
        assert_eq!(read["container"].as_str(), Some(id));
    }
    // One of them had to send a request; others may have found it under way.
    assert!(
        of_big.iter().any(|read| number(read, "ms") >= 9.0),
        "all shorter than a round trip: {of_big:#?}"
    );

    let requests = list(start, "requests");
    let of = |class: &str, kind: &str| -> Vec<&Value> {
        requests.iter().filter(|r| r["class"] == class && r["kind"] == kind).collect()
    };
    for kind in ["manifest", "config", "referrers", "blob"] {
        assert!(!of("metadata", kind).is_empty(), "no {kind} in {requests:#?}");
    }
    let faults = of("fault", "layer");
    assert!(!faults.is_empty(), "{requests:#?}");
    for fault in faults.iter().filter(|fault| fault["status"] == 206) {
        let (first, end) = (fault["spans"][0].as_u64(), fault["spans"][1].as_u64());
        assert!(first < end && first.is_some() && fault["host"] == shaper.addr().to_string(), "{fault}");
        let range = fault["range"][1].as_u64().unwrap() - fault["range"][0].as_u64().unwrap();
        assert!(fault["bytes"].as_u64().is_some_and(|bytes| bytes <= range), "{fault}");
        let times = ["start_ms", "sent_ms", "first_byte_ms", "end_ms"].map(|key| number(fault, key));
        assert!(times.is_sorted() && times[2] - times[1] >= 9.0, "{fault}");
    }

    // For people.
    let text = lazyrun.ok(&["why", &image]);
    for part in
        ["where the time went", "slowest reads", "data/big.bin", "container first", "fault layer 1 span"]
    {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert!(text.is_ascii() && text.lines().all(|line| line.len() <= 160), "{text}");
    assert!(lazyrun.ok(&["why", "--format", "{{.Start.What.Container.Name}}", &image]) == "first\n");

    // Another start is another one; the first is number 2 then, and both outlive the daemon.
    lazyrun.ok(&["run", "--rm", "--name", "second", "--network", "none", &image, "true"]);
    ended(&lazyrun, "second");
    let old = lazyrun.daemon_pid().expect("a daemon");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old), nix::sys::signal::Signal::SIGKILL).expect("kill");
    let lines = lazyrun.ok(&["why", "--list", "--format", "{{.Number}} {{.What}}", &image]);
    assert_eq!(lines, "1 second\n2 first\n");
    let second: Value =
        serde_json::from_str(&lazyrun.ok(&["why", "-n", "2", "--format", "json", &image])).expect("JSON");
    assert_eq!(second["start"]["reads"], start["reads"]);
    assert!(lazyrun.fails(1, &["why", "-n", "3", &image]).contains("number 3"));
    lazyrun.ok(&["rmi", &image]);
    lazyrun.fails(1, &["why", "first"]);
}

#[test]
fn what_is_streamed_and_what_fails_is_told() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "--rm", "--network", "none", &fixture.image(), "true"]);
    let told = ended(&lazyrun, &fixture.image());
    let reasons = list(&told["summary"], "not_lazy");
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons.iter().all(|reason| reason.as_str().unwrap().contains("no index")), "{reasons:?}");
    let stream = list(&told["summary"], "bytes").iter().find(|of| of["class"] == "stream").expect("streams");
    assert_eq!(stream["bytes"].as_u64(), Some(fixture.compressed()));

    // A tag that is not there.
    let other = fixture.registry.reference("fixture", "none");
    lazyrun.fails(125, &["run", "--rm", &other, "true"]);
    let told = wait_for("the failure to be kept", Duration::from_secs(20), || {
        let finished = lazyrun.run(&["why", "--format", "json", &other]);
        (finished.code == Some(0)).then(|| serde_json::from_str::<Value>(&finished.stdout).expect("JSON"))
    });
    assert!(told["start"]["error"].as_str().expect("an error").contains("none"), "{told:#}");
    assert!(list(&told["start"], "requests").iter().any(|request| request["status"] == 404));
    let text = lazyrun.ok(&["why", &other]);
    assert!(text.contains("failed after"), "{text}");

    // A mount is a start too.
    let dir = lazyrun.scratch("mount");
    lazyrun.ok(&["mount", &fixture.image(), dir.to_str().unwrap()]);
    assert_eq!(why(&lazyrun, &fixture.image())["start"]["what"], "mount");
    lazyrun.ok(&["umount", dir.to_str().unwrap()]);
}

/// A TCP proxy that keeps the beginning of everything that passes in clear text.
struct Tap {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Tap {
    fn before(upstream: SocketAddr) -> Tap {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        let tap = Tap { addr: listener.local_addr().expect("an address"), seen: Arc::default() };
        let seen = Arc::clone(&tap.seen);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(upstream) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().expect("clone"), to.try_clone().expect("clone"));
                    let seen = Arc::clone(&seen);
                    std::thread::spawn(move || pass(from, to, &seen));
                }
            }
        });
        tap
    }

    /// Everything between `start` and one of `ends`.
    fn between(&self, start: &str, ends: &[char]) -> Vec<String> {
        let seen = self.seen.lock().expect("lock");
        let text = String::from_utf8_lossy(&seen);
        let found = text.split(start).skip(1).filter_map(|rest| rest.split(ends).next());
        found.filter(|value| value.len() > 8).map(str::to_owned).collect()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, seen: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        seen.lock().expect("lock").extend_from_slice(&buffer[..len.min(4096)]);
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Files of the instance in which a text occurs; contents of images are left out.
fn files_with(dir: &Path, text: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("list").flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("a type"));
        if kind.is_dir() && path.file_name().is_some_and(|name| name != "layers" && name != "views") {
            files_with(&path, text, found);
        } else if kind.is_file()
            && fs::read(&path).expect("read").windows(text.len()).any(|part| part == text.as_bytes())
        {
            found.push(path.display().to_string());
        }
    }
}

#[test]
fn no_secret_reaches_a_log() {
    let fixture = Fixture::new();
    let (user, password) = ("someone", "correct-horse-battery");
    let dir = tempfile::tempdir().expect("dir");
    let ports = dir.path().join("ports");
    let mut command = Command::new("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tools/evil_registry.py")).arg(fixture.layout());
    command.args(["--quiet", "--port", "0", "--portfile"]).arg(&ports);
    // Tokens and signed URLs that are soon used up, so that they are asked for again.
    let mut faults = vec![
        format!("auth:user={user},pass={password},every=4"),
        "redirect:strict=1,uses=3".to_owned(),
        "status:code=503,on=manifest,first=1".to_owned(),
    ];
    command.args(faults.iter().flat_map(|fault| ["-f", fault]));
    let mut server = Server::start(&mut command, &dir.path().join("log"));
    let port: u16 = wait_for("the registry", Duration::from_secs(30), || {
        server.assert_alive();
        fs::read_to_string(&ports).ok()?.split(' ').next()?.parse().ok()
    });
    let tap = Tap::before(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let image = format!("{}/fixture:{TAG}", tap.addr);

    let lazyrun = Lazyrun::new().with_env("LAZYRUN_LOG", "trace,h2::proto=trace,hyper_util=trace");
    let config = lazyrun.scratch("docker");
    let auth = base64(&format!("{user}:{password}"));
    write(&config.join("config.json"), &format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, tap.addr));
    let lazyrun = lazyrun
        .with_env("DOCKER_CONFIG", config.to_str().expect("UTF-8"))
        .with_env("LAZYRUN_LOG_FORMAT", "json");
    let mut said = vec![lazyrun.ok(&["run", "--rm", "--network", "none", &image, "cat", "/data/last"])];
    lazyrun.ok(&["cache", "drop"]);
    // From now on so slowly that the middle of the big file does not come by itself before it is read.
    faults.push("slow:bps=3000000,on=storage".to_owned());
    let url = format!("http://127.0.0.1:{port}/_evil/faults");
    let list = serde_json::to_string(&faults).expect("JSON");
    let changed = Command::new("curl").args(["-sS", "--fail", "-X", "PUT", "-d", &list, &url]).output();
    assert!(changed.expect("curl is needed: run tests/tools/deps.sh").status.success());
    let mut args = vec!["run", "--rm", "--network", "none", &image];
    args.extend(READ_MIDDLE);
    lazyrun.ok(&args);
    // Something goes wrong, too.
    let other = format!("{}/fixture:none", tap.addr);
    let failed = lazyrun.run(&["run", "--rm", &other, "true"]);
    said.extend([failed.stderr, lazyrun.ok(&["why", "--format", "json", &image]), lazyrun.ok(&["metrics"])]);

    let mut secrets = tap.between("\"token\": \"", &['"']);
    secrets.extend(tap.between("sig=", &['\r', '\n', '&']));
    secrets.extend(tap.between("uthorization: Bearer ", &['\r', '\n']));
    assert!(secrets.len() > 3 && !tap.between("sig=", &['\r']).is_empty(), "tokens and URLs were seen");
    assert!(!tap.between("asic ", &['\r']).is_empty(), "the password was shown");
    secrets.extend([password.to_owned(), auth, "sig=".to_owned(), "Bearer ".to_owned()]);
    for secret in &secrets {
        let mut found = Vec::new();
        files_with(lazyrun.root(), secret, &mut found);
        assert!(found.is_empty(), "{secret:?} is in {found:?}");
        assert!(said.iter().all(|text| !text.contains(secret)), "{secret:?} is in {said:?}");
    }

    // What is to be there is: each line JSON, with the image and the layer of what it is about.
    let log = fs::read_to_string(lazyrun.root().join("daemon.log")).expect("the log");
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    let find = |message: &str| -> Vec<&Value> { lines.iter().filter(|l| l["message"] == message).collect() };
    let repository = image.trim_end_matches(":v1");
    assert!(find("request").iter().any(|l| l["class"] == "fault" && l["image"] == repository));
    assert!(find("request").iter().any(|l| l["status"] == 503 && l["host"] == tap.addr.to_string()));
    let in_span = |line: &&&Value, name: &str| {
        line["spans"].as_array().is_some_and(|spans| spans.iter().any(|span| span["name"] == name))
    };
    assert!(find("span decoded").iter().any(|line| in_span(&line, "fetch")), "decoding names its fetch");
    assert!(find("fault").iter().all(|line| line["layer"].is_string()) && !find("fault").is_empty());
    assert!(find("view built").iter().all(|line| in_span(&line, "start")), "what a start does names it");
    drop(server);
}

fn base64(text: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(text)
}

#[test]
fn the_log_is_cut_into_pieces() {
    let fixture = Fixture::new();
    let lazyrun = Lazyrun::new();
    let log = |name: &str| lazyrun.root().join(name);
    fs::create_dir_all(lazyrun.root()).expect("the root");
    let line = "a line of an earlier daemon\n";
    fs::write(log("daemon.log"), line.repeat((10 << 20) / line.len())).expect("fill the log");
    lazyrun.ok(&["run", "-d", "--name", "one", "--network", "none", &fixture.image(), "sleep", "1000"]);
    let read = |name: &str| fs::read_to_string(log(name)).unwrap_or_default();
    assert!(read("daemon.log.1").starts_with(line) && !read("daemon.log.2").starts_with(line));
    let current = read("daemon.log");
    assert!(current.contains("serving") && !current.contains(line), "{current}");
    assert!(fs::metadata(log("daemon.log.1")).expect("a file").len() <= (10 << 20) + 100);

    // The next daemon writes to the current file, though the keeper began with the old one.
    let old = lazyrun.daemon_pid().expect("a daemon");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old), nix::sys::signal::Signal::SIGKILL).expect("kill");
    wait_for("a new daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|pid| *pid != old));
    assert!(read("daemon.log").starts_with(&current), "what was there stays");
    assert_eq!(read("daemon.log").matches("serving").count(), 2);
    assert!(!read("daemon.log.1").contains("serving"));
    lazyrun.ok(&["rm", "-f", "one"]);
}
