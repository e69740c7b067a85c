//! What the kernel caches of layer files.

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::Layer;

impl Layer {
    /// Has the kernel let go of the pages that it caches of the layer file. Those not yet on the disk are only begun to
    /// be written there, and go when they are let go of again.
    ///
    /// # Errors
    /// The kernel's, which has none for a regular file.
    pub fn drop_pages(&self) -> std::io::Result<()> {
        Ok(posix_fadvise(&self.data, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
    }
}
