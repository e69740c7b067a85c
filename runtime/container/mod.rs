//! Containers: OCI specs, the shim that parents each one, and the built-in runner.
//!
//! [`spec`] turns an image configuration and the options of `run` into an OCI runtime spec; the bundle's
//! `config.json` always holds it, so any OCI runtime can run the same container. [`shim`] is the process
//! that stands between the daemon and one container: it holds its standard streams, writes its log, serves
//! attach and exec on a socket ([`proto`]) and collects its exit status. [`init`] is what the shim starts
//! inside the new namespaces; it builds the container around itself and becomes its first process.
//! [`client`] is the other side of the socket, used by the command line and the daemon.

pub mod cgroup;
pub mod client;
pub mod config;
pub mod error;
pub mod init;
pub mod proto;
pub(crate) mod rootfs;
pub mod shim;
pub mod spec;
pub(crate) mod sys;
pub(crate) mod time;

#[cfg(test)]
mod root_tests;

pub use config::{ExitRecord, ShimConfig, StatusLine};
pub use error::ContainerError;
