//! What a command will load before its first instruction, without a profile: its program, the program's interpreter,
//! and the shared libraries that those need, one after another. The dynamic loader asks for them one by one, each time
//! waiting for a round trip; here all that is known at a time is fetched with one request.
//!
//! It is a guess and can only waste bandwidth: nothing that the container sees depends on it.

mod command;
mod libraries;
mod tree;

use std::collections::HashSet;
use std::sync::Arc;

use lazyrun_fetcher::{Fetcher, Layer};
use lazyrun_fs::view::{Ino, Kind, View};

use super::profile::{Profile, Touch, prefetch, touch_in};
use super::views::Views;
use crate::container::spec::Command;
use crate::elf;
use libraries::Libraries;

/// Files larger than this are fetched in part.
const WHOLE: u64 = 2 << 20;
/// As [`WHOLE`], for what the command itself names: of that more is used than of a library.
const WHOLE_PROGRAM: u64 = 8 << 20;
/// Bytes at either end of a larger file: headers, symbols and relocations are there, and what is relocated.
const END: u64 = 256 << 10;
/// Libraries of libraries of libraries: programs have a depth of five or so.
const MAX_DEPTH: usize = 12;
/// Most files in all.
const MAX_FILES: usize = 256;
/// Longest script whose commands are looked for, in bytes.
const MAX_SCRIPT: u64 = 64 << 10;
/// What nearly every program reads, or has read for it by the C library.
const ALWAYS: [&str; 4] = ["/etc/ld.so.cache", "/etc/passwd", "/etc/nsswitch.conf", "/etc/group"];

/// A file that will be read, by its path without symlinks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    ino: Ino,
    path: Vec<u8>,
    /// Whether the command names it.
    named: bool,
}

/// Fetches what the command will load, before anybody asks for it.
pub(super) async fn fetch(fetcher: &Fetcher, views: &Arc<Views>, layers: &[Arc<Layer>], command: Command) {
    let (views, all) = (Arc::clone(views), layers.to_vec());
    let looked = tokio::task::spawn_blocking(move || {
        let view = views.tree(&all).ok()?;
        let image = Image { libraries: Libraries::of(&view, &command), view, layers: all, command };
        let first = image.first();
        Some((Arc::new(image), first))
    });
    let Ok(Some((image, mut files))) = looked.await else { return };
    let mut seen = HashSet::new();
    for _ in 0..MAX_DEPTH {
        files.retain(|file| seen.len() < MAX_FILES && seen.insert(file.ino));
        if files.is_empty() {
            return;
        }
        let touches = files.iter().flat_map(|file| image.touches(file)).collect();
        let ids = layers.iter().map(|layer| layer.id()).collect();
        prefetch(fetcher, layers, &Profile::new(ids, touches)).await;
        let (image, of) = (Arc::clone(&image), files);
        let needs = move || of.iter().flat_map(|file| image.needs(file)).collect();
        let Ok(next) = tokio::task::spawn_blocking(needs).await else { return };
        files = next;
    }
}

struct Image {
    view: Arc<View>,
    layers: Vec<Arc<Layer>>,
    command: Command,
    libraries: Libraries,
}

impl Image {
    /// What is known to be read without having read anything.
    fn first(&self) -> Vec<File> {
        let named = command::programs(&self.view, &self.command);
        let others = ALWAYS.iter().filter_map(|path| tree::file(&self.view, path.as_bytes()));
        named.into_iter().chain(others).collect()
    }

    /// The pages of layer files that hold what will be read of a file.
    fn touches(&self, file: &File) -> Vec<Touch> {
        let inode = self.view.inode(file.ino);
        let whole = if file.named { WHOLE_PROGRAM } else { WHOLE };
        let (first, last) =
            if inode.size <= whole { (inode.size, inode.size) } else { (END, inode.size - END) };
        let parts = [0..first, last..inode.size];
        let touch = |part: std::ops::Range<u64>| {
            inode.extents.iter().filter_map(move |extent| {
                let in_layer = lazyrun_index::Extent {
                    file_offset: extent.file_offset,
                    layer_offset: extent.layer_offset,
                    len: extent.len,
                };
                touch_in(extent.layer, &in_layer, part.start, part.end, 0)
            })
        };
        parts.into_iter().flat_map(touch).collect()
    }

    /// What a file that is here makes somebody read next.
    fn needs(&self, file: &File) -> Vec<File> {
        let bytes = Local { image: self, ino: file.ino };
        if let Some(needs) = elf::needs(&bytes) {
            return self.libraries.find(&self.view, &file.path, &needs);
        }
        let size = self.view.inode(file.ino).size;
        if !file.named || size > MAX_SCRIPT {
            return Vec::new();
        }
        let Some(script) = elf::Bytes::at(&bytes, 0, size as usize) else { return Vec::new() };
        command::of_script(&self.view, &self.command, &script)
    }
}

/// The bytes of a file as far as they are here.
struct Local<'a> {
    image: &'a Image,
    ino: Ino,
}

impl elf::Bytes for Local<'_> {
    fn at(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let inode = self.image.view.inode(self.ino);
        if inode.kind != Kind::File {
            return None;
        }
        let end = inode.size.min(offset.checked_add(len as u64)?);
        let mut bytes = vec![0; usize::try_from(end.checked_sub(offset)?).ok()?];
        for extent in inode.extents.iter() {
            let (from, to) = (offset.max(extent.file_offset), end.min(extent.file_offset + extent.len));
            if from >= to {
                continue;
            }
            let part = bytes.get_mut((from - offset) as usize..(to - offset) as usize)?;
            let layer = self.image.layers.get(usize::from(extent.layer))?;
            let read = layer.read_local(extent.layer_offset + (from - extent.file_offset), part);
            if read.ok().flatten()? < part.len() {
                return None;
            }
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests;
