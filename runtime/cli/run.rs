//! `lazyrun run`.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;

use super::args::RunArgs;
use super::{Context, output, progress};
use crate::container::client::{self, Ending, SessionOptions};
use crate::container::spec::{Network, RunOptions, Volume};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::{
    ImageRequest, NetworkMode, PullPolicy, RegistryOptions, Request, RunRequest, Started,
};
use crate::network::PortMapping;
use crate::registries;

impl Context {
    /// A request for an image with this process's registry settings.
    pub(super) fn image(&self, reference: &str, pull: PullPolicy) -> ImageRequest {
        ImageRequest {
            reference: reference.to_owned(),
            pull,
            registry: self.registry(),
            index: self.index.clone(),
        }
    }

    /// This process's registry settings.
    pub(super) fn registry(&self) -> RegistryOptions {
        RegistryOptions {
            docker_config: registries::login_file(),
            auth_files: registries::more_credential_files(),
            providers: self.providers.clone().map(Box::new),
            insecure: self.insecure.clone(),
            hosts: registries::host_files(&self.hosts_dirs),
            pull_secrets: false,
        }
    }
}

pub(super) fn run(context: &Context, args: RunArgs) -> Result<ExitCode, Failure> {
    let remove = args.rm;
    let detach = args.detach;
    let (interactive, tty) = (args.interactive, args.tty);
    if args.tty && !detach && args.interactive && !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        return Err(Failure::daemon("standard input is not a terminal; leave out -t, or run without a pipe"));
    }
    let request = Request::Run(Box::new(request(context, args)?));
    let mut shown = progress::Shown::new(context.progress);
    let started: Started = context.daemon()?.call(&request, &mut shown)?;
    drop(shown);
    if detach {
        output::print(&format!("{}\n", started.id))?;
        return Ok(ExitCode::SUCCESS);
    }
    let ended = in_session(interactive, tty, |options, out, err| {
        client::attach(&started.socket, false, options, out, err)
    });
    if let Ok(Ending::Detached) = ended {
        return Ok(ExitCode::SUCCESS);
    }
    if remove {
        // The daemon removes it too; asking makes sure that it is gone when this command returns.
        let remove = Request::Remove { container: started.id, force: false };
        if let Some(mut daemon) = context.running_daemon() {
            let _ = daemon.call::<()>(&remove, &mut Quiet);
        }
    }
    exit_code(ended?)
}

/// Connects this process's streams to a session.
pub(super) fn in_session<T>(
    interactive: bool,
    tty: bool,
    session: impl FnOnce(&SessionOptions<'_>, &mut dyn Write, &mut dyn Write) -> T,
) -> T {
    let stdin = std::io::stdin();
    let options =
        SessionOptions { stdin: interactive.then(|| stdin.as_fd()), terminal: tty, signal_proxy: !tty };
    // Unbuffered: what the container writes is seen at once, and prompts have no newline.
    match std::io::stdout().as_fd().try_clone_to_owned() {
        Ok(out) => session(&options, &mut File::from(out), &mut std::io::stderr()),
        Err(_) => session(&options, &mut std::io::stdout(), &mut std::io::stderr()),
    }
}

/// The exit code of a session's end.
pub(super) fn exit_code(ending: Ending) -> Result<ExitCode, Failure> {
    match ending {
        Ending::Exited(code) => Ok(ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))),
        Ending::Detached => Ok(ExitCode::SUCCESS),
        Ending::Lost => Err(Failure::daemon("the container's shim is gone, and the container with it")),
    }
}

