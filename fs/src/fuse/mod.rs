//! FUSE servers: [`flat`], a directory of layer files, and [`viewfs`], a whole view.
//!
//! Both are read-only and built so that a warm mount asks nothing: names and attributes stay cached
//! for ever, open and opendir are answered by the kernel after the first one, pages are kept.
//! A server can be killed at any moment: the mount waits for as long as anybody (the keeper) holds the
//! `/dev/fuse` descriptor, and a new server adopts it with [`serve`]. If none comes, a [`Refuser`] has waiting requests
//! fail.

mod content;
pub mod flat;
mod join;
mod journal;
mod mount;
mod protocol;
mod readonly;
mod refuse;
mod relay;
mod session;
mod stats;
pub mod unionfs;
pub mod viewfs;
mod wire;

pub use content::{Answer, LayerFiles, ReadReply};
pub use flat::Flat;
pub use mount::{FuseError, FuseKind, FuseMount, abort, mount, set_readahead};
pub use readonly::Server;
pub use refuse::{RefusedRequest, Refuser, recall_unanswered};
pub use session::{ServeOptions, ServerHandle, is_connected, serve};
pub use stats::{Requests, StatsSnapshot};
pub use viewfs::ViewFs;
pub use wire::invalidate;

use std::time::Duration;

/// How long the kernel may keep names and attributes: they never change, so a hundred years.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The largest READ the servers ask for, in bytes (the kernel's own limit unless raised by sysctl).
const MAX_READ: u32 = 1 << 20;
