//! Which programs a command names: itself, those that it is told to start, and those of a shell script.

use lazyrun_fs::view::View;

use super::{File, tree};
use crate::container::spec::Command;

/// Most words of a command or script that are looked for.
const MAX_WORDS: usize = 64;
/// Most directories of a `PATH` that are looked in.
const MAX_DIRS: usize = 64;
/// Shells, whose scripts are looked into.
const SHELLS: [&str; 6] = ["sh", "bash", "dash", "ash", "zsh", "ksh"];
/// Words after which a command follows.
const BEFORE_COMMANDS: [&str; 14] = [
    "if", "then", "else", "elif", "while", "until", "do", "!", "{", "exec", "env", "command", "nohup", "time",
];
/// Words at the place of a command that shells know themselves.
const BUILTINS: [&str; 15] = [
    "echo", "printf", "test", "[", "true", "false", "kill", "pwd", "read", "cd", "set", "exit", "fi", "done",
    "esac",
];

/// The files that the command names, in order: `entrypoint.sh nginx` is two, `sh -c 'a && b'` three.
pub(super) fn programs(view: &View, command: &Command) -> Vec<File> {
    let mut words: Vec<&str> = Vec::new();
    let script = command.args.first().is_some_and(|program| is_shell(program.as_bytes()));
    for (number, argument) in command.args.iter().take(MAX_WORDS).enumerate() {
        match script && number > 1 && is_script_option(&command.args[number - 1]) {
            true => words.extend(commands_of(argument)),
            false => words.push(argument),
        }
    }
    words.into_iter().take(MAX_WORDS).filter_map(|word| program(view, command, word.as_bytes())).collect()
}

/// The interpreter of a script, and the programs that a shell script calls.
pub(super) fn of_script(view: &View, command: &Command, script: &[u8]) -> Vec<File> {
    let Some(line) = script.strip_prefix(b"#!").and_then(|rest| rest.split(|byte| *byte == b'\n').next())
    else {
        return Vec::new();
    };
    let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let words: Vec<&[u8]> = words.take(MAX_WORDS).collect();
    let mut files: Vec<File> = words.iter().filter_map(|word| program(view, command, word)).collect();
    if words.iter().any(|word| is_shell(word)) {
        let text = String::from_utf8_lossy(script);
        let called = commands_of(&text);
        files.extend(called.into_iter().filter_map(|w| program(view, command, w.as_bytes())));
    }
    files
}

/// The file that a word means as a program, or as an argument of one.
fn program(view: &View, command: &Command, word: &[u8]) -> Option<File> {
    if word.is_empty() || word.starts_with(b"-") {
        return None;
    }
    let in_workdir = || tree::file(view, &[command.workdir.as_bytes(), b"/", word].concat());
    let found = match word {
        [b'/', ..] => tree::file(view, word),
        _ if word.contains(&b'/') => in_workdir(),
        _ => in_path(view, command, word).or_else(in_workdir),
    };
    found.map(|file| File { named: true, ..file })
}

fn in_path(view: &View, command: &Command, name: &[u8]) -> Option<File> {
    let path = command.env.iter().find_map(|pair| pair.strip_prefix("PATH="))?;
    let mut found = path
        .split(':')
        .take(MAX_DIRS)
        .filter_map(|dir| tree::file(view, &[dir.as_bytes(), b"/", name].concat()));
    found.find(|file| view.inode(file.ino).mode & 0o111 != 0)
}

fn is_shell(program: &[u8]) -> bool {
    let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or(program);
    SHELLS.iter().any(|shell| shell.as_bytes() == name)
}

/// Whether a script follows as an argument: `-c`, `-ec`, `-lc`.
fn is_script_option(argument: &str) -> bool {
    argument.starts_with('-') && !argument.starts_with("--") && argument.ends_with('c')
}

/// The words of a shell script that stand where commands do, without knowing much of its grammar: quotes are passed
/// over, and what is in them counts.
fn commands_of(script: &str) -> Vec<&str> {
    let mut commands = Vec::new();
    let mut expected = true;
    for line in script.lines() {
        expected |= !line.is_empty();
        let mut words = line;
        while let Some(start) = words.find(|c: char| !c.is_ascii_whitespace()) {
            words = &words[start..];
            if words.starts_with('#') {
                break;
            }
            let len = words.find(is_delimiter).unwrap_or(words.len());
            if len == 0 {
                expected |= words.starts_with([';', '&', '|', '(', ')', '`']);
                words = &words[1..];
                continue;
            }
            let word = &words[..len];
            words = &words[len..];
            if !expected || word.contains('=') || BEFORE_COMMANDS.contains(&word) {
                continue;
            }
            expected = false;
            if !BUILTINS.contains(&word) && word.bytes().all(is_of_name) && !commands.contains(&word) {
                commands.push(word);
                if commands.len() == MAX_WORDS {
                    return commands;
                }
            }
        }
    }
    commands
}

fn is_delimiter(c: char) -> bool {
    c.is_ascii_whitespace() || matches!(c, ';' | '&' | '|' | '(' | ')' | '`' | '"' | '\'' | '<' | '>')
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_./+-[".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_where_a_shell_expects_them() {
        let script = "nginx && curl -s -o /dev/null http://127.0.0.1/ && echo ready";
        assert_eq!(commands_of(script), ["nginx", "curl"]);
        let script = "redis-server --save '' >/dev/null; until redis-cli ping; do :; done";
        assert_eq!(commands_of(script), ["redis-server", "redis-cli"]);
        let script = "#!/bin/sh\nset -e\n# run it\nA=1 B=\"$(id -u)\" exec /opt/x \"$@\"\n\nif ! x=y find / ; then sort; fi";
        assert_eq!(commands_of(script), ["id", "/opt/x", "find", "sort"]);
        assert_eq!(commands_of(""), Vec::<&str>::new());
        let endless: String = (0..100_000).map(|i| format!("a{i};")).collect();
        assert_eq!(commands_of(&endless).len(), MAX_WORDS);
        assert_eq!(commands_of("ä ö; \u{7f}|é"), Vec::<&str>::new());
    }

    #[test]
    fn scripts_follow_certain_options() {
        for (option, is) in [("-c", true), ("-ec", true), ("--rc", false), ("-x", false), ("c", false)] {
            assert_eq!(is_script_option(option), is, "{option}");
        }
        assert!(is_shell(b"/usr/bin/bash") && is_shell(b"sh") && !is_shell(b"/bin/fish"));
    }
}
