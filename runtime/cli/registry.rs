//! `lazyrun registry`, `login` and `logout`.

use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal, Read, Write as _};

use lazyrun_fetcher::{
    ClientOptions, FetchError, HostReport, Kept, Reference, RegistryClient, erase_login, save_login,
};

use super::args::{LoginArgs, RegistryCommand};
use super::{Context, output};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::{RegistryOptions, Request};
use crate::registries;

/// Longest password or user name that is read.
const MAX_INPUT: u64 = 64 << 10;

pub(super) fn registry(context: &Context, command: RegistryCommand) -> Result<(), Failure> {
    match command {
        RegistryCommand::Show { format, name } => show(context, &name, format.as_deref()),
    }
}

fn show(context: &Context, name: &str, format: Option<&str>) -> Result<(), Failure> {
    let host = host_named(name);
    let reference: Reference = match host {
        Some(host) => of_host(host)?,
        None => name.parse().map_err(|e: lazyrun_fetcher::ReferenceError| Failure::daemon(e.to_string()))?,
    };
    let mut reports = hosts(context, &reference)?;
    if host.is_some() {
        for report in &mut reports {
            let path = report.repository.strip_suffix(ANY).unwrap_or(&report.repository);
            report.repository = path.trim_end_matches('/').to_owned();
        }
    } else if is_short(name)
        && let Some((names, file)) = wait(client(&context.registry())?.short_names(&reference))?
    {
        let (names, file) = (names.join(", "), file.display());
        eprintln!("lazyrun: {file} lets short names mean {names}; here they always mean docker.io");
    }
    match format {
        Some(format) => output::value(&reports, Some(format)),
        None => output::print(&described(&reports)),
    }
}

/// The hosts that would be asked for an image.
pub(super) fn hosts(context: &Context, reference: &Reference) -> Result<Vec<HostReport>, Failure> {
    let settings = context.registry();
    match context.running_daemon() {
        // It may have other proxies, and knows which mirrors are down.
        Some(mut daemon) => {
            let request = Request::Hosts { reference: reference.to_string(), registry: settings };
            daemon.call(&request, &mut Quiet)
        }
        None => wait(client(&settings)?.hosts(reference)),
    }
}

/// The path that stands for any image of a registry.
const ANY: &str = "image";

/// Whether a name is a registry's rather than an image's: it has no path, and a host's looks.
fn host_named(name: &str) -> Option<&str> {
    let name = name.trim_end_matches('/');
    let host = name.split(':').next().unwrap_or_default();
    let looks = host.contains('.') || host == "localhost" || name.starts_with('[');
    (looks && !name.contains(['/', '@'])).then_some(name)
}

/// Whether an image's name leaves out its registry.
fn is_short(name: &str) -> bool {
    name.split_once('/').is_none_or(|(first, _)| !first.contains(['.', ':']) && first != "localhost")
}

fn of_host(host: &str) -> Result<Reference, Failure> {
    format!("{host}/{ANY}")
        .parse()
        .ok()
        .filter(|r: &Reference| r.registry != "docker.io" || host.contains("docker.io"))
        .ok_or_else(|| {
            Failure::daemon(format!("{host:?} is not the host of a registry, with or without a port"))
        })
}

fn described(reports: &[HostReport]) -> String {
    let mut text = String::new();
    for (i, report) in reports.iter().enumerate() {
        let _ = writeln!(text, "{}. {} ({})", i + 1, report.url, report.role);
        for (name, value) in lines(report) {
            let _ = writeln!(text, "   {name:<12} {value}");
        }
    }
    text
}

fn lines(report: &HostReport) -> Vec<(&'static str, String)> {
    let none = || "none".to_owned();
    let list = |names: &[String]| if names.is_empty() { none() } else { names.join(", ") };
    let paths = |paths: &[std::path::PathBuf]| {
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    };
    let from = report.source.as_ref();
    let mut repository = report.repository.clone();
    if let Some(namespace) = &report.namespace {
        let _ = write!(repository, " (ns={namespace})");
    }
    let mut tls = report.tls.scheme.clone();
    if tls != "http" {
        tls += if report.tls.verify { ", certificate checked" } else { ", certificate NOT checked" };
    }
    for (what, files) in [("authorities", &report.tls.ca), ("shows", &report.tls.client)] {
        if !files.is_empty() {
            let _ = write!(tls, ", {what} {}", paths(files));
        }
    }
    if let Some(source) = &report.tls.source {
        let _ = write!(tls, " (from {})", source.display());
    }
    let login = match (&report.credential, &report.credential_error) {
        (Some(found), _) => {
            let user = found.user.as_ref().map_or_else(String::new, |user| format!(" of {user}"));
            format!("{}{user} from {}", found.kind, found.source)
        }
        (None, Some(error)) => error.clone(),
        (None, None) => none(),
    };
    let mut lines = vec![
        ("named by", from.map_or_else(|| "the reference".to_owned(), |path| path.display().to_string())),
        ("may", list(&report.capabilities)),
        ("repository", repository),
        ("connection", tls),
        ("login", login),
        ("proxy", report.proxy.clone().unwrap_or_else(none)),
    ];
    if !report.headers.is_empty() {
        lines.push(("headers", list(&report.headers)));
    }
    if report.resting {
        lines.push(("state", "left out for a while: it could not be reached".to_owned()));
    }
    lines
}

