//! `lazyrun config`.

use std::fmt::Write as _;
use std::process::ExitCode;

use lazyrun_fetcher::{Reference, ReferenceError};

use super::args::ConfigCommand;
use super::config_args::CheckArgs;
use super::{Context, output, registry};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::{Info, Request};
use crate::preflight::{self, Level, Options, Row};

pub(super) fn config(context: &Context, command: ConfigCommand) -> Result<ExitCode, Failure> {
    match command {
        ConfigCommand::Check(args) => check(context, args),
    }
}

fn check(context: &Context, args: CheckArgs) -> Result<ExitCode, Failure> {
    let daemon = context.running_daemon();
    let info = daemon.and_then(|mut daemon| daemon.call::<Info>(&Request::Info, &mut Quiet).ok());
    let options = Options {
        containerd_config: args.containerd_config,
        containerd_address: args.containerd_address.as_deref().map(crate::containerd::socket),
        address: args.address.as_deref().map(crate::containerd::socket),
        root: context.paths.root().to_owned(),
        daemon: info.map(|info| info.daemon_pid).filter(|pid| *pid > 0),
        registry: context.registry(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::daemon(format!("sockets can't be asked: {e}")))?;
    let mut rows = runtime.block_on(preflight::check(&options));
    for image in &args.image {
        let reference: Result<Reference, _> = image.parse();
        let hosts = reference
            .map_err(|e: ReferenceError| e.to_string())
            .and_then(|reference| registry::hosts(context, &reference).map_err(|f| f.message));
        rows.extend(preflight::check_image(image, hosts));
    }
    match args.format.as_deref() {
        None => output::print(&described(&rows))?,
        format => output::rows(
            &rows,
            format,
            &[
                ("LEVEL", |row: &Row| row.level.to_string()),
                ("WHAT", |row| row.what.clone()),
                ("WHY", |row| row.why.clone()),
                ("TODO", |row| row.todo.clone()),
            ],
        )?,
    }
    let failed = rows.iter().any(|row| row.level == Level::Error);
    Ok(ExitCode::from(u8::from(failed)))
}

/// For people: what is to be done stands below what was found.
fn described(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let _ = writeln!(text, "{:<9}{}: {}", row.level, row.what, row.why);
        if !row.todo.is_empty() {
            let _ = writeln!(text, "{:<9}-> {}", "", row.todo);
        }
    }
    let count = |level: Level| rows.iter().filter(|row| row.level == level).count();
    let _ = writeln!(text, "{} errors, {} warnings", count(Level::Error), count(Level::Warning));
    text
}
