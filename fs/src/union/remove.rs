//! Removing names: unlink and rmdir.

use std::ffi::CStr;
use std::ops::Deref;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::RenameFlags;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Union;
use super::node::Node;
use super::sys::{Real, Result, rename};

/// A node with a reference of our own, given back at the end.
pub(super) struct Lent<'u> {
    union: &'u Union,
    node: Arc<Node>,
}

impl Deref for Lent<'_> {
    type Target = Arc<Node>;

    fn deref(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let id = self.node.id;
        self.union.forget([(id, 1)]);
    }
}

impl Union {
    /// The node of a name, for as long as it is needed here.
    pub(super) fn lend(&self, parent: &Arc<Node>, name: &CStr) -> Result<Option<Lent<'_>>> {
        Ok(self.lookup(parent, name)?.map(|(node, _)| Lent { union: self, node }))
    }

    /// Removes a name that is no directory.
    pub fn unlink(&self, parent: &Arc<Node>, name: &CStr) -> Result<()> {
        self.work()?;
        let node = self.lend(parent, name)?.ok_or(Errno::ENOENT)?;
        if node.is_dir() {
            return Err(Errno::EISDIR);
        }
        let _changing = node.changing();
        let lower = self.lower_has(parent, name)?;
        self.copy_up(parent)?;
        let dir = parent.upper_dir()?;
        // Who has it open, or another name of it, still finds it.
        let held = if node.read().is_at(parent, name) { Some(node.with(Real::hold)?) } else { None };
        {
            let mut state = node.write();
            if lower {
                self.put_whiteout(&dir, name)?;
            } else {
                unlinkat(&*dir, name, UnlinkatFlags::NoRemoveDir)?;
            }
            if held.is_some() {
                state.held = held;
                state.gone = true;
            }
        }
        self.table.lock().unname(parent.id, name);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: &Arc<Node>, name: &CStr) -> Result<()> {
        self.work()?;
        let node = self.lend(parent, name)?.ok_or(Errno::ENOENT)?;
        if !node.is_dir() {
            return Err(Errno::ENOTDIR);
        }
        let _changing = node.changing();
        if !self.is_empty(&node)? {
            return Err(Errno::ENOTEMPTY);
        }
        let lower = self.lower_has(parent, name)?;
        self.copy_up(parent)?;
        let dir = parent.upper_dir()?;
        // Opened while it has a name.
        self.part(&node, 0)?;
        let mut state = node.write();
        if lower {
            self.put_whiteout(&dir, name)?;
        } else {
            match unlinkat(&*dir, name, UnlinkatFlags::RemoveDir) {
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                    // Nothing but whiteouts is in it; they go when the name is gone.
                    let temp = self.temp()?;
                    rename((&dir, name), (&temp.work, &temp.name), RenameFlags::empty())?;
                }
                other => other?,
            }
        }
        state.gone = true;
        state.parts.truncate(1);
        drop(state);
        self.table.lock().unname(parent.id, name);
        Ok(())
    }
}
