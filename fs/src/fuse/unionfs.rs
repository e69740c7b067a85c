//! [`Union`] as a FUSE filesystem.
//!
//! The union is the only writer, so the kernel keeps names and attributes for ever. Where it may, it also reads
//! and writes files of the upper layer itself (passthrough), so that only opening asks us.

mod convert;
mod dirs;
mod files;
mod passthrough;
mod requests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuser::{Config, Filesystem, InitFlags, KernelConfig, MountOption, Request, Session, SessionACL};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};

use super::{FOREVER, protocol};
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
    /// The connection, for passthrough.
    dev: Arc<OwnedFd>,
    files: Handles<OpenFile>,
    dirs: Handles<OpenDir>,
    passthrough: Passthrough,
    ttl: Duration,
    /// Nobody but root and this user may ask, if set.
    only: Option<u32>,
}

/// The part of the session that is fuser's: its mount and the answer to INIT.
#[derive(Debug)]
struct Handshake {
    posix_acl: bool,
    passthrough: Arc<AtomicBool>,
}

/// A mounted union.
#[derive(Debug)]
pub struct UnionMount {
    fs: UnionFs,
    threads: usize,
    /// Dropping it unmounts what fusermount3 mounted.
    session: Session<Handshake>,
}

/// Mounts a union on a directory. Nothing is answered before [`UnionMount::run`].
pub fn mount(union: Union, mountpoint: &Path) -> io::Result<UnionMount> {
    let config = mount_config(&union);
    UnionMount::begin(union, config.acl, |handshake| match mount_here(&config, mountpoint) {
        Ok(dev) => Session::from_fd(handshake, dev, config.acl, config.clone()),
        // Not ours to do: fusermount3 is.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Session::new(handshake, mountpoint, &config),
        Err(e) => Err(e),
    })
}

/// Takes over the `/dev/fuse` descriptor of a mount that somebody else made and holds
/// ([`FuseKind::Union`](super::FuseKind)). Returns when the kernel has its answer to INIT; nothing else is answered
/// before [`UnionMount::run`], which ends when the last holder of the mount is gone.
///
/// `threads` requests are answered at the same time: enough of them for those that wait for bytes of a lower layer.
pub fn serve(union: Union, dev: OwnedFd, threads: usize) -> io::Result<UnionMount> {
    super::session::keep_buffers_off_the_heap();
    let mut mount = UnionMount::begin(union, SessionACL::All, |handshake| {
        Session::from_fd(handshake, dev, SessionACL::All, Config::default())
    })?;
    mount.threads = threads;
    Ok(mount)
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
    fn begin(
        union: Union,
        acl: SessionACL,
        start: impl FnOnce(Handshake) -> io::Result<Session<Handshake>>,
    ) -> io::Result<Self> {
        let passthrough = Arc::new(AtomicBool::new(false));
        let posix_acl = !union.config().noacl;
        let session = start(Handshake { posix_acl, passthrough: Arc::clone(&passthrough) })?;
        let fs = UnionFs {
            ttl: union.config().timeout.map_or(FOREVER, Duration::from_secs),
            union,
            dev: Arc::new(session.as_fd().try_clone_to_owned()?),
            files: Handles::default(),
            dirs: Handles::default(),
            passthrough: Passthrough::new(passthrough.load(Ordering::Relaxed)),
            only: (acl == SessionACL::RootAndOwner).then(|| nix::unistd::geteuid().as_raw()),
        };
        let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
        Ok(UnionMount { fs, threads, session })
    }

    /// Serves until the union is unmounted.
    ///
    /// # Errors
    /// What ended it otherwise.
    pub fn run(self) -> io::Result<()> {
        let UnionMount { fs, threads, session } = self;
        let serve = move || {
            // Modes come with the umask of whoever asks; ours must not come on top. The umask is the process's
            // unless a thread parts from it; the threads that answer are made from this one.
            unshare(CloneFlags::CLONE_FS)?;
            umask(Mode::empty());
            protocol::serve(&fs, &fs.dev, threads, !fs.union.config().no_busy_poll)
        };
        let thread = std::thread::Builder::new().name("union".into()).spawn(serve)?;
        let ended = thread.join();
        drop(session);
        ended.unwrap_or_else(|_| Err(io::Error::other("the thread that serves the union panicked")))
    }
}

impl Filesystem for Handshake {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let acl = if self.posix_acl { InitFlags::FUSE_POSIX_ACL } else { InitFlags::empty() };
        super::session::configure(config, FLAGS.union(acl));
        if config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH)
            && config.set_max_stack_depth(1).is_ok()
        {
            self.passthrough.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn mount_config(union: &Union) -> Config {
    let mut config = Config::default();
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
