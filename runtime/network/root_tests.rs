//! The network against the real kernel and the real nft. "The host" of every test is a network namespace of
//! its own, entered by the test's thread, so the machine's network is never touched and tests run side by
//! side; it is gone with the thread. Needs root and nft.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::error::NetworkError;
use super::instance::{Attachment, Instance};
use super::ports::{PortMapping, Protocol};
use super::{link, netns, new_netns, nfnetlink};

const PATIENCE: Duration = Duration::from_secs(5);

/// Runs a test body on a fresh "host" with loopback up.
fn on_a_host(body: impl FnOnce(&Host) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces");
    thread::scope(|scope| {
        let test = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace for the test");
            link::with_netlink(async |nl| nl.loopback_up().await).expect("lo up");
            let root = tempfile::tempdir().expect("a root directory");
            let instance = Instance::for_root(root.path());
            body(&Host { root, instance });
        });
        if let Err(panic) = test.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

struct Host {
    root: tempfile::TempDir,
    instance: Instance,
}

impl Host {
    fn start(&self, id: &str, ports: &[PortMapping]) -> Container {
        let netns = new_netns().unwrap();
        let attachment = self.instance.attach(id, netns.as_fd(), ports).unwrap();
        Container { id: id.to_owned(), netns, attachment }
    }

    fn stop(&self, container: &Container) {
        self.instance.detach(&container.id, &container.attachment).unwrap();
    }

    /// Nothing of any instance is left: interfaces, addresses, tables.
    fn assert_clean(&self) {
        assert_eq!(interfaces(), BTreeSet::from(["lo".to_owned()]));
        assert!(!nfnetlink::table_exists(&self.instance.table).unwrap());
        assert_eq!(run("nft", &["list", "tables"]), "");
        let occupied = link::with_netlink(async |nl| nl.occupied().await).unwrap();
        assert!(occupied.iter().all(|range| range.network().is_loopback()), "{occupied:?}");
    }
}

struct Container {
    id: String,
    netns: OwnedFd,
    attachment: Attachment,
}

impl Container {
    /// Sockets stay in the namespace they were made in, so they can be used from any thread.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(self.netns.as_fd(), || Ok(work())).unwrap()
    }

    fn serve(&self, port: u16) -> Server {
        Server::start(self.inside(|| TcpListener::bind(("0.0.0.0", port)).unwrap()))
    }

    fn ip(&self) -> Ipv4Addr {
        self.attachment.ip
    }

    fn ask(&self, to: impl Into<SocketAddr>) -> Option<Ipv4Addr> {
        let to = to.into();
        self.inside(move || ask(to))
    }
}

/// Answers every connection with the address it saw it come from.
struct Server {
    address: SocketAddr,
}

impl Server {
    fn start(listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            // Ends with the test process; it holds one socket.
            for mut stream in listener.incoming().flatten() {
                if let Ok(peer) = stream.peer_addr() {
                    let _ = stream.write_all(peer.ip().to_string().as_bytes());
                }
            }
        });
        Self { address }
    }
}

/// Connects and returns the address the server saw, or nothing if it cannot be reached.
fn ask(to: SocketAddr) -> Option<Ipv4Addr> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.parse().ok()
}

fn at(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((ip, port))
}

fn tcp(host_port: u16, container_port: u16) -> PortMapping {
    PortMapping { host_ip: None, host_port, container_port, proto: Protocol::Tcp }
}

