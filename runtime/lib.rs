//! The lazyrun program: command line, daemon, containers and networking.
