//! Requests about directories that are being read.

use super::UnionFs;
use super::convert::{entry_out, nothing};
use crate::fuse::protocol::Answer;
use crate::fuse::protocol::abi::{Dirent, EntryOut, FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, OpenOut, ReadIn};
use crate::union::{DirEntry, Result};

impl UnionFs {
    pub(super) fn open_dir(&self, id: u64, answer: &mut Answer) -> Result<()> {
        let fh = self.dirs.insert(self.union.open_dir(self.node(id)?));
        answer.put(&OpenOut { fh, open_flags: FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE, backing_id: 0 });
        Ok(())
    }

    pub(super) fn read_dir(&self, read: &ReadIn, answer: &mut Answer) -> Result<()> {
        let list = self.dirs.get(read.fh)?.entries(&self.union, read.offset)?;
        for (next, entry) in from(&list, read.offset) {
            if !fits(entry, 0, read, answer) {
                break;
            }
            put(entry, entry.ino, next, answer);
        }
        Ok(())
    }

    pub(super) fn read_dir_plus(&self, read: &ReadIn, answer: &mut Answer) -> Result<()> {
        let dir = self.dirs.get(read.fh)?;
        let list = dir.entries(&self.union, read.offset)?;
        for (next, entry) in from(&list, read.offset) {
            if !fits(entry, size_of::<EntryOut>(), read, answer) {
                break;
            }
            if next <= 2 {
                // The kernel takes nothing but number and name of `.` and `..`.
                answer.put(&nothing(self.ttl));
                put(entry, entry.ino, next, answer);
                continue;
            }
            match self.union.lookup_entry(&dir.node, entry) {
                Ok(Some((_, attr))) => {
                    answer.put(&entry_out(&attr, self.ttl));
                    put(entry, attr.stat.st_ino, next, answer);
                }
                // Removed meanwhile: the kernel will find that out.
                Ok(None) => {}
                // Those before it were looked up, so the kernel must hear of them; it asks on from here.
                Err(_) if answer.len() > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The entries from an offset on, each with the offset after it.
fn from(list: &[DirEntry], offset: u64) -> impl Iterator<Item = (u64, &DirEntry)> {
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    (1u64..).zip(list).skip(first)
}

/// Whether there is room for one more entry with `before` bytes before it.
fn fits(entry: &DirEntry, before: usize, read: &ReadIn, answer: &Answer) -> bool {
    let len = (size_of::<Dirent>() + entry.name.count_bytes()).next_multiple_of(8);
    answer.len() + before + len <= read.size as usize
}

fn put(entry: &DirEntry, ino: u64, off: u64, answer: &mut Answer) {
    let name = entry.name.to_bytes();
    let namelen = u32::try_from(name.len()).unwrap_or(u32::MAX);
    answer.put(&Dirent { ino, off, namelen, kind: entry.kind >> 12 });
    answer.put_bytes(name);
    answer.put_bytes(&[0; 8][..name.len().next_multiple_of(8) - name.len()]);
}
