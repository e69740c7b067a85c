//! Waiting for the shim to place us in the control groups, and showing them inside the container.

use super::control::{Control, Message, Plan};
use super::options::Options;
use crate::container::error::{Attempt, Result};
use crate::container::sys;
use nix::sys::stat::{Mode, mkdirat};
use oci_spec::runtime::LinuxNamespaceType;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Waits at most once, as late as possible: moving a process between v1 groups can take the kernel tens of
/// milliseconds, in which the rest of the container is built.
pub(super) struct Gate<'a> {
    control: &'a Control,
    plan: &'a Plan,
    passed: bool,
    own_namespace: bool,
}

impl<'a> Gate<'a> {
    pub(super) fn new(control: &'a Control, plan: &'a Plan) -> Self {
        let own_namespace = super::has_namespace(&plan.spec, LinuxNamespaceType::Cgroup);
        Self { control, plan, passed: false, own_namespace }
    }

    /// Returns once this process is in its groups and, if asked for, in its own cgroup namespace.
    pub(super) fn pass(&mut self) -> Result<()> {
        if !self.passed {
            self.control.wait_for(Message::CgroupReady)?;
            if self.own_namespace {
                super::unshare_cgroup()?;
            }
            self.passed = true;
        }
        Ok(())
    }

    /// Mounts the container's view of its groups on `target`.
    pub(super) fn mount(&mut self, target: BorrowedFd<'_>, options: &Options) -> Result<()> {
        self.pass()?;
        let attrs = options.attr.set;
        let view = &self.plan.cgroup;
        if view.v1.is_empty() {
            let Some(path) = &view.v2 else { return Ok(()) };
            let tree = if self.own_namespace {
                sys::fs_mount("cgroup2", Some("cgroup"), &[], &[], attrs)
            } else {
                readonly_clone(path, attrs)
            };
            return sys::move_mount(tree.attempt(|| "mount the container's cgroup")?.as_fd(), target)
                .attempt(|| "mount the container's cgroup");
        }
        let what = || "mount the container's cgroups";
        let data = [("mode".to_owned(), Some("755".to_owned())), ("size".to_owned(), Some("64k".to_owned()))];
        let writable = attrs & !sys::attr::RDONLY;
        let base = sys::fs_mount("tmpfs", Some("tmpfs"), &data, &[], writable).attempt(what)?;
        sys::move_mount(base.as_fd(), target).attempt(what)?;
        for (controllers, path) in &view.v1 {
            let name = controllers.join(",").replace("name=", "");
            let data: Vec<_> = controllers
                .iter()
                .map(|c| match c.split_once('=') {
                    Some((k, v)) => (k.to_owned(), Some(v.to_owned())),
                    None => (c.clone(), None),
                })
                .collect();
            let tree = if self.own_namespace {
                sys::fs_mount("cgroup", Some("cgroup"), &data, &[], attrs).attempt(what)?
            } else {
                readonly_clone(path, attrs).attempt(what)?
            };
            place(&base, &name, &tree)?;
            for alias in controllers.iter().filter(|_| controllers.len() > 1) {
                nix::unistd::symlinkat(name.as_str(), &base, alias.as_str()).attempt(what)?;
            }
        }
        if let Some(path) = &view.v2 {
            let tree = if self.own_namespace {
                sys::fs_mount("cgroup2", Some("cgroup"), &[], &[], attrs)
            } else {
                readonly_clone(path, attrs)
            };
            place(&base, "unified", &tree.attempt(what)?)?;
        }
        if attrs & sys::attr::RDONLY != 0 {
            let readonly = sys::MountAttr { set: sys::attr::RDONLY, ..sys::MountAttr::default() };
            sys::mount_setattr(base.as_fd(), false, &readonly).attempt(what)?;
        }
        Ok(())
    }
}

fn readonly_clone(path: &std::path::Path, attrs: u64) -> std::io::Result<OwnedFd> {
    let tree = sys::clone_tree(path, false)?;
    let attr = sys::MountAttr { set: attrs, ..sys::MountAttr::default() };
    sys::mount_setattr(tree.as_fd(), false, &attr)?;
    Ok(tree)
}

fn place(base: &OwnedFd, name: &str, tree: &OwnedFd) -> Result<()> {
    let what = || format!("mount the container's {name} cgroup");
    mkdirat(base, name, Mode::from_bits_truncate(0o755)).attempt(what)?;
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC;
    let dir = nix::fcntl::openat(base, name, flags, Mode::empty()).attempt(what)?;
    sys::move_mount(tree.as_fd(), dir.as_fd()).attempt(what)
}
