//! Control groups on fake trees; the real ones are exercised by the containers in `root_tests`.

use super::*;
use oci_spec::runtime::LinuxDeviceCgroup;

const HYBRID: &str = "\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
31 24 0:27 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory
32 24 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
33 24 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
34 24 0:27 / /elsewhere/memory rw,relatime - cgroup cgroup rw,memory
";

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

#[test]
fn hybrid_mounts_are_understood_once_each() {
    let found = Hierarchies::parse(HYBRID);
    let names: Vec<_> = found.v1.iter().map(|h| h.controllers.join(",")).collect();
    assert_eq!(names, ["cpu,cpuacct", "memory", "name=systemd"]);
    assert_eq!(found.v2.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
    assert!(!found.is_unified());
    assert!(Hierarchies::parse("1 2 0:1 / /c rw - cgroup2 cgroup2 rw\n").is_unified());
}

#[test]
fn paths_that_climb_are_refused() {
    for bad in ["", "/", "/a/../b", "a//b", "./a"] {
        assert!(Cgroup::new(Hierarchies::default(), bad).is_err(), "{bad}");
    }
}

/// A v2 hierarchy in a plain directory: mkdir works, control files are ordinary files.
fn fake_v2(controllers: &str) -> (tempfile::TempDir, Cgroup) {
    let tmp = tempfile::tempdir().unwrap();
    std::fs::write(tmp.path().join("cgroup.controllers"), controllers).unwrap();
    std::fs::write(tmp.path().join("cgroup.subtree_control"), "cpu").unwrap();
    std::fs::create_dir_all(tmp.path().join("lazyrun/x")).unwrap();
    std::fs::write(tmp.path().join("lazyrun/x/cgroup.controllers"), controllers).unwrap();
    std::fs::write(tmp.path().join("lazyrun/x/memory.swap.max"), "").unwrap();
    let hs = Hierarchies { v1: vec![], v2: Some(tmp.path().to_path_buf()) };
    (tmp, Cgroup::new(hs, "/lazyrun/x").unwrap())
}

#[test]
fn v2_limits_are_translated() {
    let (tmp, group) = fake_v2("cpu memory pids io cpuset");
    let r = resources(
        r#"{"memory":{"limit":1000,"swap":3000},"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0"},
            "pids":{"limit":7},"blockIO":{"weight":1000}}"#,
    );
    group.create(Some(&r)).unwrap();
    let read = |f: &str| std::fs::read_to_string(tmp.path().join("lazyrun/x").join(f)).unwrap();
    assert_eq!(read("memory.max"), "1000");
    assert_eq!(read("memory.swap.max"), "2000");
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("cpu.weight"), "39");
    assert_eq!(read("cpuset.cpus"), "0");
    assert_eq!(read("pids.max"), "7");
    assert_eq!(read("io.weight"), "10000");
    // The last controller handed down (a plain file keeps only the last write).
    assert_eq!(std::fs::read_to_string(tmp.path().join("cgroup.subtree_control")).unwrap(), "+cpuset");
}

#[test]
fn a_limit_without_its_controller_is_an_error() {
    let (_tmp, group) = fake_v2("cpu");
    let error = group.create(Some(&resources(r#"{"pids":{"limit":7}}"#))).unwrap_err();
    assert!(error.to_string().contains("no pids cgroup controller"), "{error}");
    let v1 = Cgroup::new(Hierarchies::default(), "x").unwrap();
    let error = v1.create(Some(&resources(r#"{"memory":{"limit":7}}"#))).unwrap_err();
    assert!(error.to_string().contains("no memory cgroup controller"), "{error}");
}

#[test]
fn device_rules_become_v1_lines_with_defaults_after_them() {
    let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(
        r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]"#,
    )
    .unwrap();
    let lines: Vec<_> = devices::with_defaults(&rules).iter().map(devices::Rule::v1_line).collect();
    assert_eq!(lines[..4], ["a", "c 10:229 rw", "c *:* m", "b *:* m"]);
    assert!(lines.contains(&"c 1:3 rwm".to_owned()));
    let open: Vec<LinuxDeviceCgroup> = serde_json::from_str(r#"[{"allow":true,"access":"rwm"}]"#).unwrap();
    assert_eq!(devices::with_defaults(&open).len(), 1);
}