fn interfaces() -> BTreeSet<String> {
    // Not /sys/class/net, which shows the namespace it was mounted in. ifb and tunnel devices that some
    // kernels put into every namespace are not ours.
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = text.lines().skip(2).filter_map(|l| l.split(':').next()).map(|n| n.trim().to_owned());
    names.filter(|n| ["lo", "lr", "lv", "eth", "out"].iter().any(|p| n.starts_with(p))).collect()
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Another machine: a namespace on a wire to the host, which is 192.0.2.1; it is 192.0.2.2.
fn outside_peer() -> Container {
    let (here, there) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
    let netns = new_netns().unwrap();
    link::with_netlink(async |nl| {
        nl.add_veth("out", None, netns.as_fd(), link::mac_of(there)).await?;
        let link = nl.find("out").await?.unwrap();
        nl.address_and_up(link.index, here, 24).await
    })
    .unwrap();
    netns::run_in(netns.as_fd(), || {
        link::with_netlink_here(async |nl| nl.configure_container(there, 24, here).await)
    })
    .unwrap();
    let attachment = Attachment {
        ip: there,
        prefix: 24,
        gateway: here,
        mac: String::new(),
        host_if: "out".into(),
        ports: Vec::new(),
    };
    Container { id: "outside".into(), netns, attachment }
}

#[test]
fn containers_reach_each_other_and_everything_goes_with_the_last() {
    on_a_host(|host| {
        let a = host.start("a", &[]);
        let b = host.start("b", &[]);
        assert_ne!(a.ip(), b.ip());
        let subnet = host.instance.subnet().unwrap();
        assert_eq!(a.attachment.gateway, subnet.gateway());
        let server = b.serve(8000);
        let began = Instant::now();
        assert_eq!(a.ask(at(b.ip(), server.address.port())), Some(a.ip()));
        // A bridge port that waits for a link event would cost a second.
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        // From the host, and by the container's own loopback.
        assert_eq!(ask(at(b.ip(), 8000)), Some(subnet.gateway()));
        assert_eq!(b.ask(at(Ipv4Addr::LOCALHOST, 8000)), Some(Ipv4Addr::LOCALHOST));
        let mac = a.inside(|| run("ip", &["-o", "link", "show", "eth0"]));
        assert!(mac.contains(&a.attachment.mac), "{mac}");

        host.stop(&a);
        assert!(interfaces().contains(&host.instance.bridge));
        assert!(nfnetlink::table_exists(&host.instance.table).unwrap());
        host.stop(&b);
        host.assert_clean();
        host.stop(&b); // again: no error
        host.assert_clean();

        // The subnet stays the same, and addresses are not given out again at once.
        let c = host.start("c", &[]);
        assert_eq!(host.instance.subnet(), Some(subnet));
        assert!(c.ip() != a.ip() && c.ip() != b.ip());
        host.stop(&c);
        host.assert_clean();
    });
}

#[test]
fn a_container_whose_namespace_is_gone_detaches_cleanly() {
    on_a_host(|host| {
        let Container { id, netns, attachment } = host.start("a", &[tcp(8080, 80)]);
        drop(netns);
        host.instance.detach(&id, &attachment).unwrap();
        host.assert_clean();
    });
}

#[test]
fn published_ports_answer_on_every_address_of_the_host() {
    on_a_host(|host| {
        let outside = outside_peer();
        let web = host.start("web", &[tcp(8080, 80)]);
        let other = host.start("other", &[]);
        web.serve(80);
        let gateway = web.attachment.gateway;
        let host_ip = Ipv4Addr::new(192, 0, 2, 1);

        // From the host: its address, 127.0.0.1 and any other loopback address.
        assert!(ask(at(host_ip, 8080)).is_some());
        assert_eq!(ask(at(Ipv4Addr::LOCALHOST, 8080)), Some(gateway));
        assert_eq!(ask(at(Ipv4Addr::new(127, 9, 9, 9), 8080)), Some(gateway));
        // From outside, with the true source address.
        assert_eq!(outside.ask(at(host_ip, 8080)), Some(outside.ip()));
        // Hairpin: from the container itself and from its neighbour, by the host's and the gateway's address.
        for client in [&web, &other] {
            assert_eq!(client.ask(at(host_ip, 8080)), Some(gateway));
            assert_eq!(client.ask(at(gateway, 8080)), Some(gateway));
        }
        // What is not published is not reachable from outside, not even by a route to the subnet (the peer's
        // default route is us).
        outside.inside(|| {
            let to = at(web.attachment.ip, 80);
            assert!(TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_err());
        });
        host.stop(&web);
        assert_eq!(outside.ask(at(host_ip, 8080)), None);
        assert!(ask(at(Ipv4Addr::LOCALHOST, 8080)).is_none());
        host.stop(&other);
    });
}

#[test]
fn a_port_on_one_address_and_udp() {
    on_a_host(|host| {
        let outside = outside_peer();
        let host_ip = Ipv4Addr::new(192, 0, 2, 1);
        let on =
            |ip, proto, host_port| PortMapping { host_ip: Some(ip), host_port, container_port: 80, proto };
        let web = host
            .start("web", &[on(Ipv4Addr::LOCALHOST, Protocol::Tcp, 8080), on(host_ip, Protocol::Udp, 5353)]);
        web.serve(80);
        assert_eq!(ask(at(Ipv4Addr::LOCALHOST, 8080)), Some(web.attachment.gateway));
        assert_eq!(ask(at(host_ip, 8080)), None);
        assert_eq!(outside.ask(at(host_ip, 8080)), None);

        let echo = web.inside(|| UdpSocket::bind("0.0.0.0:80").unwrap());
        echo.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = outside.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send_to(b"hello", at(host_ip, 5353)).unwrap();
        let mut buffer = [0; 16];
        let (length, from) = echo.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"hello"[..], outside.ip().into()));
        echo.send_to(b"back", from).unwrap();
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"back"[..], at(host_ip, 5353)));
        host.stop(&web);
    });
}

#[test]
fn what_leaves_the_host_wears_its_address() {
    on_a_host(|host| {
        let mut outside = outside_peer();
        let server = outside.serve(7000);
        let a = host.start("a", &[]);
        assert_eq!(a.ask(at(outside.ip(), server.address.port())), Some(Ipv4Addr::new(192, 0, 2, 1)));
        host.stop(&a);
        outside.id.clear();
    });
}

