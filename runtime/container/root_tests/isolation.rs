//! What a container must not be able to do, whatever its image contains.

use super::*;
use std::os::unix::fs::symlink;

#[test]
fn defaults_are_dockers() {
    let script = "grep -E 'Cap(Eff|Prm|Bnd|Inh|Amb)|NoNewPrivs|Seccomp:' /proc/self/status;\
        wc -c < /proc/timer_list; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/panic;\
        mkdir /sys/x; mount -t tmpfs x /tmp; unshare -U true; ls /proc/self/fd | wc -l; cat /dev/null;\
        ls -l /dev/ptmx | grep -c pts/ptmx; stat -c %a /dev/shm; touch /etc/new && echo written";
    let (code, out, err) = Container::new().sh(script, options()).run();
    assert_eq!(code, 0);
    let want = "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t2\n0\n0\n4\n1\n1777\nwritten\n";
    assert_eq!(out, want);
    let read_only = |s: &str| s.contains("Read-only file system");
    assert!(read_only(err.lines().next().unwrap()) && read_only(err.lines().nth(1).unwrap()), "{err}");
    assert!(
        err.matches("Operation not permitted").count() + err.matches("permission denied").count() >= 2,
        "{err}"
    );
}

#[test]
fn read_only_root_and_volumes() {
    let c = Container::new();
    let shared = c.dir().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let volume = |d: &str, o: &[&str]| super::super::spec::Volume {
        source: shared.clone(),
        destination: d.into(),
        options: o.iter().map(|s| (*s).to_owned()).collect(),
    };
    let run = RunOptions {
        read_only: true,
        volumes: vec![volume("/deep/rw", &[]), volume("/ro", &["ro"])],
        tmpfs: vec![("/scratch".into(), vec!["size=1m".into()])],
        ..options()
    };
    let c = c.sh(
        "touch /x; touch /ro/x; touch /deep/rw/made /scratch/x && echo fine; echo data > /dev/shm/x",
        run,
    );
    let (code, out, err) = c.run();
    assert_eq!((code, out.as_str()), (0, "fine\n"));
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
}

#[test]
fn privileged_opens_up() {
    let run = RunOptions { privileged: true, ..options() };
    let (_, out, _) =
        Container::new().sh("grep Seccomp: /proc/self/status; mount -t tmpfs x /tmp && echo ok", run).run();
    assert_eq!(out, "Seccomp:\t0\nok\n");
}

#[test]
fn images_whose_directories_are_links_are_refused_or_stay_inside() {
    for (name, target) in
        [("proc", "/"), ("proc", "/tmp"), ("sys", "/tmp"), ("dev", "/tmp"), ("dev", "../../host")]
    {
        let mut c = Container::new().sh("true", options());
        std::fs::remove_dir(c.root().join(name)).unwrap();
        symlink(target, c.root().join(name)).unwrap();
        let (error, code) = c.refused();
        assert_eq!(code, 125);
        assert!(error.contains("is not a directory"), "{name} -> {target}: {error}");
    }
    // A link that leads out of the root leads to the same place inside it.
    let c = Container::new();
    let outside = c.dir().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::create_dir_all(c.root().join("inside")).unwrap();
    symlink("/inside", c.root().join("link")).unwrap();
    symlink(&outside, c.root().join("out")).unwrap();
    let source = c.dir().join("source");
    std::fs::write(&source, "bound\n").unwrap();
    let volume = |d: &str| super::super::spec::Volume {
        source: source.clone(),
        destination: d.into(),
        options: vec![],
    };
    let run = RunOptions {
        volumes: vec![volume("/link/../link/f")],
        workdir: Some("/link/wd".into()),
        ..options()
    };
    let (code, out, _) = c.sh("cat /inside/f; readlink -f .", run).run();
    assert_eq!((code, out.as_str()), (0, "bound\n/inside/wd\n"));
    let mut c = Container::new();
    symlink("/outside/../../../etc", c.root().join("out")).unwrap();
    c = c.sh("true", RunOptions { workdir: Some("/out/wd".into()), ..options() });
    // Resolved inside the root (/etc/wd) or refused; the host's /etc stays as it is either way.
    let _ = c.start();
    let _ = c.shim.take().unwrap().wait();
    assert!(!Path::new("/etc/wd").exists());
}

#[test]
fn a_working_directory_outside_the_root_is_refused() {
    for fd in [3, 4, 5, 7, 10, 11] {
        let run = RunOptions { workdir: Some(format!("/proc/self/fd/{fd}")), ..options() };
        let mut c = Container::new().sh("ls ../../..", run);
        let (_, code) = c.refused();
        assert_eq!(code, 125);
    }
}

#[test]
fn our_binary_cannot_be_written_through_proc() {
    require_root();
    let file = tempfile::NamedTempFile::new().unwrap();
    let tree = super::super::sys::readonly_tree(file.path()).unwrap();
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    let error = std::fs::OpenOptions::new().write(true).open(path).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn network_none_has_only_a_working_loopback() {
    let (_, out, _) =
        Container::new().sh("ip -o link | wc -l; ip -o link | grep -c 'lo:.*UP'", options()).run();
    assert_eq!(out, "1\n1\n");
}
