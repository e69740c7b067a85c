//! Writes the Rust of containerd's services that lazyrun provides or calls into the directory that is given.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: generate OUT_DIR")?;
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no parent directory")?;
    let names =
        ["snapshots.proto", "diff.proto", "content.proto", "leases.proto", "images.proto", "version.proto"];
    let files = protox::compile(names, [protos])?;
    // A map that is sorted makes answers that are the same each time.
    let config = tonic_prost_build::configure().btree_map(".").build_transport(false).out_dir(&out);
    config.compile_fds(files)?;
    Ok(())
}
