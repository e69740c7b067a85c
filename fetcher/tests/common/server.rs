//! An HTTP server that does exactly what a test wants, in this process.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::TestImage;

pub type Body = BoxBody<Bytes, io::Error>;
pub type Reply = Response<Body>;

/// A request as the handler sees it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// How many requests with this path came before.
    pub before: usize,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }

    /// The wanted byte range, end exclusive.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
    }

    pub fn is_blob(&self) -> bool {
        self.path.contains("/blobs/")
    }
}

/// Running until dropped.
pub struct Server {
    pub address: SocketAddr,
    log: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Vec::<Seen>::new()));
        let (handler, seen) = (Arc::new(handler), Arc::clone(&log));
        let task = tokio::spawn(async move {
            loop {
                let Ok((socket, _)) = listener.accept().await else { return };
                let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                    async move {
                        let (head, body) = request.into_parts();
                        let body =
                            body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                        let path = head.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
                        let one = {
                            let mut log = seen.lock().unwrap();
                            let before = log.iter().filter(|s| s.path == path).count();
                            let one = Seen {
                                method: head.method.to_string(),
                                path,
                                headers: head.headers,
                                body,
                                before,
                            };
                            log.push(one.clone());
                            one
                        };
                        Ok::<_, Infallible>(handler(&one))
                    }
                });
                tokio::spawn(async move {
                    let connection = hyper::server::conn::http1::Builder::new();
                    // A broken body ends the connection with an error: that is the point.
                    let _ = connection.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Server { address, log, task }
    }

    pub fn log(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    pub fn count(&self, filter: impl Fn(&Seen) -> bool) -> usize {
        self.log().iter().filter(|s| filter(s)).count()
    }

    pub fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

pub fn status(code: u16) -> Reply {
    Response::builder().status(code).body(full("")).unwrap()
}

/// A body that announces `bytes.len()` bytes, sends the first `sent` of them and breaks.
pub fn broken(bytes: &Bytes, sent: usize) -> Body {
    let pieces = vec![Ok(Frame::data(bytes.slice(..sent))), Err(io::Error::other("broken on purpose"))];
    // The pause lets the first piece leave before the connection breaks.
    let slow = stream::iter(pieces).then(|piece| async {
        tokio::task::yield_now().await;
        piece
    });
    BodyExt::boxed(StreamBody::new(slow))
}

/// A body that sends the first `sent` bytes and then nothing, for ever.
pub fn stalled(bytes: &Bytes, sent: usize) -> Body {
    let first = stream::iter([Ok(Frame::data(bytes.slice(..sent)))]);
    BodyExt::boxed(StreamBody::new(first.chain(stream::pending::<Result<Frame<Bytes>, io::Error>>())))
}

/// What a good registry answers; ranges included.
pub fn serve(image: &TestImage, seen: &Seen) -> Reply {
    if seen.path.contains("/manifests/") {
        return Response::builder()
            .header("content-type", "application/vnd.oci.image.manifest.v1+json")
            .header("docker-content-digest", image.digest().to_string())
            .body(full(image.manifest.clone()))
            .unwrap();
    }
    let digest = seen.path.rsplit('/').next().unwrap_or_default();
    let digest = digest.split('?').next().unwrap_or_default();
    image.blob(digest).map_or_else(|| status(404), |blob| blob_reply(seen, &blob))
}

/// A blob or the range of it that was asked for.
pub fn blob_reply(seen: &Seen, blob: &Bytes) -> Reply {
    match seen.range() {
        Some((start, end)) => Response::builder()
            .status(206)
            .header("content-range", format!("bytes {start}-{}/{}", end - 1, blob.len()))
            .body(full(blob.slice(start..end.min(blob.len()))))
            .unwrap(),
        None => Response::new(full(blob.clone())),
    }
}

/// `blob_reply` with another body: `change` gets the bytes that would be sent.
pub fn with_body(seen: &Seen, blob: &Bytes, change: impl FnOnce(&Bytes) -> Body) -> Reply {
    let wanted = seen.range().map_or_else(|| blob.clone(), |(s, e)| blob.slice(s..e));
    let (mut head, _) = blob_reply(seen, blob).into_parts();
    head.headers.insert("content-length", wanted.len().into());
    Response::from_parts(head, change(&wanted))
}
