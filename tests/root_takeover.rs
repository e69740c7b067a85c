//! The daemon killed and replaced under the feet of containers at work.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lazyrun::ipc::client::{Connection, Quiet};
use lazyrun::ipc::protocol::Request;
use lazyrun::paths::Paths;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use crate::support::fixture::{Fixture, big};
use crate::support::instance::{EXE, Lazyrun, finish_within};
use crate::support::load::{Load, below, child_of, forget, forget_everywhere, keeper_pid, root_of};
use crate::support::manager::Manager;
use crate::support::server::Server;
use crate::support::snapshotter::Snapshotter;
use crate::support::wait_for;

const RUN_PLAIN: [&str; 8] = ["run", "-d", "--name", "reader", "--network", "none", "--hydrate", "never"];

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

fn wait_for_end(what: &str, pid: i32) {
    wait_for(&format!("{what} to end"), Duration::from_secs(10), || {
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (state.is_empty() || state.contains(") Z ")).then_some(())
    });
}

fn exe_of(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).expect("a process's program")
}

/// A copy of the program, as an upgrade puts it there.
fn another_program(lazyrun: &Lazyrun) -> PathBuf {
    let dir = lazyrun.scratch("new");
    let taken = fs::read_dir(&dir).expect("a directory").count();
    let copy = dir.join(format!("lazyrun-{taken}"));
    fs::copy(EXE, &copy).expect("copy the program");
    copy
}

/// Has this program take over, without a word.
fn take_over(lazyrun: &Lazyrun, new: &Path) {
    let taken = finish_within(
        Command::new(new).arg("--root").arg(lazyrun.root()).args(["daemon", "--takeover"]),
        Duration::from_secs(60),
    );
    let taken = taken.expect("the takeover to end");
    assert_eq!((taken.code, taken.stdout.as_str(), taken.stderr.as_str()), (Some(0), "", ""));
}

/// With few mounts the descriptor of the new program is one of the low numbers that are taken in daemons.
fn taken_over_with_few_mounts(lazyrun: &Lazyrun, image: &str, keeper: i32) {
    let pull = ["pull", "--quiet", image];
    let run = [&RUN_PLAIN[..], &[image, "sleep", "1000"]].concat();
    for command in [&pull[..], &run[..]] {
        lazyrun.ok(command);
        let new = another_program(lazyrun);
        take_over(lazyrun, &new);
        let daemon = lazyrun.daemon_pid().expect("a daemon");
        assert_eq!((exe_of(daemon), exe_of(keeper)), (new.clone(), new));
    }
}

#[test]
fn another_program_takes_over_where_little_or_nothing_is_mounted() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    taken_over_with_few_mounts(&lazyrun, &fixture.image(), keeper_pid(&lazyrun));
}

#[test]
fn another_program_takes_over_from_a_snapshotter_with_few_mounts() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    taken_over_with_few_mounts(&snapshotter.lazyrun, &fixture.image(), snapshotter.pid());
}

