//! `lazyrun config check` beside a real containerd, and its reading of containerd's configuration against containerd's
//! own.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use lazyrun::preflight::ContainerdConfig;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::containerd::Containerd;
use crate::support::fixture::Fixture;
use crate::support::snapshotter::Snapshotter;

/// Runs the check as an administrator does who has this directory of credentials.
fn check(snapshotter: &Snapshotter, containerd: &Path, docker: &Path, more: &[&str]) -> Output {
    let socket = snapshotter.socket().to_str().unwrap();
    let mut args = vec!["config", "check", "--containerd-config", containerd.to_str().unwrap()];
    args.extend(["--address", socket]);
    args.extend(more);
    snapshotter.lazyrun.command(&args).env("DOCKER_CONFIG", docker).output().unwrap()
}

fn rows(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {output:?}")))
        .collect()
}

/// The levels of the rows about something.
fn levels<'a>(rows: &'a [Value], what: &str) -> Vec<&'a str> {
    rows.iter().filter(|row| row["what"] == what).filter_map(|row| row["level"].as_str()).collect()
}

#[test]
fn a_node_that_is_right_and_what_goes_wrong_with_it() {
    let fixture = Fixture::new();
    let docker = tempfile::tempdir().unwrap();
    let registry = fixture.registry.addr().to_string();
    // ann:s3cret
    let login = format!(r#"{{"auths": {{"{registry}": {{"auth": "YW5uOnMzY3JldA=="}}}}}}"#);
    fs::write(docker.path().join("config.json"), login).unwrap();
    let snapshotter = Snapshotter::with_env(&[("DOCKER_CONFIG", docker.path())]);
    let containerd = snapshotter.containerd();
    let config = containerd.config();

    let image = fixture.image();
    let output = check(&snapshotter, &config, docker.path(), &["--format", "json", "--image", &image]);
    let found = rows(&output);
    assert_eq!(output.status.code(), Some(0), "{found:#?}");
    for what in [
        "containerd",
        "containerd's configuration",
        "snapshotter in containerd",
        "Kubernetes (CRI)",
        "socket",
        "mount propagation",
        "environment",
    ] {
        assert_eq!(levels(&found, what), ["ok"], "{what}: {found:#?}");
    }
    let about_image = found.iter().find(|row| row["what"] == format!("image {image}").as_str()).unwrap();
    let why = about_image["why"].as_str().unwrap();
    assert!(why.contains("password of ann from") && why.contains("config.json"), "{why}");
    let text = check(&snapshotter, &config, docker.path(), &["--image", &image]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("s3cret") && !text.contains("YW5u"), "{text}");

    // A differ keeps this old containerd from starting, another home has other credentials, a file is broken.
    let differ = docker.path().join("differ.toml");
    let socket = snapshotter.socket();
    let entry = format!("[proxy_plugins.d]\ntype = \"diff\"\naddress = {socket:?}\n");
    fs::write(&differ, format!("version = 2\nimports = [{config:?}]\n{entry}")).unwrap();
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("config.json"), "{").unwrap();
    let output = check(&snapshotter, &differ, other.path(), &["--format", "json"]);
    let found = rows(&output);
    assert_eq!(output.status.code(), Some(1), "{found:#?}");
    assert_eq!(levels(&found, "differ for commits"), ["error"], "{found:#?}");
    assert_eq!(levels(&found, "environment"), ["warning"], "{found:#?}");
    assert!(levels(&found, "credentials").contains(&"error"), "{found:#?}");

    // Whoever has a mount namespace of its own is told before a container fails in it.
    let unshared = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "containerd"]);
        command
    };
    let apart = Containerd::with_snapshotter_as(unshared, snapshotter.socket());
    let found = rows(&check(&snapshotter, &apart.config(), docker.path(), &["--format", "json"]));
    assert_eq!(levels(&found, "mount propagation"), ["error"], "{found:#?}");
    drop(apart);

    // Without the snapshotter nobody answers.
    let socket = snapshotter.socket().to_owned();
    let (_, lazyrun, _) = snapshotter.end(Signal::SIGTERM);
    let config = config.to_str().unwrap();
    let args = ["config", "check", "--containerd-config", config, "--address", socket.to_str().unwrap()];
    let output = lazyrun.command(&args).env("DOCKER_CONFIG", docker.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("does not exist") && text.contains("1 errors"), "{text}");
}

#[test]
fn imports_are_read_as_containerd_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("conf.d")).unwrap();
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let proxy = |name: &str, address: &str| {
        format!("[proxy_plugins.{name}]\ntype = \"snapshot\"\naddress = \"{address}\"\n")
    };
    let main = format!(
        "version = 2\nimports = [{:?}, \"last.toml\"]\n[{cri}.containerd]\nsnapshotter = \"lazyrun\"\n\
         disable_snapshot_annotations = false\n{}",
        at("conf.d/*.toml"),
        proxy("lazyrun", "/first"),
    );
    fs::write(at("config.toml"), main).unwrap();
    fs::write(at("conf.d/1.toml"), format!("version = 2\n{}", proxy("lazyrun", "/second"))).unwrap();
    fs::write(at("conf.d/2.toml"), format!("[{cri}.registry]\nconfig_path = \"/certs\"\n")).unwrap();
    fs::write(at("last.toml"), proxy("other", "/third")).unwrap();
    let dumped = Command::new("containerd")
        .arg("--config")
        .arg(at("config.toml"))
        .args(["config", "dump"])
        .output()
        .unwrap();
    assert!(dumped.status.success(), "{dumped:?}");
    // It names the files that it was put together from.
    let text = String::from_utf8(dumped.stdout).unwrap();
    let text: Vec<&str> = text.lines().filter(|line| !line.starts_with("imports")).collect();
    fs::write(at("dumped.toml"), text.join("\n")).unwrap();
    let (ours, theirs) = (
        ContainerdConfig::load(&at("config.toml")).unwrap(),
        ContainerdConfig::load(&at("dumped.toml")).unwrap(),
    );
    let cri = ["plugins", "io.containerd.grpc.v1.cri"];
    for path in [
        &["proxy_plugins", "lazyrun", "address"][..],
        &["proxy_plugins", "other", "address"],
        &[cri[0], cri[1], "registry", "config_path"],
    ] {
        assert!(ours.get(path).is_some(), "{path:?}");
        assert_eq!(ours.get(path), theirs.get(path), "{path:?}");
    }
    // The section in the drop-in took the place of the first one: containerd fills it with its defaults.
    let snapshotter = [cri[0], cri[1], "containerd", "snapshotter"];
    assert_eq!(ours.get(&snapshotter), None);
    assert_eq!(theirs.get(&snapshotter).and_then(|value| value.as_str()), Some("overlayfs"));
}
