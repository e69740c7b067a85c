//! Renaming.

use std::ffi::CStr;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::fcntl::RenameFlags;
use nix::sys::stat::{Mode, mkdirat};

use super::Union;
use super::node::{Node, UPPER};
use super::sys::{Dir, Real, Result, rename};

/// A name: the directory's node, and the name in it.
type Place<'a> = (&'a Arc<Node>, &'a CStr);

/// What to tell rename(2), and what is left to do after it.
struct Plan {
    flags: RenameFlags,
    /// The whiteout that was at the new name is at the old one now and hides nothing there.
    remove_whiteout: bool,
}

impl Union {
    /// Renames. `flags` are those of renameat2(2); as on overlayfs `RENAME_WHITEOUT` is not among them.
    ///
    /// # Errors
    /// `EXDEV` for a directory that a lower layer has, unless the union makes redirects, beside the usual ones.
    pub fn rename(&self, from: Place<'_>, to: Place<'_>, flags: u32) -> Result<()> {
        self.work()?;
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        let exchange = flags == RenameFlags::RENAME_EXCHANGE;
        if !exchange && !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return Err(Errno::EINVAL);
        }
        let old = self.lend(from.0, from.1)?.ok_or(Errno::ENOENT)?;
        let new = self.lend(to.0, to.1)?;
        match &new {
            None if exchange => return Err(Errno::ENOENT),
            Some(_) if flags.contains(RenameFlags::RENAME_NOREPLACE) => return Err(Errno::EEXIST),
            Some(new) if Arc::ptr_eq(new, &old) => return Ok(()),
            _ => {}
        }
        let can_move = |node: &Node| self.redirects() || !has_lower(node);
        if !can_move(&old) || (exchange && !new.as_ref().is_some_and(|n| can_move(n))) {
            return Err(Errno::EXDEV);
        }
        let new = new.as_deref();
        let _locks = lock_both(&old, new);
        self.copy_up_changing(&old, None)?;
        self.copy_up(to.0)?;
        if let (true, Some(new)) = (exchange, new) {
            self.copy_up_changing(new, None)?;
        }
        self.move_names(from, to, (&old, new), exchange)
    }

    fn move_names(
        &self,
        from: Place<'_>,
        to: Place<'_>,
        (old, new): (&Arc<Node>, Option<&Arc<Node>>),
        exchange: bool,
    ) -> Result<()> {
        let (from_dir, to_dir) = (from.0.upper_dir()?, to.0.upper_dir()?);
        if let (false, Some(new)) = (exchange, new) {
            self.make_room(old, new, &to_dir, to.1)?;
        }
        let plan = self.plan(from, to, old, &to_dir, exchange)?;
        self.mark(old, from.0, to.0)?;
        if let (true, Some(new)) = (exchange, new) {
            self.mark(new, to.0, from.0)?;
        }
        // A replaced file may still be open.
        let replaced = new.filter(|_| !exchange);
        let held = match replaced {
            Some(n) if !n.is_dir() && n.read().is_at(to.0, to.1) => Some(n.with(Real::hold)?),
            _ => None,
        };
        for dir in [Some(old), new].into_iter().flatten().filter(|n| n.is_dir()) {
            self.part(dir, 0)?;
        }
        let moves_tree = old.is_dir() || new.is_some_and(|n| n.is_dir());
        let _tree = moves_tree.then(|| self.tree.write().unwrap_or_else(PoisonError::into_inner));
        for dir in [Some(old), new.filter(|_| exchange)].into_iter().flatten().filter(|n| n.is_dir()) {
            Self::pin_parts(dir)?;
        }
        {
            // Nobody uses the names while they change.
            let mut old_state = old.write();
            let mut new_state = new.map(|n| n.write());
            self.rename_real((&from_dir, from.1), (&to_dir, to.1), plan.flags)?;
            if old_state.held.is_none() {
                old_state.parent = Some(Arc::clone(to.0));
                old_state.name = to.1.to_owned();
            }
            if let Some(state) = &mut new_state {
                if exchange {
                    state.parent = Some(Arc::clone(from.0));
                    state.name = from.1.to_owned();
                } else if state.held.is_none() && (held.is_some() || !state.parts.is_empty()) {
                    state.held = held;
                    state.gone = true;
                    state.parts.truncate(1);
                }
            }
        }
        if plan.remove_whiteout {
            let _ = super::whiteout::remove_tree(&from_dir, from.1);
        }
        self.table.lock().renamed(
            (old.id, old.is_dir()),
            new.map(|n| (n.id, n.is_dir() && exchange)),
            from,
            to,
        );
        Ok(())
    }

    /// How the upper layer's names are to move so that no lower one shows through.
    fn plan(&self, from: Place<'_>, to: Place<'_>, old: &Node, to_dir: &Dir, exchange: bool) -> Result<Plan> {
        if exchange {
            return Ok(Plan { flags: RenameFlags::RENAME_EXCHANGE, remove_whiteout: false });
        }
        let onto_whiteout = self.whiteout_at(to_dir, to.1)?;
        let switch = RenameFlags::RENAME_EXCHANGE;
        Ok(match (self.lower_has(from.0, from.1)?, onto_whiteout) {
            (true, true) => Plan { flags: switch, remove_whiteout: false },
            (true, false) => Plan { flags: RenameFlags::RENAME_WHITEOUT, remove_whiteout: false },
            // A directory can't be renamed over a whiteout.
            (false, true) if old.is_dir() => Plan { flags: switch, remove_whiteout: true },
            (false, _) => Plan { flags: RenameFlags::empty(), remove_whiteout: false },
        })
    }

    /// Readies the new name to be replaced: a directory must be empty, in the upper layer too.
    fn make_room(&self, old: &Node, new: &Node, dir: &Dir, name: &CStr) -> Result<()> {
        match (old.is_dir(), new.is_dir()) {
            (true, false) => return Err(Errno::ENOTDIR),
            (false, true) => return Err(Errno::EISDIR),
            (false, false) => return Ok(()),
            (true, true) => {}
        }
        if !self.is_empty(new)? {
            return Err(Errno::ENOTEMPTY);
        }
        if !new.is_upper() {
            return Ok(());
        }
        // Whiteouts in it would be in the way: an empty one takes its place.
        let temp = self.temp()?;
        mkdirat(&*temp.work, temp.name.as_c_str(), Mode::S_IRWXU)?;
        let _ = self.set_opaque(&temp.real());
        rename((&temp.work, &temp.name), (dir, name), RenameFlags::RENAME_EXCHANGE)
    }

    /// A directory that comes to where lower layers may have one of that name must not merge with it, but with those that
    /// it has been merged with.
    fn mark(&self, node: &Arc<Node>, from: &Arc<Node>, to: &Arc<Node>) -> Result<()> {
        if node.is_dir() && has_lower(node) {
            return self.set_redirect(node, from, to);
        }
        if !node.is_dir() || to.read().parts.len() < 2 {
            return Ok(());
        }
        self.set_opaque(&Real::Held(node.upper_dir()?))
    }

    fn rename_real(&self, from: (&Dir, &CStr), to: (&Dir, &CStr), flags: RenameFlags) -> Result<()> {
        let whiteout = flags.contains(RenameFlags::RENAME_WHITEOUT);
        match rename((from.0, from.1), (to.0, to.1), flags) {
            // A filesystem without it: a crash between the two would show the lower file again.
            Err(Errno::EINVAL | Errno::EPERM) if whiteout => {
                rename((from.0, from.1), (to.0, to.1), flags - RenameFlags::RENAME_WHITEOUT)?;
                self.put_whiteout(from.0, from.1)
            }
            other => other,
        }
    }
}

/// Whether a directory is in a lower layer: what is below it is found by its name then.
fn has_lower(node: &Node) -> bool {
    node.read().parts.iter().any(|p| p.layer != UPPER)
}

/// Locks one or two nodes against other changes, in an order of their own.
fn lock_both<'n>(
    old: &'n Node,
    new: Option<&'n Arc<Node>>,
) -> (std::sync::MutexGuard<'n, ()>, Option<std::sync::MutexGuard<'n, ()>>) {
    match new {
        Some(new) if new.id < old.id => {
            let second = new.changing();
            (old.changing(), Some(second))
        }
        _ => (old.changing(), new.map(|n| n.changing())),
    }
}
