//! The control protocol between the command line and the daemon: one request a connection, answered by
//! progress frames and one final frame.

pub mod client;
pub mod containerd;
pub mod fds;
pub mod frame;
pub mod hydration;
pub mod index_lists;
pub mod indexes;
pub mod profiles;
pub mod protocol;
pub mod system;
pub mod why;
