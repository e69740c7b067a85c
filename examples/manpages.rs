//! Writes the manual pages and the completions of shells for packages: `cargo run --example manpages -- DIR` makes
//! `DIR/man/*.1` and `DIR/completions/lazyrun.{bash,zsh,fish}`.

use std::fs;
use std::path::PathBuf;

use lazyrun::cli::args::Shell;
use lazyrun::cli::completion::{command, script};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: manpages DIR")?;
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    for dir in [&man, &completions] {
        fs::create_dir_all(dir)?;
    }
    clap_mangen::generate_to(command(), &man)?;
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        fs::write(completions.join(format!("lazyrun.{name}")), script(shell))?;
    }
    Ok(())
}
