//! `lazyrun union` and `mount.fuse.lazyrun`: a union of plain directories, called as fuse-overlayfs is.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use lazyrun_fs::fuse::unionfs::{self, UnionMount};
use lazyrun_fs::union::{Union, UnionConfig};
use nix::mount::{MntFlags, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};

use crate::failure::Failure;

const USAGE: &str = "\
Usage: lazyrun union [-f] -o lowerdir=DIR[:DIR...][,upperdir=DIR,workdir=DIR][,OPTION...] MOUNTPOINT

Shows directories as one, as Linux's overlayfs does, without the kernel's. Goes to the background once it is
mounted; ends when it is unmounted (fusermount3 -u, umount) or gets SIGTERM.

  -f, --foreground   stay in the foreground
  -o OPTIONS         lowerdir, upperdir, workdir, volatile, userxattr, squash_to_root, squash_to_uid=N,
                     squash_to_gid=N, static_nlink, noacl, timeout=SECONDS, busy_poll=on|off,
                     redirect_dir=on|off|follow|nofollow (on: directories of lowerdir can be renamed), and those of the mount:
                     ro, nosuid, nodev, noexec, allow_other, fsname=NAME...
";

/// What a background process writes to standard output when the union is mounted.
pub const READY: &[u8] = b"ok";

/// Threads that serve a union for the daemon: a read of a lower file may wait for the network, and others go on.
const SERVING: usize = 16;

#[derive(Debug, Default)]
struct Parsed {
    config: UnionConfig,
    foreground: bool,
    /// This is the background process: tell the one that waits.
    tells: bool,
    /// The daemon made the mount: the number of its `/dev/fuse` descriptor.
    device: Option<RawFd>,
    places: Vec<PathBuf>,
    help: bool,
}

/// Whether the program was called by a name of mount(8)'s helpers.
pub fn called_as_helper(name: &Path) -> bool {
    name.file_name().is_some_and(|n| n.as_bytes().starts_with(b"mount.fuse"))
}

/// Does what the arguments (without the program's name) say. `helper`: the first of two places is the source.
pub fn main(args: &[OsString], helper: bool) -> ExitCode {
    let run = || -> Result<(), Failure> {
        let parsed = parse(args).map_err(Failure::daemon)?;
        if parsed.help {
            print!("{USAGE}");
            return Ok(());
        }
        if let Some(device) = parsed.device {
            return serve_for_daemon(parsed.config, device);
        }
        let mountpoint = match (parsed.places.as_slice(), helper) {
            ([place], _) | ([_, place], true) => place.clone(),
            _ => return Err(Failure::daemon(format!("name one mount point\n{USAGE}"))),
        };
        if parsed.foreground || parsed.tells {
            return serve(parsed, &mountpoint);
        }
        background(args, helper)
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("lazyrun: {failure}");
            // fuse-overlayfs and mount helpers fail with 1.
            ExitCode::FAILURE
        }
    }
}

fn parse(args: &[OsString]) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_bytes() {
            b"-f" | b"--foreground" => parsed.foreground = true,
            b"-d" | b"--debug" => parsed.foreground = true,
            b"--ready" => parsed.tells = true,
            b"--device" => {
                let number = args.next().and_then(|n| n.to_str()?.parse().ok()).filter(|n| *n > 2);
                parsed.device = Some(number.ok_or("--device needs the number of a descriptor")?);
            }
            b"-h" | b"--help" => parsed.help = true,
            // Of mount(8): sloppy, no mtab, verbose; and the type it was called for.
            b"-s" | b"-n" | b"-v" => {}
            b"-t" => drop(args.next()),
            b"-o" => {
                let value = args.next().ok_or("-o needs options")?;
                parsed.config.parse(value.as_bytes()).map_err(|e| e.to_string())?;
            }
            other => match other.strip_prefix(b"-o") {
                Some(value) => parsed.config.parse(value).map_err(|e| e.to_string())?,
                None if other.starts_with(b"-") && other.len() > 1 => {
                    return Err(format!("there is no option {}", arg.display()));
                }
                None => parsed.places.push(PathBuf::from(arg)),
            },
        }
    }
    Ok(parsed)
}