#[test]
fn a_containers_raw_way_to_the_hosts_loopback_is_shut() {
    on_a_host(|host| {
        let secret = UdpSocket::bind("127.0.0.1:9999").unwrap();
        secret.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let a = host.start("a", &[]);
        a.inside(|| {
            fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap();
            run("ip", &["addr", "del", "127.0.0.1/8", "dev", "lo"]);
            run("ip", &["route", "flush", "table", "local", "127.0.0.0/8"]);
            let gateway = a.attachment.gateway.to_string();
            run(
                "ip",
                &["route", "add", "127.0.0.0/8", "via", &gateway, "dev", "eth0", "src", &a.ip().to_string()],
            );
            let socket = UdpSocket::bind((a.ip(), 0)).unwrap();
            socket.send_to(b"boo", "127.0.0.1:9999").unwrap();
        });
        assert!(secret.recv_from(&mut [0; 8]).is_err(), "a container reached the host's loopback");
        host.stop(&a);
    });
}

#[test]
fn a_port_in_use_is_refused_and_leaves_nothing() {
    on_a_host(|host| {
        let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
        let netns = new_netns().unwrap();
        let error = host.instance.attach("a", netns.as_fd(), &[tcp(8080, 80)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot publish port 0.0.0.0:8080/tcp: it is already in use on this host"
        );
        host.assert_clean();
        drop(listener);

        let first = host.start(&"f".repeat(64), &[tcp(8080, 80)]);
        let error = host.instance.attach("b", netns.as_fd(), &[tcp(8080, 81)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot publish port 0.0.0.0:8080/tcp: container ffffffffffff already publishes it"
        );
        // The same number for another protocol, and a port found free, are fine.
        let udp = PortMapping { proto: Protocol::Udp, ..tcp(8080, 80) };
        let second = host.start("b", &[udp, tcp(0, 80), tcp(0, 81)]);
        let found: BTreeSet<u16> = second.attachment.ports.iter().map(|p| p.host_port).collect();
        assert!(found.len() == 3 && !found.contains(&0), "{found:?}");
        second.serve(80);
        assert!(ask(at(Ipv4Addr::LOCALHOST, second.attachment.ports[1].host_port)).is_some());

        let elsewhere = PortMapping { host_ip: Some(Ipv4Addr::new(203, 0, 113, 7)), ..tcp(81, 81) };
        let error = host.instance.attach("c", netns.as_fd(), &[elsewhere]).unwrap_err();
        assert!(matches!(error, NetworkError::Port { .. }), "{error}");

        host.stop(&first);
        host.stop(&second);
        host.assert_clean();
    });
}

#[test]
fn without_nft_nothing_is_left_and_the_error_says_what_to_do() {
    on_a_host(|host| {
        let instance = host.instance.clone().with_nft("/nonexistent/nft");
        let netns = new_netns().unwrap();
        let error = instance.attach("a", netns.as_fd(), &[]).unwrap_err();
        assert!(error.to_string().contains("install the package nftables or use --network host"), "{error}");
        host.assert_clean();
        assert!(netns::run_in(netns.as_fd(), || Ok(interfaces())).unwrap().contains("lo"));
        // Removal needs no nft.
        let a = host.start("a", &[tcp(8080, 80)]);
        instance.detach("a", &a.attachment).unwrap();
        host.assert_clean();
    });
}

#[test]
fn what_a_crash_leaves_is_cleaned_by_the_next_attach_or_reset() {
    on_a_host(|host| {
        let state = host.root.path().join("network/state.json");
        let name = host.instance.bridge.clone();

        // The record was written, then nothing: the same container attaches again.
        let a = host.start("a", &[tcp(8080, 80)]);
        link::with_netlink(async |nl| nl.delete(&a.attachment.host_if).await).unwrap();
        let again = host.instance.attach("a", a.netns.as_fd(), &[tcp(8080, 80)]).unwrap();
        assert_eq!(again.ports, a.attachment.ports);

        // The records are gone, interfaces and table are not (as if the last save had been lost).
        fs::remove_file(&state).unwrap();
        let b = host.start("b", &[]);
        assert_eq!(interfaces(), BTreeSet::from(["lo".into(), name.clone(), b.attachment.host_if.clone()]));
        assert!(!run("nft", &["list", "table", "ip", &host.instance.table]).contains("8080"));

        // Table and bridge vanish under a running container: the next one brings them back.
        nfnetlink::delete_table(&host.instance.table).unwrap();
        link::with_netlink(async |nl| nl.delete(&name).await).unwrap();
        let c = host.start("c", &[]);
        assert!(nfnetlink::table_exists(&host.instance.table).unwrap());
        b.serve(80);
        assert_eq!(c.ask(at(b.ip(), 80)), Some(c.ip()));

        // Damaged records while somebody is attached: refused; reset still removes everything.
        fs::write(&state, "{").unwrap();
        let netns = new_netns().unwrap();
        let error = host.instance.attach("d", netns.as_fd(), &[]).unwrap_err();
        assert!(matches!(error, NetworkError::StateDamaged { .. }), "{error}");
        host.instance.reset().unwrap();
        host.assert_clean();
        assert_eq!(host.instance.subnet(), None);
        host.instance.reset().unwrap();

        // Half states: only a bridge, only a table.
        link::with_netlink(async |nl| nl.add_bridge(&name, Ipv4Addr::new(10, 1, 1, 1)).await).unwrap();
        host.instance.reset().unwrap();
        run("nft", &["add", "table", "ip", &host.instance.table]);
        host.instance.teardown_if_unused().unwrap();
        host.assert_clean();

        // A stranger's interface of our name stops the bridge from going, not the table.
        run("ip", &["link", "add", &name, "type", "veth", "peer", "name", "stranger"]);
        run("nft", &["add", "table", "ip", &host.instance.table]);
        assert!(matches!(host.instance.reset(), Err(NetworkError::NotABridge { .. })));
        assert!(!nfnetlink::table_exists(&host.instance.table).unwrap());
    });
}

#[test]
fn retain_removes_the_dead_and_keeps_the_living() {
    on_a_host(|host| {
        let a = host.start("a", &[tcp(8080, 80)]);
        let _b = host.start("b", &[tcp(8081, 80)]);
        a.serve(80);
        let live = ["a".to_owned()].into();
        assert_eq!(host.instance.retain(&live).unwrap(), ["b"]);
        assert!(ask(at(Ipv4Addr::LOCALHOST, 8080)).is_some());
        assert!(!run("nft", &["list", "table", "ip", &host.instance.table]).contains("8081"));
        assert_eq!(host.instance.retain(&[].into()).unwrap(), ["a"]);
        host.assert_clean();
    });
}

#[test]
fn eight_at_once_get_eight_addresses() {
    on_a_host(|host| {
        let began = Instant::now();
        let containers: Vec<Container> = thread::scope(|scope| {
            let all: Vec<_> = (0..8u16)
                .map(|i| scope.spawn(move || host.start(&format!("c{i}"), &[tcp(9000 + i, 80)])))
                .collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        println!("8 concurrent attaches with a port each: {:?}", began.elapsed());
        let ips: BTreeSet<_> = containers.iter().map(Container::ip).collect();
        assert_eq!(ips.len(), 8);
        for container in &containers {
            container.serve(80);
            let port = container.attachment.ports[0].host_port;
            assert_eq!(ask(at(Ipv4Addr::LOCALHOST, port)), Some(container.attachment.gateway));
        }
        assert!(containers[0].ask(at(containers[7].ip(), 80)).is_some());
        thread::scope(|scope| {
            for container in &containers {
                scope.spawn(|| host.stop(container));
            }
        });
        host.assert_clean();
    });
}

#[test]
fn addresses_come_back_when_the_subnet_is_full() {
    on_a_host(|host| {
        write_subnet(host.root.path(), "10.3.4.0/29");
        let mut all: Vec<Container> = (0..5).map(|i| host.start(&i.to_string(), &[])).collect();
        let netns = new_netns().unwrap();
        let error = host.instance.attach("x", netns.as_fd(), &[]).unwrap_err();
        assert!(error.to_string().starts_with("no free address is left in 10.3.4.0/29"), "{error}");
        let gone = all.remove(2);
        host.stop(&gone);
        let next = host.start("x", &[]);
        assert_eq!(next.ip(), gone.ip());
        assert!(all[0].ask(at(next.ip(), 1)).is_none());
        next.serve(80);
        assert_eq!(all[0].ask(at(next.ip(), 80)), Some(all[0].ip()));
    });
}

#[test]
fn a_subnet_that_the_host_uses_is_avoided() {
    on_a_host(|host| {
        write_subnet(host.root.path(), "192.0.2.128/25");
        let outside = outside_peer();
        let a = host.start("a", &[]);
        let subnet = host.instance.subnet().unwrap();
        assert!(subnet.to_string().starts_with("10."), "{subnet}");
        outside.serve(7000);
        assert!(a.ask(at(outside.ip(), 7000)).is_some());
    });
}

#[test]
fn attaching_from_inside_a_runtime_is_harmless() {
    on_a_host(|host| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let a = host.start("a", &[]);
            host.stop(&a);
        });
        host.assert_clean();
    });
}

fn write_subnet(root: &Path, subnet: &str) {
    fs::create_dir_all(root.join("network")).unwrap();
    fs::write(root.join("network/subnet"), subnet).unwrap();
}
