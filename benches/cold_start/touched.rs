//! Which pages of which files a program touches.
//!
//! With the readahead of the view's backing device set to nothing, the page cache afterwards holds the pages that were
//! read or mapped and no others; `mincore` tells them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// The pages of one file, ascending.
pub(crate) struct TouchedFile {
    /// Path relative to the root.
    pub(crate) path: Vec<u8>,
    pub(crate) pages: Vec<u64>,
}

/// All files below `root`, on its own filesystem, that have pages in the page cache.
pub(crate) fn touched_files(root: &Path) -> io::Result<Vec<TouchedFile>> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() {
                todo.push(path);
            } else if kind.is_file() {
                let pages = cached_pages(&File::open(&path)?)?;
                if !pages.is_empty() {
                    let relative = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes();
                    found.push(TouchedFile { path: relative.to_owned(), pages });
                }
            }
        }
    }
    Ok(found)
}

fn cached_pages(file: &File) -> io::Result<Vec<u64>> {
    let pages = file.metadata()?.len().div_ceil(PAGE);
    let Some(len) = std::num::NonZeroUsize::new((pages * PAGE) as usize) else { return Ok(Vec::new()) };
    let mut resident = vec![0u8; pages as usize];
    // SAFETY: a new mapping at an address of the kernel's choice; nobody reads through it, and it is unmapped below.
    let map = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file.as_fd(), 0)? };
    // SAFETY: the range is the mapping just made, and the vector has a byte for each of its pages.
    let result = unsafe { libc::mincore(map.as_ptr(), len.get(), resident.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    // SAFETY: nothing points into the mapping.
    unsafe { munmap(map, len.get())? };
    if result != 0 {
        return Err(error);
    }
    Ok((0..pages).filter(|&page| resident[page as usize] & 1 != 0).collect())
}
