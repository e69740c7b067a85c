//! `lazyrun mount` and `umount`: the daemon makes the mount, this process attaches it, so that it appears in
//! the caller's own mount namespace and goes away if the caller dies before.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::args::MountArgs;
use super::mount_options::MountOptions;
use super::{Context, progress};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::{Mounted, Request};
use crate::rootless;

fn resolve(directory: &Path) -> Result<PathBuf, Failure> {
    let bad = |why: String| {
        Failure::daemon(format!("{} can't be used as a mount point: {why}", directory.display()))
    };
    let real = directory.canonicalize().map_err(|e| bad(e.to_string()))?;
    if real.is_dir() { Ok(real) } else { Err(bad("it is not a directory".into())) }
}

pub(super) fn mount(context: &Context, args: &MountArgs) -> Result<(), Failure> {
    rootless::need_mounts()?;
    let options = MountOptions::parse(&args.options).map_err(Failure::daemon)?;
    if args.rw && options.writable == Some(false) {
        return Err(Failure::daemon("--rw and -o ro contradict each other"));
    }
    let writable = args.rw || options.writable == Some(true);
    let target = resolve(&args.directory)?;
    let request = Request::Mount {
        image: context.image(&args.image, args.pull),
        target: target.clone(),
        plan: args.union,
        writable,
        shown: options.shown.clone(),
        hydrate: args.hydrate,
    };
    let mut daemon = context.daemon()?;
    let (mounted, fd): (Mounted, _) =
        daemon.call_fd(&request, &mut progress::Shown::new(context.progress))?;
    let fd = fd.ok_or_else(|| Failure::daemon("the daemon sent no mount"))?;
    lazyrun_fs::mount::set_attrs(fd.as_fd(), options.attributes(writable), options.clear)
        .and_then(|()| lazyrun_fs::mount::attach(fd.as_fd(), &target))
        .map_err(|e| Failure::daemon(format!("the image can't be mounted at {}: {e}", target.display())))?;
    daemon.acknowledge()?;
    tracing::debug!(plan = mounted.plan, "mounted");
    Ok(())
}

pub(super) fn unmount(context: &Context, directory: &Path) -> Result<(), Failure> {
    let target = resolve(directory)?;
    lazyrun_fs::mount::detach(&target)
        .map_err(|e| Failure::daemon(format!("{} can't be unmounted: {e}", target.display())))?;
    match context.running_daemon() {
        Some(mut daemon) => daemon.call(&Request::Unmounted { target }, &mut Quiet),
        None => Ok(()),
    }
}