/// Starts the process that serves and waits until it has mounted.
fn background(args: &[OsString], helper: bool) -> Result<(), Failure> {
    let mut command = Command::new("/proc/self/exe");
    if helper {
        // The name decides how places are read.
        std::os::unix::process::CommandExt::arg0(&mut command, "mount.fuse.lazyrun");
    } else {
        command.arg("union");
    }
    let failed = |e: std::io::Error| Failure::daemon(format!("cannot start the process that serves: {e}"));
    let mut child = command
        .arg("--ready")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut told = Vec::new();
    if let Some(mut out) = child.stdout.take() {
        let _ = out.read_to_end(&mut told);
    }
    if told == READY {
        return Ok(());
    }
    let status = child.wait().map_err(failed)?;
    // It has said why.
    Err(Failure::daemon(format!("the union was not mounted ({status})")))
}

fn serve(parsed: Parsed, mountpoint: &Path) -> Result<(), Failure> {
    raise_file_limit();
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    // Threads made from here on leave them to the one that waits for them.
    let blocked = signals.thread_block();
    let union = Union::open(parsed.config).map_err(|e| Failure::daemon(e.to_string()))?;
    let mounted = unionfs::mount(union, mountpoint)
        .map_err(|e| Failure::daemon(format!("cannot mount a union on {}: {e}", mountpoint.display())))?;
    let target = mountpoint.canonicalize();
    if let (Ok(()), Ok(target)) = (blocked, target) {
        std::thread::spawn(move || {
            if signals.wait().is_ok() {
                unmount(&target);
            }
        });
    }
    if parsed.tells {
        detach().map_err(|e| Failure::daemon(format!("cannot go to the background: {e}")))?;
    }
    run(mounted)
}

/// Serves a mount that the daemon made and handed over, until it is gone. What goes wrong before that is told to the
/// daemon, in the place of its success.
fn serve_for_daemon(config: UnionConfig, device: RawFd) -> Result<(), Failure> {
    raise_file_limit();
    // Whoever uses the mount needs this process: it ends with the mount and not before.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    let _ = signals.thread_block();
    // SAFETY: the daemon placed this descriptor for this purpose, and nothing has used it since.
    let device = unsafe { OwnedFd::from_raw_fd(device) };
    let _ = nix::fcntl::fcntl(&device, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC));
    let served = Union::open(config)
        .map_err(|e| e.to_string())
        .and_then(|union| unionfs::serve(union, device, SERVING).map_err(|e| e.to_string()));
    let mut out = std::io::stdout();
    let mounted = served.map_err(|why| {
        let _ = out.write_all(why.as_bytes());
        Failure::daemon(why)
    })?;
    let failed = |e: std::io::Error| Failure::daemon(format!("cannot tell that the union is served: {e}"));
    out.write_all(READY).and_then(|()| out.flush()).map_err(failed)?;
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    run(mounted)
}

fn run(mounted: UnionMount) -> Result<(), Failure> {
    mounted.run().map_err(|e| Failure::daemon(format!("the union ended: {e}")))
}

/// Leaves the caller's session and its pipes, and tells it.
fn detach() -> std::io::Result<()> {
    // Fails for a leader of a group, which is fine.
    let _ = nix::unistd::setsid();
    let _ = nix::unistd::chdir("/");
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    std::io::stdout().write_all(READY)?;
    std::io::stdout().flush()?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

fn unmount(target: &Path) {
    if umount2(target, MntFlags::MNT_DETACH).is_err() {
        let _ = Command::new("fusermount3").arg("-uz").arg(target).status();
    }
}

/// Directories in use are held open.
fn raise_file_limit() {
    const ENOUGH: u64 = 1 << 20;
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && setrlimit(Resource::RLIMIT_NOFILE, ENOUGH.max(hard), ENOUGH.max(hard)).is_err()
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn called_as_podman_and_mount_call_it() {
        let podman = parse(&args(&["-o", "lowerdir=/l1:/l2,upperdir=/u,workdir=/w,nodev", "/m"])).unwrap();
        assert_eq!(podman.places, [PathBuf::from("/m")]);
        assert_eq!((podman.config.lower.len(), podman.foreground), (2, false));
        let mount = parse(&args(&["none", "/m", "-n", "-o", "rw,lowerdir=/l", "-f"])).unwrap();
        assert_eq!(mount.places.len(), 2);
        assert!(mount.foreground && mount.config.read_only());
        assert!(called_as_helper(Path::new("/sbin/mount.fuse.lazyrun")));
        assert!(!called_as_helper(Path::new("/usr/bin/lazyrun")));
    }

    #[test]
    fn what_is_not_understood_is_said() {
        assert_eq!(parse(&args(&["-x"])).unwrap_err(), "there is no option -x");
        assert_eq!(parse(&args(&["-o", "lowerdirs=/x"])).unwrap_err(), "there is no option `lowerdirs=/x`");
    }
}
