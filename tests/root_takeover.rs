//! The daemon killed and replaced under the feet of containers at work.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lazyrun::ipc::client::{Connection, Quiet};
use lazyrun::ipc::protocol::Request;
use lazyrun::paths::Paths;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::fixture::{Fixture, big};
use crate::support::instance::{EXE, Lazyrun, finish_within};
use crate::support::load::{Load, below, child_of, forget, forget_everywhere, keeper_pid, root_of};
use crate::support::manager::Manager;
use crate::support::wait_for;

/// Kills the daemon `kills` times at random moments while `containers` read and work; returns the longest read of
/// each of its lives.
fn killed_under_load(lazyrun: &Lazyrun, plan: &str, containers: usize, kills: u32) -> Vec<Duration> {
    let fixture = Fixture::new();
    let load = Load::start(lazyrun, &fixture, containers, &["--union", plan, "--hydrate", "never"]);
    let keeper = keeper_pid(lazyrun);
    let mut seed = u64::from(std::process::id());
    let mut stalls = Vec::new();
    for round in 0..kills {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        std::thread::sleep(Duration::from_millis(20 + seed % 500));
        let before = load.reads();
        let old = wait_for("a daemon", Duration::from_secs(30), || child_of(keeper));
        kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
        wait_for("a new daemon", Duration::from_secs(30), || child_of(keeper).filter(|pid| *pid != old));
        // Every other time the new one is killed while it takes over.
        if round % 2 == 0 {
            wait_for("reads to go on", Duration::from_secs(60), || {
                (load.reads() > before + containers as u64).then_some(())
            });
            stalls.push(load.take_longest());
        }
    }
    let outcome = load.stop();
    assert!(outcome.failures.is_empty(), "{kills} kills, plan {plan}:\n{}", outcome.failures.join("\n"));
    assert!(outcome.rounds >= containers as u64, "{outcome:?}");
    stalls.push(outcome.longest);
    stalls.sort_unstable();
    eprintln!(
        "plan {plan}: {kills} kills, {} reads, {} rounds of work, 0 failed; longest stall of a life: median {:?}, \
         longest {:?}",
        outcome.reads,
        outcome.rounds,
        stalls[stalls.len() / 2],
        stalls[stalls.len() - 1],
    );
    stalls
}

#[test]
fn a_daemon_killed_under_load_fails_nothing() {
    killed_under_load(&Lazyrun::new(), "erofs", 4, 5);
}

#[test]
fn a_daemon_killed_under_load_fails_nothing_by_plan_overlay() {
    killed_under_load(&Lazyrun::new(), "overlay", 4, 5);
}

/// `make soak-takeover`: as many kills as `KILLS` says, or 100, in 8 containers.
#[test]
#[ignore = "takes minutes: make soak-takeover"]
fn soak_takeover() {
    for plan in ["erofs", "overlay", "fuse"] {
        killed_under_load(&Lazyrun::new(), plan, 8, kills());
    }
}

fn kills() -> u32 {
    std::env::var("TAKEOVER_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(100)
}

/// Every request goes through the journal, as on kernels that cannot resend.
fn without_resend() -> Lazyrun {
    Lazyrun::new().with_env("LAZYRUN_FUSE_RESEND", "false")
}

#[test]
fn a_daemon_killed_under_load_fails_nothing_without_resend() {
    killed_under_load(&without_resend(), "erofs", 4, 5);
}

#[test]
fn a_daemon_killed_under_load_fails_nothing_without_resend_by_plan_overlay() {
    killed_under_load(&without_resend(), "overlay", 4, 5);
}

/// The same as `soak_takeover`, through the journal.
#[test]
#[ignore = "takes minutes: make soak-takeover"]
fn soak_takeover_without_resend() {
    for plan in ["erofs", "overlay"] {
        killed_under_load(&without_resend(), plan, 8, kills());
    }
}

fn exe_of(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).expect("a process's program")
}

