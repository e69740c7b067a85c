//! The lazyrun program: command line, daemon, containers and networking.

pub mod bench;
pub mod cli;
pub mod clock;
pub mod container;
pub mod containerd;
pub mod daemon;
pub mod demo;
mod elf;
pub mod failure;
mod file_limit;
pub mod ipc;
pub mod keeper;
pub mod logs;
pub mod names;
pub mod network;
pub mod paths;
pub mod preflight;
pub mod proc;
pub mod registries;
pub mod rootless;
pub mod settings;
pub mod snapshotter;
pub mod units;
