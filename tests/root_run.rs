//! `lazyrun run`: what the container sees, what the user gets back.

use std::fs;

use crate::support::fixture::Fixture;
use crate::support::instance::Lazyrun;

#[test]
fn output_goes_where_it_belongs() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let script = "echo to stdout; echo to stderr >&2";
    let finished = lazyrun.run(&["run", "--rm", &fixture.image(), "sh", "-c", script]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!(finished.stdout, "to stdout\n");
    assert!(finished.stderr.contains("to stderr\n"), "{finished:#?}");
}

#[test]
fn the_image_says_what_runs_by_default() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    assert_eq!(lazyrun.ok(&["run", "--rm", &fixture.image()]), "the default command\n");
    assert_eq!(lazyrun.ok(&["run", "--rm", &fixture.image(), "pwd"]), "/data\n");
    assert_eq!(lazyrun.ok(&["run", "--rm", &fixture.image(), "hello"]), "hello from a script\n");
}

#[test]
fn the_exit_code_is_the_commands() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let run = |args: &[&str]| lazyrun.run(&[&["run", "--rm", &fixture.image()], args].concat()).code;
    assert_eq!(run(&["true"]), Some(0));
    assert_eq!(run(&["false"]), Some(1));
    assert_eq!(run(&["sh", "-c", "exit 42"]), Some(42));
    assert_eq!(run(&["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"]), Some(143));
}

#[test]
fn errors_of_the_command_are_126_and_127() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let why = lazyrun.fails(127, &["run", "--rm", &image, "no-such-command"]);
    assert!(why.contains("no-such-command"), "{why}");
    let why = lazyrun.fails(126, &["run", "--rm", &image, "/etc/passwd"]);
    assert!(why.contains("/etc/passwd"), "{why}");
    lazyrun.fails(126, &["run", "--rm", &image, "/data"]);
    lazyrun.fails(127, &["run", "--rm", "--entrypoint", "/nowhere", &image]);
}

#[test]
fn options_shape_the_process() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let env = lazyrun.ok(&["run", "--rm", "-e", "ONE=1", "-e", "GREETING=bye", &image, "env"]);
    assert!(
        env.lines().any(|line| line == "ONE=1") && env.lines().any(|line| line == "GREETING=bye"),
        "{env}"
    );
    assert_eq!(lazyrun.ok(&["run", "--rm", "-w", "/tmp", &image, "pwd"]), "/tmp\n");
    assert_eq!(lazyrun.ok(&["run", "--rm", "-u", "1000:1000", &image, "id", "-u"]), "1000\n");
    assert_eq!(lazyrun.ok(&["run", "--rm", "-u", "user", &image, "id", "-g"]), "1000\n");
    assert_eq!(
        lazyrun.ok(&["run", "--rm", "--entrypoint", "/bin/echo", &image, "an", "entry"]),
        "an entry\n"
    );
}

#[test]
fn standard_input_arrives() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let finished =
        lazyrun.run_with_input(&["run", "--rm", "-i", &fixture.image(), "wc", "-c"], "twelve bytes");
    assert_eq!((finished.code, finished.stdout.trim()), (Some(0), "12"), "{finished:#?}");
    // Without -i there is none.
    let finished = lazyrun.run_with_input(&["run", "--rm", &fixture.image(), "wc", "-c"], "twelve bytes");
    assert_eq!(finished.stdout.trim(), "0", "{finished:#?}");
}

#[test]
fn a_container_writes_to_itself_only() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let script = "echo new >/data/new && echo over >/data/last && rm /data/first && cat /data/new /data/last";
    assert_eq!(lazyrun.ok(&["run", "--rm", &image, "sh", "-c", script]), "new\nover\n");
    let script = "ls /data/new 2>/dev/null; cat /data/last /data/first";
    assert_eq!(lazyrun.ok(&["run", "--rm", &image, "sh", "-c", script]), "behind the big file\nreplaced\n");
}

#[test]
fn volumes_reach_the_host() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let (image, dir) = (fixture.image(), lazyrun.scratch("volume"));
    fs::write(dir.join("in"), "from the host\n").unwrap();
    let volume = format!("{}:/mnt/volume", dir.display());
    let script = "cat /mnt/volume/in; echo back >/mnt/volume/out";
    assert_eq!(lazyrun.ok(&["run", "--rm", "-v", &volume, &image, "sh", "-c", script]), "from the host\n");
    assert_eq!(fs::read_to_string(dir.join("out")).unwrap(), "back\n");
    let read_only = format!("{volume}:ro");
    let finished = lazyrun.run(&["run", "--rm", "-v", &read_only, &image, "touch", "/mnt/volume/no"]);
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(!dir.join("no").exists());
}

#[test]
fn a_container_is_confined() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let sh = |script: &str| lazyrun.ok(&["run", "--rm", &image, "sh", "-c", script]);
    assert_eq!(sh("echo $$"), "1\n", "the command is process 1 of its own namespace");
    // The capabilities that docker leaves, by capabilities(7).
    assert!(sh("grep CapEff /proc/self/status").contains("00000000a80425fb"));
    let masked =
        "cat /proc/kcore /proc/keys /proc/timer_list /proc/sched_debug 2>/dev/null | head -c 10 | wc -c";
    assert_eq!(sh(masked).trim(), "0", "what tells of the host is masked, where the kernel has it");
    assert_eq!(sh("echo 1 2>/dev/null >/proc/sys/kernel/panic || echo refused"), "refused\n");
    assert_eq!(sh("mount -t tmpfs none /tmp 2>/dev/null || echo refused"), "refused\n");
    assert_eq!(sh("grep -c Seccomp:.2 /proc/self/status"), "1\n", "a seccomp filter is in force");
    let mounts = sh("cat /proc/self/mountinfo");
    assert!(!mounts.contains(" /home ") || !mounts.contains("/dev/vd"), "{mounts}");
}

#[test]
fn limits_hold() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let script = "for i in $(seq 40); do sleep 5 & done 2>/dev/null; echo started";
    let finished = lazyrun.run(&["run", "--rm", "--pids-limit", "10", &image, "sh", "-c", script]);
    assert!(!finished.stdout.contains("started"), "40 processes ran under a limit of 10: {finished:#?}");
    let script = "tail -c 300000000 /dev/zero >/dev/null; echo survived";
    let finished = lazyrun.run(&["run", "--rm", "-m", "32m", &image, "sh", "-c", script]);
    assert!(!finished.stdout.contains("survived") || finished.stderr.contains("Killed"), "{finished:#?}");
}

#[test]
fn a_terminal_is_a_terminal() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let output = lazyrun.ok(&["run", "--rm", "-t", &fixture.image(), "tty"]);
    assert!(output.starts_with("/dev/"), "{output:?}");
}

#[test]
fn a_deep_root_works() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::deep());
    assert_eq!(lazyrun.ok(&["run", "--rm", &fixture.image(), "echo", "deep"]), "deep\n");
    lazyrun.reset();
}

#[test]
fn two_instances_do_not_meet() {
    let (fixture, one, two) = (Fixture::new(), Lazyrun::new(), Lazyrun::new());
    one.ok(&["run", "-d", "--name", "same", &fixture.image(), "sleep", "100"]);
    two.ok(&["run", "-d", "--name", "same", &fixture.image(), "sleep", "100"]);
    assert_ne!(one.info()["bridge"], two.info()["bridge"]);
    assert_ne!(one.daemon_pid(), two.daemon_pid());
    one.reset();
    assert!(two.ok(&["ps"]).contains("same"));
}