pub(super) fn login(context: &Context, args: &LoginArgs) -> Result<(), Failure> {
    let registry = registry_named(&args.registry)?;
    let reference = of_host(&registry)?;
    let file = registries::login_file()
        .ok_or_else(|| Failure::daemon("nobody says where logins are kept; set HOME or DOCKER_CONFIG"))?;
    let user = match &args.username {
        Some(user) => user.clone(),
        None if args.password_stdin => {
            return Err(Failure::daemon(
                "--password-stdin needs the user's name too: give it with --username",
            ));
        }
        None => ask("Username: ", true)?,
    };
    let password = match (&args.password, args.password_stdin) {
        (Some(password), _) => {
            eprintln!("lazyrun: a password on the command line can be seen by others; use --password-stdin");
            password.clone()
        }
        (None, true) => from_stdin()?,
        (None, false) => ask("Password: ", false)?,
    };
    if user.is_empty() || password.is_empty() {
        return Err(Failure::daemon("user name and password must not be empty"));
    }
    // Docker keeps both with a colon between.
    if user.contains(':') {
        return Err(Failure::daemon("a user name cannot hold a colon"));
    }
    wait(client(&context.registry())?.check_login(&reference, &user, &password))
        .map_err(|failure| Failure::new(1, failure.message))?;
    match wait(save_login(&file, &registry, &user, &password))? {
        Kept::File(file) => {
            eprintln!("lazyrun: the password is kept in {}, readable by you only", file.display());
        }
        Kept::Helper(program) => eprintln!("lazyrun: the password is kept by {program}"),
    }
    output::print("Login Succeeded\n")
}

pub(super) fn logout(registry: &str) -> Result<(), Failure> {
    let registry = registry_named(registry)?;
    let known = match registries::login_file() {
        Some(file) => wait(erase_login(&file, &registry))?,
        None => false,
    };
    output::print(&if known {
        format!("Removing login credentials for {registry}\n")
    } else {
        format!("Not logged in to {registry}\n")
    })
}

/// A registry as people write it, perhaps as a URL; all names of Docker Hub are one.
fn registry_named(text: &str) -> Result<String, Failure> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let host = rest.split('/').next().unwrap_or_default();
    Ok(of_host(host)?.registry)
}

fn client(settings: &RegistryOptions) -> Result<RegistryClient, Failure> {
    let options = ClientOptions {
        insecure_registries: settings.insecure.clone(),
        credential_files: settings.docker_config.iter().chain(&settings.auth_files).cloned().collect(),
        credential_providers: settings.providers.as_deref().cloned(),
        hosts: settings.hosts.clone(),
        proxies: registries::proxies(),
        ..ClientOptions::default()
    };
    RegistryClient::new(options).map_err(|e| Failure::daemon(e.to_string()))
}

/// Runs something that waits for the network, in this process.
fn wait<T>(job: impl Future<Output = Result<T, FetchError>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::daemon(format!("no thread for the network: {e}")))?;
    runtime.block_on(job).map_err(|e| Failure::daemon(e.to_string()))
}

fn from_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(MAX_INPUT).read_to_string(&mut text);
    read.map_err(|e| Failure::daemon(format!("the password can't be read from standard input: {e}")))?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}

/// Asks at the terminal; a password is not shown while it is typed.
fn ask(question: &str, shown: bool) -> Result<String, Failure> {
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::daemon("there is no terminal to ask at; give --username and --password-stdin"));
    }
    let failed = |e: std::io::Error| Failure::daemon(format!("the terminal can't be read: {e}"));
    eprint!("{question}");
    std::io::stderr().flush().map_err(failed)?;
    let before = tcgetattr(&stdin).map_err(|e| failed(e.into()))?;
    if !shown {
        let mut hidden = before.clone();
        hidden.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &hidden).map_err(|e| failed(e.into()))?;
    }
    let mut line = String::new();
    let read = stdin.lock().take(MAX_INPUT).read_line(&mut line);
    if !shown {
        let _ = tcsetattr(&stdin, SetArg::TCSAFLUSH, &before);
        eprintln!();
    }
    read.map_err(failed)?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_told_from_images() {
        for name in ["docker.io", "r.example:5000", "localhost:5000", "127.0.0.1", "[::1]:5000", "ghcr.io/"] {
            assert!(host_named(name).is_some(), "{name}");
        }
        for name in ["redis", "redis:7", "debian:12.1", "r.example/app", "localhost/app"] {
            assert!(host_named(name).is_none(), "{name}");
        }
        for (text, registry) in [
            ("https://index.docker.io/v1/", "docker.io"),
            ("docker.io", "docker.io"),
            ("http://r.example:5000", "r.example:5000"),
        ] {
            assert_eq!(registry_named(text).expect("a registry"), registry);
        }
        assert!(registry_named("nohost").is_err() && registry_named("").is_err());
        assert!(is_short("redis:7") && is_short("a/b") && !is_short("localhost/a") && !is_short("r.io/a"));
    }
}
