//! Real registries behind TLS with an authority of their own, client certificates, and a real pull-through mirror.

use std::sync::Arc;

use crate::common::certs::Authority;
use crate::common::hosts::HostsDir;
use crate::common::registry::{Extra, Registry};
use crate::common::{Bench, TestImage, amd64, no_progress, quick_fetch};
use lazyrun_fetcher::{ClientOptions, FetchError, Layer};

/// A registry that has the image, and one in front of it that speaks TLS and is a mirror of it.
struct Secured {
    origin: Registry,
    secured: Registry,
}

impl Secured {
    /// Lets in clients with a certificate of `clients`, if given.
    async fn start(server: &Authority, clients: Option<&Authority>) -> Secured {
        let origin = Registry::start().await;
        let certificate = server.server(&["127.0.0.1", "registry.example"]);
        let extra =
            Extra { tls: Some(&certificate), clients, mirror_of: Some(format!("http://{}", origin.address)) };
        let secured = Registry::start_as(&extra).await;
        Secured { origin, secured }
    }

    async fn push(&self, image: &TestImage) -> String {
        self.origin.push(image, "team/app", "v1").await;
        format!("{}/team/app:v1", self.secured.address)
    }
}

async fn pull(options: ClientOptions, name: &str) -> Result<Vec<Arc<Layer>>, FetchError> {
    let bench = Bench::with(options, quick_fetch());
    let image = bench.client.resolve(&name.parse().unwrap(), &amd64()).await?;
    let mut layers = Vec::new();
    for layer in &image.layers {
        let blobs = bench.client.blobs(&image.reference);
        layers.push(bench.fetcher.ingest(layer, blobs, no_progress()).await?);
    }
    Ok(layers)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_of_its_own_as_docker_and_containerd_have_it() {
    let (authority, other) = (Authority::new("the authority"), Authority::new("another"));
    let registry = Secured::start(&authority, None).await;
    let name = registry.push(&TestImage::small(2000)).await;
    let address = &registry.secured.address;

    // Docker's way: the file is in the registry's directory.
    let hosts = HostsDir::new();
    hosts.write(address, "ca.crt", &other.pem);
    let error = pull(hosts.options(), &name).await.unwrap_err();
    assert!(matches!(error, FetchError::Tls { .. }), "{error}");
    hosts.write(address, "also.crt", &authority.pem);
    pull(hosts.options(), &name).await.unwrap();

    // containerd's way: a relative path in hosts.toml.
    let hosts = HostsDir::with(address, &format!("server = \"https://{address}\"\nca = \"a/ca.pem\""));
    std::fs::create_dir(hosts.of(address).join("a")).unwrap();
    let error = pull(hosts.options(), &name).await.unwrap_err();
    assert!(error.to_string().contains("a/ca.pem"), "{error}");
    hosts.write(address, "a/ca.pem", &authority.pem);
    pull(hosts.options(), &name).await.unwrap();

    // Not checked at all.
    let unchecked = format!("server = \"https://{address}\"\nskip_verify = true");
    pull(HostsDir::with(address, &unchecked).options(), &name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_are_shown_where_they_are_wanted() {
    let (authority, clients) = (Authority::new("servers"), Authority::new("clients"));
    let strangers = Authority::new("strangers");
    let registry = Secured::start(&authority, Some(&clients)).await;
    let name = registry.push(&TestImage::small(2010)).await;
    let address = &registry.secured.address;

    let hosts = HostsDir::new();
    hosts.write(address, "ca.crt", &authority.pem);
    let error = pull(hosts.options(), &name).await.unwrap_err();
    assert!(matches!(error, FetchError::Tls { .. } | FetchError::Broken { .. }), "{error}");
    // Of two certificates the one is shown whose authority the server names.
    strangers.client("a stranger").write(&hosts.of(address), "a");
    clients.client("a friend").write(&hosts.of(address), "b");
    pull(hosts.options(), &name).await.unwrap();

    let good = clients.client("a friend");
    for (client, both) in [
        ("client = \"both.pem\"", true),
        ("client = [\"both.pem\"]", true),
        ("client = [[\"b.cert\", \"b.key\"]]", false),
        ("client = [[\"a.cert\", \"a.key\"], [\"b.cert\", \"b.key\"]]", false),
    ] {
        let toml = format!("server = \"https://{address}\"\nca = [\"ca.pem\"]\n{client}");
        let hosts = HostsDir::with(address, &toml);
        hosts.write(address, "ca.pem", &authority.pem);
        if both {
            hosts.write(address, "both.pem", &format!("{}{}", good.cert, good.key));
        } else {
            strangers.client("a stranger").write(&hosts.of(address), "a");
            good.write(&hosts.of(address), "b");
        }
        pull(hosts.options(), &name).await.unwrap_or_else(|e| panic!("{client}: {e}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_certificate_counts_without_a_restart() {
    let (authority, other) = (Authority::new("the authority"), Authority::new("another"));
    let registry = Secured::start(&authority, None).await;
    let name = registry.push(&TestImage::small(2020)).await.parse().unwrap();
    let hosts = HostsDir::new();
    hosts.write(&registry.secured.address, "ca.crt", &other.pem);
    let bench = Bench::with(ClientOptions { retries: 0, ..hosts.options() }, quick_fetch());
    bench.client.resolve(&name, &amd64()).await.unwrap_err();
    hosts.write(&registry.secured.address, "ca.crt", &authority.pem);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while let Err(error) = bench.client.resolve(&name, &amd64()).await {
        assert!(std::time::Instant::now() < deadline, "the change is never noticed: {error}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_mirror_is_killed_in_the_middle() {
    let origin = Registry::start().await;
    let image = TestImage::small(2030);
    let name = origin.push(&image, "team/app", "v1").await;
    let authority = Authority::new("the mirror's");
    let certificate = authority.server(&["127.0.0.1"]);
    let mirror_of = Some(format!("http://{}", origin.address));
    let extra = Extra { tls: Some(&certificate), mirror_of, ..Extra::default() };
    let mirror = Registry::start_as(&extra).await;
    let toml = format!("[host.\"https://{}\"]\nca = \"ca.pem\"", mirror.address);
    let hosts = HostsDir::with(&origin.address, &toml);
    hosts.write(&origin.address, "ca.pem", &authority.pem);
    let bench = Bench::with(hosts.options(), quick_fetch());
    let resolved = bench.resolve(&name).await;
    let mut layers = Vec::new();
    for layer in &resolved.layers {
        let blobs = bench.client.blobs(&resolved.reference);
        layers.push(bench.fetcher.ingest(layer, blobs, no_progress()).await.unwrap());
    }
    let report = bench.client.hosts(&resolved.reference).await.unwrap();
    assert!(!report[0].resting);
    for (layer, made) in layers.iter().zip(&image.layers) {
        layer.forget().unwrap();
        let bytes = bench.fetcher.read(layer, 0, 1000).await.unwrap();
        assert_eq!(bytes, made.tar[..1000]);
    }
    mirror.stop();
    for (layer, made) in layers.iter().zip(&image.layers) {
        bench.fetcher.hydrate(layer, no_progress()).await.unwrap();
        assert!(std::fs::read(layer.data_path()).unwrap() == made.tar);
    }
    assert!(bench.client.hosts(&resolved.reference).await.unwrap()[0].resting);
    bench.client.tag_digest(&resolved.reference).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_settings_an_unknown_authority_is_refused() {
    let authority = Authority::new("unknown");
    let registry = Secured::start(&authority, None).await;
    let address = registry.secured.address.clone();
    let name = registry.push(&TestImage::small(2040)).await;
    let toml = format!("server = \"https://{address}\"");
    let error = pull(HostsDir::with(&address, &toml).options(), &name).await.unwrap_err();
    assert!(matches!(error, FetchError::Tls { .. }), "{error}");
    let hosts = HostsDir::with(&address, &toml);
    let options = ClientOptions { insecure_registries: vec![address], ..hosts.options() };
    pull(options, &name).await.unwrap();
}
