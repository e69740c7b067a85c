//! Requests as the kernel writes them.

use std::ffi::CStr;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::abi::{
    BatchForgetIn, CopyFileRangeIn, CreateIn, FallocateIn, ForgetOne, FsyncIn, InHeader, IoctlIn, LseekIn,
    MkdirIn, MknodIn, OpenIn, ReadIn, ReleaseIn, Rename2In, SetattrIn, SetxattrIn, WriteIn, XattrSize,
    opcode,
};

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::fuse) struct Request<'a> {
    pub(in crate::fuse) header: InHeader,
    pub(in crate::fuse) operation: Operation<'a>,
}

/// What is wanted of the node that the header names.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::fuse) enum Operation<'a> {
    Lookup(&'a CStr),
    Forget(u64),
    BatchForget(&'a [u8]),
    Getattr,
    Setattr(SetattrIn),
    Readlink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    Mknod(MknodIn, &'a CStr),
    Mkdir(MkdirIn, &'a CStr),
    Unlink(&'a CStr),
    Rmdir(&'a CStr),
    Rename {
        newdir: u64,
        flags: u32,
        old: &'a CStr,
        new: &'a CStr,
    },
    /// The node is the directory, `old` the file.
    Link {
        old: u64,
        name: &'a CStr,
    },
    Open(OpenIn),
    Read(ReadIn),
    Write(WriteIn, &'a [u8]),
    Statfs,
    Release(ReleaseIn),
    Fsync(FsyncIn),
    Setxattr {
        flags: u32,
        name: &'a CStr,
        value: &'a [u8],
    },
    Getxattr {
        size: u32,
        name: &'a CStr,
    },
    Listxattr {
        size: u32,
    },
    Removexattr(&'a CStr),
    Opendir,
    Readdir(ReadIn),
    Readdirplus(ReadIn),
    Releasedir(ReleaseIn),
    Fsyncdir,
    Create(CreateIn, &'a CStr),
    /// A file without a name, in the directory that the node is.
    Tmpfile(CreateIn),
    Interrupt,
    Destroy,
    Ioctl(IoctlIn, &'a [u8]),
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    CopyFileRange(CopyFileRangeIn),
    /// What is not known here.
    Other,
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum Malformed {
    /// There is no header, or it is not about these bytes: nothing can be answered.
    Header,
    /// There is a header, but not what belongs to its opcode.
    Body(InHeader),
}

impl<'a> Request<'a> {
    /// Reads the one request that `bytes` are.
    pub(in crate::fuse) fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let (header, body) = InHeader::read_from_prefix(bytes).map_err(|_| Malformed::Header)?;
        if header.len as usize != bytes.len() {
            return Err(Malformed::Header);
        }
        match operation(header.opcode, Body(body)) {
            Some(operation) => Ok(Self { header, operation }),
            None => Err(Malformed::Body(header)),
        }
    }
}

/// The nodes of a BATCH_FORGET, each with the references that the kernel gives back.
pub(in crate::fuse) fn forgotten(list: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    list.chunks_exact(size_of::<ForgetOne>())
        .filter_map(|one| ForgetOne::read_from_bytes(one).ok())
        .map(|one| (one.nodeid, one.nlookup))
}

fn operation(opcode: u32, mut body: Body<'_>) -> Option<Operation<'_>> {
    use Operation as O;
    Some(match opcode {
        opcode::LOOKUP => O::Lookup(body.name()?),
        opcode::FORGET => O::Forget(body.take()?),
        opcode::BATCH_FORGET => {
            let list: BatchForgetIn = body.take()?;
            O::BatchForget(body.bytes((list.count as usize).checked_mul(size_of::<ForgetOne>())?)?)
        }
        opcode::GETATTR => O::Getattr,
        opcode::SETATTR => O::Setattr(body.take()?),
        opcode::READLINK => O::Readlink,
        opcode::SYMLINK => O::Symlink { name: body.name()?, target: body.name()? },
        opcode::MKNOD => O::Mknod(body.take()?, body.name()?),
        opcode::MKDIR => O::Mkdir(body.take()?, body.name()?),
        opcode::UNLINK => O::Unlink(body.name()?),
        opcode::RMDIR => O::Rmdir(body.name()?),
        opcode::RENAME => O::Rename { newdir: body.take()?, flags: 0, old: body.name()?, new: body.name()? },
        opcode::RENAME2 => {
            let Rename2In { newdir, flags, .. } = body.take()?;
            O::Rename { newdir, flags, old: body.name()?, new: body.name()? }
        }
        opcode::LINK => O::Link { old: body.take()?, name: body.name()? },
        opcode::OPEN => O::Open(body.take()?),
        opcode::READ => O::Read(body.take()?),
        opcode::WRITE => {
            let write: WriteIn = body.take()?;
            O::Write(write, body.bytes(write.size as usize)?)
        }
        opcode::STATFS => O::Statfs,
        opcode::RELEASE => O::Release(body.take()?),
        opcode::FSYNC => O::Fsync(body.take()?),
        opcode::SETXATTR => {
            let SetxattrIn { size, flags } = body.take()?;
            O::Setxattr { flags, name: body.name()?, value: body.bytes(size as usize)? }
        }
        opcode::GETXATTR => O::Getxattr { size: body.take::<XattrSize>()?.size, name: body.name()? },
        opcode::LISTXATTR => O::Listxattr { size: body.take::<XattrSize>()?.size },
        opcode::REMOVEXATTR => O::Removexattr(body.name()?),
        opcode::OPENDIR => O::Opendir,
        opcode::READDIR => O::Readdir(body.take()?),
        opcode::READDIRPLUS => O::Readdirplus(body.take()?),
        opcode::RELEASEDIR => O::Releasedir(body.take()?),
        opcode::FSYNCDIR => O::Fsyncdir,
        opcode::CREATE => O::Create(body.take()?, body.name()?),
        opcode::TMPFILE => O::Tmpfile(body.take()?),
        opcode::INTERRUPT => O::Interrupt,
        opcode::DESTROY => O::Destroy,
        opcode::IOCTL => {
            let control: IoctlIn = body.take()?;
            O::Ioctl(control, body.bytes(control.in_size as usize)?)
        }
        opcode::FALLOCATE => O::Fallocate(body.take()?),
        opcode::LSEEK => O::Lseek(body.take()?),
        opcode::COPY_FILE_RANGE => O::CopyFileRange(body.take()?),
        _ => O::Other,
    })
}

/// What is left of a request.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Option<T> {
        let (record, rest) = T::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some(record)
    }

    fn name(&mut self) -> Option<&'a CStr> {
        let name = CStr::from_bytes_until_nul(self.0).ok()?;
        self.0 = &self.0[name.count_bytes() + 1..];
        Some(name)
    }

    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn request(opcode: u32, parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: 8, nodeid: 5, ..InHeader::default() };
        [header.as_bytes(), &body].concat()
    }

    #[test]
    fn requests_with_records_names_and_contents() {
        let bytes = request(opcode::LOOKUP, &[b"name\0"]);
        let parsed = Request::parse(&bytes).unwrap();
        assert_eq!((parsed.header.nodeid, parsed.operation), (5, Operation::Lookup(c"name")));

        let rename = Rename2In { newdir: 9, flags: 2, padding: 0 };
        let bytes = request(opcode::RENAME2, &[rename.as_bytes(), b"a\0bc\0"]);
        let parsed = Request::parse(&bytes).unwrap().operation;
        assert_eq!(parsed, Operation::Rename { newdir: 9, flags: 2, old: c"a", new: c"bc" });

        let write = WriteIn { size: 3, offset: 7, ..WriteIn::default() };
        let bytes = request(opcode::WRITE, &[write.as_bytes(), b"\0\x01\x02"]);
        assert_eq!(Request::parse(&bytes).unwrap().operation, Operation::Write(write, &[0, 1, 2]));

        let forget = [ForgetOne { nodeid: 3, nlookup: 1 }, ForgetOne { nodeid: 4, nlookup: 2 }];
        let list = BatchForgetIn { count: 2, dummy: 0 };
        let bytes = request(opcode::BATCH_FORGET, &[list.as_bytes(), forget.as_bytes()]);
        let Operation::BatchForget(list) = Request::parse(&bytes).unwrap().operation else { panic!() };
        assert_eq!(forgotten(list).collect::<Vec<_>>(), [(3, 1), (4, 2)]);

        assert_eq!(Request::parse(&request(9999, &[b"x"])).unwrap().operation, Operation::Other);
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let write = WriteIn { size: 4, ..WriteIn::default() };
        let lists = BatchForgetIn { count: u32::MAX, dummy: 0 };
        for (opcode, parts) in [
            (opcode::LOOKUP, vec![&b"no end"[..]]),
            (opcode::WRITE, vec![write.as_bytes(), b"abc"]),
            (opcode::SYMLINK, vec![&b"one\0"[..]]),
            (opcode::BATCH_FORGET, vec![lists.as_bytes(), &[0; 16]]),
            (opcode::SETATTR, vec![&[0; 87][..]]),
        ] {
            let bytes = request(opcode, &parts);
            let Err(Malformed::Body(header)) = Request::parse(&bytes) else { panic!("opcode {opcode}") };
            assert_eq!(header.opcode, opcode);
        }
        let bytes = request(opcode::GETATTR, &[&[0; 16]]);
        assert_eq!(Request::parse(&bytes[..bytes.len() - 1]), Err(Malformed::Header));
        assert_eq!(Request::parse(&bytes[..39]), Err(Malformed::Header));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(opcode in 0u32..60, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let bytes = request(opcode, &[&body]);
            if let Ok(Request { operation: Operation::BatchForget(list), .. }) = Request::parse(&bytes) {
                prop_assert!(forgotten(list).count() <= body.len() / 16);
            }
        }
    }
}