/// A copy of the program, as an upgrade puts it there.
fn another_program(lazyrun: &Lazyrun) -> PathBuf {
    let copy = lazyrun.scratch("new").join("lazyrun");
    fs::copy(EXE, &copy).expect("copy the program");
    copy
}

#[test]
fn another_program_takes_over_and_all_that_runs_goes_on() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let new = another_program(&lazyrun);
    let load = Load::start(&lazyrun, &fixture, 2, &["--hydrate", "never"]);
    let keeper = keeper_pid(&lazyrun);
    let old = child_of(keeper).expect("a daemon");
    load.take_longest();
    let taken = finish_within(
        Command::new(&new).arg("--root").arg(lazyrun.root()).args(["daemon", "--takeover"]),
        Duration::from_secs(60),
    );
    let taken = taken.expect("the takeover to end");
    assert_eq!((taken.code, taken.stdout.as_str(), taken.stderr.as_str()), (Some(0), "", ""));
    let daemon = lazyrun.daemon_pid().expect("a daemon");
    assert_ne!(daemon, old);
    assert_eq!(
        (exe_of(daemon), exe_of(keeper)),
        (new.clone(), new.clone()),
        "keeper and daemon are the new program"
    );
    assert_eq!(child_of(keeper), Some(daemon), "the keeper is the same process");
    eprintln!("longest read during a takeover: {:?}", load.take_longest());
    // The new keeper is as good as the old one.
    kill(Pid::from_raw(daemon), Signal::SIGKILL).expect("kill the new daemon");
    wait_for("another daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|pid| *pid != daemon));
    let outcome = load.stop();
    assert!(outcome.failures.is_empty(), "{}", outcome.failures.join("\n"));
    assert_eq!(exe_of(lazyrun.daemon_pid().expect("a daemon")), new);
    lazyrun.reset();
}

#[test]
fn a_program_that_is_no_daemon_does_not_take_over() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let load = Load::start(&lazyrun, &fixture, 1, &["--hydrate", "never"]);
    let keeper = keeper_pid(&lazyrun);
    let (old, exe) = (lazyrun.daemon_pid().expect("a daemon"), exe_of(keeper));
    // Whoever asks is what takes over, and this is the tests' program.
    let paths = Paths::new(lazyrun.root()).expect("the instance's paths");
    let mut connection = Connection::open(&paths.control()).expect("connect to the daemon");
    let failure = connection.call::<()>(&Request::TakeOver, &mut Quiet).expect_err("no daemon");
    assert!(failure.message.contains("the new daemon does not start, the old one does again"), "{failure}");
    let daemon = lazyrun.daemon_pid().expect("a daemon");
    assert_ne!(daemon, old);
    assert_eq!((exe_of(daemon), exe_of(keeper)), (exe.clone(), exe));
    let outcome = load.stop();
    assert!(outcome.failures.is_empty(), "{}", outcome.failures.join("\n"));
}

#[test]
fn there_must_be_a_daemon_to_take_over_from() {
    let lazyrun = Lazyrun::new();
    assert!(lazyrun.fails(125, &["daemon", "--takeover"]).contains("no daemon to take over from"));
}

/// What a read of a page that is not cached comes to.
fn read_uncached(below: &[PathBuf], root: &Path, at: usize) -> std::io::Result<Vec<u8>> {
    let file = File::open(root.join("data/big.bin"))?;
    forget_everywhere(below, &file);
    let mut page = vec![0; 4096];
    file.read_exact_at(&mut page, at as u64).map(|()| page)
}

