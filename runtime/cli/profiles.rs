//! `lazyrun profile`.

use std::process::ExitCode;

use clap::Parser;
use serde::de::DeserializeOwned;

use super::args::{Cli, Command, ProfileCommand};
use super::{Context, indexes, output, progress, run};
use crate::failure::Failure;
use crate::ipc::indexes::{IndexAction, Pushed};
use crate::ipc::profiles::{PathTouches, ProfileAction};
use crate::ipc::protocol::{PullPolicy, Request};
use lazyrun_index::Digest;

pub(super) fn profile(context: &Context, command: ProfileCommand) -> Result<ExitCode, Failure> {
    match command {
        ProfileCommand::Show { format, image } => show(context, &image, format.as_deref())?,
        ProfileCommand::Build { network, image, command } => {
            return build(context, &network, &image, &command);
        }
        ProfileCommand::Push { format, image } => push(context, &image, format.as_deref())?,
        ProfileCommand::Pull { image } => {
            let digest: Digest = call(context, &image, ProfileAction::Pull)?;
            output::print(&format!("{digest}\n"))?;
        }
        ProfileCommand::Rm { image } => {
            let removed: bool = call(context, &image, ProfileAction::Forget)?;
            if !removed {
                return Err(Failure::new(1, format!("there is no profile of {image} here")));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn call<T: DeserializeOwned>(context: &Context, image: &str, action: ProfileAction) -> Result<T, Failure> {
    let request = Request::Profile { image: context.image(image, PullPolicy::Missing), action };
    context.daemon()?.call(&request, &mut progress::Shown::new(context.progress))
}

fn show(context: &Context, image: &str, format: Option<&str>) -> Result<(), Failure> {
    let touched: Vec<PathTouches> = call(context, image, ProfileAction::Show)?;
    output::rows(
        &touched,
        format,
        &[
            ("AT", |t| format!("{:.3}s", f64::from(t.at_ms) / 1000.0)),
            ("TOUCHED", |t| output::bytes(t.touched)),
            ("SIZE", |t| output::bytes(t.size)),
            ("LOCAL", |t| format!("{}%", (t.local * 100).checked_div(t.touched).unwrap_or(100))),
            ("LAYER", |t| t.layer.to_string()),
            ("PATH", |t| t.path.escape_debug().collect()),
        ],
    )
}

/// As a user would: forgets what is known, runs the container, and what it touched is kept when it ends.
fn build(context: &Context, network: &str, image: &str, command: &[String]) -> Result<ExitCode, Failure> {
    // An image that is not here has no profile to forget.
    let _ = call::<bool>(context, image, ProfileAction::Forget);
    let words = ["lazyrun", "run", "--rm", "--network", network, image].into_iter().map(str::to_owned);
    let cli = Cli::try_parse_from(words.chain(command.iter().cloned()));
    let Ok(Cli { command: Command::Run(args), .. }) = cli else {
        return Err(Failure::daemon(format!("{image:?} is no reference of an image")));
    };
    let code = run::run(context, *args)?;
    let touched: Vec<PathTouches> = call(context, image, ProfileAction::Show)?;
    let bytes: u64 = touched.iter().map(|t| t.touched).sum();
    eprintln!("{} in {} files are touched", output::bytes(bytes), touched.len());
    Ok(code)
}

fn push(context: &Context, image: &str, format: Option<&str>) -> Result<(), Failure> {
    // Without one, only indexes would be pushed.
    let _: Vec<PathTouches> = call(context, image, ProfileAction::Show)?;
    let action = IndexAction::Push { without_profile: false, created: None };
    let pushed: Pushed = indexes::call(context, image, action)?;
    match format {
        Some(format) => output::value(&pushed, Some(format)),
        None => output::print(&format!("{}\n", pushed.digest)),
    }
}
