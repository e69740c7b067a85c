//! Our bundles under runc, runc's bundles under us.

use super::*;

const LOOK: &str = "id; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; pwd; env | grep -v SHLVL; hostname; \
    mount | grep -v cgroup | grep -v ' / ' | while read a on b c d e; do echo $b $d $e; done";

fn require_runc() {
    require_root();
    assert!(Command::new("runc").arg("--version").output().is_ok(), "this test needs runc");
}

/// Lines in an order that does not depend on the runtime.
fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(|l| l.replace(",inode64", "")).collect();
    lines.sort();
    lines
}

fn under_runc(c: &mut Container, script: &str) -> (i32, String) {
    c.config.runtime = Some("/usr/sbin/runc".into());
    let _ = script;
    c.started();
    let record = c.ended();
    (record.exit_code, c.output().0)
}

#[test]
fn the_same_bundle_looks_the_same_under_runc() {
    require_runc();
    let run = || RunOptions { user: Some("web".into()), workdir: Some("/tmp".into()), ..options() };
    let (code, ours, err) = Container::new().sh(LOOK, run()).run();
    assert_eq!(code, 0, "{err}");
    let (code, theirs) = under_runc(&mut Container::new().sh(LOOK, run()), LOOK);
    assert_eq!(code, 0);
    // Options differ in their order, and what covers masked files may be any null device: compare what is
    // mounted where.
    let what = |text: &str| -> Vec<String> {
        let shorten = |l: String| match l.split(' ').next() {
            Some(path) if path.starts_with("/proc/") => path.to_owned(),
            Some(path) if path.starts_with('/') => l.split(' ').take(2).collect::<Vec<_>>().join(" "),
            _ => l,
        };
        sorted(text).into_iter().map(shorten).collect()
    };
    assert_eq!(what(&ours), what(&theirs));
}

#[test]
fn a_bundle_of_runcs_own_making_runs() {
    require_runc();
    let mut c = Container::new();
    let made = Command::new("runc").arg("spec").current_dir(c.dir()).status().unwrap();
    assert!(made.success());
    let path = c.dir().join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["process"]["args"] = serde_json::json!(["sh", "-c", "hostname; id -u; touch /x"]);
    spec["process"]["terminal"] = serde_json::json!(false);
    std::fs::write(&path, spec.to_string()).unwrap();
    c.started();
    assert_eq!(c.ended().exit_code, 1);
    assert_eq!(c.output().0, "runc\n0\n");
}

#[test]
fn runc_as_runtime_serves_exec_terminal_and_errors() {
    require_runc();
    let mut c = Container::new().sh("echo up; sleep 1000", options());
    c.config.runtime = Some("/usr/sbin/runc".into());
    c.started();
    assert!(eventually(|| c.output().0 == "up\n"));
    assert_eq!(c.exec_sh("hostname; exit 4"), (Ending::Exited(4), "box\n".to_owned()));
    let tty = ExecProcess { args: vec!["tty".into()], terminal: true, ..Default::default() };
    assert!(c.exec(&tty, None).unwrap().1.starts_with("/dev/pts/"));
    client::kill(&c.config.socket, libc::SIGKILL).unwrap();
    assert_eq!(c.ended().exit_code, 137);
    let mut c = Container::new().spec(&RunOptions { args: vec!["nope".into()], ..options() });
    c.config.runtime = Some("/usr/sbin/runc".into());
    let (error, code) = c.refused();
    assert_eq!(code, 127, "{error}");
}
