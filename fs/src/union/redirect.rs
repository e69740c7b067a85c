//! Directories that were renamed although a lower layer has them: overlayfs's `redirect_dir`. The upper directory says
//! where in the layers below its lower ones are, as a name beside it or as a path from the root (overlayfs.rst,
//! "Renaming directories").

use std::ffi::{CStr, CString};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::FileStat;

use super::Union;
use super::lookup::{Merging, Opacity};
use super::node::{Node, Part, UPPER, key_of};
use super::sys::{Dir, Real, Result, is_dir, open_dir, stat_at};

const REDIRECT: &CStr = c"trusted.overlay.redirect";
/// Of an upper directory in which something has a number of a lower layer that does not have it under that name.
const IMPURE: &CStr = c"trusted.overlay.impure";
const METACOPY: &CStr = c"trusted.overlay.metacopy";

/// Bytes of the longest path that is written, the default of overlayfs's `redirect_max`.
const MAX_PATH: usize = 256;

/// What is done about redirects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedirectDir {
    /// They are followed, and none is made.
    #[default]
    Follow,
    /// They are followed and made.
    On,
    /// They are not even followed.
    NoFollow,
}

/// Where the lower directories of a directory are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Redirect {
    /// Under another name in the same directory.
    Beside(CString),
    /// At a path from the root of each layer, by its components.
    At(Vec<CString>),
}

impl Redirect {
    /// Reads the mark of a directory.
    fn parse(value: &[u8]) -> Result<Self> {
        let path = value.strip_prefix(b"/");
        let names = path.unwrap_or(value).split(|b| *b == b'/').map(|name| match name {
            b"" | b"." | b".." => Err(Errno::EIO),
            name => CString::new(name).map_err(|_| Errno::EIO),
        });
        let mut names: Vec<CString> = names.collect::<Result<_>>()?;
        match (path, names.len()) {
            (Some(_), _) => Ok(Redirect::At(names)),
            (None, 1) => Ok(Redirect::Beside(names.remove(0))),
            (None, _) => Err(Errno::EIO),
        }
    }

    fn mark(&self) -> Vec<u8> {
        match self {
            Redirect::Beside(name) => name.as_bytes().to_vec(),
            Redirect::At(names) => names.iter().flat_map(|n| [b"/", n.as_bytes()].concat()).collect(),
        }
    }
}

impl Union {
    fn follows(&self) -> bool {
        self.prefix.starts_with('t') && self.config.redirect_dir != RedirectDir::NoFollow
    }

    /// Whether directories of lower layers can be renamed.
    pub(super) fn redirects(&self) -> bool {
        self.prefix.starts_with('t') && self.config.redirect_dir == RedirectDir::On
    }

    /// The mark of a directory in a layer. The lowest has nothing to redirect to.
    pub(super) fn redirect_of(&self, dir: &Real, layer: usize) -> Result<Option<Redirect>> {
        if !self.follows() || layer + 1 >= self.layers.len() {
            return Ok(None);
        }
        dir.xattr(REDIRECT)?.map(|value| Redirect::parse(&value)).transpose()
    }

    /// Refuses files of which overlayfs (`metacopy=on`) has copied up the attributes alone: their contents are elsewhere.
    pub(super) fn has_contents(&self, file: &Real, stat: &FileStat, layer: usize) -> Result<()> {
        let regular = super::sys::kind_of(stat) == libc::S_IFREG;
        if !regular || stat.st_size == 0 || layer + 1 >= self.layers.len() || !self.prefix.starts_with('t') {
            return Ok(());
        }
        // What the kernel knows already was asked then, or made here.
        if self.known_by_key(key_of(stat), layer) {
            return Ok(());
        }
        match file.get_xattr(METACOPY, &mut []) {
            Ok(_) => Err(Errno::EIO),
            Err(_) => Ok(()),
        }
    }

    /// Merges in the directories at a path in the layers from `layer` on.
    pub(super) fn merge_at(
        &self,
        mut layer: usize,
        mut path: Vec<CString>,
        merging: &mut Merging,
    ) -> Result<()> {
        while let Some(root) = self.layers.get(layer) {
            let step = self.walk(root, layer, &path)?;
            if let Some((stat, xwhiteouts)) = step.found {
                let part = Part { layer, fd: None, xwhiteouts, at: Some(path.clone()) };
                merging.push(self.is_writable(), part, &stat);
            }
            if step.ends {
                break;
            }
            path = step.redirected.unwrap_or(path);
            layer += 1;
        }
        Ok(())
    }

    /// Looks a path up in one layer, as overlayfs does: whatever hides one of its components hides the path in the layers
    /// below as well.
    fn walk(&self, root: &Dir, layer: usize, path: &[CString]) -> Result<Step> {
        let mut step = Step::default();
        let mut dir = Arc::clone(root);
        for (i, name) in path.iter().enumerate() {
            let Some(stat) = stat_at(&dir, name)? else { return Ok(step) };
            if !is_dir(&stat) {
                return Ok(Step { ends: true, ..step });
            }
            let real = Real::named(&dir, name);
            let opacity = self.opacity(&real);
            step.ends |= opacity == Opacity::Opaque;
            if let Some(redirect) = self.redirect_of(&real, layer)? {
                let (mut new, rest) = match redirect {
                    Redirect::At(new) => (new, &path[i + 1..]),
                    Redirect::Beside(new) => ([&path[..i], &[new]].concat(), &path[i + 1..]),
                };
                new.extend_from_slice(rest);
                step.redirected = Some(new);
            }
            if i + 1 == path.len() {
                step.found = Some((stat, opacity == Opacity::Whiteouts));
            } else {
                dir = open_dir(&dir, name)?;
            }
        }
        Ok(step)
    }

