//! The `lazyrun` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next().as_deref().and_then(|a| a.to_str()) {
        Some("shim") => {
            lazyrun::container::shim::main(std::path::Path::new(&args.nth(1).unwrap_or_default()))
        }
        Some("init") => lazyrun::container::init::main(),
        _ => ExitCode::FAILURE,
    }
}
