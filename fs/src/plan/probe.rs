//! The probes themselves. They run in the mount helper: see [`crate::mounter`].

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Check, Probes, tiny};
use crate::fuse::{self, Flat, FuseKind, FuseMount, LayerFiles, ReadReply, ServeOptions, ServerHandle};
use crate::mount::{self, OverlayOptions, fd_path};

/// Name of the probe's directory, before the process number.
const PREFIX: &str = ".lazyrun-probe-";
/// Bytes of the file that is read through every stack.
const CONTENT_SIZE: u32 = 64 * 1024;

/// Tries every piece of the plans, with files in `root` (or in the nearest directory above it that
/// exists) that are gone afterwards. Makes FUSE mounts and serves them, so it wants a process of its own.
pub fn probe(root: &Path) -> Probes {
    if let Err(reason) = privilege() {
        return all(&Err(reason));
    }
    let mut probes = all(&Err("it was not tried".into()));
    probes.privilege = Ok(());
    let scratch = Scratch::new(root);
    probes.erofs = with(&scratch, erofs_on_file);
    let (tree, _server) = match serve() {
        Ok(fuse) => fuse,
        Err(reason) => {
            probes.fuse = Err(reason);
            let needs_fuse = || Err("it needs FUSE".into());
            probes.erofs_on_fuse = needs_fuse();
            probes.overlay_on_erofs = needs_fuse();
            probes.overlay_on_fuse = needs_fuse();
            return probes;
        }
    };
    // Whatever the plan, what is written has to go somewhere.
    probes.fuse = with(&scratch, |_| read_back(tree.as_fd(), "FUSE"));
    probes.overlay_on_fuse = with(&scratch, |scratch| overlay(scratch, "fuse", tree.as_fd()));
    let device = Path::new(&fd_path(tree.as_fd())).join(tiny::FILE);
    let view =
        with(&scratch, |scratch| mount::erofs(&scratch.image, &[device], false).map_err(|e| e.to_string()));
    match view {
        Ok(view) => {
            probes.erofs_on_fuse = read_back(view.as_fd(), "EROFS");
            probes.overlay_on_erofs = with(&scratch, |scratch| overlay(scratch, "erofs", view.as_fd()));
        }
        Err(reason) => {
            probes.overlay_on_erofs = Err(format!("there is no EROFS view to put it on: {reason}"));
            probes.erofs_on_fuse = Err(reason);
        }
    }
    probes
}

fn all(check: &Check) -> Probes {
    Probes {
        privilege: check.clone(),
        fuse: check.clone(),
        erofs: check.clone(),
        erofs_on_fuse: check.clone(),
        overlay_on_erofs: check.clone(),
        overlay_on_fuse: check.clone(),
    }
}

/// Runs a probe that needs files in the root directory.
fn with<T>(
    scratch: &Result<Scratch, String>,
    probe: impl FnOnce(&Scratch) -> Result<T, String>,
) -> Result<T, String> {
    scratch.as_ref().map_err(Clone::clone).and_then(probe)
}

/// CAP_SYS_ADMIN (bit 21) among the effective capabilities of this process.
fn privilege() -> Check {
    let status = fs::read_to_string("/proc/self/status").map_err(|e| format!("cannot read /proc: {e}"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok()).unwrap_or(0);
    if bits & (1 << 21) == 0 {
        return Err("mounting needs root (CAP_SYS_ADMIN)".into());
    }
    Ok(())
}

fn serve() -> Result<(OwnedFd, ServerHandle), String> {
    let FuseMount { tree, dev } = fuse::mount(FuseKind::Flat).map_err(|e| e.to_string())?;
    let server = fuse::serve(Flat::new(Arc::new(Content)), tree.as_fd(), dev, ServeOptions::default());
    Ok((tree, server.map_err(|e| e.to_string())?))
}

fn erofs_on_file(scratch: &Scratch) -> Check {
    let view = mount::erofs(&scratch.image, std::slice::from_ref(&scratch.device), false);
    read_back(view.map_err(|e| e.to_string())?.as_fd(), "EROFS")
}

/// Writes into an overlay and removes a file of the lower, which needs a whiteout in the upper.
fn overlay(scratch: &Scratch, name: &str, lower: BorrowedFd<'_>) -> Check {
    let fail = |what: &str, e: io::Error| format!("an overlay here cannot {what}: {e}");
    let upper = scratch.dir.join(format!("upper-{name}"));
    let work = scratch.dir.join(format!("work-{name}"));
    for dir in [&upper, &work] {
        fs::create_dir(dir).map_err(|e| fail("be prepared", e))?;
    }
    let options = OverlayOptions::default();
    let tree = mount::overlay(lower, &upper, &work, &options).map_err(|e| e.to_string())?;
    read_back(tree.as_fd(), "an overlay")?;
    let root = PathBuf::from(fd_path(tree.as_fd()));
    fs::write(root.join("new"), b"new").map_err(|e| fail("create a file", e))?;
    fs::remove_file(root.join(tiny::FILE)).map_err(|e| fail("remove a file of its lower", e))
}

fn read_back(tree: BorrowedFd<'_>, what: &str) -> Check {
    let path = Path::new(&fd_path(tree)).join(tiny::FILE);
    let mut got = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut got))
        .map_err(|e| format!("{what} cannot be read: {e}"))?;
    if got != content() {
        return Err(format!("{what} gives wrong bytes"));
    }
    Ok(())
}

fn content() -> Vec<u8> {
    (0..CONTENT_SIZE).map(|i| (i % 251) as u8).collect()
}

/// The one layer file that the probe serves.
struct Content;

impl LayerFiles for Content {
    fn by_name(&self, name: &[u8]) -> Option<u64> {
        (name == tiny::FILE.as_bytes()).then_some(2)
    }

    fn size(&self, ino: u64) -> Option<u64> {
        (ino == 2).then_some(u64::from(CONTENT_SIZE))
    }

    fn read(&self, _ino: u64, offset: u64, len: u32, reply: Box<dyn ReadReply>) {
        let content = content();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let end = start.saturating_add(len as usize).min(content.len());
        reply.data(&content[start..end]);
    }
}

/// Removes what probes left that were killed.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse::<u32>().ok());
        let gone = |pid| pid == std::process::id() || !Path::new(&format!("/proc/{pid}")).exists();
        if pid.is_some_and(gone) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A directory for the probe's files, removed in the end.
struct Scratch {
    dir: PathBuf,
    image: PathBuf,
    device: PathBuf,
}

impl Scratch {
    fn new(root: &Path) -> Result<Self, String> {
        let base = root.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
        let dir = base.join(format!("{PREFIX}{}", std::process::id()));
        let fail = |e: io::Error| format!("{} cannot be written to: {e}", base.display());
        sweep(base);
        DirBuilder::new().mode(0o700).create(&dir).map_err(fail)?;
        let scratch = Self { image: dir.join("image"), device: dir.join("device"), dir };
        fs::write(&scratch.image, tiny::image(CONTENT_SIZE)).map_err(fail)?;
        fs::write(&scratch.device, content()).map_err(fail)?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
