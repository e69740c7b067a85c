//! Through a real, small forward proxy: CONNECT for https, absolute-form requests for plain http.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use crate::common::certs::Authority;
use crate::common::hosts::HostsDir;
use crate::common::registry::{Extra, Registry};
use crate::common::{Bench, TestImage, amd64, no_progress, quick_client, quick_fetch};
use lazyrun_fetcher::{ClientOptions, FetchError, Proxies};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A proxy that leads every name to one address; it closes plain connections after one exchange.
struct Proxy {
    address: SocketAddr,
    /// First lines of what was asked, and whether there were credentials for the proxy.
    log: Arc<Mutex<Vec<(String, bool)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    async fn start(target: String) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&log);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, target.clone(), Arc::clone(&seen)));
            }
        });
        Proxy { address, log, task }
    }

    fn asked(&self) -> Vec<String> {
        self.log.lock().unwrap().iter().map(|(line, _)| line.clone()).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut client: TcpStream, target: String, log: Arc<Mutex<Vec<(String, bool)>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = client.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let line = head.lines().next().unwrap().to_owned();
    let known = head.to_ascii_lowercase().contains("proxy-authorization: basic dtpw");
    log.lock().unwrap().push((line.clone(), known));
    let mut server = TcpStream::connect(&target).await.unwrap();
    if line.starts_with("CONNECT ") {
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    } else {
        // From absolute form to the path, and no second request on the connection.
        let (method, rest) = line.split_once(" http://").unwrap();
        let path = &rest[rest.find('/').unwrap()..];
        let headers = head.split_once("\r\n").unwrap().1;
        let plain = format!("{method} {path}\r\nConnection: close\r\n{headers}");
        server.write_all(plain.as_bytes()).await.unwrap();
    }
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

async fn pull(bench: &Bench, name: &str) -> Result<(), FetchError> {
    let image = bench.client.resolve(&name.parse().unwrap(), &amd64()).await?;
    for layer in &image.layers {
        let blobs = bench.client.blobs(&image.reference);
        let layer = bench.fetcher.ingest(layer, blobs, no_progress()).await?;
        layer.forget().unwrap();
        bench.fetcher.read(&layer, 1000, 10).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn https_goes_through_a_tunnel() {
    let origin = Registry::start().await;
    origin.push(&TestImage::small(3000), "app", "v1").await;
    let authority = Authority::new("the authority");
    let certificate = authority.server(&["registry.example"]);
    let mirror_of = Some(format!("http://{}", origin.address));
    let secured = Registry::start_as(&Extra { tls: Some(&certificate), mirror_of, ..Extra::default() }).await;
    let proxy = Proxy::start(secured.address.clone()).await;
    let hosts = HostsDir::new();
    hosts.write("registry.example:5000", "ca.crt", &authority.pem);
    let proxies = Proxies {
        https: Some(format!("http://u:p@{}", proxy.address)),
        no_proxy: Some("other.example".to_owned()),
        ..Proxies::default()
    };
    let bench = Bench::with(ClientOptions { proxies: proxies.clone(), ..hosts.options() }, quick_fetch());
    pull(&bench, "registry.example:5000/app:v1").await.unwrap();
    let asked = proxy.asked();
    assert!(
        !asked.is_empty() && asked.iter().all(|l| l == "CONNECT registry.example:5000 HTTP/1.1"),
        "{asked:?}"
    );
    assert!(proxy.log.lock().unwrap().iter().all(|(_, known)| *known), "the proxy's password was not given");
    let shown = bench.client.hosts(&"registry.example:5000/app".parse().unwrap()).await.unwrap();
    assert_eq!(shown[0].proxy, Some(format!("http://{}", proxy.address)));

    // Exempt: it is looked for by its name, which does not exist.
    let proxies = Proxies { no_proxy: Some(".example".to_owned()), ..proxies };
    let options = ClientOptions { proxies, retries: 0, ..hosts.options() };
    let error = pull(&Bench::with(options, quick_fetch()), "registry.example:5000/app:v1").await.unwrap_err();
    assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    assert_eq!(proxy.asked().len(), asked.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_goes_in_absolute_form() {
    let origin = Registry::start().await;
    origin.push(&TestImage::small(3010), "app", "v1").await;
    let proxy = Proxy::start(origin.address.clone()).await;
    let toml = "server = \"http://plain.example:5000\"";
    let hosts = HostsDir::with("plain.example:5000", toml);
    let proxies = Proxies { http: Some(proxy.address.to_string()), ..Proxies::default() };
    let bench = Bench::with(ClientOptions { proxies, ..hosts.options() }, quick_fetch());
    pull(&bench, "plain.example:5000/app:v1").await.unwrap();
    let asked = proxy.asked();
    assert!(asked.iter().all(|l| l.starts_with("GET http://plain.example:5000/v2/app/")), "{asked:?}");
    assert!(asked.len() >= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_goes_direct_and_a_proxy_that_is_none_is_refused() {
    let origin = Registry::start().await;
    let name = origin.push(&TestImage::small(3020), "app", "v1").await;
    let proxies = Proxies {
        http: Some("http://127.0.0.1:1".to_owned()),
        https: Some("http://127.0.0.1:1".to_owned()),
        no_proxy: None,
    };
    let bench = Bench::with(ClientOptions { proxies, ..quick_client() }, quick_fetch());
    pull(&bench, &name).await.unwrap();
    let proxies = Proxies { https: Some("socks5://127.0.0.1:1".to_owned()), ..Proxies::default() };
    let refused = lazyrun_fetcher::RegistryClient::new(ClientOptions { proxies, ..quick_client() });
    assert!(matches!(refused, Err(FetchError::Proxy { .. })));
}
