//! One instance's network: attach, detach, and the removal of everything.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::NetworkError;
use super::ipam::{self, Subnet};
use super::link::{self, Netlink};
use super::ports::{self, PortMapping};
use super::store::{self, Store};
use super::{firewall, netns, nfnetlink};

type Result<T> = std::result::Result<T, NetworkError>;

/// The root directory whose instance has the plain names `lazyrun0` and `lazyrun`.
pub const DEFAULT_ROOT: &str = "/var/lib/lazyrun";

/// The subnet the default root's instance takes if nothing of the host overlaps it.
const DEFAULT_SUBNET: &str = "10.87.0.0/16";

/// The bridge network of one root directory. Cheap to make; holds nothing open.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Name of the bridge: `lazyrun0` for the default root, else `lr` and 8 hex digits of the root's hash.
    pub bridge: String,
    /// Name of the nftables table (family ip): `lazyrun` for the default root, else `lazyrun_` and 8 digits.
    pub table: String,
    root: PathBuf,
    hash: u32,
    preferred: Option<Subnet>,
    nft: String,
}

/// A container's place in the network, as `attach` made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The container's address.
    pub ip: Ipv4Addr,
    /// Prefix length of the subnet.
    pub prefix: u8,
    /// The bridge's address, the container's default route.
    pub gateway: Ipv4Addr,
    /// MAC of the container's `eth0`, derived from the address.
    pub mac: String,
    /// Name of the veth end on the host.
    pub host_if: String,
    /// Published ports, with every host port filled in.
    pub ports: Vec<PortMapping>,
}

impl Instance {
    /// The instance of a root directory, which need not exist yet. Touches nothing.
    #[must_use]
    pub fn for_root(root: &Path) -> Self {
        let root = canonical(root);
        let digest = Sha256::digest(root.as_os_str().as_bytes());
        let hash = digest.first_chunk().copied().map_or(0, u32::from_be_bytes);
        let default = root == canonical(Path::new(DEFAULT_ROOT));
        let (bridge, table) = if default {
            ("lazyrun0".to_owned(), "lazyrun".to_owned())
        } else {
            (format!("lr{hash:08x}"), format!("lazyrun_{hash:08x}"))
        };
        let preferred = DEFAULT_SUBNET.parse().ok().filter(|_| default);
        Self { bridge, table, root, hash, preferred, nft: "nft".to_owned() }
    }

    /// The subnet chosen when the first container came; `None` before. It stays the same from then on, unless
    /// at a time without containers the host got a route that overlaps it.
    #[must_use]
    pub fn subnet(&self) -> Option<Subnet> {
        store::read_subnet(&self.root.join("network"))
    }

    /// Gives the container `id`, whose network namespace is `netns`, an address, an `eth0` on the bridge and
    /// its published ports; bridge and firewall table are made if this is the first one. What an earlier,
    /// interrupted attach left is cleaned up first. On an error nothing of the container is left.
    ///
    /// # Errors
    /// Port taken, subnet full, nft missing, or the kernel refuses: see [`NetworkError`].
    pub fn attach(&self, id: &str, netns: BorrowedFd<'_>, ports: &[PortMapping]) -> Result<Attachment> {
        let mut store = Store::open(&self.root)?;
        self.refuse_damage(&store)?;
        if let Some(old) = store.state.containers.get(id).cloned() {
            self.remove(&mut store, id, &old)?;
        }
        let reserved = ports::reserve(ports, &store.state.containers)?;
        let subnet = match store.state.containers.values().next() {
            Some(other) => Subnet::new(other.gateway, other.prefix).ok_or_else(|| self.no_subnet())?,
            None => self.start(&store)?,
        };
        let result = self
            .admit(&mut store, id, &subnet, reserved.ports.clone())
            .and_then(|attachment| self.connect(&mut store, netns, &subnet, attachment));
        if result.is_err() {
            self.undo(&mut store, id);
        }
        result
    }

    /// Takes a container out of the network: interface, published ports, address. With the last one bridge
    /// and table go. Doing it again is no error, nor is a container whose namespace is gone already.
    ///
    /// # Errors
    /// Whatever could not be removed; the rest was.
    pub fn detach(&self, id: &str, attachment: &Attachment) -> Result<()> {
        let mut store = Store::open(&self.root)?;
        match store.state.containers.get(id).cloned() {
            Some(recorded) => self.remove(&mut store, id, &recorded),
            None => {
                // The name may belong to another container by now.
                let reused = store.state.containers.values().any(|a| a.host_if == attachment.host_if);
                if !reused {
                    link::with_netlink(async |nl| nl.delete(&attachment.host_if).await)?;
                }
                self.clean_if_unused(&store)
            }
        }
    }

