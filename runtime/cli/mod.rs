//! The command line: what can be typed, and which module does it.

pub mod args;
mod bench_args;
pub mod completion;
mod config;
mod config_args;
mod container_args;
mod containerd;
mod containers;
mod hydrate;
mod images;
pub mod index_args;
mod index_lists;
mod indexes;
mod metrics;
mod mount_options;
mod mounts;
mod output;
mod profiles;
mod progress;
mod registry;
mod registry_args;
mod run;
mod snapshotter;
mod system;
mod system_disk;
mod template;
pub mod union;
mod unshare;
mod why;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lazyrun_fetcher::ProviderFiles;
use serde::de::DeserializeOwned;

use crate::failure::{EXIT_LAZYRUN, Failure};
use crate::ipc::client::{Connection, Quiet};
use crate::ipc::protocol::{IndexOptions, Request};
use crate::ipc::system::{LimitChange, PruneOptions};
use crate::keeper;
use crate::paths::Paths;
use crate::registries;
use crate::rootless;
use crate::settings::Settings;
use args::{Cli, Command, SystemCommand};

/// What the commands need to know of the global flags.
#[derive(Debug)]
pub struct Context {
    paths: Paths,
    progress: progress::Style,
    insecure: Vec<String>,
    hosts_dirs: Vec<PathBuf>,
    providers: Option<ProviderFiles>,
    index: IndexOptions,
    limits: LimitChange,
    settings: Settings,
}

impl Context {
    /// A connection to the instance's daemon, which is started when none answers.
    fn daemon(&self) -> Result<Connection, Failure> {
        if self.limits != LimitChange::default() {
            system_disk::limit(self, self.limits)?;
        }
        keeper::start::connect_or_start(&self.paths, &self.settings)
    }

    /// The rows of a list. A root that nothing was ever done in has none, and needs no daemon to say so.
    fn list<T: DeserializeOwned>(&self, request: &Request) -> Result<Vec<T>, Failure> {
        match self.running_daemon() {
            Some(mut daemon) => daemon.call(request, &mut Quiet),
            None if self.paths.meta().exists() => self.daemon()?.call(request, &mut Quiet),
            None => Ok(Vec::new()),
        }
    }

    /// A connection to the instance's daemon if one runs.
    fn running_daemon(&self) -> Option<Connection> {
        let connection = Connection::open(&self.paths.control()).ok()?;
        if self.limits != LimitChange::default()
            && let Err(failure) = system_disk::limit(self, self.limits)
        {
            eprintln!("lazyrun: {failure}");
        }
        Some(connection)
    }
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_LAZYRUN } else { 0 });
        }
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("lazyrun: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let root = cli.root.unwrap_or_else(rootless::default_root);
    let paths = Paths::new(&root)
        .map_err(|e| Failure::daemon(format!("the root directory {} can't be used: {e}", root.display())))?;
    let index = IndexOptions { trust: cli.index_trust, digest: cli.index_digest };
    let (insecure, hosts_dirs) = (cli.insecure_registry, cli.hosts_dir);
    let plugins = cli.image_credential_provider_config.zip(cli.image_credential_provider_bin_dir);
    let providers = plugins.map(|(config, bin_dir)| registries::provider_files(&config, &bin_dir));
    let limits = LimitChange { limit: cli.cache_limit, reserve: cli.disk_reserve };
    let (progress, settings) = (cli.progress, cli.settings);
    let context = Context { paths, progress, insecure, hosts_dirs, providers, index, limits, settings };
    let context = &context;
    match cli.command {
        Command::Keeper { state } => return Ok(system::keeper(context, state)),
        Command::Daemon { takeover: true, .. } => system::take_over(context)?,
        Command::Daemon { takeover: false, kept, snapshotter } => {
            return system::daemon(context, kept, snapshotter.as_deref());
        }
        Command::Snapshotter(args) => return snapshotter::serve(context, args),
        Command::Containerd { command } => containerd::containerd(context, command)?,
        Command::Run(args) => return run::run(context, *args),
        Command::Exec(args) => return containers::exec(context, args),
        Command::Logs(args) => containers::logs(context, &args)?,
        Command::Ps { all, quiet, lazy, format } => {
            containers::list(context, all, quiet, lazy, format.as_deref())?;
        }
        Command::Stop { time, containers } => return containers::stop(context, time, &containers),
        Command::Kill { signal, containers } => return containers::kill(context, &signal, &containers),
        Command::Rm { force, containers } => return containers::remove(context, force, &containers),
        Command::Inspect { format, names } => return containers::inspect(context, format.as_deref(), &names),
        Command::Images { quiet, lazy, format } => images::list(context, quiet, lazy, format.as_deref())?,
        Command::Pull { quiet, hydrate, image } => images::pull(context, quiet, hydrate, &image)?,
        Command::Hydrate(args) => hydrate::hydrate(context, args)?,
        Command::Rmi { force, images } => return images::remove(context, force, &images),
        Command::Index { command } => indexes::index(context, command)?,
        Command::Profile { command } => return profiles::profile(context, command),
        Command::Registry { command } => registry::registry(context, command)?,
        Command::Login(args) => registry::login(context, &args)?,
        Command::Logout { registry } => registry::logout(&registry)?,
        Command::Cache { command: args::CacheCommand::Drop { image } } => images::cache_drop(context, image)?,
        Command::Mount(args) => mounts::mount(context, &args)?,
        Command::Unshare { command } => return unshare::unshare(context, command),
        Command::MapIds { pid } => rootless::map_ids(pid).map_err(|e| Failure::daemon(e.to_string()))?,
        Command::Union { args } => return Ok(union::main(&args, false)),
        Command::Umount { directory } => mounts::unmount(context, &directory)?,
        Command::Metrics { openmetrics } => metrics::metrics(context, openmetrics)?,
        Command::Why { number, list, format, name } => {
            why::why(context, &name, number, list, format.as_deref())?;
        }
        Command::Info { format } => system::info(context, format.as_deref())?,
        Command::Version { format } => system::version(format.as_deref())?,
        Command::Doctor { format } => return system::doctor(context, format.as_deref()),
        Command::Config { command } => return config::config(context, command),
        Command::Completion { shell } => completion::completion(shell)?,
        Command::System { command } => return system_command(context, command),
        Command::Demo(args) => return system::demo(&args),
        Command::Bench(args) => return system::bench(context, &args),
    }
    Ok(ExitCode::SUCCESS)
}

fn system_command(context: &Context, command: SystemCommand) -> Result<ExitCode, Failure> {
    match command {
        SystemCommand::Df { verbose, format } => system_disk::usage(context, verbose, format.as_deref())?,
        SystemCommand::Prune { all, cache, dry_run, force, format } => {
            return system_disk::prune(
                context,
                PruneOptions { all, cache, dry_run },
                force,
                format.as_deref(),
            );
        }
        SystemCommand::Check { repair, format } => {
            return system_disk::check(context, repair, format.as_deref());
        }
        SystemCommand::Reset { force } => system::reset(context, force)?,
    }
    Ok(ExitCode::SUCCESS)
}
