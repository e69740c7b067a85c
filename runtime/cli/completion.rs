//! `lazyrun completion`.

use clap::{Command, CommandFactory as _};
use clap_complete::Shell as Generator;

use super::args::{Cli, Shell};
use super::output;
use crate::failure::Failure;

pub(super) fn completion(shell: Shell) -> Result<(), Failure> {
    output::print(&script(shell))
}

/// The script for a shell.
pub fn script(shell: Shell) -> String {
    let generator = match shell {
        Shell::Bash => Generator::Bash,
        Shell::Zsh => Generator::Zsh,
        Shell::Fish => Generator::Fish,
    };
    let mut text = Vec::new();
    clap_complete::generate(generator, &mut command(), "lazyrun", &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// The command line as it is for people: clap's scripts would offer hidden commands too.
pub fn command() -> Command {
    let whole = Cli::command();
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let about = whole.get_about().cloned().unwrap_or_default();
    Command::new("lazyrun")
        .version(env!("CARGO_PKG_VERSION"))
        .about(about)
        .subcommand_required(true)
        .args(whole.get_arguments().cloned())
        .subcommands(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_knows_the_commands_but_not_the_hidden_ones() {
        for (shell, own) in [
            (Shell::Bash, "complete -F"),
            (Shell::Zsh, "#compdef lazyrun"),
            (Shell::Fish, "complete -c lazyrun"),
        ] {
            let text = script(shell);
            for word in [own, "snapshotter", "hydrate", "containerd-config", "cache-limit"] {
                assert!(text.contains(word), "{shell:?}: no {word}");
            }
            assert!(!text.contains("map-ids"), "{shell:?} offers a hidden command");
        }
    }
}
