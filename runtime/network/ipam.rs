//! Which subnet an instance takes and which address a container gets: pure arithmetic.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 network: address and prefix length. Text form `10.87.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The network that `address` lies in; `None` for a prefix longer than 32.
    #[must_use]
    pub fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        let network = Ipv4Addr::from_bits(address.to_bits() & mask(prefix)?);
        Some(Self { network, prefix })
    }

    /// The first address of the range, with all host bits zero.
    #[must_use]
    pub fn network(&self) -> Ipv4Addr {
        self.network
    }

    /// Prefix length in bits.
    #[must_use]
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The bridge's own address: the first host of the range.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | 1)
    }

    /// Whether the two ranges share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Subnet) -> bool {
        let shorter = self.prefix.min(other.prefix);
        let Some(mask) = mask(shorter) else { return false };
        self.network.to_bits() & mask == other.network.to_bits() & mask
    }

    /// Number of addresses containers may get: all but network, gateway and broadcast.
    fn capacity(&self) -> u32 {
        let size = 1u64 << (32 - u32::from(self.prefix.min(32)));
        u32::try_from(size.saturating_sub(3)).unwrap_or(u32::MAX)
    }

    fn host(&self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits().wrapping_add(number))
    }
}

fn mask(prefix: u8) -> Option<u32> {
    match prefix {
        0 => Some(0),
        1..=32 => Some(u32::MAX << (32 - prefix)),
        _ => None,
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = &'static str;

    /// Only what can serve a bridge: /8 to /30.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, prefix) = text.split_once('/').ok_or("a subnet is written ADDRESS/PREFIX")?;
        let address = address.parse().map_err(|_| "the subnet's address is no IPv4 address")?;
        let prefix = prefix.parse().map_err(|_| "the subnet's prefix is no number")?;
        if !(8..=30).contains(&prefix) {
            return Err("the subnet's prefix is not between 8 and 30");
        }
        Self::new(address, prefix).ok_or("the subnet's prefix is not between 8 and 30")
    }
}

/// The first of `preferred`, then of the pool beginning at a place told by `hash`, that overlaps nothing in
/// `occupied`. The pool: every /24 of 10.128.0.0/9, then of 172.16.0.0/12, then of 192.168.0.0/16.
pub(super) fn choose_subnet(preferred: &[Subnet], hash: u32, occupied: &[Subnet]) -> Option<Subnet> {
    let pools = [
        (Ipv4Addr::new(10, 128, 0, 0), 1u32 << 15),
        (Ipv4Addr::new(172, 16, 0, 0), 1 << 12),
        (Ipv4Addr::new(192, 168, 0, 0), 1 << 8),
    ];
    let pool = pools.into_iter().flat_map(|(base, count)| {
        (0..count).filter_map(move |i| {
            let number = (hash % count + i) % count;
            Subnet::new(Ipv4Addr::from_bits(base.to_bits() + (number << 8)), 24)
        })
    });
    preferred.iter().copied().chain(pool).find(|s| !occupied.iter().any(|o| o.overlaps(s)))
}

/// The next free address after `last`, going round: an address rests as long as possible before it is given
/// out again, so that strangers' connections and caches do not meet its new owner.
pub(super) fn next_address(
    subnet: &Subnet,
    last: Option<Ipv4Addr>,
    taken: impl Fn(Ipv4Addr) -> bool,
) -> Option<Ipv4Addr> {
    let capacity = subnet.capacity();
    let start = last.map_or(0, |ip| ip.to_bits().wrapping_sub(subnet.network.to_bits()).wrapping_sub(1));
    // Hosts 2 ..= capacity + 1 are ours to give; `start` is the place after the last one given.
    (0..capacity).map(|i| subnet.host(2 + (start % capacity + i) % capacity)).find(|ip| !taken(*ip))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn net(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn subnet_text_and_parts() {
        let subnet = net("10.1.2.77/24");
        assert_eq!(subnet.to_string(), "10.1.2.0/24");
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 1, 2, 1));
        for bad in ["", "10.0.0.0", "10.0.0.0/31", "10.0.0.0/7", "10.0.0.0/x", "::/64", "10.0.0.0/300"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn overlap_is_containment_either_way() {
        assert!(net("10.0.0.0/8").overlaps(&net("10.200.1.0/24")));
        assert!(net("10.200.1.0/24").overlaps(&net("10.0.0.0/8")));
        assert!(!net("10.200.1.0/24").overlaps(&net("10.200.2.0/24")));
        let everything = Subnet::new(Ipv4Addr::UNSPECIFIED, 0).unwrap();
        assert!(everything.overlaps(&net("192.168.0.0/24")));
        assert!(!Subnet::new(Ipv4Addr::new(10, 0, 0, 5), 32).unwrap().overlaps(&net("10.0.1.0/24")));
    }

    #[test]
    fn the_choice_skips_what_the_host_uses() {
        let preferred = [net("10.87.0.0/16")];
        assert_eq!(choose_subnet(&preferred, 7, &[]), Some(preferred[0]));
        assert_eq!(choose_subnet(&preferred, 7, &[net("10.87.3.0/24")]), Some(net("10.128.7.0/24")));
        assert_eq!(choose_subnet(&[], 7, &[net("10.128.7.0/24")]), Some(net("10.128.8.0/24")));
        assert_eq!(choose_subnet(&[], 32767, &[net("10.255.255.0/24")]), Some(net("10.128.0.0/24")));
        assert_eq!(choose_subnet(&[], 7, &[net("10.0.0.0/8")]), Some(net("172.16.7.0/24")));
        let all = [net("10.0.0.0/8"), net("172.16.0.0/12"), net("192.168.0.0/16")];
        assert_eq!(choose_subnet(&preferred, 7, &all), None);
    }

    #[test]
    fn addresses_go_round_and_are_reused_only_when_free() {
        let subnet = net("10.0.0.0/29"); // hosts 2 to 6 for containers
        let mut taken = BTreeSet::new();
        let mut last = None;
        let mut given = Vec::new();
        while let Some(ip) = next_address(&subnet, last, |ip| taken.contains(&ip)) {
            taken.insert(ip);
            last = Some(ip);
            given.push(ip.octets()[3]);
        }
        assert_eq!(given, [2, 3, 4, 5, 6]);
        taken.remove(&Ipv4Addr::new(10, 0, 0, 3));
        assert_eq!(next_address(&subnet, last, |ip| taken.contains(&ip)), Some(Ipv4Addr::new(10, 0, 0, 3)));
        let mut after = next_address(&subnet, Some(Ipv4Addr::new(10, 0, 0, 2)), |_| false);
        assert_eq!(after, Some(Ipv4Addr::new(10, 0, 0, 3)));
        // A last address of an earlier, other subnet does no harm.
        after = next_address(&subnet, Some(Ipv4Addr::new(172, 16, 9, 9)), |_| false);
        assert!(subnet.overlaps(&Subnet::new(after.unwrap(), 32).unwrap()));
    }
}