fn refused_after_the_bound(lazyrun: &Lazyrun, plan: &str) {
    let fixture = Fixture::new();
    let image = fixture.image();
    let run = ["run", "-d", "--name", "reader", "--network", "none", "--union", plan, "--hydrate", "never"];
    lazyrun.ok(&[&run[..], &[&image, "sleep", "1000"]].concat());
    let root = root_of(lazyrun, "reader");
    let below = below(lazyrun);
    assert!(read_uncached(&below, &root, 4096).expect("a read") == big()[4096..8192]);
    // The next daemon cannot start: its database is no database.
    let meta = lazyrun.root().join("meta.db");
    let aside = lazyrun.root().join("meta.aside");
    fs::rename(&meta, &aside).expect("take the database away");
    fs::create_dir(&meta).expect("put something else there");
    let daemon = lazyrun.daemon_pid();
    assert!(daemon.is_some(), "the daemon has its database open");
    kill(Pid::from_raw(daemon.unwrap_or(0)), Signal::SIGKILL).expect("kill the daemon");
    let began = Instant::now();
    let error = read_uncached(&below, &root, 8 << 20).expect_err("nobody is there to answer");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(1) && waited < Duration::from_secs(10), "refused after {waited:?}");
    let refused = lazyrun.run(&["images"]);
    assert_eq!(refused.code, Some(125), "{refused:#?}");
    // What was wrong is put right: the mounts are still there.
    fs::remove_dir(&meta).expect("take the obstacle away");
    fs::rename(&aside, &meta).expect("put the database back");
    let bytes =
        wait_for("reads to go on", Duration::from_secs(60), || read_uncached(&below, &root, 8 << 20).ok());
    assert!(bytes == big()[8 << 20..][..4096]);
    wait_for("a daemon", Duration::from_secs(60), || {
        (lazyrun.run(&["ps"]).stdout.contains("reader")).then_some(())
    });
    lazyrun.ok(&["exec", "reader", "cat", "/data/last"]);
}

#[test]
fn without_a_daemon_reads_fail_after_the_bound_and_go_on_with_the_next_one() {
    refused_after_the_bound(&Lazyrun::new().with_options(&["--fault-timeout", "2s"]), "erofs");
}

#[test]
fn without_a_daemon_reads_fail_after_the_bound_without_resend() {
    refused_after_the_bound(&without_resend().with_options(&["--fault-timeout", "2s"]), "overlay");
}

#[test]
fn a_daemon_that_hangs_as_it_starts_holds_nobody_up_for_ever() {
    let lazyrun = Lazyrun::new().with_options(&["--fault-timeout", "2s"]);
    let fixture = Fixture::new();
    lazyrun.ok(&[
        "run",
        "-d",
        "--name",
        "reader",
        "--network",
        "none",
        "--hydrate",
        "never",
        &fixture.image(),
        "sleep",
        "1000",
    ]);
    let root = root_of(&lazyrun, "reader");
    let (keeper, below) = (keeper_pid(&lazyrun), below(&lazyrun));
    let old = child_of(keeper).expect("a daemon");
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
    let new =
        wait_for("a new daemon", Duration::from_secs(30), || child_of(keeper).filter(|pid| *pid != old));
    // Not before it is the daemon: the keeper waits for that.
    wait_for("the new daemon to be one", Duration::from_secs(30), || {
        let command = fs::read_to_string(format!("/proc/{new}/cmdline")).unwrap_or_default();
        command.contains("--kept").then_some(())
    });
    kill(Pid::from_raw(new), Signal::SIGSTOP).expect("stop the new daemon");
    let reader = std::thread::spawn({
        let (below, root) = (below.clone(), root.clone());
        move || read_uncached(&below, &root, 12 << 20)
    });
    let began = Instant::now();
    while !reader.is_finished() && began.elapsed() < Duration::from_secs(15) {
        std::thread::sleep(Duration::from_millis(20));
    }
    kill(Pid::from_raw(new), Signal::SIGCONT).expect("let it go on");
    // If it was ready before it was stopped, it answers now.
    if let Err(error) = reader.join().expect("the reader") {
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    }
    wait_for("reads to go on", Duration::from_secs(60), || read_uncached(&below, &root, 12 << 20).ok());
}

