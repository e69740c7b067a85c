//! The lazyrun program: command line, daemon, containers and networking.

pub mod bench;
pub mod container;
pub mod demo;
pub mod network;
