//! The container's root: every mount of the spec made as a detached mount and attached to a descriptor that
//! was resolved inside the root, then pivot_root.

use super::cgroup::Gate;
use super::control::{Control, Plan};
use super::options::Options;
use super::{console, dev, paths};
use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::{rootfs, sys};
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat};
use oci_spec::runtime::Mount;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Makes the root with all mounts, nodes, masks, and moves into it.
pub(super) fn build_root(control: &Control, plan: &Plan, cgroup: &mut Gate<'_>) -> Result<()> {
    let spec = &plan.spec;
    let linux = spec.linux().as_ref();
    isolate()?;
    let path = super::root_path(spec, &plan.bundle)?;
    let root = become_mount(&path)?;
    let null = paths::host_null()?;
    for m in spec.mounts().iter().flatten() {
        one(&root, m, plan, cgroup)?;
    }
    let process = spec.process().as_ref();
    if needs_dev(spec.mounts().iter().flatten()) {
        dev::populate(root.as_fd(), linux.and_then(|l| l.devices().as_ref()))?;
    }
    if process.is_some_and(|p| p.terminal() == Some(true)) {
        console::attach(control, &root, Some(root.as_fd()), plan)?;
    }
    if let Some(process) = process {
        rootfs::ensure_dir(root.as_fd(), process.cwd())?;
    }
    for path in linux.and_then(|l| l.readonly_paths().as_ref()).into_iter().flatten() {
        paths::make_readonly(root.as_fd(), Path::new(path))?;
    }
    for path in linux.and_then(|l| l.masked_paths().as_ref()).into_iter().flatten() {
        paths::mask(root.as_fd(), Path::new(path), null.as_fd())?;
    }
    if spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true) {
        let attr = sys::MountAttr { set: sys::attr::RDONLY, ..sys::MountAttr::default() };
        sys::mount_setattr(root.as_fd(), false, &attr).attempt(|| "make the root read-only")?;
    }
    pivot(&root)?;
    set_propagation(linux.and_then(|l| l.rootfs_propagation().as_deref()))
}

/// Cuts this mount namespace off from the host's: nothing made here may appear there. What the host mounts
/// later may still arrive until the final propagation is set.
fn isolate() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .attempt(|| "isolate the container's mounts")
}

/// The propagation the spec wants for the container's root, once inside it; private when it wants none.
fn set_propagation(word: Option<&str>) -> Result<()> {
    let (flag, recursive) = match word {
        None | Some("") => return Ok(()),
        Some("slave") => (MsFlags::MS_SLAVE, false),
        Some("rslave") => (MsFlags::MS_SLAVE, true),
        Some("private") => (MsFlags::MS_PRIVATE, false),
        Some("rprivate") => (MsFlags::MS_PRIVATE, true),
        Some("shared") => (MsFlags::MS_SHARED, false),
        Some("rshared") => (MsFlags::MS_SHARED, true),
        Some("unbindable") => (MsFlags::MS_UNBINDABLE, false),
        Some("runbindable") => (MsFlags::MS_UNBINDABLE, true),
        Some(other) => return Err(ContainerError::Invalid(format!("unknown rootfsPropagation \"{other}\""))),
    };
    let none: Option<&str> = None;
    let rec = if recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    mount(none, "/", none, rec | flag, none).attempt(|| "set the root's mount propagation")
}

/// The root directory as a mount of its own, private, so that it can be pivoted to.
fn become_mount(path: &Path) -> Result<OwnedFd> {
    let what = || format!("use {} as the container's root", path.display());
    let tree = sys::clone_tree(path, true).attempt(what)?;
    let private = sys::MountAttr { propagation: libc::MS_PRIVATE, ..sys::MountAttr::default() };
    sys::mount_setattr(tree.as_fd(), true, &private).attempt(what)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let target = open(path, flags, Mode::empty()).attempt(what)?;
    sys::move_mount(tree.as_fd(), target.as_fd()).attempt(what)?;
    Ok(tree)
}

/// A /dev that is bound from somewhere is left as it is.
fn needs_dev<'a>(mut mounts: impl Iterator<Item = &'a Mount>) -> bool {
    !mounts.any(|m| rootfs::clean(m.destination()) == Path::new("dev") && is_bind(m))
}

fn is_bind(m: &Mount) -> bool {
    let words = m.options().iter().flatten();
    m.typ().as_deref() == Some("bind") || words.into_iter().any(|o| o == "bind" || o == "rbind")
}

