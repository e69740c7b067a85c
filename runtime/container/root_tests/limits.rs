//! Control groups at work.

use super::*;

#[test]
fn the_oom_killer_is_noticed() {
    let run = RunOptions { memory: Some(16 << 20), memory_swap: Some(16 << 20), ..options() };
    let mut c = Container::new().sh("exec tail /dev/zero", run);
    c.started();
    let record = c.ended();
    assert_eq!((record.exit_code, record.oom_killed), (137, true));
}

#[test]
fn the_process_limit_holds() {
    let run = RunOptions { pids_limit: Some(5), ..options() };
    let (_, out, err) =
        Container::new().sh("for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; echo end", run).run();
    assert!(err.contains("fork") || !out.contains("end"), "{out} {err}");
}

#[test]
fn limits_are_set_where_the_kernel_reads_them() {
    let run = RunOptions { memory: Some(64 << 20), cpus: Some(0.5), pids_limit: Some(9), ..options() };
    let script = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max 2>/dev/null \
        || cat memory.max cpu.max pids.max";
    let (_, out, _) = Container::new().sh(script, run).run();
    assert!(["67108864\n50000\n9\n", "67108864\n50000 100000\n9\n"].contains(&out.as_str()), "{out}");
}

#[test]
fn devices_outside_the_list_are_closed() {
    // mknod is allowed, opening what was made is not (1:1 is /dev/mem).
    let c = Container::new();
    let (_, out, err) = c.sh("mknod /tmp/mem c 1 1 2>/dev/null || busybox mknod /tmp/mem c 1 1; dd if=/tmp/mem bs=1 count=1 of=/dev/null && echo opened", options()).run();
    assert_eq!(out, "");
    assert!(err.contains("Operation not permitted"), "{err}");
}

#[test]
fn the_v2_filter_loads_and_filters() {
    require_root();
    let Some(mount) = Hierarchies::detect().unwrap().v2 else { panic!("this test needs a cgroup2 mount") };
    let dir = mount.join(format!("lazyrun-test-devices-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let rules: Vec<oci_spec::runtime::LinuxDeviceCgroup> = serde_json::from_str(
        r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":11,"access":"r"}]"#,
    )
    .unwrap();
    let attached = super::super::cgroup::attach_v2_filter(&dir, &rules);
    let procs = dir.join("cgroup.procs");
    // Nodes of our own: kmsg (1:11) may be read, not written; fuse (10:229) neither; null (1:3) both.
    let nodes = tempfile::tempdir().unwrap();
    let script = format!(
        "cd {} && mknod a c 1 11 && mknod b c 10 229 && mknod c c 1 3 && echo $$ > {} && \
         for f in a b c; do (: < $f) 2>/dev/null && echo $f r; (: >> $f) 2>/dev/null && echo $f w; done",
        nodes.path().display(),
        procs.display()
    );
    let out = Command::new("sh").args(["-c", &script]).output();
    let removed = eventually(|| std::fs::remove_dir(&dir).is_ok());
    attached.unwrap();
    assert!(removed);
    assert_eq!(String::from_utf8(out.unwrap().stdout).unwrap(), "a r\nc r\nc w\n");
}