#[test]
fn with_the_keeper_everything_ends_and_the_next_command_starts_anew() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&[
        "run",
        "-d",
        "--name",
        "reader",
        "--network",
        "none",
        "--hydrate",
        "never",
        &image,
        "sleep",
        "1000",
    ]);
    let root = root_of(&lazyrun, "reader");
    let keeper = keeper_pid(&lazyrun);
    let daemon = child_of(keeper).expect("a daemon");
    let file = File::open(root.join("data/big.bin")).expect("open the big file");
    forget_everywhere(&below(&lazyrun), &file);
    kill(Pid::from_raw(keeper), Signal::SIGKILL).expect("kill the keeper");
    wait_for("the daemon to end", Duration::from_secs(10), || {
        let state = fs::read_to_string(format!("/proc/{daemon}/stat")).unwrap_or_default();
        (state.is_empty() || state.contains(") Z ")).then_some(())
    });
    let error = file.read_exact_at(&mut [0; 4096], 16 << 20).expect_err("its bytes are nowhere");
    assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOTCONN)), "{error}");
    drop(file);
    assert_eq!(
        lazyrun.ok(&["run", "--rm", "--network", "none", &image, "cat", "/data/last"]),
        "behind the big file\n"
    );
    lazyrun.ok(&["rm", "-f", "reader"]);
    lazyrun.reset();
}

#[test]
fn under_systemd_mounts_outlive_the_keeper() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let mut manager = Manager::new(&lazyrun.scratch("manager"));
    let (root, socket) = (lazyrun.root().to_owned(), lazyrun.scratch("socket").join("s"));
    let args = [
        "--root",
        root.to_str().expect("a path"),
        "snapshotter",
        "--address",
        socket.to_str().expect("a path"),
    ];
    let log = lazyrun.scratch("log").join("snapshotter");
    let service = manager.start(EXE, &args, &log);
    lazyrun.ok(&[
        "run",
        "-d",
        "--name",
        "reader",
        "--network",
        "none",
        "--union",
        "overlay",
        "--hydrate",
        "never",
        &fixture.image(),
        "sleep",
        "1000",
    ]);
    let keeper = service.pid() as i32;
    let load_root = root_of(&lazyrun, "reader");
    let file = File::open(load_root.join("data/big.bin")).expect("open the big file");
    let mounts: Vec<PathBuf> = fs::read_dir(format!("/proc/{keeper}/fd"))
        .expect("the keeper's descriptors")
        .flatten()
        .map(|fd| fd.path().join("data/big.bin"))
        .filter(|path| path.exists())
        .collect();
    assert!(!mounts.is_empty(), "the keeper holds no view");
    forget(&file);
    manager.hear();
    assert!(
        manager.stored.keys().any(|name| name.starts_with("lazyrun+view+")),
        "{:?}",
        manager.stored.keys()
    );
    kill(Pid::from_raw(keeper), Signal::SIGKILL).expect("kill the keeper");
    drop(service);
    let reader = std::thread::spawn(move || {
        let mut page = vec![0; 4096];
        file.read_exact_at(&mut page, 20 << 20).map(|()| page)
    });
    let service = manager.start(EXE, &args, &log);
    let page = reader.join().expect("the reader").expect("a read goes on with the next keeper");
    assert!(page == big()[20 << 20..][..4096]);
    assert_eq!(lazyrun.ok(&["exec", "reader", "cat", "/data/last"]), "behind the big file\n");
    assert_ne!(service.pid() as i32, keeper);
    // What ends in peace leaves nothing with the manager.
    lazyrun.ok(&["rm", "-f", "reader"]);
    kill(Pid::from_raw(service.pid() as i32), Signal::SIGTERM).expect("end the service");
    let mut service = service;
    wait_for("the service to end", Duration::from_secs(60), || service.ended());
    manager.hear();
    assert!(manager.stored.is_empty(), "{:?}", manager.stored.keys());
}