#[test]
fn another_program_takes_over_and_all_that_runs_goes_on() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let new = another_program(&lazyrun);
    let load = Load::start(&lazyrun, &fixture, 2, &["--hydrate", "never"]);
    let keeper = keeper_pid(&lazyrun);
    let old = child_of(keeper).expect("a daemon");
    load.take_longest();
    take_over(&lazyrun, &new);
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
    lazyrun.ok(&[&RUN_PLAIN[..], &["--union", plan, &image, "sleep", "1000"]].concat());
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
    assert!(
        refused.stderr.contains("there is no lazyrun daemon, and the next try has to wait"),
        "{refused:#?}"
    );
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
    lazyrun.ok(&[&RUN_PLAIN[..], &[&fixture.image(), "sleep", "1000"]].concat());
    let root = root_of(&lazyrun, "reader");
    let (keeper, below) = (keeper_pid(&lazyrun), below(&lazyrun));
    let old = child_of(keeper).expect("a daemon");
    // The next one will wait for what somebody writes there.
    lazyrun.ok(&["--cache-limit", "50%", "images"]);
    let (limits, aside) = (lazyrun.root().join("cache.json"), lazyrun.root().join("cache.aside"));
    fs::rename(&limits, &aside).expect("take the limits away");
    mkfifo(&limits, Mode::S_IRUSR | Mode::S_IWUSR).expect("put a pipe there");
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
    let mut pipe = wait_for("the new daemon to hang", Duration::from_secs(30), || {
        File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&limits).ok()
    });
    let new = child_of(keeper).expect("a daemon");
    assert_ne!(new, old);
    let reader = std::thread::spawn({
        let (below, root) = (below.clone(), root.clone());
        move || read_uncached(&below, &root, 12 << 20)
    });
    let began = Instant::now();
    while !reader.is_finished() && began.elapsed() < Duration::from_secs(15) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let in_time = reader.is_finished();
    let hung = child_of(keeper);
    fs::rename(&aside, &limits).expect("put the limits back");
    pipe.write_all(&fs::read(&limits).expect("the limits")).expect("let it go on");
    drop(pipe);
    let read = reader.join().expect("the reader");
    assert!(in_time, "nobody refused the read");
    assert_eq!(hung, Some(new), "the daemon still hung");
    assert_eq!(read.expect_err("nobody was there to answer").raw_os_error(), Some(libc::EIO));
    wait_for("reads to go on", Duration::from_secs(60), || read_uncached(&below, &root, 12 << 20).ok());
    assert_eq!(child_of(keeper), Some(new), "one that goes on in time may");
}

fn ended_when_it_hangs(lazyrun: &Lazyrun, plan: &str) {
    let fixture = Fixture::new();
    lazyrun.ok(&[&RUN_PLAIN[..], &["--union", plan, &fixture.image(), "sleep", "1000"]].concat());
    let (root, below, keeper) = (root_of(lazyrun, "reader"), below(lazyrun), keeper_pid(lazyrun));
    let old = child_of(keeper).expect("a daemon");
    kill(Pid::from_raw(old), Signal::SIGSTOP).expect("stop the daemon");
    let read = std::thread::spawn({
        let (below, root) = (below.clone(), root.clone());
        move || read_uncached(&below, &root, 12 << 20)
    });
    wait_for("another daemon", Duration::from_secs(60), || child_of(keeper).filter(|new| *new != old));
    assert!(read.join().expect("the reader").expect("read") == big()[12 << 20..][..4096]);
    lazyrun.ok(&["exec", "reader", "cat", "/data/last"]);
}

#[test]
fn a_daemon_that_hangs_is_ended_and_reads_go_on() {
    ended_when_it_hangs(&Lazyrun::new().with_options(&["--fault-timeout", "2s"]), "erofs");
}

#[test]
fn a_daemon_that_hangs_is_ended_and_reads_go_on_without_resend() {
    ended_when_it_hangs(&without_resend().with_options(&["--fault-timeout", "2s"]), "overlay");
}

#[test]
fn a_keeper_that_waits_before_the_next_try_ends_when_told() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&[&RUN_PLAIN[..], &[&fixture.image(), "sleep", "1000"]].concat());
    let keeper = keeper_pid(&lazyrun);
    let (meta, aside) = (lazyrun.root().join("meta.db"), lazyrun.root().join("meta.aside"));
    fs::rename(&meta, &aside).expect("take the database away");
    fs::create_dir(&meta).expect("put something else there");
    kill(Pid::from_raw(child_of(keeper).expect("a daemon")), Signal::SIGKILL).expect("kill the daemon");
    wait_for("the keeper to wait", Duration::from_secs(60), || {
        let refused = lazyrun.run(&["images"]);
        refused.stderr.contains("the next try has to wait").then_some(())
    });
    kill(Pid::from_raw(keeper), Signal::SIGTERM).expect("end the keeper");
    wait_for_end("the keeper", keeper);
    fs::remove_dir(&meta).expect("take the obstacle away");
    fs::rename(&aside, &meta).expect("put the database back");
    lazyrun.ok(&["rm", "-f", "reader"]);
}

