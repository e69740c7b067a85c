//! The name files of a container: `/etc/resolv.conf` and `/etc/hosts`.

use std::net::IpAddr;
use std::{fs, iter};

/// Name servers of a container when the host names only loopback ones (which the container cannot reach):
/// Cloudflare's and Google's public resolvers.
pub const FALLBACK_NAMESERVERS: [&str; 2] = ["1.1.1.1", "8.8.8.8"];

/// What systemd-resolved itself asks, when `/etc/resolv.conf` only names its stub on 127.0.0.53.
const UPSTREAM_OF_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// The resolv.conf of a container on the bridge, from this host's files: `/etc/resolv.conf`; if that has no
/// usable name server, the one of systemd-resolved; if that has none either, [`FALLBACK_NAMESERVERS`].
#[must_use]
pub fn host_resolv_conf() -> String {
    let main = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    if has_nameserver(&main) {
        return resolv_conf(&main);
    }
    match fs::read_to_string(UPSTREAM_OF_RESOLVED) {
        Ok(text) if has_nameserver(&text) => resolv_conf(&text),
        _ => resolv_conf(&main),
    }
}

/// Makes a container's resolv.conf out of a host's: name servers that a container on the bridge cannot reach
/// (loopback, and IPv6, since the bridge has only IPv4) are left out, [`FALLBACK_NAMESERVERS`] put in if none
/// remains; everything else (search, domain, options, comments) is kept as it is.
#[must_use]
pub fn resolv_conf(host: &str) -> String {
    let mut out = String::with_capacity(host.len() + 64);
    for line in host.lines().filter(|line| nameserver(line).is_none_or(usable)) {
        out.push_str(line);
        out.push('\n');
    }
    if !has_nameserver(host) {
        for server in FALLBACK_NAMESERVERS {
            out.push_str("nameserver ");
            out.push_str(server);
            out.push('\n');
        }
    }
    out
}

fn has_nameserver(text: &str) -> bool {
    text.lines().filter_map(nameserver).any(usable)
}

/// The address of a `nameserver` line.
fn nameserver(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    (words.next()? == "nameserver").then(|| words.next().unwrap_or_default())
}

fn usable(address: &str) -> bool {
    matches!(address.parse(), Ok(IpAddr::V4(ip)) if !ip.is_loopback() && !ip.is_unspecified())
}

/// One line of a hosts file.
#[derive(Debug, Clone)]
pub struct HostEntry {
    /// Address.
    pub ip: IpAddr,
    /// Names it answers to; empty ones and doubles are left out.
    pub names: Vec<String>,
}

/// The hosts file of a container: localhost by IPv4 and IPv6, the usual IPv6 multicast names, then the given
/// entries (first the container's own address with its host name and name, then what `--add-host` says).
#[must_use]
pub fn hosts(entries: &[HostEntry]) -> String {
    let mut out = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for entry in entries {
        let mut names: Vec<&str> = Vec::new();
        for name in &entry.names {
            // A line break in a name would let it write entries of its own.
            if !name.is_empty() && !name.contains(char::is_whitespace) && !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        if !names.is_empty() {
            out.extend(iter::once(entry.ip.to_string()));
            out.push('\t');
            out.push_str(&names.join(" "));
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reachable_nameservers_and_everything_else_stay() {
        let host = "# made by hand\nsearch corp.example\nnameserver 127.0.0.1\nnameserver 10.0.0.2\n\
                    nameserver ::1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\noptions ndots:2 edns0\n";
        assert_eq!(
            resolv_conf(host),
            "# made by hand\nsearch corp.example\nnameserver 10.0.0.2\noptions ndots:2 edns0\n"
        );
    }

    #[test]
    fn fallback_when_nothing_is_reachable() {
        let fallback = "nameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        assert_eq!(resolv_conf(""), fallback);
        assert_eq!(
            resolv_conf("nameserver 127.0.0.53\noptions trust-ad"),
            format!("options trust-ad\n{fallback}")
        );
        assert_eq!(resolv_conf("nameserver\nnameserver junk"), fallback);
        assert!(host_resolv_conf().contains("nameserver "));
    }

    #[test]
    fn hosts_file() {
        let ip = "10.87.0.2".parse().unwrap();
        let names = ["box", "web", "", "box", "evil\n1.2.3.4 bank"].map(str::to_owned).to_vec();
        let text = hosts(&[HostEntry { ip, names }, HostEntry { ip, names: Vec::new() }]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost"));
        assert!(text.ends_with("ip6-allrouters\n10.87.0.2\tbox web\n"), "{text}");
    }
}
