//! [`Union`] as a FUSE filesystem.
//!
//! The union is the only writer, so the kernel keeps names and attributes for ever. Where it may, it also reads
//! and writes files of the upper layer itself (passthrough), so that only opening asks us.

mod answers;
mod convert;
mod passthrough;
mod requests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use fuser::{Config, InitFlags, KernelConfig, MountOption, Session, SessionACL};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};

use super::FOREVER;
use crate::union::{Handles, OpenDir, OpenFile, Union};
use passthrough::Passthrough;

/// What every kernel is asked for.
const FLAGS: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_READDIRPLUS_AUTO)
    .union(InitFlags::FUSE_ATOMIC_O_TRUNC)
    .union(InitFlags::FUSE_HANDLE_KILLPRIV_V2)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_DONT_MASK)
    .union(InitFlags::FUSE_ASYNC_DIO)
    .union(InitFlags::FUSE_PASSTHROUGH);

/// A union being served.
#[derive(Debug)]
struct UnionFs {
    union: Union,
    files: Handles<OpenFile>,
    dirs: Handles<OpenDir>,
    passthrough: Passthrough,
    ttl: Duration,
}

/// A mounted union.
#[derive(Debug)]
pub struct UnionMount {
    session: Session<UnionFs>,
}

/// Mounts a union on a directory. Nothing is answered before [`UnionMount::run`].
pub fn mount(union: Union, mountpoint: &Path) -> io::Result<UnionMount> {
    let config = mount_config(&union);
    let fs = UnionFs::new(union);
    let session = match mount_here(&config, mountpoint) {
        Ok(dev) => Session::from_fd(fs, dev, config.acl, config)?,
        // Not ours to do: fusermount3 is.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Session::new(fs, mountpoint, &config)?,
        Err(e) => return Err(e),
    };
    Ok(UnionMount { session })
}

/// Takes over the `/dev/fuse` descriptor of a mount that somebody else made and holds
/// ([`FuseKind::Union`](super::FuseKind)). Returns when the kernel has its answer to INIT; nothing else is answered
/// before [`UnionMount::run`], which ends when the last holder of the mount is gone.
///
/// `threads` requests are answered at the same time: enough of them for those that wait for bytes of a lower layer.
pub fn serve(union: Union, dev: OwnedFd, threads: usize) -> io::Result<UnionMount> {
    super::session::keep_buffers_off_the_heap();
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads.max(1));
    Ok(UnionMount { session: Session::from_fd(UnionFs::new(union), dev, config.acl, config)? })
}

/// Makes the mount without a helper, with its type's full name and everything that the options do not forbid.
fn mount_here(config: &Config, mountpoint: &Path) -> io::Result<OwnedFd> {
    let mut flags = MsFlags::empty();
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let dev = OwnedFd::from(super::mount::open_device().map_err(|e| no_device(&e))?);
    let mut data = format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", dev.as_raw_fd());
    let (mut source, mut kind) = ("lazyrun", "fuse".to_owned());
    for option in &config.mount_options {
        match option {
            MountOption::FSName(name) => source = name,
            MountOption::Subtype(name) => kind = format!("fuse.{name}"),
            MountOption::CUSTOM(other) => data = format!("{data},{other}"),
            MountOption::DefaultPermissions => data.push_str(",default_permissions"),
            MountOption::AutoUnmount => return Err(io::ErrorKind::PermissionDenied.into()),
            MountOption::RO => flags |= MsFlags::MS_RDONLY,
            MountOption::NoDev => flags |= MsFlags::MS_NODEV,
            MountOption::NoSuid => flags |= MsFlags::MS_NOSUID,
            MountOption::NoExec => flags |= MsFlags::MS_NOEXEC,
            MountOption::NoAtime => flags |= MsFlags::MS_NOATIME,
            MountOption::DirSync => flags |= MsFlags::MS_DIRSYNC,
            MountOption::Sync => flags |= MsFlags::MS_SYNCHRONOUS,
            _ => {}
        }
    }
    if config.acl != SessionACL::Owner {
        data.push_str(",allow_other");
    }
    nix::mount::mount(Some(source), mountpoint, Some(kind.as_str()), flags, Some(data.as_str()))?;
    Ok(dev)
}

/// fusermount3 could not open it either: it does so with the user's rights.
fn no_device(e: &io::Error) -> io::Error {
    io::Error::other(format!("/dev/fuse can't be opened: {e}"))
}

impl UnionMount {
    /// Serves until the union is unmounted.
    ///
    /// # Errors
    /// What ended it otherwise.
    pub fn run(self) -> io::Result<()> {
        let session = self.session;
        let serve = move || {
            // Modes come with the umask of whoever asks; ours must not come on top. The umask is the process's
            // unless a thread parts from it; the threads that answer are made from this one.
            unshare(CloneFlags::CLONE_FS)?;
            umask(Mode::empty());
            session.run()
        };
        let thread = std::thread::Builder::new().name("union".into()).spawn(serve)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that serves the union panicked")))
    }
}

fn mount_config(union: &Union) -> Config {
    let mut config = Config::default();
    config.n_threads = Some(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8));
    let options = &mut config.mount_options;
    options.push(MountOption::DefaultPermissions);
    let mut acl = if nix::unistd::geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
    let (mut source, mut subtype) = ("lazyrun", "lazyrun");
    for option in &union.config().mount_options {
        match option.split_once('=') {
            Some(("fsname", name)) => source = name,
            Some(("subtype", name)) => subtype = name,
            _ => match flag(option) {
                Some(option) => options.push(option),
                None if option == "allow_other" => acl = SessionACL::All,
                None if option == "allow_root" => acl = SessionACL::RootAndOwner,
                // What the kernel does by itself.
                None if matches!(option.as_str(), "default_permissions" | "ro" | "relatime" | "diratime") => {
                }
                None => options.push(MountOption::CUSTOM(option.clone())),
            },
        }
    }
    options.push(MountOption::FSName(source.to_owned()));
    options.push(MountOption::Subtype(subtype.to_owned()));
    if !union.is_writable() {
        options.retain(|o| *o != MountOption::RW);
        options.push(MountOption::RO);
    }
    config.acl = acl;
    config
}

fn flag(option: &str) -> Option<MountOption> {
    Some(match option {
        "rw" => MountOption::RW,
        "dev" => MountOption::Dev,
        "nodev" => MountOption::NoDev,
        "suid" => MountOption::Suid,
        "nosuid" => MountOption::NoSuid,
        "exec" => MountOption::Exec,
        "noexec" => MountOption::NoExec,
        "atime" => MountOption::Atime,
        "noatime" => MountOption::NoAtime,
        "dirsync" => MountOption::DirSync,
        "sync" => MountOption::Sync,
        "async" => MountOption::Async,
        "auto_unmount" => MountOption::AutoUnmount,
        _ => return None,
    })
}

impl UnionFs {
    fn new(union: Union) -> Self {
        let ttl = union.config().timeout.map_or(FOREVER, Duration::from_secs);
        UnionFs {
            union,
            files: Handles::default(),
            dirs: Handles::default(),
            passthrough: Passthrough::default(),
            ttl,
        }
    }

    fn configure(&self, config: &mut KernelConfig) {
        let acl = if self.union.config().noacl { InitFlags::empty() } else { InitFlags::FUSE_POSIX_ACL };
        super::session::configure(config, FLAGS.union(acl));
        if config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH)
            && config.set_max_stack_depth(1).is_ok()
        {
            self.passthrough.allow();
        }
    }
}