fn request(context: &Context, args: RunArgs) -> Result<RunRequest, Failure> {
    let network = match args.network.as_str() {
        "bridge" => NetworkMode::Bridge,
        "host" => NetworkMode::Host,
        "none" => NetworkMode::None,
        other => {
            return Err(Failure::daemon(format!(
                "there is no network {other:?}; choose bridge, host or none"
            )));
        }
    };
    if network != NetworkMode::Bridge && !args.publish.is_empty() {
        return Err(Failure::daemon("ports can only be published with --network bridge"));
    }
    let mut ports = Vec::new();
    for published in &args.publish {
        let parsed = PortMapping::parse(published);
        ports.extend(parsed.map_err(|e| Failure::daemon(format!("{published:?} can't be published: {e}")))?);
    }
    let options = RunOptions {
        args: args.command,
        entrypoint: args.entrypoint.map(|entrypoint| vec![entrypoint]),
        env: environment(&args.env),
        workdir: args.workdir,
        user: args.user,
        hostname: args.hostname,
        network: match network {
            NetworkMode::Host => Network::Host,
            NetworkMode::Bridge | NetworkMode::None => Network::Netns,
        },
        tty: args.tty,
        volumes: args.volume.iter().map(|v| volume(v)).collect::<Result<_, _>>()?,
        memory: args.memory.as_deref().map(memory).transpose()?,
        cpus: args.cpus,
        pids_limit: args.pids_limit,
        privileged: args.privileged,
        read_only: args.read_only,
        cap_add: args.cap_add,
        cap_drop: args.cap_drop,
        ..RunOptions::default()
    };
    Ok(RunRequest {
        image: context.image(&args.image, args.pull),
        name: args.name,
        options,
        network,
        ports,
        remove: args.rm,
        wait_attach: !args.detach,
        open_stdin: args.interactive,
        plan: args.union,
        runtime: args.runtime,
        hydrate: args.hydrate,
    })
}

/// `NAME=VALUE` as it stands; a bare `NAME` takes the caller's value, or is left out when there is none.
pub(super) fn environment(given: &[String]) -> Vec<String> {
    let resolve = |entry: &String| {
        if entry.contains('=') {
            return Some(entry.clone());
        }
        std::env::var(entry).ok().map(|value| format!("{entry}={value}"))
    };
    given.iter().filter_map(resolve).collect()
}

fn volume(text: &str) -> Result<Volume, Failure> {
    let bad = |why: &str| Failure::daemon(format!("the volume {text:?} {why}; write SOURCE:TARGET[:ro]"));
    let mut parts = text.splitn(3, ':');
    let (Some(source), Some(target)) = (parts.next(), parts.next()) else { return Err(bad("has no target")) };
    if !source.starts_with(['/', '.']) {
        return Err(bad("has a source that is no path, and there are no named volumes in this version"));
    }
    if !target.starts_with('/') {
        return Err(bad("needs an absolute target"));
    }
    let source = std::path::absolute(source).map_err(|e| bad(&format!("has a bad source ({e})")))?;
    if !source.exists() {
        // As docker does: a source that isn't there becomes a directory.
        std::fs::create_dir_all(&source).map_err(|e| {
            Failure::daemon(format!("the volume source {} can't be made: {e}", source.display()))
        })?;
    }
    let options: Vec<String> =
        parts.next().map(|o| o.split(',').map(str::to_owned).collect()).unwrap_or_default();
    Ok(Volume { source, destination: target.into(), options })
}

/// Bytes with docker's suffixes b, k, m, g.
fn memory(text: &str) -> Result<i64, Failure> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(Failure::daemon(format!("{text:?} is no amount of memory; write for example 512m"))),
    };
    let value = digits.parse::<f64>().ok().filter(|v| v.is_finite() && *v > 0.0);
    let bytes = value.map(|v| v * f64::from(1u32 << shift)).filter(|v| *v < i64::MAX as f64);
    bytes
        .map(|v| v as i64)
        .ok_or_else(|| Failure::daemon(format!("{text:?} is no amount of memory; write for example 512m")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory() {
        assert_eq!(memory("512m"), Ok(512 << 20));
        assert_eq!(memory("1.5g"), Ok(3 << 29));
        assert_eq!(memory("4096"), Ok(4096));
        assert!(memory("x").is_err() && memory("-1").is_err() && memory("1q").is_err());
    }

    #[test]
    fn volumes() {
        let v = volume("/tmp:/data:ro").expect("volume");
        assert_eq!(
            (v.source, v.destination, v.options),
            ("/tmp".into(), "/data".into(), vec!["ro".to_owned()])
        );
        assert!(volume("/tmp").is_err() && volume("/tmp:data").is_err());
    }
}
