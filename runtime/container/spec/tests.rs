//! Specs as docker would make them.

use super::*;

fn image(config: &str) -> ImageConfiguration {
    let json = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{config},"rootfs":{{"type":"layers","diff_ids":[]}},"history":[]}}"#
    );
    serde_json::from_str(&json).unwrap()
}

fn spec(config: &str, run: &RunOptions) -> Result<Spec> {
    let paths =
        BundlePaths { rootfs: "rootfs".into(), cgroup: Some("/lazyrun/x".into()), ..Default::default() };
    generate(&image(config), run, &paths)
}

fn args(config: &str, run: &RunOptions) -> Vec<String> {
    spec(config, run).unwrap().process().as_ref().unwrap().args().clone().unwrap()
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

const IMAGE: &str = r#"{"Entrypoint":["/ep"],"Cmd":["a","b"],"Env":["PATH=/bin","X=1"],"User":"web",
    "WorkingDir":"/srv","StopSignal":"SIGQUIT","ExposedPorts":{"80/tcp":{}},"Volumes":{"/data":{}}}"#;

#[test]
fn commands_combine_as_dockers() {
    let run = |entrypoint: Option<&[&str]>, a: &[&str]| RunOptions {
        entrypoint: entrypoint.map(strings),
        args: strings(a),
        ..RunOptions::default()
    };
    assert_eq!(args(IMAGE, &run(None, &[])), ["/ep", "a", "b"]);
    assert_eq!(args(IMAGE, &run(None, &["c"])), ["/ep", "c"]);
    assert_eq!(args(IMAGE, &run(Some(&["/x"]), &[])), ["/x"]);
    assert_eq!(args(IMAGE, &run(Some(&[""]), &["c"])), ["c"]);
    assert!(spec("{}", &RunOptions::default()).unwrap_err().to_string().contains("no command"));
}

#[test]
fn environment_user_and_annotations() {
    let run = RunOptions {
        env: strings(&["X=2", "Y=3"]),
        tty: true,
        hostname: Some("h".into()),
        ..Default::default()
    };
    let spec = spec(IMAGE, &run).unwrap();
    let process = spec.process().as_ref().unwrap();
    let env = process.env().as_ref().unwrap();
    assert_eq!(*env, ["PATH=/bin", "HOSTNAME=h", "TERM=xterm", "X=2", "Y=3"]);
    assert_eq!(process.cwd(), std::path::Path::new("/srv"));
    let notes = spec.annotations().as_ref().unwrap();
    assert_eq!(notes[user::USER_ANNOTATION], "web");
    assert_eq!(notes["org.opencontainers.image.stopSignal"], "SIGQUIT");
    assert_eq!(notes["org.opencontainers.image.exposedPorts"], "80/tcp");
    assert_eq!(notes["org.lazyrun.image.volumes"], "/data");
}

#[test]
fn the_sandbox_is_closed_by_default_and_open_when_privileged() {
    let plain = spec(IMAGE, &RunOptions::default()).unwrap();
    let linux = plain.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_some());
    assert!(linux.masked_paths().as_ref().unwrap().contains(&"/proc/kcore".to_owned()));
    let caps = plain.process().as_ref().unwrap().capabilities().clone().unwrap();
    assert_eq!(caps.bounding().as_ref().unwrap().len(), 14);
    assert!(caps.inheritable().as_ref().unwrap().is_empty());
    let open = spec(IMAGE, &RunOptions { privileged: true, ..Default::default() }).unwrap();
    let linux = open.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_none() && linux.masked_paths().as_ref().is_none_or(Vec::is_empty));
}

#[test]
fn limits_and_what_they_refuse() {
    let run =
        RunOptions { memory: Some(64 << 20), cpus: Some(1.5), pids_limit: Some(10), ..Default::default() };
    let json = serde_json::to_value(spec(IMAGE, &run).unwrap()).unwrap();
    let r = &json["linux"]["resources"];
    assert_eq!(r["memory"]["swap"], 128 << 20);
    assert_eq!(r["cpu"]["quota"], 150_000);
    assert_eq!(r["pids"]["limit"], 10);
    for bad in [
        RunOptions { memory: Some(1), ..Default::default() },
        RunOptions { cpus: Some(f64::NAN), ..Default::default() },
        RunOptions { workdir: Some("rel".into()), ..Default::default() },
        RunOptions { hostname: Some("a b".into()), ..Default::default() },
        RunOptions { cap_add: strings(&["NOPE"]), ..Default::default() },
        RunOptions { tmpfs: vec![("/..".into(), vec![])], ..Default::default() },
    ] {
        assert!(spec(IMAGE, &bad).is_err(), "{bad:?}");
    }
}

#[test]
fn options_survive_json() {
    let run = RunOptions { cpus: Some(0.5), network: Network::Host, ..Default::default() };
    let json = serde_json::to_string(&run).unwrap();
    assert_eq!(serde_json::from_str::<RunOptions>(&json).unwrap(), run);
    assert_eq!(serde_json::from_str::<RunOptions>("{}").unwrap(), RunOptions::default());
}
