//! What can go wrong, each as one sentence for the person at the terminal.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::ports::Protocol;

/// An error of the container network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A file or directory of the instance, or a kernel setting, could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// Verb, as in "cannot write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a change to interfaces, addresses or routes.
    #[error("cannot {action}: {source}")]
    Kernel {
        /// What was tried, as in "cannot create the bridge lazyrun0".
        action: String,
        /// Why.
        source: io::Error,
    },
    /// There is no nft program.
    #[error(
        "the program nft was not found, so no bridge network can be set up: install the package nftables or use --network host"
    )]
    NftMissing,
    /// nft ran and refused.
    #[error("nft could not load the table {table}: {message}")]
    Nft {
        /// Our table.
        table: String,
        /// First line of what nft said.
        message: String,
    },
    /// An interface of that name exists that is not ours.
    #[error("the interface {name} exists and is not a bridge: remove it or use another --root")]
    NotABridge {
        /// Interface name.
        name: String,
    },
    /// Something on the host listens on that port.
    #[error("cannot publish port {host_ip}:{port}/{proto}: it is already in use on this host")]
    PortInUse {
        /// Host address of the mapping, 0.0.0.0 for all.
        host_ip: Ipv4Addr,
        /// Host port.
        port: u16,
        /// Protocol.
        proto: Protocol,
    },
    /// Another container of this instance has that port.
    #[error("cannot publish port {host_ip}:{port}/{proto}: container {container} already publishes it")]
    PortPublished {
        /// Host address of the mapping, 0.0.0.0 for all.
        host_ip: Ipv4Addr,
        /// Host port.
        port: u16,
        /// Protocol.
        proto: Protocol,
        /// First 12 digits of the other container's id.
        container: String,
    },
    /// The port could not be checked (for instance the host address is not an address of this host).
    #[error("cannot publish port {host_ip}:{port}/{proto}: {source}")]
    Port {
        /// Host address of the mapping, 0.0.0.0 for all.
        host_ip: Ipv4Addr,
        /// Host port.
        port: u16,
        /// Protocol.
        proto: Protocol,
        /// Why.
        source: io::Error,
    },
    /// A `-p` argument that cannot be understood.
    #[error("invalid port mapping {spec:?}: {reason}")]
    PortSyntax {
        /// What was written.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Every address of the subnet is taken.
    #[error("no free address is left in {subnet} on the bridge {bridge}")]
    SubnetFull {
        /// The subnet.
        subnet: String,
        /// The bridge.
        bridge: String,
    },
    /// Every subnet of the private pool collides with a route or address of the host.
    #[error(
        "no free private subnet was found for the bridge {bridge}: every candidate overlaps a route of this host"
    )]
    NoSubnet {
        /// The bridge.
        bridge: String,
    },
    /// The record of addresses in use cannot be read while containers are attached.
    #[error(
        "the network state {} is damaged while containers are attached: stop them and run `lazyrun system reset`",
        path.display()
    )]
    StateDamaged {
        /// The state file.
        path: PathBuf,
    },
    /// Several steps of a removal failed; the others were done.
    #[error("not everything of the network could be removed: {}", join(.0))]
    Several(Vec<NetworkError>),
}

impl NetworkError {
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File { action, path: path.into(), source }
    }

    pub(super) fn kernel(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Kernel { action: action.into(), source: source.into() }
    }

    /// No error, the only one, or all of them.
    pub(super) fn collect(mut errors: Vec<NetworkError>) -> Result<(), NetworkError> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

fn join(errors: &[NetworkError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
