//! Published ports: what users write, and the check that nobody else has them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket, sockopt,
};
use serde::{Deserialize, Serialize};

use super::error::NetworkError;
use super::instance::Attachment;

type Result<T> = std::result::Result<T, NetworkError>;

/// Transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// `tcp` or `udp`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Host address it is published on; `None` means all of them.
    pub host_ip: Option<Ipv4Addr>,
    /// Port on the host; 0 asks for a free one (an [`Attachment`] names the one found).
    pub host_port: u16,
    /// Port in the container.
    pub container_port: u16,
    /// Protocol.
    pub proto: Protocol,
}

impl PortMapping {
    /// Parses the argument of `-p`: `[[IP:][HOST_PORT]:]CONTAINER_PORT[/tcp|/udp]`, where ports may be ranges
    /// of equal length (`8000-8005:80-85`). Without a host port a free one is taken.
    ///
    /// # Errors
    /// When the text has another shape, a port is 0 or too large, ranges differ in length, or the address is
    /// not IPv4.
    pub fn parse(spec: &str) -> Result<Vec<PortMapping>> {
        let bad =
            |reason: &str| NetworkError::PortSyntax { spec: spec.to_owned(), reason: reason.to_owned() };
        if spec.contains('[') {
            return Err(bad("the bridge network is IPv4 only"));
        }
        let (rest, proto) = match spec.rsplit_once('/') {
            None => (spec, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(bad("the protocol must be tcp or udp")),
        };
        let parts: Vec<&str> = rest.split(':').collect();
        let (host_ip, host, container) = match *parts.as_slice() {
            [container] => (None, "", container),
            [host, container] => (None, host, container),
            [ip, host, container] => {
                let ip: Ipv4Addr = ip.parse().map_err(|_| bad("the host address is not an IPv4 address"))?;
                (Some(ip).filter(|ip| !ip.is_unspecified()), host, container)
            }
            _ => return Err(bad("expected [[IP:][HOST_PORT]:]CONTAINER_PORT[/PROTOCOL]")),
        };
        let (first, last) = range(container).ok_or_else(|| bad("the container port is no port number"))?;
        let host = match host {
            "" => None,
            text => Some(range(text).ok_or_else(|| bad("the host port is no port number"))?),
        };
        if host.is_some_and(|(low, high)| high - low != last - first) {
            return Err(bad("the two port ranges differ in length"));
        }
        let mapping = |i: u16| PortMapping {
            host_ip,
            host_port: host.map_or(0, |(low, _)| low + i),
            container_port: first + i,
            proto,
        };
        Ok((0..=last - first).map(mapping).collect())
    }

    fn address(&self) -> Ipv4Addr {
        self.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED)
    }

    fn clashes(&self, other: &PortMapping) -> bool {
        let same_address = match (self.host_ip, other.host_ip) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        same_address && self.proto == other.proto && self.host_port == other.host_port
    }
}

impl fmt::Display for PortMapping {
    /// As `docker ps` writes it: `0.0.0.0:8080->80/tcp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}->{}/{}", self.address(), self.host_port, self.container_port, self.proto)
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let port = |t: &str| {
        if t.starts_with('+') { None } else { t.parse::<u16>().ok().filter(|p| *p != 0) }
    };
    let (low, high) = match text.split_once('-') {
        Some((low, high)) => (port(low)?, port(high)?),
        None => (port(text)?, port(text)?),
    };
    (low <= high).then_some((low, high))
}

/// Ports that were found free. The sockets keep others off them until the mapping is in force; afterwards
/// the record in the state does that among containers. (Nothing keeps a program on the host from binding the
/// port later; it then gets no connections from outside.)
pub(super) struct Reserved {
    /// The mappings with every host port filled in.
    pub(super) ports: Vec<PortMapping>,
    _sockets: Vec<OwnedFd>,
}

