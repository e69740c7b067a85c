//! The container's network: bridge, published ports, host, none; and that all of it goes again.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::support::fixture::Fixture;
use crate::support::instance::Lazyrun;
use crate::support::leaks;
use crate::support::server::free_port;
use crate::support::wait_for;

const SERVE: &str = "mkdir /www; echo published >/www/index.html; exec httpd -f -p 8080 -h /www";

fn get(addr: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.ends_with("published\n").then_some(answer)
}

#[test]
fn a_published_port_is_reached_over_loopback() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let port = free_port();
    let mapping = format!("{port}:8080");
    lazyrun.ok(&["run", "-d", "--name", "web", "-p", &mapping, &fixture.image(), "sh", "-c", SERVE]);
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    wait_for("the published port to answer", Duration::from_secs(30), || get(addr));
    lazyrun.ok(&["rm", "-f", "web"]);
    assert_eq!(get(addr), None, "the port is still published");
}

#[test]
fn containers_reach_each_other_and_the_host_over_the_bridge() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", "--name", "web", &fixture.image(), "sh", "-c", SERVE]);
    let address =
        lazyrun.ok(&["exec", "web", "sh", "-c", "ip -4 -o addr show dev eth0 | tr -s ' ' | cut -d' ' -f4"]);
    let address = address.trim().split('/').next().unwrap().to_owned();
    let addr: SocketAddr = format!("{address}:8080").parse().unwrap();
    wait_for("the container's address to answer from the host", Duration::from_secs(30), || get(addr));
    let url = format!("http://{address}:8080/index.html");
    let page = lazyrun.ok(&["run", "--rm", &fixture.image(), "wget", "-q", "-O", "-", &url]);
    assert_eq!(page, "published\n");
    let route = lazyrun.ok(&["exec", "web", "ip", "route"]);
    assert!(route.contains("default via"), "{route}");
    lazyrun.ok(&["rm", "-f", "web"]);
}

#[test]
fn network_none_has_loopback_only() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let devices = lazyrun.ok(&["run", "--rm", "--network", "none", &fixture.image(), "ls", "/sys/class/net"]);
    assert_eq!(devices, "lo\n");
}

#[test]
fn network_host_is_the_hosts() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let inside =
        lazyrun.ok(&["run", "--rm", "--network", "host", &fixture.image(), "readlink", "/proc/self/ns/net"]);
    let outside = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(inside.trim(), outside.to_str().unwrap());
}

#[test]
fn names_resolve_from_files() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let script = "cat /etc/hosts; echo ---; cat /etc/resolv.conf; echo ---; hostname";
    let output = lazyrun.ok(&["run", "--rm", &fixture.image(), "sh", "-c", script]);
    let parts: Vec<&str> = output.split("---\n").collect();
    assert!(parts[0].contains("127.0.0.1") && parts[0].contains("localhost"), "{output}");
    assert!(parts[1].contains("nameserver"), "{output}");
    assert!(parts[0].contains(parts[2].trim()), "the own name is not in /etc/hosts: {output}");
}

#[test]
fn everything_goes_with_the_last_container() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["run", "-d", "--name", "only", &fixture.image(), "sleep", "1000"]);
    let info = lazyrun.info();
    let bridge = info["bridge"].as_str().expect("info names the bridge").to_owned();
    assert!(leaks::network_devices().contains(&bridge), "no bridge {bridge}");
    lazyrun.ok(&["rm", "-f", "only"]);
    wait_for("the bridge to go", Duration::from_secs(20), || {
        (!leaks::network_devices().contains(&bridge)).then_some(())
    });
    let tables = leaks::firewall_tables();
    assert!(!tables.iter().any(|table| table.contains(&bridge)), "{tables:?}");
}
