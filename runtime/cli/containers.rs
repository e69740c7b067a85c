//! Commands about containers that exist.

use std::io;
use std::process::ExitCode;

use super::args::{ExecArgs, LogsArgs};
use super::{Context, hydrate, output, run};
use crate::container::client::{self, LogOptions};
use crate::container::proto::ExecProcess;
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::{ContainerPaths, ContainerSummary, Request};

pub(super) fn list(
    context: &Context,
    all: bool,
    quiet: bool,
    lazy: bool,
    format: Option<&str>,
) -> Result<(), Failure> {
    if lazy {
        return hydrate::containers(context, all, format);
    }
    let containers: Vec<ContainerSummary> = match context.running_daemon() {
        Some(mut daemon) => daemon.call(&Request::List { all }, &mut Quiet)?,
        // Without a daemon nothing runs; only `-a` may have something to tell.
        None if all && context.paths.containers().exists() => {
            context.daemon()?.call(&Request::List { all }, &mut Quiet)?
        }
        None => Vec::new(),
    };
    let format = if quiet { Some("{{.ID}}") } else { format };
    output::rows(
        &containers,
        format,
        &[
            ("CONTAINER ID", |c| c.id[..12].to_owned()),
            ("IMAGE", |c| c.image.clone()),
            ("COMMAND", |c| format!("{:?}", shorten(&c.command, 20))),
            ("STATUS", |c| c.status.clone()),
            ("PORTS", |c| c.ports.clone()),
            ("NAMES", |c| c.names.clone()),
        ],
    )
}

fn shorten(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars().take(max - 1).chain(['…']).collect()
}

// Does something to each container; says what went wrong for each, and names on stdout those it worked for.
fn each(
    context: &Context,
    containers: &[String],
    request: impl Fn(String) -> Request,
) -> Result<ExitCode, Failure> {
    let mut code = 0;
    for container in containers {
        match context.daemon()?.call::<()>(&request(container.clone()), &mut Quiet) {
            Ok(()) => output::print(&format!("{container}\n"))?,
            Err(failure) => {
                eprintln!("lazyrun: {failure}");
                code = failure.code;
            }
        }
    }
    Ok(ExitCode::from(code))
}

pub(super) fn stop(context: &Context, timeout_secs: u64, containers: &[String]) -> Result<ExitCode, Failure> {
    each(context, containers, |container| Request::Stop { container, timeout_secs })
}

pub(super) fn kill(context: &Context, signal: &str, containers: &[String]) -> Result<ExitCode, Failure> {
    let signal = parse_signal(signal)?;
    each(context, containers, |container| Request::Kill { container, signal })
}

fn parse_signal(text: &str) -> Result<i32, Failure> {
    crate::daemon::parse_signal(text).ok_or_else(|| Failure::daemon(format!("there is no signal {text:?}")))
}

pub(super) fn remove(context: &Context, force: bool, containers: &[String]) -> Result<ExitCode, Failure> {
    each(context, containers, |container| Request::Remove { container, force })
}

fn locate(context: &Context, container: &str) -> Result<ContainerPaths, Failure> {
    let request = Request::Locate { container: container.to_owned() };
    context.daemon()?.call(&request, &mut Quiet)
}

pub(super) fn exec(context: &Context, args: ExecArgs) -> Result<ExitCode, Failure> {
    let paths = locate(context, &args.container)?;
    if !paths.running {
        return Err(Failure::new(1, format!("container {} is not running", args.container)));
    }
    let process = ExecProcess {
        args: args.command,
        env: run::environment(&args.env),
        cwd: args.workdir,
        user: args.user,
        terminal: args.tty,
        stdin: args.interactive,
        ..ExecProcess::default()
    };
    let ended = run::in_session(args.interactive, args.tty, |options, out, err| {
        client::exec(&paths.socket, &process, options, out, err)
    });
    run::exit_code(ended?)
}

pub(super) fn logs(context: &Context, args: &LogsArgs) -> Result<(), Failure> {
    let paths = locate(context, &args.container)?;
    let options = LogOptions {
        follow: args.follow && paths.running,
        tail: args.tail,
        since: args.since.clone(),
        until: args.until.clone(),
        timestamps: args.timestamps,
    };
    let exit = paths.log.with_file_name("exit.json");
    let ended = || exit.exists();
    client::read_logs(&paths.log, &options, &ended, &mut io::stdout().lock(), &mut io::stderr().lock())?;
    Ok(())
}

pub(super) fn inspect(
    context: &Context,
    format: Option<&str>,
    names: &[String],
) -> Result<ExitCode, Failure> {
    let mut found = Vec::new();
    let mut code = 0;
    for name in names {
        match context
            .daemon()?
            .call::<serde_json::Value>(&Request::Inspect { name: name.clone() }, &mut Quiet)
        {
            Ok(value) => found.push(value),
            Err(failure) => {
                eprintln!("lazyrun: {failure}");
                code = failure.code;
            }
        }
    }
    match format {
        None | Some("json") => output::value(&found, None)?,
        format => output::rows(&found, format, &[])?,
    }
    Ok(ExitCode::from(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        assert_eq!(parse_signal("TERM"), Ok(15));
        assert_eq!(parse_signal("sigkill"), Ok(9));
        assert_eq!(parse_signal("34"), Ok(34));
        assert!(parse_signal("0").is_err() && parse_signal("nope").is_err());
    }
}
