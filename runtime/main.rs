//! The `lazyrun` binary.

fn main() {}
