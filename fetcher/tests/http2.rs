//! HTTP/2 servers that turn requests away: refused streams and GOAWAY.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::certs::Authority;
use crate::common::hosts::HostsDir;
use crate::common::server::{Seen, serve};
use crate::common::{Bench, TestImage, TestLayer, amd64, no_progress, quick_fetch, tar};
use bytes::Bytes;
use h2::Reason;
use h2::server::SendResponse;
use http_body_util::BodyExt as _;
use hyper::Request;
use lazyrun_fetcher::ClientOptions;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// What becomes of a request.
#[derive(Clone, Copy)]
enum Do {
    Serve,
    /// RST_STREAM with REFUSED_STREAM; the connection stays.
    Refuse,
    /// The answer, and a GOAWAY after which the connection ends in order.
    ServeLast,
    /// GOAWAY without an answer, and the connection is closed.
    Leave,
}

/// A registry that speaks HTTP/2 over TLS and follows a rule: what to do with the n-th request of a connection.
struct Http2 {
    port: u16,
    connections: Arc<AtomicUsize>,
    turned_away: Arc<AtomicUsize>,
    hosts: HostsDir,
    task: tokio::task::JoinHandle<()>,
}

impl Http2 {
    async fn start(image: &TestImage, rule: impl Fn(usize) -> Do + Send + Sync + 'static) -> Http2 {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority = Authority::new("http2");
        let signed = authority.server(&["127.0.0.1"]);
        let chain = vec![CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap();
        let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let hosts = HostsDir::new();
        hosts.write(&format!("127.0.0.1:{port}"), "ca.crt", &authority.pem);
        let (connections, turned_away) = (Arc::default(), Arc::default());
        let (count, away) = (Arc::clone(&connections), Arc::clone(&turned_away));
        let (image, rule) = (Arc::new(image.clone()), Arc::new(rule));
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                AtomicUsize::fetch_add(&count, 1, Ordering::SeqCst);
                let (acceptor, image) = (acceptor.clone(), Arc::clone(&image));
                let (rule, away) = (Arc::clone(&rule), Arc::clone(&away));
                tokio::spawn(async move { connection(socket, &acceptor, image, &*rule, &away).await });
            }
        });
        Http2 { port, connections, turned_away, hosts, task }
    }

    /// Resolves, streams and reads lazily, several parts at once.
    async fn everything(&self, image: &TestImage, options: ClientOptions) {
        let bench = Bench::with(options, quick_fetch());
        let resolved = bench.resolve(&format!("127.0.0.1:{}/app:v1", self.port)).await;
        let blobs = bench.client.blobs(&resolved.reference);
        let layer = bench.fetcher.ingest(&resolved.layers[0], blobs, no_progress()).await.unwrap();
        layer.forget().unwrap();
        let tar = Arc::new(image.layers[0].tar.clone());
        let mut readers = tokio::task::JoinSet::new();
        for i in 0..6usize {
            let (fetcher, layer, tar) = (bench.fetcher.clone(), Arc::clone(&layer), Arc::clone(&tar));
            readers.spawn(async move {
                let at = i * 280_000;
                let bytes = fetcher.read(&layer, at as u64, 1000).await.unwrap();
                assert!(bytes == tar[at..at + 1000], "wrong bytes at {at}");
            });
        }
        while let Some(done) = readers.join_next().await {
            done.unwrap();
        }
        bench.client.resolve(&resolved.reference, &amd64()).await.unwrap();
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn connection(
    socket: TcpStream,
    acceptor: &TlsAcceptor,
    image: Arc<TestImage>,
    rule: &(dyn Fn(usize) -> Do + Send + Sync),
    away: &AtomicUsize,
) {
    let Ok(stream) = acceptor.accept(socket).await else { return };
    let Ok(mut h2) = h2::server::handshake(stream).await else { return };
    let mut number = 0;
    while let Some(Ok((request, mut respond))) = h2.accept().await {
        number += 1;
        match rule(number) {
            Do::Serve => drop(tokio::spawn(answer(request, respond, Arc::clone(&image)))),
            Do::ServeLast => {
                h2.graceful_shutdown();
                tokio::spawn(answer(request, respond, Arc::clone(&image)));
            }
            Do::Refuse => {
                away.fetch_add(1, Ordering::SeqCst);
                respond.send_reset(Reason::REFUSED_STREAM);
            }
            Do::Leave => {
                away.fetch_add(1, Ordering::SeqCst);
                h2.abrupt_shutdown(Reason::NO_ERROR);
            }
        }
    }
}

async fn answer(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>, image: Arc<TestImage>) {
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        headers: request.headers().clone(),
        body: Bytes::new(),
        before: 0,
    };
    let (head, body) = serve(&image, &seen).into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let Ok(mut stream) = respond.send_response(hyper::Response::from_parts(head, ()), false) else { return };
    let _ = stream.send_data(body, true);
}

fn image(seed: u64) -> TestImage {
    TestImage::new(vec![TestLayer::gzip(tar(seed, 30, 60_000))])
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_streams_go_over_a_fresh_connection() {
    let image = image(4000);
    let server = Http2::start(&image, |n| if n <= 2 { Do::Serve } else { Do::Refuse }).await;
    // Without any other repetition.
    let options = ClientOptions { retries: 0, ..server.hosts.options() };
    server.everything(&image, options).await;
    assert!(server.turned_away.load(Ordering::SeqCst) > 0);
    assert!(server.connections.load(Ordering::SeqCst) > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_ends_in_order_costs_nothing() {
    let image = image(4010);
    let server = Http2::start(&image, |n| if n < 3 { Do::Serve } else { Do::ServeLast }).await;
    let options = server.hosts.options();
    server.everything(&image, options).await;
    assert!(server.connections.load(Ordering::SeqCst) > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_left_is_replaced() {
    let image = image(4020);
    let server = Http2::start(&image, |n| if n <= 2 { Do::Serve } else { Do::Leave }).await;
    server.everything(&image, server.hosts.options()).await;
    assert!(server.turned_away.load(Ordering::SeqCst) > 0);
    assert!(server.connections.load(Ordering::SeqCst) > 1);
}
