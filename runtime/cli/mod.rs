//! The command line: what can be typed, and which module does it.

pub mod args;
mod containers;
mod images;
pub mod index_args;
mod index_lists;
mod indexes;
mod metrics;
mod mounts;
mod output;
mod profiles;
mod progress;
mod run;
mod system;
mod template;
pub mod union;
mod why;

use std::process::ExitCode;

use clap::Parser;

use crate::failure::{EXIT_LAZYRUN, Failure};
use crate::ipc::client::Connection;
use crate::ipc::protocol::IndexOptions;
use crate::keeper;
use crate::paths::{DEFAULT_ROOT, Paths};
use args::{Cli, Command, SystemCommand};

/// What the commands need to know of the global flags.
#[derive(Debug)]
pub struct Context {
    paths: Paths,
    progress: progress::Style,
    insecure: Vec<String>,
    index: IndexOptions,
}

impl Context {
    /// A connection to the instance's daemon, which is started when none answers.
    fn daemon(&self) -> Result<Connection, Failure> {
        keeper::start::connect_or_start(&self.paths)
    }

    /// A connection to the instance's daemon if one runs.
    fn running_daemon(&self) -> Option<Connection> {
        Connection::open(&self.paths.control()).ok()
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
    let root = cli.root.unwrap_or_else(|| DEFAULT_ROOT.into());
    let paths = Paths::new(&root)
        .map_err(|e| Failure::daemon(format!("the root directory {} can't be used: {e}", root.display())))?;
    let index = IndexOptions { trust: cli.index_trust, digest: cli.index_digest };
    let context = Context { paths, progress: cli.progress, insecure: cli.insecure_registry, index };
    let context = &context;
    match cli.command {
        Command::Keeper { settings } => return Ok(system::keeper(context, &settings)),
        Command::Daemon { kept, settings } => return Ok(system::daemon(context, kept, &settings)),
        Command::Run(args) => return run::run(context, *args),
        Command::Exec(args) => return containers::exec(context, args),
        Command::Logs(args) => containers::logs(context, &args)?,
        Command::Ps { all, quiet, format } => containers::list(context, all, quiet, format.as_deref())?,
        Command::Stop { time, containers } => return containers::stop(context, time, &containers),
        Command::Kill { signal, containers } => return containers::kill(context, &signal, &containers),
        Command::Rm { force, containers } => return containers::remove(context, force, &containers),
        Command::Inspect { format, names } => return containers::inspect(context, format.as_deref(), &names),
        Command::Images { quiet, format } => images::list(context, quiet, format.as_deref())?,
        Command::Pull { quiet, image } => images::pull(context, quiet, &image)?,
        Command::Rmi { force, images } => return images::remove(context, force, &images),
        Command::Index { command } => indexes::index(context, command)?,
        Command::Profile { command } => return profiles::profile(context, command),
        Command::Cache { command: args::CacheCommand::Drop { image } } => images::cache_drop(context, image)?,
        Command::Mount(args) => mounts::mount(context, &args)?,
        Command::Union { args } => return Ok(union::main(&args, false)),
        Command::Umount { directory } => mounts::unmount(context, &directory)?,
        Command::Metrics { openmetrics } => metrics::metrics(context, openmetrics)?,
        Command::Why { number, list, format, name } => {
            why::why(context, &name, number, list, format.as_deref())?;
        }
        Command::Info { format } => system::info(context, format.as_deref())?,
        Command::Version { format } => system::version(format.as_deref())?,
        Command::Doctor { format } => return system::doctor(context, format.as_deref()),
        Command::System { command: SystemCommand::Reset { force } } => system::reset(context, force)?,
        Command::Demo(args) => return system::demo(&args),
        Command::Bench(args) => return system::bench(context, &args),
    }
    Ok(ExitCode::SUCCESS)
}
