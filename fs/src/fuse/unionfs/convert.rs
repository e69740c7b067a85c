//! The union's words in the protocol's.

use std::time::Duration;

use crate::fuse::protocol::abi;
use crate::fuse::protocol::abi::{AttrOut, EntryOut, SetattrIn, StatfsOut, fattr};
use crate::union::{Attr, SetAttr, SetTime};

/// What SETATTR is to change.
pub(super) fn set_attr(set: &SetattrIn) -> SetAttr {
    let wanted = |bit| set.valid & bit != 0;
    let time = |bit, now, seconds: u64, nanos| {
        let at = || SetTime::At(seconds.cast_signed(), nanos);
        wanted(bit).then(|| if wanted(now) { SetTime::Now } else { at() })
    };
    SetAttr {
        mode: wanted(fattr::MODE).then_some(set.mode),
        uid: wanted(fattr::UID).then_some(set.uid),
        gid: wanted(fattr::GID).then_some(set.gid),
        size: wanted(fattr::SIZE).then_some(set.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, set.atime, set.atimensec),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, set.mtime, set.mtimensec),
    }
}

/// Attributes, with the number that stat(2) shows.
fn attr(attr: &Attr) -> abi::Attr {
    let st = &attr.stat;
    let nanos = |n: i64| u32::try_from(n).unwrap_or(0);
    abi::Attr {
        ino: st.st_ino,
        size: st.st_size.cast_unsigned(),
        blocks: st.st_blocks.cast_unsigned(),
        atime: st.st_atime.cast_unsigned(),
        mtime: st.st_mtime.cast_unsigned(),
        ctime: st.st_ctime.cast_unsigned(),
        atimensec: nanos(st.st_atime_nsec),
        mtimensec: nanos(st.st_mtime_nsec),
        ctimensec: nanos(st.st_ctime_nsec),
        mode: st.st_mode,
        nlink: u32::try_from(st.st_nlink).unwrap_or(u32::MAX),
        uid: st.st_uid,
        gid: st.st_gid,
        // Both encodings agree in the 32 bits that FUSE has.
        rdev: st.st_rdev as u32,
        blksize: u32::try_from(st.st_blksize).unwrap_or(4096),
        flags: 0,
    }
}

/// The answer that tells attributes, which may be kept for `ttl`.
pub(super) fn attr_out(a: &Attr, ttl: Duration) -> AttrOut {
    AttrOut { attr_valid: ttl.as_secs(), attr_valid_nsec: ttl.subsec_nanos(), dummy: 0, attr: attr(a) }
}

/// The answer that names a node.
pub(super) fn entry_out(a: &Attr, ttl: Duration) -> EntryOut {
    EntryOut {
        nodeid: a.id,
        attr_valid: ttl.as_secs(),
        attr_valid_nsec: ttl.subsec_nanos(),
        attr: attr(a),
        ..nothing(ttl)
    }
}

/// The answer that there is no such name. Numbers of nodes are never used again, so one generation is enough.
pub(super) fn nothing(ttl: Duration) -> EntryOut {
    EntryOut { entry_valid: ttl.as_secs(), entry_valid_nsec: ttl.subsec_nanos(), ..EntryOut::default() }
}

pub(super) fn statfs(s: &nix::sys::statvfs::Statvfs) -> StatfsOut {
    let number = |n: u64, default| u32::try_from(n).unwrap_or(default);
    StatfsOut {
        blocks: s.blocks(),
        bfree: s.blocks_free(),
        bavail: s.blocks_available(),
        files: s.files(),
        ffree: s.files_free(),
        bsize: number(s.block_size(), 4096),
        namelen: number(s.name_max(), 255),
        frsize: number(s.fragment_size(), 4096),
        ..StatfsOut::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_marked_is_set() {
        let set = SetattrIn {
            valid: fattr::MODE | fattr::MTIME,
            mode: 0o640,
            uid: 9,
            mtime: u64::MAX,
            mtimensec: 5,
            ..SetattrIn::default()
        };
        let set = set_attr(&set);
        assert_eq!((set.mode, set.uid, set.gid, set.size), (Some(0o640), None, None, None));
        assert!(set.atime.is_none());
        assert!(matches!(set.mtime, Some(SetTime::At(-1, 5))), "before 1970");
        let now = SetattrIn { valid: fattr::ATIME | fattr::ATIME_NOW, ..SetattrIn::default() };
        assert!(matches!(set_attr(&now).atime, Some(SetTime::Now)));
    }
}
