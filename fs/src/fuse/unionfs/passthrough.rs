//! Which open files the kernel reads and writes itself.
//!
//! All opens of a file must be of one sort while any is open, so the first one decides. Files that the kernel
//! must take set-id bits from when they are written go through us: passthrough writes with our rights.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::fuse::protocol::Backing;

/// The files that are open.
#[derive(Debug)]
pub(super) struct Passthrough {
    allowed: AtomicBool,
    open: Mutex<HashMap<u64, Open>>,
}

#[derive(Debug)]
struct Open {
    count: u64,
    backing: Option<Arc<Backing>>,
}

impl Passthrough {
    /// `allowed`: the kernel can do it.
    pub(super) fn new(allowed: bool) -> Self {
        Self { allowed: AtomicBool::new(allowed), open: Mutex::default() }
    }

    /// One more open of a node. `register` is called if this open may decide and `wanted` says yes.
    pub(super) fn open(
        &self,
        node: u64,
        wanted: impl FnOnce() -> bool,
        register: impl FnOnce() -> io::Result<Backing>,
    ) -> Option<Arc<Backing>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get_mut(&node) {
            known.count += 1;
            return known.backing.clone();
        }
        let mut backing = None;
        if self.allowed.load(Ordering::Relaxed) && wanted() {
            match register() {
                Ok(id) => backing = Some(Arc::new(id)),
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                    // Not privileged enough; it will not get better.
                    self.allowed.store(false, Ordering::Relaxed);
                }
                Err(e) => tracing::debug!("no passthrough: {e}"),
            }
        }
        open.insert(node, Open { count: 1, backing: backing.clone() });
        backing
    }

    /// One open less.
    pub(super) fn close(&self, node: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get_mut(&node) {
            known.count -= 1;
            if known.count == 0 {
                open.remove(&node);
            }
        }
    }
}
