//! HTTP clients, one for each way to connect: their pools hold the connections.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;
use reqwest::{Client, Url};

use super::classify::deepest;
use super::proxy::Proxies;
use super::tls;
use crate::error::FetchError;
use crate::hosts::TlsSettings;

/// Ways to connect that are remembered. The files that say them are few.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// What tells a way to connect from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Way {
    pub(super) tls: TlsSettings,
    /// By https: some authority has to be known.
    pub(super) secure: bool,
    /// To this machine: without a proxy.
    pub(super) local: bool,
    /// Connections of its own where requests would share one (HTTP/2).
    pub(super) apart: bool,
    /// Bound for TCP and TLS handshakes.
    pub(super) connect: Duration,
}

/// The clients.
pub(super) struct Pools {
    user_agent: String,
    proxies: Proxies,
    made: Mutex<LruCache<Way, (u64, Client)>>,
}

/// A client with what tells its pool from a later one of the same way.
pub(super) struct Pooled {
    pub(super) client: Client,
    way: Way,
    number: u64,
}

impl Pools {
    pub(super) fn new(user_agent: String, proxies: Proxies) -> Pools {
        Pools { user_agent, proxies, made: Mutex::new(LruCache::new(CAPACITY)) }
    }

    /// The client for a way to connect.
    ///
    /// # Errors
    /// When its certificates cannot be used.
    pub(super) fn get(&self, way: Way) -> Result<Pooled, FetchError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, client) = match made.get(&way) {
            Some((number, client)) => (*number, client.clone()),
            None => {
                let client = self.build(&way)?;
                made.put(way.clone(), (0, client.clone()));
                (0, client)
            }
        };
        Ok(Pooled { client, way, number })
    }

    /// Another client in place of one whose connections are of no use any more: the next request opens a fresh one.
    /// What is under way on the old ones goes on.
    ///
    /// # Errors
    /// As [`Pools::get`].
    pub(super) fn renew(&self, old: &Pooled) -> Result<Pooled, FetchError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, client) = match made.get(&old.way) {
            // Somebody else was faster.
            Some((number, client)) if *number != old.number => (*number, client.clone()),
            _ => (old.number + 1, self.build(&old.way)?),
        };
        made.put(old.way.clone(), (number, client.clone()));
        Ok(Pooled { client, way: old.way.clone(), number })
    }

    /// The proxy for a URL, without secrets.
    pub(super) fn proxy_shown(&self, url: &Url) -> Option<String> {
        self.proxies.shown(url)
    }

    /// Authorities take tens of milliseconds to load, and a proxy may still be talked to by https.
    fn tls_config(&self, way: &Way) -> Result<rustls::ClientConfig, FetchError> {
        if way.local && !way.secure { tls::unused() } else { tls::config(&way.tls, way.secure) }
    }

    fn build(&self, way: &Way) -> Result<Client, FetchError> {
        let mut builder = Client::builder()
            .user_agent(self.user_agent.clone())
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(way.connect)
            .pool_idle_timeout(Duration::from_secs(60))
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .http2_adaptive_window(true)
            .retry(reqwest::retry::never())
            .tls_backend_preconfigured(self.tls_config(way)?)
            .no_proxy();
        if !way.local {
            let proxies = self.proxies.clone();
            builder = builder.proxy(reqwest::Proxy::custom(move |url| proxies.of(url)));
        }
        let host = "any host".to_owned();
        builder.build().map_err(|e| FetchError::Tls { host, reason: deepest(&e) })
    }
}