    /// Removes every container that `live` does not name, for a daemon that comes back after a crash; bridge
    /// and table too if none is left. Returns the ids removed.
    ///
    /// # Errors
    /// Whatever could not be removed; the rest was.
    pub fn retain(&self, live: &HashSet<String>) -> Result<Vec<String>> {
        if !self.root.join("network").is_dir() {
            return Ok(Vec::new());
        }
        let mut store = Store::open(&self.root)?;
        self.refuse_damage(&store)?;
        let dead: Vec<_> = store.state.containers.iter().filter(|(id, _)| !live.contains(*id)).collect();
        let dead: Vec<_> = dead.into_iter().map(|(id, a)| (id.clone(), a.clone())).collect();
        let mut errors = Vec::new();
        for (id, attachment) in &dead {
            errors.extend(self.remove(&mut store, id, attachment).err());
        }
        errors.extend(self.clean_if_unused(&store).err());
        NetworkError::collect(errors)?;
        Ok(dead.into_iter().map(|(id, _)| id).collect())
    }

    /// Removes bridge and table if no container is attached (`detach` of the last one did so already).
    ///
    /// # Errors
    /// Whatever could not be removed; the rest was.
    pub fn teardown_if_unused(&self) -> Result<()> {
        if !self.root.join("network").is_dir() {
            return NetworkError::collect(self.remove_bridge_and_table());
        }
        let store = Store::open(&self.root)?;
        self.refuse_damage(&store)?;
        self.clean_if_unused(&store)
    }

    /// Removes all that belongs to this instance, attached containers or not, whatever state it is in, and
    /// forgets the subnet. Goes on after errors.
    ///
    /// # Errors
    /// Whatever could not be removed; the rest was.
    pub fn reset(&self) -> Result<()> {
        let mut errors = Vec::new();
        let mut store = None;
        if self.root.join("network").is_dir() {
            match Store::open(&self.root) {
                Ok(opened) => store = Some(opened),
                Err(e) => errors.push(e),
            }
        }
        let recorded: Vec<String> = store
            .iter()
            .flat_map(|s| s.state.containers.values())
            .map(|attachment| attachment.host_if.clone())
            .collect();
        for name in recorded {
            errors.extend(link::with_netlink(async |nl| nl.delete(&name).await).err());
        }
        errors.extend(self.remove_bridge_and_table());
        if let Some(store) = &mut store {
            errors.extend(store.clear().err());
        }
        NetworkError::collect(errors)
    }

    /// Before the first container: clears what a crash may have left, settles the subnet, makes the bridge.
    fn start(&self, store: &Store) -> Result<Subnet> {
        let remembered = store.subnet();
        let preferred: Vec<Subnet> = remembered.into_iter().chain(self.preferred).collect();
        let subnet = link::with_netlink(async |nl| {
            self.remove_links(nl).await?;
            let occupied = nl.occupied().await?;
            let subnet = ipam::choose_subnet(&preferred, self.hash, &occupied);
            let subnet = subnet.ok_or_else(|| self.no_subnet())?;
            self.make_bridge(nl, subnet.gateway(), subnet.prefix()).await?;
            Ok(subnet)
        });
        let subnet = match subnet {
            Ok(subnet) => subnet,
            Err(e) => {
                // Half a bridge helps nobody.
                let _ = link::with_netlink(async |nl| self.remove_links(nl).await);
                return Err(e);
            }
        };
        if remembered != Some(subnet) {
            store.set_subnet(subnet)?;
        }
        Ok(subnet)
    }

    /// Kernel settings of the bridge and of the host.
    fn settings(&self) -> Result<()> {
        let conf = |family: &str, name: &str| format!("/proc/sys/net/{family}/conf/{}/{name}", self.bridge);
        set("/proc/sys/net/ipv4/ip_forward", true)?;
        set(&conf("ipv4", "route_localnet"), true)?;
        // Without this a container could send router advertisements and become the host's IPv6 gateway
        // (CVE-2020-13401). Absent when the host has no IPv6.
        let disable_ipv6 = conf("ipv6", "disable_ipv6");
        if Path::new(&disable_ipv6).exists() { set(&disable_ipv6, true) } else { Ok(()) }
    }

    /// Reserves an address and writes the record, before anything of the container is in the kernel.
    fn admit(
        &self,
        store: &mut Store,
        id: &str,
        subnet: &Subnet,
        ports: Vec<PortMapping>,
    ) -> Result<Attachment> {
        let containers = &store.state.containers;
        let taken: HashSet<Ipv4Addr> = containers.values().map(|a| a.ip).collect();
        let ip = ipam::next_address(subnet, store.state.last, |ip| taken.contains(&ip));
        let ip = ip.ok_or_else(|| NetworkError::SubnetFull {
            subnet: subnet.to_string(),
            bridge: self.bridge.clone(),
        })?;
        let attachment = Attachment {
            ip,
            prefix: subnet.prefix(),
            gateway: subnet.gateway(),
            mac: link::mac_of(ip).map(|byte| format!("{byte:02x}")).join(":"),
            host_if: format!("{}{:04x}", self.veth_prefix(), ip.to_bits() & 0xffff),
            ports,
        };
        let needs_table = containers.is_empty() || !attachment.ports.is_empty() || !self.has_table()?;
        store.state.table_stale |= needs_table;
        store.state.last = Some(ip);
        store.state.containers.insert(id.to_owned(), attachment.clone());
        store.save()?;
        Ok(attachment)
    }

