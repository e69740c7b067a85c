//! The hosts that would be asked for an image, and as whom.

use lazyrun_fetcher::HostReport;

use super::Rows;

pub(super) fn check(image: &str, hosts: Result<Vec<HostReport>, String>, rows: &mut Rows) {
    let what = format!("image {image}");
    let hosts = match hosts {
        Ok(hosts) => hosts,
        Err(error) => {
            rows.error(&what, error, "correct the settings; `lazyrun registry show` tells which count");
            return;
        }
    };
    let can = |need: &str| hosts.iter().any(|host| host.capabilities.iter().any(|can| can == need));
    for need in ["resolve", "pull"] {
        if !can(need) {
            rows.error(
                &what,
                format!("no host may be asked to {need}"),
                format!("add {need:?} to the capabilities of a host in its hosts.toml"),
            );
        }
    }
    for (i, host) in hosts.iter().enumerate() {
        let place = format!("{}. {} ({})", i + 1, host.url, host.role);
        if let Some(error) = &host.credential_error {
            rows.error(&what, format!("{place}: {error}"), "correct it, or take the credential away");
            continue;
        }
        let login = host.credential.as_ref().map_or_else(
            || "without credentials".to_owned(),
            |found| {
                let user = found.user.as_ref().map_or_else(String::new, |user| format!(" of {user}"));
                format!("with the {}{user} from {}", found.kind, found.source)
            },
        );
        rows.ok(&what, format!("{place}, {login}"));
        if host.tls.scheme != "http" && !host.tls.verify {
            rows.warning(
                &what,
                format!("{place}: its certificate is not checked"),
                "give its authority with `ca` in hosts.toml instead of skipping the check",
            );
        }
        if host.resting {
            rows.warning(&what, format!("{place}: it could not be reached lately and is left out"), "");
        }
    }
}
