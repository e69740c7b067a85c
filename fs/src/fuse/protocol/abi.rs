//! The records of `linux/fuse.h` that requests and answers are made of, as they are from Linux 5.15 on. Names are the
//! kernel's; numbers are in the machine's byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Declares records: plain numbers without gaps.
macro_rules! records {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub(in crate::fuse) struct $name {
            $($(#[$field_doc])* pub(in crate::fuse) $field: $kind,)*
        }
    )*};
}

records! {
    /// What every request begins with.
    InHeader {
        /// Bytes of the whole request.
        len: u32,
        opcode: u32,
        /// The request's number, by which it is answered.
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        /// Extensions and padding.
        extensions: u32,
    }
    /// What every answer begins with.
    OutHeader {
        /// Bytes of the whole answer.
        len: u32,
        /// A negative errno, or 0.
        error: i32,
        unique: u64,
    }
    InitIn {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }
    Attr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    EntryOut {
        nodeid: u64,
        generation: u64,
        /// Seconds that the name may be kept.
        entry_valid: u64,
        /// Seconds that the attributes may be kept.
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    AttrOut {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }
    ForgetOne {
        nodeid: u64,
        nlookup: u64,
    }
    BatchForgetIn {
        count: u32,
        dummy: u32,
    }
    MknodIn {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }
    MkdirIn {
        mode: u32,
        umask: u32,
    }
    Rename2In {
        newdir: u64,
        flags: u32,
        padding: u32,
    }
    SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    OpenIn {
        flags: u32,
        open_flags: u32,
    }
    CreateIn {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }
    OpenOut {
        fh: u64,
        open_flags: u32,
        /// Of a file that the kernel reads and writes itself (Linux 6.9).
        backing_id: i32,
    }
    ReleaseIn {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }
    ReadIn {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    WriteIn {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    WriteOut {
        size: u32,
        padding: u32,
    }
    StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    FsyncIn {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }
    /// Without `FUSE_SETXATTR_EXT`.
    SetxattrIn {
        size: u32,
        flags: u32,
    }
    /// Of GETXATTR and LISTXATTR; and what they answer when only the size was asked for.
    XattrSize {
        size: u32,
        padding: u32,
    }
    IoctlIn {
        fh: u64,
        flags: u32,
        cmd: u32,
        arg: u64,
        in_size: u32,
        out_size: u32,
    }
    IoctlOut {
        result: i32,
        flags: u32,
        in_iovs: u32,
        out_iovs: u32,
    }
    FallocateIn {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }
    LseekIn {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }
    CopyFileRangeIn {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }
    Dirent {
        ino: u64,
        /// Where to go on after it.
        off: u64,
        namelen: u32,
        /// As in dirent(3).
        kind: u32,
    }
    NotifyInvalInodeOut {
        ino: u64,
        off: u64,
        /// 0: to the end.
        len: u64,
    }
    /// Of `FUSE_DEV_IOC_BACKING_OPEN`.
    BackingMap {
        fd: i32,
        flags: u32,
        padding: u64,
    }
}

/// `FUSE_WRITE_KILL_SUIDGID`.
pub(in crate::fuse) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
pub(in crate::fuse) const FSYNC_FDATASYNC: u32 = 1;
/// `FOPEN_KEEP_CACHE`: what pages there are of the file stay.
pub(in crate::fuse) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_CACHE_DIR`: the kernel may keep the listing.
pub(in crate::fuse) const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// `FOPEN_PASSTHROUGH`: the kernel reads and writes the backing file.
pub(in crate::fuse) const FOPEN_PASSTHROUGH: u32 = 1 << 7;

/// Which attributes to change: bits of [`SetattrIn::valid`].
pub(in crate::fuse) mod fattr {
    pub(in crate::fuse) const MODE: u32 = 1;
    pub(in crate::fuse) const UID: u32 = 1 << 1;
    pub(in crate::fuse) const GID: u32 = 1 << 2;
    pub(in crate::fuse) const SIZE: u32 = 1 << 3;
    pub(in crate::fuse) const ATIME: u32 = 1 << 4;
    pub(in crate::fuse) const MTIME: u32 = 1 << 5;
    pub(in crate::fuse) const FH: u32 = 1 << 6;
    pub(in crate::fuse) const ATIME_NOW: u32 = 1 << 7;
    pub(in crate::fuse) const MTIME_NOW: u32 = 1 << 8;
}

/// `enum fuse_opcode`.
pub(in crate::fuse) mod opcode {
    /// Declares numbers.
    macro_rules! opcodes {
        ($($name:ident = $number:literal,)*) => {$(
            pub(in crate::fuse) const $name: u32 = $number;
        )*};
    }
    opcodes! {
        LOOKUP = 1,
        FORGET = 2,
        GETATTR = 3,
        SETATTR = 4,
        READLINK = 5,
        SYMLINK = 6,
        MKNOD = 8,
        MKDIR = 9,
        UNLINK = 10,
        RMDIR = 11,
        RENAME = 12,
        LINK = 13,
        OPEN = 14,
        READ = 15,
        WRITE = 16,
        STATFS = 17,
        RELEASE = 18,
        FSYNC = 20,
        SETXATTR = 21,
        GETXATTR = 22,
        LISTXATTR = 23,
        REMOVEXATTR = 24,
        INIT = 26,
        OPENDIR = 27,
        READDIR = 28,
        RELEASEDIR = 29,
        FSYNCDIR = 30,
        CREATE = 35,
        INTERRUPT = 36,
        DESTROY = 38,
        IOCTL = 39,
        BATCH_FORGET = 42,
        FALLOCATE = 43,
        READDIRPLUS = 44,
        RENAME2 = 45,
        LSEEK = 46,
        COPY_FILE_RANGE = 47,
        TMPFILE = 51,
    }
}

impl InHeader {
    /// `None` for what is too short to have one.
    pub(in crate::fuse) fn parse(request: &[u8]) -> Option<Self> {
        Self::read_from_prefix(request).ok().map(|(header, _)| header)
    }

    /// Whether somebody waits for an answer.
    pub(in crate::fuse) fn wants_answer(&self) -> bool {
        !matches!(self.opcode, opcode::FORGET | opcode::INTERRUPT | opcode::BATCH_FORGET)
    }
}