    /// Interfaces and firewall, side by side: nft takes as long as all the rest.
    fn connect(
        &self,
        store: &mut Store,
        netns: BorrowedFd<'_>,
        subnet: &Subnet,
        attachment: Attachment,
    ) -> Result<Attachment> {
        let stale = store.state.table_stale;
        let (links, table) = thread::scope(|scope| {
            let table = scope.spawn(|| if stale { self.load_table(store, subnet) } else { Ok(()) });
            let links = self.connect_links(netns, &attachment);
            let table = table.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (links, table)
        });
        links?;
        table?;
        if stale {
            store.state.table_stale = false;
            store.save()?;
        }
        Ok(attachment)
    }

    fn connect_links(&self, netns: BorrowedFd<'_>, attachment: &Attachment) -> Result<()> {
        let Attachment { ip, prefix, gateway, ref host_if, .. } = *attachment;
        link::with_netlink(async |nl| {
            nl.delete(host_if).await?;
            let bridge = match nl.find(&self.bridge).await? {
                Some(link) if link.is_bridge => link.index,
                Some(_) => return Err(NetworkError::NotABridge { name: self.bridge.clone() }),
                None => self.restore_bridge(nl, gateway, prefix).await?,
            };
            nl.add_veth(host_if, Some(bridge), netns, link::mac_of(ip)).await?;
            nl.join_bridge(host_if, bridge).await
        })?;
        netns::run_in(netns, || {
            link::with_netlink_here(async |nl| nl.configure_container(ip, prefix, gateway).await)
        })
    }

    async fn make_bridge(&self, nl: &Netlink, gateway: Ipv4Addr, prefix: u8) -> Result<u32> {
        let index = nl.add_bridge(&self.bridge, gateway).await?;
        self.settings()?;
        nl.address_and_up(index, gateway, prefix).await?;
        Ok(index)
    }

    /// Somebody removed the bridge under the running containers: they get it back.
    async fn restore_bridge(&self, nl: &Netlink, gateway: Ipv4Addr, prefix: u8) -> Result<u32> {
        let index = self.make_bridge(nl, gateway, prefix).await?;
        for name in nl.names_with(&self.veth_prefix()).await? {
            nl.join_bridge(&name, index).await?;
        }
        Ok(index)
    }

    fn load_table(&self, store: &Store, subnet: &Subnet) -> Result<()> {
        let published: Vec<_> = store
            .state
            .containers
            .values()
            .flat_map(|attachment| attachment.ports.iter().map(|port| (attachment.ip, *port)))
            .collect();
        let ruleset = firewall::ruleset(&self.table, &self.bridge, *subnet, &published);
        firewall::load(&self.nft, &self.table, &ruleset)
    }

    /// Removes one recorded container. The record goes last, so the address is free only once nothing uses it.
    fn remove(&self, store: &mut Store, id: &str, attachment: &Attachment) -> Result<()> {
        // If the interface will not go, the record stays: its address is not free, and a later try finds it.
        link::with_netlink(async |nl| nl.delete(&attachment.host_if).await)?;
        store.state.containers.remove(id);
        let mut errors = Vec::new();
        if store.state.containers.is_empty() {
            errors.extend(self.remove_bridge_and_table());
        } else if !attachment.ports.is_empty() {
            let subnet =
                Subnet::new(attachment.gateway, attachment.prefix).ok_or_else(|| self.no_subnet())?;
            match self.load_table(store, &subnet) {
                Ok(()) => store.state.table_stale = false,
                Err(e) => {
                    // Its ports lead nowhere until the next attach writes the table.
                    store.state.table_stale = true;
                    errors.push(e);
                }
            }
        }
        errors.extend(store.save().err());
        NetworkError::collect(errors)
    }

    /// After a failed attach; the failure itself is what the user gets to see.
    fn undo(&self, store: &mut Store, id: &str) {
        let outcome = match store.state.containers.get(id).cloned() {
            Some(attachment) => self.remove(store, id, &attachment),
            None => self.clean_if_unused(store),
        };
        if let Err(error) = outcome {
            tracing::warn!(container = id, %error, "a failed attach could not be undone completely");
        }
    }

