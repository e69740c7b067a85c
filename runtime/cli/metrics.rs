//! `lazyrun metrics`.

use super::{Context, output};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::Request;

/// Prints the running daemon's metrics; starts none, because it would have nothing to tell.
pub(super) fn metrics(context: &Context, open: bool) -> Result<(), Failure> {
    let Some(mut daemon) = context.running_daemon() else {
        return Err(Failure::new(1, "no lazyrun daemon runs for this root, so there is nothing to count"));
    };
    let text: String = daemon.call(&Request::Metrics { open }, &mut Quiet)?;
    output::print(&text)
}
