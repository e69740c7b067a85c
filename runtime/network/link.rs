//! Interfaces, addresses and routes over rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteType};
use rtnetlink::{Handle, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::error::NetworkError;
use super::ipam::Subnet;
use super::netns;

/// Name of the interface inside a container.
pub(super) const CONTAINER_IF: &str = "eth0";

type Result<T> = std::result::Result<T, NetworkError>;

/// A netlink connection into one network namespace.
pub(super) struct Netlink(Handle);

/// Runs `work` with a netlink connection into the calling thread's network namespace, in a thread and
/// runtime of its own (so being inside another tokio runtime is no problem).
pub(super) fn with_netlink<T: Send>(work: impl AsyncFnOnce(&Netlink) -> Result<T> + Send) -> Result<T> {
    netns::on_thread(|| with_netlink_here(work))
}

/// The same in the calling thread, which must not be inside a runtime.
pub(super) fn with_netlink_here<T>(work: impl AsyncFnOnce(&Netlink) -> Result<T>) -> Result<T> {
    let open = |e| NetworkError::kernel("open a netlink socket", e);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(open)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(open)?;
        tokio::spawn(connection);
        work(&Netlink(handle)).await
    })
}

/// What is known of one interface.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) is_bridge: bool,
}

impl Netlink {
    /// The interface of that name, if there is one.
    pub(super) async fn find(&self, name: &str) -> Result<Option<Link>> {
        let mut found = self.0.link().get().match_name(name).execute();
        match found.try_next().await {
            Ok(message) => Ok(message.as_ref().map(describe)),
            Err(e) if errno(&e) == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(failed(format!("look up the interface {name}"), e)),
        }
    }

    /// Removes an interface; says whether there was one. The other end of a veth goes with it.
    pub(super) async fn delete(&self, name: &str) -> Result<bool> {
        let Some(link) = self.find(name).await? else { return Ok(false) };
        match self.0.link().del(link.index).execute().await {
            Ok(()) => Ok(true),
            // It vanished meanwhile, as a veth does when the namespace at its other end goes.
            Err(e) if errno(&e) == Some(libc::ENODEV) => Ok(false),
            Err(e) => Err(failed(format!("remove the interface {name}"), e)),
        }
    }

    /// Names of the interfaces that begin with `prefix`.
    pub(super) async fn names_with(&self, prefix: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut links = self.0.link().get().execute();
        while let Some(link) = links.next().await {
            let link = link.map_err(|e| failed("list the interfaces", e))?;
            names.extend(link.attributes.into_iter().find_map(|a| match a {
                LinkAttribute::IfName(name) if name.starts_with(prefix) => Some(name),
                _ => None,
            }));
        }
        Ok(names)
    }

    /// Makes an interface a port of the bridge, if it is not one yet, and lets the bridge send a frame back
    /// where it came from. Where the module br_netfilter is loaded, a container's connection to its own
    /// published port never leaves the bridge level and needs that.
    pub(super) async fn join_bridge(&self, name: &str, bridge: u32) -> Result<()> {
        let action = || format!("put the interface {name} on the bridge");
        let missing = || NetworkError::kernel(action(), io::ErrorKind::NotFound);
        let index = self.find(name).await?.ok_or_else(missing)?.index;
        let enslave = LinkUnspec::new_with_index(index).controller(bridge).build();
        self.0.link().change(enslave).execute().await.map_err(|e| failed(action(), e))?;
        let hairpin = LinkBridgePort::new(index).hairpin(true).build();
        self.0.link().set_port(hairpin).execute().await.map_err(|e| failed(action(), e))
    }

