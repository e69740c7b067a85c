//! The kernel's FUSE protocol (`linux/fuse.h`), as far as the union speaks it.
//!
//! fuser makes the mount and shakes hands; from there on the union's requests are read here. fuser answers some of
//! them itself (`O_TMPFILE`: not implemented), takes a node's number from its attributes, so that none can have one
//! number and show another, and sleeps as soon as there is no request.

pub(super) mod abi;
mod answer;
mod backing;
mod busy_poll;
mod request;
mod serve;

pub(super) use answer::Answer;
pub(super) use backing::Backing;
pub(super) use request::{Operation, Request};
pub(super) use serve::{Serve, serve};
