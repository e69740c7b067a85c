//! Starting an instance: the command line brings up a keeper when no daemon answers.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};

use crate::failure::Failure;
use crate::ipc::client::Connection;
use crate::ipc::fds;
use crate::paths::Paths;
use crate::rootless;
use crate::settings::Settings;

/// What a daemon writes to its ready descriptor once it serves.
pub const READY: &str = "ok";

/// Where a keeper started by the command line finds the pipe to report on.
pub const KEEPER_READY_FD: i32 = 3;

/// Connects to the instance's daemon, starting one when there is none.
///
/// # Errors
/// Why the daemon can't be started, in one sentence.
pub fn connect_or_start(paths: &Paths, settings: &Settings) -> Result<Connection, Failure> {
    if let Ok(connection) = Connection::open(&paths.control()) {
        return Ok(connection);
    }
    rootless::need_mounts()?;
    let io_failure = |e: io::Error| Failure::daemon(format!("the lazyrun daemon can't be started: {e}"));
    paths.create().map_err(io_failure)?;
    let lock = std::fs::File::create(paths.start_lock()).map_err(io_failure)?;
    let _lock =
        Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| io_failure(io::Error::from(e)))?;
    // Somebody else may have started it while this process waited for the lock.
    if let Ok(connection) = Connection::open(&paths.control()) {
        return Ok(connection);
    }
    let said = spawn_keeper(paths, settings).map_err(io_failure)?;
    if said != READY {
        let reason =
            if said.is_empty() { "it ended without a word; see daemon.log in its root" } else { &said };
        return Err(Failure::daemon(format!("the lazyrun daemon can't be started: {reason}")));
    }
    Connection::open(&paths.control()).map_err(io_failure)
}

fn spawn_keeper(paths: &Paths, settings: &Settings) -> io::Result<String> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let log = std::fs::OpenOptions::new().create(true).append(true).open(paths.log())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("lazyrun").arg("--root").arg(paths.root()).arg("keeper").envs(settings.environment());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    fds::place(&mut command, &[(write.as_fd(), KEEPER_READY_FD)])?;
    fds::own_session(&mut command);
    let mut keeper = command.spawn()?;
    // The command holds a copy too; the pipe must end when the keeper closes its own.
    drop((command, write));
    let mut said = String::new();
    std::fs::File::from(read).take(4096).read_to_string(&mut said)?;
    if said != READY {
        // It is on its way out; who comes next must not find its socket. One that serves outlives this process,
        // and init reaps it.
        keeper.wait()?;
    }
    Ok(said.trim().to_owned())
}
