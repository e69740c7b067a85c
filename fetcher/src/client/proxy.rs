//! Proxies for registries, by the rules of curl and Go: one for each scheme, and hosts that need none.

use std::fmt;
use std::net::IpAddr;

use reqwest::Url;
use serde::{Deserialize, Serialize};

use crate::error::FetchError;
use crate::hosts::is_loopback;

/// Which proxies to use. Loopback is always reached without.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Proxies {
    /// URL of the proxy for plain http (`HTTP_PROXY`); without a scheme it is spoken to in plain http.
    pub http: Option<String>,
    /// URL of the proxy for https (`HTTPS_PROXY`).
    pub https: Option<String>,
    /// Hosts that are reached without (`NO_PROXY`): `*`, names (with all below them), addresses, networks (CIDR), each
    /// perhaps with a port; separated by commas.
    pub no_proxy: Option<String>,
}

/// User and password of a proxy are secrets.
impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |url: &Option<String>| url.as_deref().map(redacted);
        f.debug_struct("Proxies")
            .field("http", &shown(&self.http))
            .field("https", &shown(&self.https))
            .field("no_proxy", &self.no_proxy)
            .finish()
    }
}

impl Proxies {
    /// The proxy that a request to `url` goes through.
    pub(crate) fn of(&self, url: &Url) -> Option<Url> {
        let proxy = match url.scheme() {
            "https" => &self.https,
            _ => &self.http,
        };
        let proxy = proxy.as_deref().filter(|p| !p.is_empty())?;
        if is_loopback(url) || self.is_exempt(url) {
            return None;
        }
        parse(proxy)
    }

    /// As [`Proxies::of`], without user and password, to be shown.
    pub(crate) fn shown(&self, url: &Url) -> Option<String> {
        self.of(url).map(|proxy| redacted(proxy.as_str()))
    }

    /// The same without users and passwords.
    #[must_use]
    pub fn without_secrets(&self) -> Proxies {
        let shown = |url: &Option<String>| url.as_deref().map(redacted);
        Proxies { http: shown(&self.http), https: shown(&self.https), no_proxy: self.no_proxy.clone() }
    }

    /// Whether the proxies can be used.
    pub(super) fn check(&self) -> Result<(), FetchError> {
        let given = [&self.http, &self.https].into_iter().flatten().filter(|url| !url.is_empty());
        match given.into_iter().find(|url| parse(url).is_none()) {
            Some(url) => Err(FetchError::Proxy { url: redacted(url) }),
            None => Ok(()),
        }
    }

    fn is_exempt(&self, url: &Url) -> bool {
        let Some(list) = &self.no_proxy else { return false };
        let host = url.host_str().unwrap_or_default().to_ascii_lowercase();
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(&host);
        let host = host.strip_suffix('.').unwrap_or(host);
        let port = url.port_or_known_default();
        list.split(',').map(str::trim).filter(|e| !e.is_empty()).any(|entry| covers(entry, host, port))
    }
}

/// Whether an entry of the list means this host.
fn covers(entry: &str, host: &str, port: Option<u16>) -> bool {
    if entry == "*" {
        return true;
    }
    let entry = entry.to_ascii_lowercase();
    let address = host.parse::<IpAddr>().ok();
    if let Some((network, bits)) = entry.split_once('/') {
        return match (network.parse().ok(), bits.parse().ok(), address) {
            (Some(network), Some(bits), Some(address)) => is_within(address, network, bits),
            _ => false,
        };
    }
    if let (Ok(one), Some(address)) = (entry.parse::<IpAddr>(), address) {
        return one == address;
    }
    // A port may follow; an IPv6 address with one stands in brackets.
    let (name, wanted) = match entry.rsplit_once(':') {
        Some((name, digits))
            if digits.parse::<u16>().is_ok() && (!name.contains(':') || name.ends_with(']')) =>
        {
            (name, digits.parse().ok())
        }
        _ => (entry.as_str(), None),
    };
    if wanted.is_some() && wanted != port {
        return false;
    }
    let name = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    let name = name.strip_prefix('*').unwrap_or(name);
    match name.strip_prefix('.') {
        Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
        None => host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')),
    }
}

fn is_within(address: IpAddr, network: IpAddr, bits: u32) -> bool {
    let cut = |value: u128, width: u32| value.checked_shr(width - bits).unwrap_or(0);
    match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(n)) if bits <= 32 => {
            cut(u32::from(a).into(), 32) == cut(u32::from(n).into(), 32)
        }
        (IpAddr::V6(a), IpAddr::V6(n)) if bits <= 128 => cut(a.into(), 128) == cut(n.into(), 128),
        _ => false,
    }
}

fn parse(proxy: &str) -> Option<Url> {
    let whole = if proxy.contains("://") { proxy.to_owned() } else { format!("http://{proxy}") };
    Url::parse(&whole).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}

/// The URL of a proxy without user and password.
fn redacted(proxy: &str) -> String {
    let Some(mut shown) = parse(proxy) else {
        let scheme = proxy.split_once("://").map_or("", |(scheme, _)| scheme);
        return format!("{scheme}://…");
    };
    let _ = (shown.set_username(""), shown.set_password(None));
    shown.to_string().trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(no_proxy: &str, url: &str) -> Option<String> {
        let proxies = Proxies {
            http: Some("p.example:3128".to_owned()),
            https: Some("http://u:secret@s.example:3128".to_owned()),
            no_proxy: Some(no_proxy.to_owned()),
        };
        proxies.shown(&Url::parse(url).unwrap())
    }

    #[test]
    fn schemes_have_their_proxies_and_loopback_none() {
        assert_eq!(of("", "http://a/").as_deref(), Some("http://p.example:3128"));
        assert_eq!(of("", "https://a/").as_deref(), Some("http://s.example:3128"));
        for local in ["http://127.0.0.1:5000/", "https://localhost/", "http://[::1]:5000/"] {
            assert_eq!(of("", local), None);
        }
    }

    #[test]
    fn exempt_hosts_are_found_as_go_finds_them() {
        let list = "foo.example, .bar.example,*.star.example,10.0.0.0/8,192.0.2.7,port.example:5000,fe80::/10,[::2]:9";
        for url in [
            "https://foo.example/",
            "https://a.foo.example/",
            "https://FOO.example./",
            "https://a.bar.example/",
            "https://a.star.example/",
            "https://10.255.0.1/",
            "https://192.0.2.7:5000/",
            "https://port.example:5000/",
            "https://[fe80::1]/",
            "http://[::2]:9/",
        ] {
            assert_eq!(of(list, url), None, "{url}");
        }
        for url in [
            "https://xfoo.example/",
            "https://bar.example/",
            "https://11.0.0.1/",
            "https://port.example/",
            "https://[::2]:8/",
        ] {
            assert!(of(list, url).is_some(), "{url}");
        }
        assert_eq!(of("*", "https://anything/"), None);
    }

    #[test]
    fn what_is_no_http_proxy_is_refused() {
        for (url, ok) in
            [("socks5://u:secret@p:1080", false), ("http://p", true), ("p:3128", true), ("", true)]
        {
            let proxies = Proxies { https: Some(url.to_owned()), ..Proxies::default() };
            let checked = proxies.check();
            assert_eq!(checked.is_ok(), ok, "{url}");
            assert!(!format!("{checked:?} {proxies:?}").contains("secret"));
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let proxies = Proxies { https: Some("http://u:secret@p".to_owned()), ..Proxies::default() };
        let shown = format!("{proxies:?} {:?}", proxies.without_secrets().https);
        assert!(!shown.contains("secret") && shown.contains("http://p"), "{shown}");
    }
}
