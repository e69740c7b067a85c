//! Commands about the instance and the machine.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lazyrun_fs::mounter::Mounter;
use lazyrun_fs::plan::{self, Plan, Probes};
use serde_json::json;

use super::args::{BenchArgs, DemoArgs};
use super::{Context, output};
use crate::bench::{self, BenchOptions};
use crate::daemon::cache::change_limits;
use crate::demo::image::HostImageOptions;
use crate::demo::shaper::Shape;
use crate::demo::{self, DemoOptions};
use crate::failure::{EXIT_LAZYRUN, Failure};
use crate::ipc::client::Quiet;
use crate::ipc::protocol::{Info, Request};
use crate::ipc::system::LimitChange;
use crate::keeper::manager::{self, Manager};
use crate::keeper::{self, Given};
use crate::logs;
use crate::network::Instance;
use crate::preflight;

// Long enough for a kernel that is busy taking things down, short enough for a person.
const RESET_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn log_to_stderr(context: &Context) {
    let settings = &context.settings;
    logs::init(&context.paths.log(), settings.log_level.as_deref(), settings.log_format);
}

pub(super) fn keeper(context: &Context, state: Option<i32>) -> ExitCode {
    if let Some(state) = state {
        // SAFETY: the program that this process ran before left it open, and nothing has used it since.
        let state = unsafe { OwnedFd::from_raw_fd(state) };
        return keeper::go_on(&context.paths, &context.settings, state);
    }
    // SAFETY: the command line that started this process placed the pipe there and nothing has used it since.
    let ready = unsafe { OwnedFd::from_raw_fd(keeper::start::KEEPER_READY_FD) };
    let _ = nix::fcntl::fcntl(&ready, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC));
    keeper::main(&context.paths, &context.settings, Some(ready), Given::default())
}

pub(super) fn daemon(context: &Context, kept: bool, snapshotter: Option<&str>) -> Result<ExitCode, Failure> {
    log_to_stderr(context);
    let snapshotter = snapshotter.map(serde_json::from_str).transpose();
    let snapshotter = snapshotter.map_err(|e| Failure::daemon(format!("odd --snapshotter: {e}")))?;
    if kept {
        return Ok(crate::daemon::main(&context.paths, &context.settings, snapshotter.as_ref()));
    }
    store_limits(context)?;
    let passed = manager::passed().map_err(|e| Failure::daemon(format!("systemd's descriptors: {e}")))?;
    let given = Given { manager: Manager::of_this_process(), kept: passed.kept, snapshotter: None };
    Ok(keeper::main(&context.paths, &context.settings, None, given))
}

/// Sets the limits of the cache that the command line has, for the daemons of a keeper that this process becomes.
pub(super) fn store_limits(context: &Context) -> Result<(), Failure> {
    if context.limits != LimitChange::default() {
        context.paths.create().map_err(anyhow::Error::from)?;
        change_limits(&context.paths, context.limits)?;
    }
    Ok(())
}

pub(super) fn take_over(context: &Context) -> Result<(), Failure> {
    let Some(mut daemon) = context.running_daemon() else {
        return Err(Failure::daemon("there is no daemon to take over from; the next command starts one"));
    };
    daemon.call::<()>(&Request::TakeOver, &mut Quiet)
}

pub(super) fn info(context: &Context, format: Option<&str>) -> Result<(), Failure> {
    let info: Info = match context.running_daemon() {
        Some(mut daemon) => daemon.call(&Request::Info, &mut Quiet)?,
        None => idle_info(context),
    };
    output::value(&info, format)
}

// What can be said without a daemon.
fn idle_info(context: &Context) -> Info {
    let network = Instance::for_root(context.paths.root());
    let plan = probes(context).and_then(|probes| plan::choose(&probes, None).map_err(|e| e.to_string()));
    Info {
        version: env!("CARGO_PKG_VERSION").into(),
        daemon_pid: 0,
        root: context.paths.root().to_owned(),
        mount_plan: plan.map_or_else(|_| "none".into(), |p| p.to_string()),
        bridge: network.bridge,
        nft_table: network.table,
        containers_running: 0,
        containers_stopped: 0,
        images: 0,
        fuse_requests: 0,
        registry_requests: 0,
        registry_bytes: 0,
        faults: 0,
        daemon_rss: 0,
    }
}

// Probed in the nearest directory that exists, so that asking makes nothing.
fn probes(context: &Context) -> Result<Probes, String> {
    let root = context.paths.root();
    let dir = root.ancestors().find(|dir| dir.is_dir()).unwrap_or(root);
    Mounter::new("/proc/self/exe".into()).probe(dir).map_err(|e| e.to_string())
}

pub(super) fn version(format: Option<&str>) -> Result<(), Failure> {
    match format {
        None => output::print(&format!("lazyrun {}\n", env!("CARGO_PKG_VERSION"))),
        format => output::value(&json!({ "version": env!("CARGO_PKG_VERSION") }), format),
    }
}

