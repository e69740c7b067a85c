//! containerd's diff service: the layer that a container's changes make, from its upper directory alone.
//!
//! containerd's own differ reads both trees of a comparison from end to end, and of a lazy image that means every byte
//! from the registry. What lies in the upper directory of an overlay *is* the difference, so where a request compares
//! a snapshot of ours with what it stands on, only that is read ([`change`], [`upper`]) and written as a layer
//! ([`archive`], [`stream`]) into containerd's content store. Everything else is answered with "not implemented", on
//! which containerd asks its next differ.

mod archive;
mod change;
mod error;
mod service;
mod sparse;
mod stream;
#[cfg(test)]
mod tests;
mod upper;

pub(super) use service::DiffService;
