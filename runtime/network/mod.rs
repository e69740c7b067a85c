//! Container networking: a bridge with NAT, port publishing, and the name files of a container.
//!
//! One [`Instance`] belongs to one root directory; its bridge, its nftables table and its subnet are
//! derived from that directory, so instances never collide. What the host sees of it:
//!
//! - a bridge (`lazyrun0` for the default root) that carries the gateway address, and one veth per container;
//! - one nftables table of the family `ip`: masquerade for what leaves the subnet, destination NAT for
//!   published ports, and a forward chain that lets containers out and only replies and published ports in;
//! - `net.ipv4.ip_forward=1` (machine-wide; it is set when the first container comes and never reset,
//!   because somebody else may have come to rely on it) and, on the bridge alone, `route_localnet=1`,
//!   so that published ports answer on 127.0.0.1 too.
//!
//! Bridge and table go when the last container goes.
//!
//! Limits worth telling users: an `accept` of ours cannot overrule a `drop` in somebody else's table (a host
//! whose forward policy is drop, as Docker sets it for iptables, must let the bridge through itself); the
//! bridge network is IPv4 only; a program that binds a published port on the host *later* is shadowed.
//!
//! Everything here is synchronous and may block for some milliseconds: call it from `spawn_blocking`.
//! Netlink speaks through a small current-thread runtime in a short-lived thread of its own, so it does no
//! harm to be inside another runtime; that thread inherits the network namespace of the *calling thread*,
//! which is what "the host" means throughout.

mod error;
mod firewall;
mod instance;
mod ipam;
mod link;
mod names;
mod netns;
mod nfnetlink;
mod ports;
mod store;

#[cfg(test)]
mod root_tests;

pub use error::NetworkError;
pub use instance::{Attachment, DEFAULT_ROOT, Instance};
pub use ipam::Subnet;
pub use names::{FALLBACK_NAMESERVERS, HostEntry, host_resolv_conf, hosts, resolv_conf};
pub use netns::{loopback_up, new_netns};
pub use ports::{PortMapping, Protocol};
