//! The `lazyrun` binary: the processes of an instance are told apart by the first argument.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    // A container's own processes start here too, before anything else is looked at: they are on the path to
    // the first instruction of every container.
    let mut args = std::env::args_os();
    let name = PathBuf::from(args.next().unwrap_or_default());
    if lazyrun::cli::union::called_as_helper(&name) {
        return lazyrun::cli::union::main(&args.collect::<Vec<_>>(), true);
    }
    match args.next().as_ref().and_then(|a| a.to_str()) {
        Some("init") => return lazyrun::container::init::main(),
        Some("mounter") => return lazyrun_fs::mounter::main(),
        Some("shim") => {
            let config = args.nth(1).map(PathBuf::from).unwrap_or_default();
            return lazyrun::container::shim::main(&config);
        }
        _ => {}
    }
    lazyrun::cli::main()
}
