//! `lazyrun unshare`: where users who are not root may mount.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use super::Context;
use crate::failure::Failure;
use crate::rootless;

/// Runs a command, or a shell, in the user namespace of this user's instance, where it may mount.
pub(super) fn unshare(context: &Context, command: Vec<OsString>) -> Result<ExitCode, Failure> {
    if rootless::may_mount() {
        return Err(Failure::daemon("this process may mount already: a user namespace would be of no use"));
    }
    let socket = context.paths.control();
    if UnixStream::connect(&socket).is_ok() {
        rootless::join(&socket).map_err(|e| {
            Failure::daemon(format!("the user namespace of the lazyrun daemon can't be entered: {e}"))
        })?;
    } else {
        let mut helper = Command::new("/proc/self/exe");
        helper.arg0("lazyrun").arg("map-ids").arg(std::process::id().to_string());
        rootless::enter_new(helper).map_err(|e| {
            Failure::daemon(format!("no user namespace can be made here: {e}; see user_namespaces(7)"))
        })?;
    }
    let mut command = command.into_iter();
    let program = command.next().unwrap_or_else(rootless::shell);
    let error = Command::new(&program).args(command).exec();
    let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    Err(Failure::new(code, format!("{} can't be run: {error}", program.display())))
}
