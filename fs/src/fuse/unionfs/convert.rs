//! The union's words in FUSE's.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};
use nix::errno::Errno;

use crate::union::{Attr, SetTime};

pub(super) fn errno(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e as i32)
}

pub(super) fn name(name: &OsStr) -> Result<CString, Errno> {
    CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)
}

pub(super) fn kind(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn time(seconds: i64, nanos: i64) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    let at = match time {
        TimeOrNow::Now => return SetTime::Now,
        TimeOrNow::SpecificTime(at) => at,
    };
    match at.duration_since(UNIX_EPOCH) {
        Ok(d) => SetTime::At(i64::try_from(d.as_secs()).unwrap_or(i64::MAX), d.subsec_nanos()),
        Err(e) => {
            let before = e.duration();
            let seconds = -i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_nanos() {
                0 => SetTime::At(seconds, 0),
                nanos => SetTime::At(seconds - 1, 1_000_000_000 - nanos),
            }
        }
    }
}

/// Attributes, with the number that stat(2) shows.
pub(super) fn attr(attr: &Attr) -> FileAttr {
    let st = &attr.stat;
    FileAttr {
        ino: INodeNo(st.st_ino),
        size: u64::try_from(st.st_size).unwrap_or(0),
        blocks: u64::try_from(st.st_blocks).unwrap_or(0),
        atime: time(st.st_atime, st.st_atime_nsec),
        mtime: time(st.st_mtime, st.st_mtime_nsec),
        ctime: time(st.st_ctime, st.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: kind(st.st_mode),
        perm: (st.st_mode & 0o7777) as u16,
        nlink: u32::try_from(st.st_nlink).unwrap_or(u32::MAX),
        uid: st.st_uid,
        gid: st.st_gid,
        // Both encodings agree in the 32 bits that FUSE has.
        rdev: st.st_rdev as u32,
        blksize: u32::try_from(st.st_blksize).unwrap_or(4096),
        flags: 0,
    }
}

/// Attributes for an answer that names the node too. fuser takes the node's number from them, so a node with a
/// number of its own shows a wrong one, valid for no time: the kernel asks again with GETATTR.
pub(super) fn entry(a: &Attr, ttl: Duration) -> (FileAttr, Duration) {
    let mut out = attr(a);
    if a.id == a.stat.st_ino {
        return (out, ttl);
    }
    out.ino = INodeNo(a.id);
    (out, Duration::ZERO)
}

/// The answer that there is no such name.
pub(super) fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_come_back() {
        for (seconds, nanos) in [(-5, 250_000_000), (-1, 0), (0, 1), (7, 999_999_999)] {
            let there = time(seconds, nanos);
            let SetTime::At(s, n) = set_time(TimeOrNow::SpecificTime(there)) else { panic!("not a time") };
            assert_eq!((s, i64::from(n)), (seconds, nanos));
        }
    }
}