pub(super) fn doctor(context: &Context, format: Option<&str>) -> Result<ExitCode, Failure> {
    let probes =
        probes(context).map_err(|e| Failure::daemon(format!("this machine can't be probed: {e}")))?;
    let chosen = plan::choose(&probes, None);
    let nft = preflight::find_program("nft");
    let kernel =
        nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let mut checks: Vec<(String, Result<(), String>)> =
        probes.each().into_iter().map(|(name, outcome)| (name.to_owned(), outcome.clone())).collect();
    checks.push((
        "bridge networking".into(),
        nft.then_some(())
            .ok_or_else(|| "nft is not installed; install nftables, or use --network host".into()),
    ));
    let usable = chosen.is_ok();
    if let Some(format) = format {
        let checks: Vec<_> = checks
            .iter()
            .map(|(name, outcome)| json!({ "name": name, "ok": outcome.is_ok(), "reason": outcome.as_ref().err() }))
            .collect();
        let plan = chosen.as_ref().map(ToString::to_string).map_err(ToString::to_string);
        let value = json!({ "kernel": kernel, "plan": plan.as_ref().ok(), "reason": plan.as_ref().err(), "checks": checks });
        output::value(&value, Some(format))?;
        return Ok(ExitCode::from(if usable { 0 } else { EXIT_LAZYRUN }));
    }
    let mut text = format!("kernel      {kernel}\nroot        {}\n", context.paths.root().display());
    for (name, outcome) in &checks {
        text += &match outcome {
            Ok(()) => format!("ok          {name}\n"),
            Err(reason) => format!("missing     {name}: {reason}\n"),
        };
    }
    text += &match chosen {
        Ok(plan) => format!("mount plan  {plan}{}\n", why(plan, &probes)),
        Err(error) => format!("mount plan  none: {error}\n"),
    };
    output::print(&text)?;
    Ok(ExitCode::from(if usable { 0 } else { EXIT_LAZYRUN }))
}

// Why this plan and not a better one.
fn why(plan: Plan, probes: &Probes) -> String {
    match (plan, probes.allows(Plan::Erofs)) {
        (Plan::Erofs, _) => ": the kernel serves names, attributes and cached contents itself".into(),
        (_, Err(reason)) => format!(", because plan erofs cannot be used: {reason}"),
        _ => String::new(),
    }
}

pub(super) fn reset(context: &Context, force: bool) -> Result<(), Failure> {
    let exists = context.paths.root().exists();
    if !exists && context.running_daemon().is_none() {
        return Ok(());
    }
    // A root that was left behind by a crash may still have a bridge and mounts: the daemon knows how to clean.
    let mut told = context.daemon()?.call::<()>(&Request::Reset { force }, &mut Quiet);
    if told.is_err() && context.running_daemon().is_none() {
        // It was about to end.
        wait_for_keeper(context)?;
        told = context.daemon()?.call(&Request::Reset { force }, &mut Quiet);
    }
    told?;
    wait_for_keeper(context)?;
    for dir in [context.paths.root(), context.paths.run()] {
        match std::fs::remove_dir_all(dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::daemon(format!("{} can't be deleted: {e}", dir.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

fn wait_for_keeper(context: &Context) -> Result<(), Failure> {
    let deadline = Instant::now() + RESET_TIMEOUT;
    while keeper_lives(context) {
        if Instant::now() > deadline {
            return Err(Failure::daemon(
                "the daemon was told to end but is still there; see daemon.log in its root",
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn keeper_lives(context: &Context) -> bool {
    let Ok(file) = std::fs::File::open(context.paths.keeper_lock()) else { return false };
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).is_err()
}

fn own_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|e| Failure::daemon(format!("the lazyrun program can't be found: {e}")))
}

fn say(message: &str) {
    eprintln!("lazyrun: {message}");
}

pub(super) fn demo(args: &DemoArgs) -> Result<ExitCode, Failure> {
    let options = DemoOptions {
        exe: own_program()?,
        shape: Shape { mbit: args.mbit, rtt_ms: args.rtt_ms },
        rounds: args.rounds,
        cache: args.cache.clone().unwrap_or_else(|| std::env::temp_dir().join("lazyrun-demo")),
        image: HostImageOptions { compressed: args.size_mb << 20, ..HostImageOptions::default() },
        network: args.network.clone(),
    };
    let report = demo::run(&options, &say).map_err(|e| Failure::daemon(e.to_string()))?;
    report_out(&report, args.format.as_deref())
}

pub(super) fn bench(context: &Context, args: &BenchArgs) -> Result<ExitCode, Failure> {
    let options = BenchOptions {
        exe: own_program()?,
        image: args.image.clone(),
        args: args.command.clone(),
        rounds: args.rounds,
        network: args.network.clone(),
        insecure_registries: context.insecure.clone(),
        hosts_dirs: context.hosts_dirs.clone(),
        parent: None,
        compressed: None,
    };
    let report = bench::bench(&options, None, &say).map_err(|e| Failure::daemon(e.to_string()))?;
    report_out(&report, args.format.as_deref())
}

fn report_out(report: &bench::Report, format: Option<&str>) -> Result<ExitCode, Failure> {
    match format {
        None => output::print(&report.to_string())?,
        format => output::value(report, format)?,
    }
    Ok(ExitCode::SUCCESS)
}
