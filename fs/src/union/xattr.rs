//! Extended attributes. Overlayfs's own are hidden; what is called like them in the union has an escaped name in
//! the layers (`trusted.overlay.overlay.*`), so that unions nest.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use nix::errno::Errno;

use super::Union;
use super::node::Node;
use super::sys::{Real, Result, to_c};

const ESCAPE: &[u8] = b"overlay.";
const ACL: &[u8] = b"system.posix_acl_";

impl Union {
    /// Whether a layer's attribute is one of overlayfs's marks.
    pub(super) fn is_mark(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix.as_bytes()).is_some_and(|rest| !rest.starts_with(ESCAPE))
    }

    /// What an attribute of the union is called in the layers.
    fn escaped(&self, name: &CStr) -> CString {
        let prefix = self.prefix.as_bytes();
        match name.to_bytes().strip_prefix(prefix) {
            Some(rest) => to_c([prefix, ESCAPE, rest].concat()),
            None => name.to_owned(),
        }
    }

    fn allowed(&self, name: &CStr) -> Result<()> {
        let refused = self.config.noacl && name.to_bytes().starts_with(ACL);
        if refused { Err(Errno::EOPNOTSUPP) } else { Ok(()) }
    }

    pub(super) fn with_real<T>(&self, node: &Node, f: impl FnOnce(&Real) -> Result<T>) -> Result<T> {
        if node.is_dir() { f(&Real::Held(self.part(node, 0)?.0)) } else { node.with(f) }
    }

    /// Reads an attribute's value into `buf` and returns its length; an empty buffer asks for the length only.
    pub fn get_xattr(&self, node: &Node, name: &CStr, buf: &mut [u8]) -> Result<usize> {
        self.allowed(name)?;
        let name = self.escaped(name);
        self.with_real(node, |real| real.get_xattr(&name, buf))
    }

    /// The names of all attributes, each ended by NUL.
    pub fn list_xattr(&self, node: &Node) -> Result<Vec<u8>> {
        let list = self.with_real(node, Real::list_xattr)?;
        let prefix = self.prefix.as_bytes();
        let mut out = Vec::with_capacity(list.len());
        for name in list.split(|b| *b == 0).filter(|n| !n.is_empty()) {
            if self.is_mark(name) || (self.config.noacl && name.starts_with(ACL)) {
                continue;
            }
            match name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix(ESCAPE)) {
                Some(rest) => out.extend_from_slice(&[prefix, rest].concat()),
                None => out.extend_from_slice(name),
            }
            out.push(0);
        }
        Ok(out)
    }

    /// Sets an attribute; `flags` are those of setxattr(2).
    pub fn set_xattr(&self, node: &Arc<Node>, name: &CStr, value: &[u8], flags: i32) -> Result<()> {
        self.allowed(name)?;
        self.copy_up(node)?;
        let name = self.escaped(name);
        self.with_real(node, |real| real.set_xattr(&name, value, flags))?;
        node.write().default_acl = None;
        Ok(())
    }

    /// Removes an attribute.
    pub fn remove_xattr(&self, node: &Arc<Node>, name: &CStr) -> Result<()> {
        self.allowed(name)?;
        self.work()?;
        let name = self.escaped(name);
        if !node.is_upper() {
            // Nothing is copied up for an attribute that is not there.
            self.with_real(node, |real| real.get_xattr(&name, &mut []))?;
            self.copy_up(node)?;
        }
        self.with_real(node, |real| real.remove_xattr(&name))?;
        node.write().default_acl = None;
        Ok(())
    }
}