fn one(root: &OwnedFd, m: &Mount, plan: &Plan, cgroup: &mut Gate<'_>) -> Result<()> {
    let options = Options::parse(m.options().as_deref().unwrap_or_default());
    let destination = m.destination();
    if rootfs::clean(destination).as_os_str().is_empty() {
        return Err(ContainerError::invalid("a mount over the container's root is not possible"));
    }
    let kind = m.typ().as_deref().unwrap_or("none");
    if is_bind(m) {
        return bind(root.as_fd(), m, &options, &plan.bundle);
    }
    refuse_link(root.as_fd(), destination, kind)?;
    let target = rootfs::ensure_dir(root.as_fd(), destination)?;
    if matches!(kind, "cgroup" | "cgroup2") {
        return cgroup.mount(target.as_fd(), &options);
    }
    let source = m.source().as_ref().and_then(|s| s.to_str()).unwrap_or(kind);
    let tree = sys::fs_mount(kind, Some(source), &options.data, &options.superblock, options.attr.set)
        .attempt(|| format!("mount {kind} for {}", destination.display()))?;
    attach(&tree, target.as_fd(), &options, destination)
}

/// proc, sysfs and /dev land where they belong or not at all: an image in which they are links is refused.
fn refuse_link(root: BorrowedFd<'_>, destination: &Path, kind: &str) -> Result<()> {
    let inner = rootfs::clean(destination);
    if !(matches!(kind, "proc" | "sysfs") || inner == Path::new("dev")) {
        return Ok(());
    }
    match rootfs::open(root, destination, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty()) {
        Err(_) => Ok(()),
        Ok(fd) => {
            let st = fstat(&fd).attempt(|| format!("look at {}", destination.display()))?;
            let is_dir = SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
            if is_dir {
                return Ok(());
            }
            Err(ContainerError::Invalid(format!(
                "{} in the image is not a directory, so {kind} cannot be mounted there",
                destination.display()
            )))
        }
    }
}

fn bind(root: BorrowedFd<'_>, m: &Mount, options: &Options, bundle: &Path) -> Result<()> {
    let destination = m.destination();
    let source: PathBuf = match m.source() {
        Some(source) => bundle.join(source),
        None => {
            return Err(ContainerError::Invalid(format!(
                "the mount on {} has no source",
                destination.display()
            )));
        }
    };
    let what = || format!("bind {} to {}", source.display(), destination.display());
    let tree = sys::clone_tree(&source, options.recursive).attempt(what)?;
    let st = fstat(&tree).attempt(what)?;
    let is_dir = SFlag::from_bits_truncate(st.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
    let target =
        if is_dir { rootfs::ensure_dir(root, destination)? } else { rootfs::ensure_file(root, destination)? };
    if options.attr != sys::MountAttr::default() {
        sys::mount_setattr(tree.as_fd(), false, &options.attr).attempt(what)?;
    }
    attach(&tree, target.as_fd(), options, destination)
}

fn attach(tree: &OwnedFd, target: BorrowedFd<'_>, options: &Options, destination: &Path) -> Result<()> {
    let what = || format!("mount on {} in the container", destination.display());
    if options.tree_attr != sys::MountAttr::default() {
        sys::mount_setattr(tree.as_fd(), true, &options.tree_attr).attempt(what)?;
    }
    for (propagation, recursive) in &options.propagation {
        let attr = sys::MountAttr { propagation: *propagation, ..sys::MountAttr::default() };
        sys::mount_setattr(tree.as_fd(), *recursive, &attr).attempt(what)?;
    }
    sys::move_mount(tree.as_fd(), target).attempt(what)
}

/// Makes `root` this mount namespace's root and drops the host's.
fn pivot(root: &OwnedFd) -> Result<()> {
    let what = || "move into the container's root";
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let old = open("/", flags, Mode::empty()).attempt(what)?;
    nix::unistd::fchdir(root).attempt(what)?;
    // With both arguments ".", the old root ends up stacked on the new one (pivot_root(2), NOTES).
    nix::unistd::pivot_root(".", ".").attempt(what)?;
    nix::unistd::fchdir(&old).attempt(what)?;
    let none: Option<&str> = None;
    // Unmounting must not reach the host through shared mounts.
    mount(none, ".", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).attempt(what)?;
    umount2(".", MntFlags::MNT_DETACH).attempt(what)?;
    nix::unistd::chdir("/").attempt(what)
}