/// Checks the ports against the other containers and against the host.
pub(super) fn reserve(wanted: &[PortMapping], containers: &BTreeMap<String, Attachment>) -> Result<Reserved> {
    let mut ports: Vec<PortMapping> = Vec::with_capacity(wanted.len());
    let mut sockets = Vec::with_capacity(wanted.len());
    for port in wanted {
        let other = containers.iter().find(|(_, a)| a.ports.iter().any(|p| p.clashes(port)));
        if let Some((id, _)) = other.filter(|_| port.host_port != 0) {
            let container = id.chars().take(12).collect();
            let (host_ip, proto) = (port.address(), port.proto);
            return Err(NetworkError::PortPublished { host_ip, port: port.host_port, proto, container });
        }
        let (socket, host_port) = hold(port)?;
        ports.push(PortMapping { host_port, ..*port });
        sockets.push(socket);
    }
    Ok(Reserved { ports, _sockets: sockets })
}

/// Binds the port, without listening: nobody can connect to the socket, yet the kernel tells whether another
/// one is there.
fn hold(port: &PortMapping) -> Result<(OwnedFd, u16)> {
    let kind = match port.proto {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let attempt = || -> nix::Result<(OwnedFd, u16)> {
        let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
        if port.proto == Protocol::Tcp {
            // Connections that linger in TIME_WAIT are no obstacle; a listener still is.
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        }
        bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(port.address(), port.host_port)))?;
        let bound: SockaddrIn = getsockname(socket.as_raw_fd())?;
        Ok((socket, bound.port()))
    };
    let (host_ip, proto) = (port.address(), port.proto);
    attempt().map_err(|e| match e {
        Errno::EADDRINUSE => NetworkError::PortInUse { host_ip, port: port.host_port, proto },
        e => NetworkError::Port { host_ip, port: port.host_port, proto, source: io::Error::from(e) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host_ip: Option<[u8; 4]>, host_port: u16, container_port: u16) -> PortMapping {
        PortMapping { host_ip: host_ip.map(Ipv4Addr::from), host_port, container_port, proto: Protocol::Tcp }
    }

    #[test]
    fn port_arguments() {
        assert_eq!(PortMapping::parse("8080:80").unwrap(), [tcp(None, 8080, 80)]);
        assert_eq!(PortMapping::parse("80").unwrap(), [tcp(None, 0, 80)]);
        assert_eq!(PortMapping::parse("127.0.0.1:8080:80").unwrap(), [tcp(Some([127, 0, 0, 1]), 8080, 80)]);
        assert_eq!(PortMapping::parse("127.0.0.1::80").unwrap(), [tcp(Some([127, 0, 0, 1]), 0, 80)]);
        assert_eq!(PortMapping::parse("0.0.0.0:1:2").unwrap(), [tcp(None, 1, 2)]);
        let udp = PortMapping::parse("53:53/udp").unwrap();
        assert_eq!(udp[0].proto, Protocol::Udp);
        let many = PortMapping::parse("8000-8002:80-82").unwrap();
        assert_eq!(many, [tcp(None, 8000, 80), tcp(None, 8001, 81), tcp(None, 8002, 82)]);
        assert_eq!(many[0].to_string(), "0.0.0.0:8000->80/tcp");
        assert_eq!(PortMapping::parse("1-65535:1-65535").unwrap().len(), 65535);
    }

    #[test]
    fn port_arguments_that_make_no_sense() {
        for bad in [
            "",
            ":",
            "a",
            "0:80",
            "80:0",
            "80:65536",
            "80:+80",
            "8000-8001:80",
            "9-8:9-8",
            "80:80/icmp",
            "80:80/",
            "[::1]:80:80",
            "1.2.3:80:80",
            "1:2:3:4",
            "-1:80",
            "80:80:80",
        ] {
            let error = PortMapping::parse(bad).expect_err(bad);
            assert!(error.to_string().starts_with("invalid port mapping"), "{error}");
        }
    }

    #[test]
    fn clashes_need_a_common_address_and_protocol() {
        let all = tcp(None, 80, 1);
        let one = tcp(Some([10, 0, 0, 1]), 80, 1);
        let two = tcp(Some([10, 0, 0, 2]), 80, 1);
        assert!(all.clashes(&one) && one.clashes(&all) && one.clashes(&one));
        assert!(!one.clashes(&two) && !all.clashes(&tcp(None, 81, 1)));
        assert!(!all.clashes(&PortMapping { proto: Protocol::Udp, ..all }));
    }
}