#[test]
fn with_the_keeper_everything_ends_and_the_next_command_starts_anew() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    lazyrun.ok(&[&RUN_PLAIN[..], &[&image, "sleep", "1000"]].concat());
    let root = root_of(&lazyrun, "reader");
    let keeper = keeper_pid(&lazyrun);
    let daemon = child_of(keeper).expect("a daemon");
    let file = File::open(root.join("data/big.bin")).expect("open the big file");
    forget_everywhere(&below(&lazyrun), &file);
    kill(Pid::from_raw(keeper), Signal::SIGKILL).expect("kill the keeper");
    wait_for_end("the daemon", daemon);
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

/// A snapshotter under a service manager, with a container that reads lazily; in the end it is told to end.
struct Managed {
    service: Server,
    manager: Manager,
    args: Vec<String>,
    log: PathBuf,
    /// The big file, with nothing of it in memory.
    file: File,
    lazyrun: Lazyrun,
    _fixture: Fixture,
}

impl Managed {
    fn start() -> Managed {
        let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
        let mut manager = Manager::new(&lazyrun.scratch("manager"));
        let socket = lazyrun.scratch("socket").join("s");
        let path = |path: &Path| path.to_str().expect("a path").to_owned();
        let args =
            ["--root".into(), path(lazyrun.root()), "snapshotter".into(), "--address".into(), path(&socket)];
        let log = lazyrun.scratch("log").join("snapshotter");
        let service = manager.start(EXE, &args, &log);
        let image = fixture.image();
        lazyrun.ok(&[&RUN_PLAIN[..], &["--union", "overlay", &image, "sleep", "1000"]].concat());
        let file = File::open(root_of(&lazyrun, "reader").join("data/big.bin")).expect("open the big file");
        forget(&file);
        manager.hear();
        Managed { service, manager, args: args.into(), log, file, lazyrun, _fixture: fixture }
    }

    /// Kills the service's process, reads meanwhile, and starts the next one; how the read went.
    fn kill_and_restart(&mut self) -> std::io::Result<Vec<u8>> {
        kill(Pid::from_raw(self.service.pid() as i32), Signal::SIGKILL).expect("kill the keeper");
        wait_for("the keeper to end", Duration::from_secs(10), || self.service.ended());
        let file = self.file.try_clone().expect("the big file");
        let reader = std::thread::spawn(move || {
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, 20 << 20).map(|()| page)
        });
        self.service = self.manager.start(EXE, &self.args, &self.log);
        wait_for("the read to end", Duration::from_secs(20), || {
            self.manager.hear();
            reader.is_finished().then_some(())
        });
        reader.join().expect("the reader")
    }

    /// What ends in peace leaves nothing with the manager.
    fn end(&mut self) {
        self.lazyrun.ok(&["rm", "-f", "reader"]);
        kill(Pid::from_raw(self.service.pid() as i32), Signal::SIGTERM).expect("end the service");
        wait_for("the service to end", Duration::from_secs(60), || self.service.ended());
        self.manager.hear();
        assert!(self.manager.stored.is_empty(), "{:?}", self.manager.stored.keys());
    }
}

#[test]
fn under_systemd_mounts_outlive_the_keeper() {
    let mut managed = Managed::start();
    let keeper = managed.service.pid();
    assert!(
        managed.manager.stored.keys().any(|name| name.starts_with("lazyrun+view+")),
        "{:?}",
        managed.manager.stored.keys()
    );
    let page = managed.kill_and_restart().expect("a read goes on with the next keeper");
    assert!(page == big()[20 << 20..][..4096]);
    assert_eq!(managed.lazyrun.ok(&["exec", "reader", "cat", "/data/last"]), "behind the big file\n");
    assert_ne!(managed.service.pid(), keeper);
    managed.end();
}

#[test]
fn what_the_next_daemon_cannot_take_over_keeps_nobody_waiting() {
    let mut managed = Managed::start();
    let is_tree = |name: &String| !name.ends_with("+dev") && !name.ends_with("+journal");
    let lost: Vec<String> = managed.manager.stored.keys().filter(|name| is_tree(name)).cloned().collect();
    assert!(lost.iter().any(|name| name.starts_with("lazyrun+view+")), "{lost:?}");
    for name in &lost {
        managed.manager.stored.remove(name);
    }
    managed.kill_and_restart().expect_err("its mount was lost");
    managed.end();
}