    fn clean_if_unused(&self, store: &Store) -> Result<()> {
        if !store.state.containers.is_empty() {
            return Ok(());
        }
        NetworkError::collect(self.remove_bridge_and_table())
    }

    /// Both at once: each mostly waits for the kernel's grace periods.
    fn remove_bridge_and_table(&self) -> Vec<NetworkError> {
        let (links, table) = thread::scope(|scope| {
            let table = scope.spawn(|| match nfnetlink::delete_table(&self.table) {
                // Who may not make tables in this network, as in a user namespace, has made none.
                Err(e)
                    if e.kind() == std::io::ErrorKind::PermissionDenied
                        && !self.root.join("network").is_dir() =>
                {
                    Ok(false)
                }
                result => result.map_err(|e| {
                    NetworkError::kernel(format!("remove the nftables table {}", self.table), e)
                }),
            });
            let links = link::with_netlink(async |nl| self.remove_links(nl).await);
            (links, table.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        links.err().into_iter().chain(table.err()).collect()
    }

    /// Removes our veths, on the bridge or not, and the bridge. An interface of the bridge's name that is no
    /// bridge is not ours; neither is anything else somebody may have put on the bridge.
    async fn remove_links(&self, nl: &Netlink) -> Result<()> {
        let mut errors = Vec::new();
        for name in nl.names_with(&self.veth_prefix()).await? {
            errors.extend(nl.delete(&name).await.err());
        }
        match nl.find(&self.bridge).await? {
            Some(link) if link.is_bridge => errors.extend(nl.delete(&self.bridge).await.err()),
            Some(_) => errors.push(NetworkError::NotABridge { name: self.bridge.clone() }),
            None => {}
        }
        NetworkError::collect(errors)
    }

    fn has_table(&self) -> Result<bool> {
        nfnetlink::table_exists(&self.table)
            .map_err(|e| NetworkError::kernel(format!("look for the nftables table {}", self.table), e))
    }

    /// Records lost while containers are attached: nobody knows which addresses are taken.
    fn refuse_damage(&self, store: &Store) -> Result<()> {
        if !store.damaged {
            return Ok(());
        }
        let attached = link::with_netlink(async |nl| nl.names_with(&self.veth_prefix()).await)?;
        if attached.is_empty() {
            Ok(())
        } else {
            Err(NetworkError::StateDamaged { path: store.state_path() })
        }
    }

    /// What the names of all our veths begin with; four more digits come from the address.
    fn veth_prefix(&self) -> String {
        format!("lv{:08x}", self.hash)
    }

    fn no_subnet(&self) -> NetworkError {
        NetworkError::NoSubnet { bridge: self.bridge.clone() }
    }

    #[cfg(test)]
    pub(super) fn with_nft(mut self, program: &str) -> Self {
        self.nft = program.to_owned();
        self
    }
}

/// Writes a switch under /proc/sys if it is not in that position already (it may be read-only then).
fn set(path: &str, on: bool) -> Result<()> {
    let wanted = if on { "1" } else { "0" };
    let now = fs::read_to_string(path).map_err(|e| NetworkError::file("read", path, e))?;
    if now.trim() == wanted {
        return Ok(());
    }
    fs::write(path, wanted).map_err(|e| NetworkError::file("write", path, e))
}

/// The path with symbolic links resolved as far as it exists, so that one directory has one name.
fn canonical(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut missing: Vec<OsString> = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        if let Ok(mut resolved) = fs::canonicalize(existing) {
            resolved.extend(missing.iter().rev());
            return resolved;
        }
        match (existing.parent(), existing.file_name()) {
            (Some(parent), Some(name)) => {
                missing.push(name.to_owned());
                existing = parent;
            }
            _ => return absolute,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_root_directory() {
        let default = Instance::for_root(Path::new(DEFAULT_ROOT));
        assert_eq!((default.bridge.as_str(), default.table.as_str()), ("lazyrun0", "lazyrun"));

        let dir = tempfile::tempdir().unwrap();
        let a = Instance::for_root(&dir.path().join("a/b"));
        let b = Instance::for_root(&dir.path().join("b"));
        assert!(a.bridge.len() <= 15 && a.bridge.starts_with("lr") && a.bridge != b.bridge);
        assert_eq!(a.table, format!("lazyrun_{}", &a.bridge[2..]));
        assert_eq!(a.subnet(), None);

        // The same before and after it exists, and by another way to it.
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("link")).unwrap();
        assert_eq!(Instance::for_root(&dir.path().join("link/b")).bridge, a.bridge);
        assert_eq!(Instance::for_root(&dir.path().join("a/./b/")).bridge, a.bridge);
        assert_eq!(
            Instance::for_root(&dir.path().join("link/b/not/yet")).bridge,
            Instance::for_root(&dir.path().join("a/b/not/yet")).bridge
        );
    }
}
