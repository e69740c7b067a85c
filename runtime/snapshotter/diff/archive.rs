//! Entries of a layer's tar: plain headers, and PAX records for what does not fit into them.

use std::fs::File;
use std::io::{self, Read, Write};

use nix::sys::stat::{FileStat, major, minor};
use tar::{Builder, EntryType, Header};

use super::sparse::{self, Data, Run};

/// What a plain header has room for, in its octal digits.
const MAX_ID: u32 = 0o7_777_777;
const MAX_SIZE: u64 = 0o77_777_777_777;
const MAX_TIME: i64 = 0o77_777_777_777;
const MAX_NAME: usize = 100;

/// A moment in seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanos: i64,
}

/// What is said of an entry, besides its content.
#[derive(Debug)]
pub(super) struct Meta<'a> {
    /// Its path, without a slash at either end.
    pub(super) path: &'a [u8],
    /// Its attributes.
    pub(super) stat: &'a FileStat,
    /// Its extended attributes.
    pub(super) xattrs: &'a [(String, Vec<u8>)],
}

/// A tar that is being written.
pub(super) struct Archive<W: Write> {
    tar: Builder<W>,
    // No entry is later than this, when it is set.
    latest: Option<Time>,
}

type Records = Vec<(String, Vec<u8>)>;

impl<W: Write> Archive<W> {
    pub(super) fn new(to: W, latest: Option<Time>) -> Self {
        Self { tar: Builder::new(to), latest }
    }

    /// Ends it.
    pub(super) fn finish(self) -> io::Result<W> {
        self.tar.into_inner()
    }

    /// An entry without content: a directory, a device, a pipe.
    pub(super) fn bare(&mut self, meta: &Meta<'_>, kind: EntryType) -> io::Result<()> {
        let slash: &[u8] = if kind == EntryType::Directory { b"/" } else { b"" };
        let path = [meta.path, slash].concat();
        let (header, records) = self.entry(meta, kind, &path)?;
        self.append(header, records, 0, io::empty())
    }

    /// A symlink, or another name of an earlier entry.
    pub(super) fn link(&mut self, meta: &Meta<'_>, kind: EntryType, target: &[u8]) -> io::Result<()> {
        let (mut header, mut records) = self.entry(meta, kind, meta.path)?;
        name(&mut header.as_old_mut().linkname, &mut records, "linkpath", target);
        self.append(header, records, 0, io::empty())
    }

    /// A file.
    pub(super) fn file(&mut self, meta: &Meta<'_>, file: &File) -> io::Result<()> {
        let size = meta.stat.st_size.cast_unsigned();
        let Some(runs) = sparse::runs(file, size)? else {
            let (header, records) = self.entry(meta, EntryType::Regular, meta.path)?;
            let whole = [Run { start: 0, len: size }];
            return self.append(header, records, size, Data::new(file, &whole));
        };
        let (mut header, mut records) = self.entry(meta, EntryType::Regular, b"GNUSparseFile.0")?;
        // Readers that know nothing of holes find the map and the data under a name that says so.
        let base = meta.path.rsplit(|byte| *byte == b'/').next().unwrap_or(meta.path);
        name(&mut header.as_old_mut().name, &mut records, "path", &[b"GNUSparseFile.0/", base].concat());
        for (key, value) in [("major", b"1".to_vec()), ("minor", b"0".to_vec()), ("name", meta.path.to_vec())]
        {
            records.push((format!("GNU.sparse.{key}"), value));
        }
        records.push(("GNU.sparse.realsize".into(), size.to_string().into_bytes()));
        let map = sparse::map(&runs);
        let stored = map.len() as u64 + runs.iter().map(|run| run.len).sum::<u64>();
        self.append(header, records, stored, map.chain(Data::new(file, &runs)))
    }

    /// A whiteout, `.wh.NAME` or `.wh..wh..opq`.
    pub(super) fn whiteout(&mut self, path: &[u8], time: Time) -> io::Result<()> {
        let mut header = Header::new_ustar();
        let mut records = Records::new();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        name(&mut header.as_old_mut().name, &mut records, "path", path);
        self.time(&mut header, &mut records, time);
        self.append(header, records, 0, io::empty())
    }

    fn entry(&self, meta: &Meta<'_>, kind: EntryType, path: &[u8]) -> io::Result<(Header, Records)> {
        let (stat, mut records) = (meta.stat, Records::new());
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(u64::from(fitting(&mut records, "uid", stat.st_uid)));
        header.set_gid(u64::from(fitting(&mut records, "gid", stat.st_gid)));
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let number = |part: u64| u32::try_from(part).map_err(io::Error::other);
            header.set_device_major(number(major(stat.st_rdev))?)?;
            header.set_device_minor(number(minor(stat.st_rdev))?)?;
        }
        name(&mut header.as_old_mut().name, &mut records, "path", path);
        let time = Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec };
        self.time(&mut header, &mut records, time);
        records.extend(meta.xattrs.iter().map(|(key, value)| (format!("SCHILY.xattr.{key}"), value.clone())));
        Ok((header, records))
    }

    fn time(&self, header: &mut Header, records: &mut Records, time: Time) {
        let time = self.latest.map_or(time, |latest| latest.min(time));
        header.set_mtime(time.seconds.clamp(0, MAX_TIME).cast_unsigned());
        if time.nanos != 0 || !(0..=MAX_TIME).contains(&time.seconds) {
            records.push(("mtime".into(), time.text().into_bytes()));
        }
    }

    fn append(
        &mut self,
        mut header: Header,
        mut records: Records,
        size: u64,
        data: impl Read,
    ) -> io::Result<()> {
        if size > MAX_SIZE {
            records.push(("size".into(), size.to_string().into_bytes()));
        }
        header.set_size(if size > MAX_SIZE { 0 } else { size });
        header.set_cksum();
        self.tar
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
        self.tar.append(&header, data)
    }
}

// A name that is longer than the header's field, or not in ASCII, is said by a record.
fn name(field: &mut [u8; MAX_NAME], records: &mut Records, key: &str, value: &[u8]) {
    if value.len() > MAX_NAME || !value.is_ascii() {
        records.retain(|(known, _)| known != key);
        records.push((key.to_owned(), value.to_vec()));
    }
    field.fill(0);
    let len = value.len().min(MAX_NAME);
    field[..len].copy_from_slice(&value[..len]);
}

fn fitting(records: &mut Records, key: &str, id: u32) -> u32 {
    if id <= MAX_ID {
        return id;
    }
    records.push((key.to_owned(), id.to_string().into_bytes()));
    0
}

impl Time {
    // As PAX has it: the whole of it in decimal, also before 1970.
    fn text(self) -> String {
        let all = i128::from(self.seconds) * 1_000_000_000 + i128::from(self.nanos);
        let (sign, all) = (if all < 0 { "-" } else { "" }, all.unsigned_abs());
        let fraction = format!("{:09}", all % 1_000_000_000);
        format!("{sign}{}.{fraction}", all / 1_000_000_000)
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_decimal_on_both_sides_of_1970() {
        let text = |seconds, nanos| Time { seconds, nanos }.text();
        assert_eq!(text(1_600_000_000, 120_000_000), "1600000000.12");
        assert_eq!(text(10, 0), "10");
        assert_eq!(text(0, 1), "0.000000001");
        assert_eq!(text(-2, 500_000_000), "-1.5");
        assert_eq!(text(-1, 0), "-1");
    }
}