    /// Before a directory moves: what lower layers have of it is found where it is from now on.
    pub(super) fn pin_parts(node: &Node) -> Result<()> {
        let layers: Vec<usize> = {
            let state = node.read();
            state.parts.iter().filter(|p| p.layer != UPPER && p.at.is_none()).map(|p| p.layer).collect()
        };
        let paths = layers.into_iter().map(|layer| Ok((layer, real_path(node, layer)?)));
        let paths: Vec<(usize, Vec<CString>)> = paths.collect::<Result<_>>()?;
        let mut state = node.write();
        for (layer, path) in paths {
            if let Some(part) = state.parts.iter_mut().find(|p| p.layer == layer) {
                part.at = Some(path);
            }
        }
        Ok(())
    }

    /// Writes down where the lower directories of one are that moves to the directory `to`, or within its own.
    pub(super) fn set_redirect(&self, node: &Arc<Node>, from: &Arc<Node>, to: &Arc<Node>) -> Result<()> {
        let same = Arc::ptr_eq(from, to);
        let known = node.read().redirect.clone();
        let redirect = match known {
            // Where it says stays where it is.
            Some(Redirect::At(_)) => return Ok(()),
            Some(Redirect::Beside(_)) if same => return Ok(()),
            _ if same => Redirect::Beside(node.read().name.clone()),
            _ => Redirect::At(path_below(node)),
        };
        let mark = redirect.mark();
        if matches!(redirect, Redirect::At(_)) && mark.len() > MAX_PATH {
            return Err(Errno::EXDEV);
        }
        let no_marks = |_| Errno::EXDEV;
        Real::Held(node.upper_dir()?).set_xattr(REDIRECT, &mark, 0).map_err(no_marks)?;
        // Only for the numbers that a listing shows.
        let _ = Real::Held(to.upper_dir()?).set_xattr(IMPURE, b"y", 0);
        node.write().redirect = Some(redirect);
        Ok(())
    }

    /// Whether directories in an upper one may have the numbers of lower ones with other names.
    pub(super) fn is_impure(&self, upper: &Dir) -> bool {
        self.follows() && Real::Held(Arc::clone(upper)).get_xattr(IMPURE, &mut []).is_ok()
    }
}

/// What one layer has at a path.
#[derive(Default)]
struct Step {
    /// The directory, and whether files in it may be whiteouts.
    found: Option<(FileStat, bool)>,
    /// Nothing of the layers below is to be seen.
    ends: bool,
    /// The path in the layers below, if it is another one.
    redirected: Option<Vec<CString>>,
}

/// Where a directory's part in `layer` is, from that layer's root. Names must not change meanwhile.
pub(super) fn real_path(node: &Node, layer: usize) -> Result<Vec<CString>> {
    let mut names = Vec::new();
    let mut above = {
        let state = node.read();
        let Some(parent) = &state.parent else { return Ok(names) };
        let part = state.parts.iter().find(|p| p.layer == layer).ok_or(Errno::ENOENT)?;
        if let Some(at) = &part.at {
            return Ok(at.clone());
        }
        names.push(state.name.clone());
        Arc::clone(parent)
    };
    loop {
        let next = {
            let state = above.read();
            let Some(parent) = &state.parent else { break };
            let part = state.parts.iter().find(|p| p.layer == layer).ok_or(Errno::ENOENT)?;
            if let Some(at) = &part.at {
                names.extend(at.iter().rev().cloned());
                break;
            }
            names.push(state.name.clone());
            Arc::clone(parent)
        };
        above = next;
    }
    names.reverse();
    Ok(names)
}

/// What a directory is called for the layers below the upper one.
fn path_below(node: &Arc<Node>) -> Vec<CString> {
    let mut names = Vec::new();
    let mut node = Arc::clone(node);
    loop {
        let next = {
            let state = node.read();
            let Some(parent) = &state.parent else { break };
            match &state.redirect {
                Some(Redirect::At(path)) => {
                    names.extend(path.iter().rev().cloned());
                    break;
                }
                Some(Redirect::Beside(name)) => names.push(name.clone()),
                None => names.push(state.name.clone()),
            }
            Arc::clone(parent)
        };
        node = next;
    }
    names.reverse();
    names
}

/// Opens a directory by its path, following nothing.
pub(super) fn open_path(root: &Dir, path: &[CString]) -> Result<Dir> {
    path.iter().try_fold(Arc::clone(root), |dir, name| open_dir(&dir, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_are_written() {
        for mark in [&b"name"[..], b"/a", b"/a/b c/d"] {
            assert_eq!(Redirect::parse(mark).unwrap().mark(), mark);
        }
        for mark in [&b""[..], b"/", b"a/b", b"/a//b", b"/a/", b"..", b"/a/../b", b"/.", b"a\0b"] {
            assert_eq!(Redirect::parse(mark), Err(Errno::EIO), "{mark:?}");
        }
    }
}
