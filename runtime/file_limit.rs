//! The number of files that a process may have open. Keeper and daemon hold two or three descriptors for each mounted
//! image, more than the usual 1024 on a busy node; servers of writable mounts hold files that containers have open. Containers
//! get the limit that was given, and so do daemons before they raise it.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// What this process was started with: soft and hard.
static GIVEN: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises this process's limit as far as it may.
pub(crate) fn raise() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let (_, hard) = *GIVEN.get_or_init(|| (soft, hard));
    let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
}

/// Has a child start with the limit that this process was started with.
pub(crate) fn give_back(command: &mut Command) {
    let Some((soft, hard)) = GIVEN.get().copied() else { return };
    let lower = move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from);
    // SAFETY: only setrlimit runs between fork and exec, which is async-signal-safe.
    unsafe { command.pre_exec(lower) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_get_what_this_process_was_given() {
        let before = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        raise();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        assert_eq!((soft, hard), (before.1, before.1));
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -Sn"]);
        give_back(&mut command);
        let said = command.output().expect("run a shell").stdout;
        let said = String::from_utf8(said).expect("text");
        let number = said.trim().replace("unlimited", &rlim_t::MAX.to_string());
        assert_eq!(number, GIVEN.get().expect("what was given").0.to_string());
    }
}
