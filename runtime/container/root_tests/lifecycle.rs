//! Start, exit codes, signals, exec, and nothing left behind.

use super::*;

#[test]
fn output_exit_code_and_surroundings() {
    let script = "echo out; echo err >&2; hostname; id; pwd; echo $HOME $HOSTNAME $X; echo $$; exit 42";
    let run = RunOptions {
        env: vec!["X=y z".to_owned()],
        user: Some("web".to_owned()),
        workdir: Some("/srv/made".to_owned()),
        ..options()
    };
    let (code, out, err) = Container::new().sh(script, run).run();
    assert_eq!(code, 42);
    assert_eq!(err, "err\n");
    let expected = "out\nbox\nuid=33(web) gid=34(web) groups=29(audio)\n/srv/made\n/home/web box y z\n1\n";
    assert_eq!(out, expected);
}

#[test]
fn commands_that_cannot_run_have_dockers_codes() {
    let mut c = Container::new().spec(&RunOptions { args: vec!["nope".into()], ..options() });
    let (error, code) = c.refused();
    assert_eq!((error.as_str(), code), ("exec: \"nope\": executable file not found in $PATH", 127));
    assert_eq!(ExitRecord::load(c.dir()).unwrap().unwrap().exit_code, 127);
    let mut c = Container::new().spec(&RunOptions { args: vec!["/no/pe".into()], ..options() });
    assert_eq!(c.refused(), ("exec: \"/no/pe\": no such file or directory".to_owned(), 127));
    let mut c = Container::new().spec(&RunOptions { args: vec!["/etc/passwd".into()], ..options() });
    assert_eq!(c.refused(), ("exec: \"/etc/passwd\": permission denied".to_owned(), 126));
    let mut c = Container::new().spec(&RunOptions { args: vec!["/etc".into()], ..options() });
    assert_eq!(c.refused(), ("exec: \"/etc\": is a directory".to_owned(), 126));
    let mut c = Container::new().sh("true", RunOptions { user: Some("ghost".into()), ..options() });
    assert_eq!(c.refused(), ("user \"ghost\" is not in the container's /etc/passwd".to_owned(), 125));
}

#[test]
fn signals_reach_the_first_process() {
    let mut c =
        Container::new().sh("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done", options());
    c.started();
    assert!(eventually(|| c.output().0 == "ready\n"));
    assert_eq!(client::state(&c.config.socket).unwrap().status, "running");
    client::kill(&c.config.socket, libc::SIGTERM).unwrap();
    assert_eq!(c.ended().exit_code, 7);
    let mut c = Container::new().sh("sleep 1000", options());
    c.started();
    client::kill(&c.config.socket, libc::SIGKILL).unwrap();
    assert_eq!(c.ended().exit_code, 137);
    assert!(client::kill(&c.config.socket, libc::SIGKILL).is_err());
}

#[test]
fn exec_joins_the_container() {
    let mut c =
        Container::new().sh("echo ready; sleep 1000", RunOptions { env: vec!["A=1".into()], ..options() });
    c.started();
    assert!(eventually(|| c.output().0 == "ready\n"));
    let (ending, out) = c.exec_sh("hostname; echo $A; ps -o pid,args | grep -c 'sleep 1000'; readlink /proc/1/ns/pid /proc/self/ns/pid | sort -u | wc -l; exit 3");
    assert_eq!(ending, Ending::Exited(3));
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[..2], ["box", "1"], "{out}");
    let seen = |f: &str| c.exec_sh(f).1;
    assert_eq!(
        seen("grep -E 'Cap(Eff|Bnd|Inh)|Seccomp:' /proc/self/status"),
        seen("grep -E 'Cap(Eff|Bnd|Inh)|Seccomp:' /proc/1/status")
    );
    for kind in ["mnt", "uts", "ipc", "net", "pid", "cgroup"] {
        let (_, out) = c.exec_sh(&format!("readlink /proc/1/ns/{kind}; readlink /proc/self/ns/{kind}"));
        let mut lines = out.lines();
        assert_eq!(lines.next().unwrap(), lines.next().unwrap(), "{kind}");
    }
    assert_eq!(seen("cat /proc/self/cgroup"), seen("cat /proc/1/cgroup"));
    let user = ExecProcess { args: vec!["id".into()], user: Some("33:44".into()), ..Default::default() };
    assert_eq!(c.exec(&user, None).unwrap().1.trim(), "uid=33(web) gid=44");
    let error = c.exec(&ExecProcess { args: vec!["nope".into()], ..Default::default() }, None).unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().contains("not found in $PATH")), (127, true));
    client::kill(&c.config.socket, libc::SIGKILL).unwrap();
    assert_eq!(c.ended().exit_code, 137);
}

#[test]
fn a_killed_shim_takes_its_container_along() {
    let mut c =
        Container::new().sh("sleep 1000 & sleep 1000", RunOptions { user: Some("web".into()), ..options() });
    let pid = c.started();
    assert!(eventually(|| c.cgroup().pids().len() == 3 || c.cgroup().pids().len() == 2));
    let others = c.cgroup().pids();
    let mut shim = c.shim.take().unwrap();
    shim.kill().unwrap();
    shim.wait().unwrap();
    assert!(
        eventually(|| !alive(pid) && others.iter().all(|p| !alive(*p))),
        "the container outlived its shim"
    );
    let record = super::super::shim::sweep(&c.config).unwrap();
    assert_eq!((record.exit_code, record.error.is_some()), (137, true));
    c.assert_gone();
}

#[test]
fn a_root_handed_over_as_a_descriptor_is_mounted_nowhere_else() {
    use super::super::sys;
    let mut c = Container::new().sh("cat /mark; touch /new", options());
    let other = c.dir().join("other");
    std::fs::rename(c.root(), &other).unwrap();
    std::fs::write(other.join("mark"), "detached\n").unwrap();
    std::fs::create_dir(c.root()).unwrap();
    let tree = sys::clone_tree(&other, false).unwrap();
    // Inherited under its own number.
    nix::fcntl::fcntl(&tree, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    c.config.rootfs_fd = Some(tree.as_raw_fd());
    c.started();
    assert_eq!(c.ended().exit_code, 0);
    assert_eq!(c.output().0, "detached\n");
    assert!(other.join("new").exists() && std::fs::read_dir(c.root()).unwrap().next().is_none());
}
