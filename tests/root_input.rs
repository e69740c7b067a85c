//! Bad references, registries and blobs: one clear sentence, exit code 125, nothing half-made, the daemon alive.

use std::net::{IpAddr, TcpListener, UdpSocket};

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, corrupt, truncate, write};
use crate::support::instance::Lazyrun;
use crate::support::server::free_port;

/// Runs an image that cannot be had; the reason must name `about`. Afterwards no image is listed and the same
/// daemon answers.
fn refused(lazyrun: &Lazyrun, image: &str, about: &str) {
    let before = lazyrun.daemon_pid();
    let why = lazyrun.fails(125, &["run", "--rm", image, "true"]);
    assert!(why.to_lowercase().contains(&about.to_lowercase()), "expected {about:?} in: {why}");
    assert!(why.len() < 600, "one sentence is enough: {why}");
    let images = lazyrun.ok(&["images"]);
    assert!(images.lines().count() <= 1, "something half-made is listed: {images}");
    if before.is_some() {
        assert_eq!(lazyrun.daemon_pid(), before, "the daemon did not survive");
    }
}

#[test]
fn unknown_repository_and_tag() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let registry = DockerRegistry::start();
    refused(&lazyrun, &format!("{}/no/such:latest", registry.addr()), "no/such");
    refused(&lazyrun, &fixture.registry.reference("fixture", "no-such-tag"), "no-such-tag");
}

#[test]
fn malformed_references() {
    let lazyrun = Lazyrun::new();
    for reference in ["", "name/UPPER", "a//b", "name:tag:tag", "name@sha256:short", "../escape", "a b"] {
        refused(&lazyrun, reference, "reference");
    }
}

#[test]
fn a_registry_that_wants_a_password() {
    let (fixture, lazyrun) = (Fixture::guarded("me", "secret"), Lazyrun::new());
    refused(&lazyrun, &fixture.image(), "password");
    // With credentials where docker keeps them it works.
    let config = lazyrun.scratch("docker");
    let auth = format!(r#"{{"auths":{{"{}":{{"auth":"bWU6c2VjcmV0"}}}}}}"#, fixture.registry.addr());
    write(&config.join("config.json"), &auth);
    let fresh = Lazyrun::new();
    let status = fresh
        .command(&["run", "--rm", &fixture.image(), "true"])
        .env("DOCKER_CONFIG", &config)
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn nobody_listens() {
    let lazyrun = Lazyrun::new();
    let addr = format!("127.0.0.1:{}", free_port());
    refused(&lazyrun, &format!("{addr}/image:latest"), &addr);
}

/// An address of this machine that is not loopback, which therefore is spoken to with TLS.
fn outer_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Connecting a datagram socket sends nothing; it only chooses a source address.
    socket.connect("198.51.100.1:9").expect("this test needs a route to the outside");
    socket.local_addr().unwrap().ip()
}

#[test]
fn plain_http_where_tls_is_due() {
    let listener = TcpListener::bind((outer_address(), 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    refused(&Lazyrun::new(), &format!("{addr}/image:latest"), &addr.to_string());
}

#[test]
fn a_corrupt_layer() {
    for layer in 0..3 {
        let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
        corrupt(&fixture.blob(&fixture.layers[layer].digest));
        refused(&lazyrun, &fixture.image(), &fixture.layers[layer].digest[7..19]);
    }
}

#[test]
fn a_truncated_layer() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    truncate(&fixture.blob(&fixture.layers[1].digest));
    refused(&lazyrun, &fixture.image(), &fixture.layers[1].digest[7..19]);
}

#[test]
fn a_layer_that_is_another() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let (wanted, other) = (&fixture.layers[2].digest, &fixture.layers[0].digest);
    std::fs::copy(fixture.blob(other), fixture.blob(wanted)).unwrap();
    refused(&lazyrun, &fixture.image(), &wanted[7..19]);
}

#[test]
fn a_manifest_that_is_another() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let digest = "sha256:".to_owned() + &"0".repeat(64);
    let manifest = std::fs::read_dir(fixture.layout().join("blobs/sha256")).unwrap().flatten();
    let manifest = manifest
        .map(|entry| entry.path())
        .find(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("schemaVersion")));
    std::fs::copy(manifest.unwrap(), fixture.blob(&digest)).unwrap();
    refused(&lazyrun, &format!("{}/fixture@{digest}", fixture.registry.addr()), "sha256:00000000");
}

#[test]
fn after_a_refusal_good_images_run() {
    let (bad, good, lazyrun) = (Fixture::new(), Fixture::new(), Lazyrun::new());
    corrupt(&bad.blob(&bad.layers[0].digest));
    refused(&lazyrun, &bad.image(), "sha256");
    assert_eq!(lazyrun.ok(&["run", "--rm", &good.image(), "echo", "fine"]), "fine\n");
}

#[test]
fn bad_options() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    for options in [
        &["--network", "no-such-network"][..],
        &["-p", "not-a-port"],
        &["-p", "99999:80"],
        &["-v", "relative:/x"],
        &["-v", "/x:relative"],
        &["-m", "lots"],
        &["--cpus", "-1"],
        &["--no-such-option"],
    ] {
        let args = [&["run", "--rm"], options, &[&image, "true"]].concat();
        let finished = lazyrun.run(&args);
        assert_eq!(finished.code, Some(125), "{options:?}: {finished:#?}");
        assert!(!finished.stderr.is_empty() && !finished.stderr.contains("panicked"), "{finished:#?}");
    }
    assert!(lazyrun.ok(&["ps", "-a", "-q"]).is_empty(), "a refused container is listed");
}
