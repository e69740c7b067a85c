//! The two nftables requests that need no `nft` process: is our table there, and away with it.
//!
//! Written against `linux/netfilter/nfnetlink.h` and `nf_tables.h`. All numbers are in host order except the
//! resource id of the batch messages.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = (NFNL_SUBSYS_NFTABLES << 8) | 1;
const NFT_MSG_DELTABLE: u16 = (NFNL_SUBSYS_NFTABLES << 8) | 2;
const NFTA_TABLE_NAME: u16 = 1;
const NFPROTO_IPV4: u8 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;

/// Whether the table `ip <name>` exists in the calling thread's network namespace.
pub(super) fn table_exists(name: &str) -> io::Result<bool> {
    let request = message(NFT_MSG_GETTABLE, NLM_F_REQUEST, NFPROTO_IPV4, 0, &name_attribute(name));
    existed(exchange(&request))
}

/// Removes the table `ip <name>` with all that is in it; says whether there was one.
pub(super) fn delete_table(name: &str) -> io::Result<bool> {
    let mut batch = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES, &[]);
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    batch.extend(message(NFT_MSG_DELTABLE, flags, NFPROTO_IPV4, 0, &name_attribute(name)));
    batch.extend(message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES, &[]));
    existed(exchange(&batch))
}

fn existed(answer: io::Result<()>) -> io::Result<bool> {
    match answer {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A netlink header, an nfgenmsg and the attributes.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = 16 + 4 + attributes.len();
    let mut out = Vec::with_capacity(length);
    out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]); // sequence and port: one question at a time
    out.extend([family, 0]); // NFNETLINK_V0
    out.extend(resource.to_be_bytes());
    out.extend(attributes);
    out
}

fn name_attribute(name: &str) -> Vec<u8> {
    let length = 4 + name.len() + 1;
    let mut out = Vec::with_capacity(length + 3);
    out.extend(u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
    out.extend(NFTA_TABLE_NAME.to_ne_bytes());
    out.extend(name.as_bytes());
    out.push(0);
    out.resize(length.next_multiple_of(4), 0);
    out
}

/// Sends and reads the one answer: an error message carries its errno (0 is the acknowledgement), anything
/// else is the thing asked for.
fn exchange(request: &[u8]) -> io::Result<()> {
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    sendto(socket.as_raw_fd(), request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0u8; 8192];
    let length = loop {
        match recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let answer = answer.get(..length).unwrap_or_default();
    let short = || io::Error::other("the kernel's netfilter answer is too short");
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(short)?;
    if kind != NLMSG_ERROR {
        return Ok(());
    }
    let code =
        answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes).ok_or_else(short)?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) }
}