    /// Creates a bridge, still down. Its MAC is fixed: left to the kernel it would follow the ports as they
    /// come and go, and every container would have a stale neighbour entry for its gateway.
    pub(super) async fn add_bridge(&self, name: &str, gateway: Ipv4Addr) -> Result<u32> {
        let message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Bridge)
            .name(name)
            .address(mac_of(gateway).to_vec())
            .build();
        let action = || format!("create the bridge {name}");
        self.0.link().add(message).execute().await.map_err(|e| failed(action(), e))?;
        let link = self.find(name).await?;
        link.map(|l| l.index).ok_or_else(|| NetworkError::kernel(action(), io::ErrorKind::NotFound))
    }

    /// Gives an interface an address (which may be there already) and brings it up.
    pub(super) async fn address_and_up(&self, index: u32, ip: Ipv4Addr, prefix: u8) -> Result<()> {
        let add = self.0.address().add(index, IpAddr::V4(ip), prefix).replace();
        add.execute().await.map_err(|e| failed(format!("set the address {ip}/{prefix}"), e))?;
        self.up(index).await
    }

    async fn up(&self, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let change = self.0.link().change(message).execute().await;
        change.map_err(|e| failed(format!("bring the interface number {index} up"), e))
    }

    /// Brings `lo` up (always number 1, the first interface of its namespace).
    pub(super) async fn loopback_up(&self) -> Result<()> {
        self.up(1).await
    }

    /// Creates a veth pair in one message: this end up and (if `bridge` is given) already a port of the
    /// bridge, the other end already inside `netns` as `eth0`. There is no moment in which a crash would
    /// leave an end lying about in the wrong place.
    pub(super) async fn add_veth(
        &self,
        name: &str,
        bridge: Option<u32>,
        netns: BorrowedFd<'_>,
        mac: [u8; 6],
    ) -> Result<()> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(CONTAINER_IF)
            .address(mac.to_vec())
            .setns_by_fd(netns.as_raw_fd())
            .build();
        let mut message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(name)
            .up()
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
        if let Some(bridge) = bridge {
            message = message.controller(bridge);
        }
        let added = self.0.link().add(message.build()).execute().await;
        added.map_err(|e| failed(format!("create the interface pair {name} and {CONTAINER_IF}"), e))
    }

    /// The container's side, run from within its namespace: `lo` and `eth0` up, address, default route.
    pub(super) async fn configure_container(
        &self,
        ip: Ipv4Addr,
        prefix: u8,
        gateway: Ipv4Addr,
    ) -> Result<()> {
        self.loopback_up().await?;
        let link = self.find(CONTAINER_IF).await?.ok_or_else(|| {
            NetworkError::kernel(format!("find {CONTAINER_IF} in the container"), io::ErrorKind::NotFound)
        })?;
        self.address_and_up(link.index, ip, prefix).await?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        let added = self.0.route().add(route).execute().await;
        added.map_err(|e| failed(format!("set the default route by {gateway}"), e))
    }

    /// Every IPv4 range that this host has an address in or a route to (default routes aside).
    pub(super) async fn occupied(&self) -> Result<Vec<Subnet>> {
        let mut ranges = Vec::new();
        let mut addresses = self.0.address().get().execute();
        while let Some(address) = addresses.next().await {
            let address = address.map_err(|e| failed("list the addresses", e))?;
            for attribute in &address.attributes {
                if let AddressAttribute::Address(IpAddr::V4(ip)) | AddressAttribute::Local(IpAddr::V4(ip)) =
                    attribute
                {
                    ranges.extend(Subnet::new(*ip, address.header.prefix_len));
                }
            }
        }
        let mut routes = self.0.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(route) = routes.next().await {
            let route = route.map_err(|e| failed("list the routes", e))?;
            if !matches!(route.header.kind, RouteType::Unicast | RouteType::Local) {
                continue;
            }
            for attribute in &route.attributes {
                if let RouteAttribute::Destination(RouteAddress::Inet(ip)) = attribute {
                    ranges.extend(Subnet::new(*ip, route.header.destination_prefix_length));
                }
            }
        }
        // 0.0.0.0/0, and its two halves as some VPNs write it, lead everywhere and collide with nothing.
        ranges.retain(|range| range.prefix() > 1);
        Ok(ranges)
    }
}

/// The fixed, locally administered MAC of an address, as CNI derives it: neighbour entries stay true when an
/// address is given to another container.
pub(super) fn mac_of(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x0a, 0x58, a, b, c, d]
}

fn describe(message: &LinkMessage) -> Link {
    let is_bridge = message.attributes.iter().any(|a| match a {
        LinkAttribute::LinkInfo(infos) => infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Bridge))),
        _ => false,
    });
    Link { index: message.header.index, is_bridge }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

fn failed(action: impl Into<String>, error: rtnetlink::Error) -> NetworkError {
    let source = match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    };
    NetworkError::kernel(action, source)
}
