//! `/metrics` over HTTP, on the address that the user asks for.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

use super::text::Format;
use crate::daemon::Daemon;
use crate::failure::Failure;

/// Connections served at a time; more wait in the backlog.
const MAX_CONNECTIONS: usize = 16;
/// A client that takes longer for a request's header is no scraper.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries to listen where somebody else still does.
const RETRY: Duration = Duration::from_secs(2);

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port of one address.
    Tcp(SocketAddr),
    /// A Unix socket, for root only.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err(Failure::daemon(format!(
                    "the metrics address {text:?} is no absolute path; write for example unix:/run/lazyrun/metrics.sock"
                )));
            }
            return Ok(Address::Unix(path.into()));
        }
        text.parse().map(Address::Tcp).map_err(|_| {
            Failure::daemon(format!(
                "the metrics address {text:?} makes no sense; write IP:PORT, for example 127.0.0.1:9618, or unix:PATH"
            ))
        })
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub(super) enum Listener {
    /// On a TCP port.
    Tcp(TcpListener),
    /// On a Unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// Listens; a socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// When the address is taken or not of this machine.
    pub(super) async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => Ok(Listener::Tcp(TcpListener::bind(address).await?)),
            Address::Unix(path) => bind_unix(path).map(Listener::Unix),
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    let stale = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err();
    if stale {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Daemon {
    /// Serves metrics at `address` from now on. A daemon that has taken over from another one serves without, and tries
    /// again, rather than not at all: containers wait for it.
    ///
    /// # Errors
    /// When it can't listen there.
    pub(in crate::daemon) async fn serve_metrics(
        self: &Arc<Self>,
        address: Address,
        took_over: bool,
    ) -> Result<(), Failure> {
        let why = |error: io::Error| {
            Failure::daemon(format!(
                "metrics can't be served at {address}: {error}; choose another --metrics-address"
            ))
        };
        match Listener::bind(&address).await.map_err(why) {
            Ok(listener) => {
                tracing::info!(%address, "metrics are served");
                tokio::spawn(Arc::clone(self).accept_scrapes(listener));
            }
            Err(error) if took_over => {
                tracing::warn!(%error, "metrics wait");
                let this = Arc::clone(self);
                tokio::spawn(async move {
                    let listener = loop {
                        tokio::time::sleep(RETRY).await;
                        if let Ok(listener) = Listener::bind(&address).await {
                            break listener;
                        }
                    };
                    tracing::info!(%address, "metrics are served");
                    this.accept_scrapes(listener).await;
                });
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn accept_scrapes(self: Arc<Self>, listener: Listener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = match &listener {
                Listener::Tcp(listener) => {
                    listener.accept().await.map(|(stream, _)| Box::new(stream) as Box<dyn Stream>)
                }
                Listener::Unix(listener) => {
                    listener.accept().await.map(|(stream, _)| Box::new(stream) as Box<dyn Stream>)
                }
            };
            let Ok(stream) = accepted else {
                // Out of descriptors or the like: a pause lets connections end.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let this = Arc::clone(&self);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(|request| {
                    let this = Arc::clone(&this);
                    async move { Ok::<_, Infallible>(this.answer_scrape(&request).await) }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = served.await {
                    tracing::debug!(%error, "a scrape broke off");
                }
                drop(place);
            });
        }
    }

    async fn answer_scrape<B>(self: &Arc<Self>, request: &Request<B>) -> Response<Full<Bytes>> {
        let plain = |status: StatusCode, text: &'static str| {
            let mut response = Response::new(Full::from(text));
            *response.status_mut() = status;
            response
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/metrics" => {}
            "/" => return plain(StatusCode::OK, "lazyrun: metrics are at /metrics\n"),
            _ => return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n"),
        }
        let format = Format::accepted(request.headers().get(ACCEPT).and_then(|v| v.to_str().ok()));
        match self.blocking(move |this| this.metrics(format)).await {
            Ok(text) => {
                let mut response = Response::new(Full::from(text));
                let kind = HeaderValue::from_static(format.content_type());
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            Err(error) => {
                tracing::warn!(%error, "metrics can't be told");
                plain(StatusCode::INTERNAL_SERVER_ERROR, "see the daemon's log\n")
            }
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let tcp = "[::1]:80".parse::<Address>().expect("an address");
        assert_eq!(tcp.to_string(), "[::1]:80");
        assert_eq!("unix:/a b".parse::<Address>().expect("a path"), Address::Unix("/a b".into()));
        for bad in ["", "9618", ":9618", "localhost:1", "unix:", "unix:relative", "127.0.0.1"] {
            assert!(bad.parse::<Address>().expect_err("no address").message.contains("metrics address"));
        }
    }

    #[tokio::test]
    async fn a_socket_file_of_the_dead_is_replaced_and_one_of_the_living_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let address = Address::Unix(dir.path().join("sock"));
        let first = Listener::bind(&address).await.expect("listen");
        assert_eq!(Listener::bind(&address).await.expect_err("taken").kind(), io::ErrorKind::AddrInUse);
        drop(first);
        Listener::bind(&address).await.expect("listen again");
    }
}
