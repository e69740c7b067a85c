//! Writes zTOCs as soci-snapshotter does: the entries with `tar`, the checkpoints with zlib's own way of stopping at
//! block borders, the FlatBuffer with the crate that its inventors publish.

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, Vector, WIPOffset};
use lazyrun_index::Digest;
use libz_rs_sys as z;

const WINDOW: usize = 32768;

/// A place to start decoding at.
#[derive(Clone)]
pub(crate) struct Point {
    pub(crate) blob: i64,
    pub(crate) tar: i64,
    pub(crate) bits: u8,
    pub(crate) window: Vec<u8>,
}

/// One entry of the table of contents.
#[derive(Clone, Default)]
pub(crate) struct File {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: String,
    pub(crate) offset: i64,
    pub(crate) size: i64,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: i64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: String,
    pub(crate) device: (i64, i64),
    pub(crate) pax: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a zTOC says.
#[derive(Clone)]
pub(crate) struct Ztoc {
    pub(crate) version: String,
    pub(crate) blob_size: i64,
    pub(crate) size: i64,
    pub(crate) files: Vec<File>,
    pub(crate) algorithm: i8,
    pub(crate) last_span: i32,
    pub(crate) digests: Vec<String>,
    pub(crate) checkpoints: Vec<u8>,
    /// Whether all entries refer to the first one's PAX records.
    pub(crate) share: bool,
}

/// The checkpoints of a gzip blob, one each time more than `span` bytes were decoded since the last.
pub(crate) fn points(blob: &[u8], span: usize) -> Vec<Point> {
    let mut stream = z::z_stream::default();
    let size = size_of::<z::z_stream>() as i32;
    // SAFETY: a default-initialised stream with its own size; 47 finds gzip framing by itself.
    assert_eq!(unsafe { z::inflateInit2_(&raw mut stream, 47, z::zlibVersion(), size) }, z::Z_OK);
    let (mut points, mut out, mut read, mut last) = (Vec::new(), Vec::new(), 0, 0);
    let mut space = [0u8; 4096];
    loop {
        let input = &blob[read..];
        stream.next_in = input.as_ptr();
        stream.avail_in = input.len() as u32;
        stream.next_out = space.as_mut_ptr();
        stream.avail_out = space.len() as u32;
        // SAFETY: the pointers and lengths are those of live slices.
        let code = unsafe { z::inflate(&raw mut stream, z::Z_BLOCK) };
        read += input.len() - stream.avail_in as usize;
        out.extend_from_slice(&space[..space.len() - stream.avail_out as usize]);
        if code == z::Z_STREAM_END {
            if read == blob.len() {
                break;
            }
            // SAFETY: the stream is initialised.
            assert_eq!(unsafe { z::inflateReset(&raw mut stream) }, z::Z_OK);
            continue;
        }
        assert_eq!(code, z::Z_OK);
        let border = stream.data_type & 128 != 0 && stream.data_type & 64 == 0;
        if border && (out.is_empty() || out.len() - last > span) {
            let mut window = vec![0; WINDOW];
            let n = out.len().min(WINDOW);
            window[WINDOW - n..].copy_from_slice(&out[out.len() - n..]);
            let bits = (stream.data_type & 7) as u8;
            points.push(Point { blob: read as i64, tar: out.len() as i64, bits, window });
            last = out.len();
        }
    }
    // SAFETY: the stream was initialised above.
    unsafe { z::inflateEnd(&raw mut stream) };
    points
}

/// Packs checkpoints; version 1 leaves out the first.
pub(crate) fn pack(points: &[Point], version: u8) -> Vec<u8> {
    let mut out = (points.len() as u32).to_le_bytes().to_vec();
    out.extend(4096i64.to_le_bytes());
    for point in &points[usize::from(version == 1)..] {
        out.extend(point.blob.to_le_bytes());
        out.extend(point.tar.to_le_bytes());
        out.push(point.bits);
        out.extend(&point.window);
    }
    out
}

/// The checkpoints of a plain tar.
pub(crate) fn pack_plain(span_size: i64, size: i64) -> Vec<u8> {
    let mut fbb = FlatBufferBuilder::new();
    let start = fbb.start_table();
    fbb.push_slot::<i32>(4, 2, 0);
    fbb.push_slot::<i64>(6, span_size, 0);
    fbb.push_slot::<i64>(8, size, 0);
    let root = fbb.end_table(start);
    fbb.finish_minimal(root);
    fbb.finished_data().to_vec()
}

/// The table of contents of `tar`, and where its archive ends.
pub(crate) fn files(tar: &[u8]) -> (Vec<File>, i64) {
    use tar::EntryType as T;
    let (mut files, mut end) = (Vec::new(), 0);
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut pax = Vec::new();
        if let Some(records) = entry.pax_extensions().unwrap() {
            for record in records {
                let record = record.unwrap();
                pax.push((record.key_bytes().to_vec(), record.value_bytes().to_vec()));
            }
        }
        pax.sort();
        let header = entry.header();
        let kind = match header.entry_type() {
            T::Regular => "reg",
            T::Directory => "dir",
            T::Symlink => "symlink",
            T::Link => "hardlink",
            T::Char => "char",
            T::Block => "block",
            T::Fifo => "fifo",
            other => panic!("{other:?}"),
        };
        // Many writers leave the numbers of other entries empty.
        let number = |n: std::io::Result<Option<u32>>| i64::from(n.unwrap_or(None).unwrap_or(0));
        let device = (number(header.device_major()), number(header.device_minor()));
        let (offset, size) = (entry.raw_file_position() as i64, entry.size() as i64);
        files.push(File {
            name: entry.path_bytes().to_vec(),
            kind: kind.into(),
            offset,
            size,
            link: entry.link_name_bytes().map(|l| l.to_vec()).unwrap_or_default(),
            mode: header.mode().unwrap_or(0).into(),
            uid: header.uid().unwrap_or(0) as u32,
            gid: header.gid().unwrap_or(0) as u32,
            // What Go writes on a machine an hour ahead of Greenwich.
            mtime: time(header.mtime().unwrap_or(0) as i64 + 3600, &pax),
            device,
            pax,
        });
        end = offset + (size + 511) / 512 * 512;
    }
    (files, (end + 1024).min(tar.len() as i64))
}

/// Only for times of one day: 2020-09-13, and 2023-11-14, which the tests use.
fn time(local: i64, pax: &[(Vec<u8>, Vec<u8>)]) -> String {
    let (mut local, mut fraction) = (local, String::new());
    if let Some((_, value)) = pax.iter().find(|(key, _)| key == b"mtime") {
        let text = std::str::from_utf8(value).unwrap();
        let (secs, part) = text.split_once('.').unwrap_or((text, ""));
        local = secs.parse::<i64>().unwrap() + 3600;
        if !part.is_empty() {
            fraction = format!(".{part}");
        }
    }
    let days = [(18_518, "2020-09-13"), (19_675, "2023-11-14"), (0, "1970-01-01")];
    let (day, name) = days.iter().find(|(day, _)| *day == local / 86_400).expect("a day the tests use");
    let secs = local - day * 86_400;
    format!("{name}T{:02}:{:02}:{:02}{fraction}+01:00", secs / 3600, secs / 60 % 60, secs % 60)
}

impl Ztoc {
    /// The zTOC of a gzip blob.
    pub(crate) fn gzip(blob: &[u8], tar: &[u8], span: usize, version: u8) -> Self {
        let points = points(blob, span);
        let digests = (0..points.len())
            .map(|i| {
                let start = points[i].blob - i64::from(points[i].bits > 0);
                let end = points.get(i + 1).map_or(blob.len() as i64, |next| next.blob);
                Digest::of(&blob[start as usize..end as usize]).to_string()
            })
            .collect();
        Self::new(blob, tar, 1, digests, pack(&points, version))
    }

    /// The zTOC of a plain tar.
    pub(crate) fn plain(tar: &[u8], span: usize) -> Self {
        let digests = tar.chunks(span).map(|span| Digest::of(span).to_string()).collect();
        let mut ztoc = Self::new(tar, tar, 2, digests, pack_plain(span as i64, tar.len() as i64));
        ztoc.size = tar.len() as i64;
        ztoc
    }

    fn new(blob: &[u8], tar: &[u8], algorithm: i8, digests: Vec<String>, checkpoints: Vec<u8>) -> Self {
        let (files, size) = files(tar);
        Self {
            version: "0.9".into(),
            blob_size: blob.len() as i64,
            size,
            files,
            algorithm,
            last_span: digests.len() as i32 - 1,
            digests,
            checkpoints,
            share: false,
        }
    }

    /// The FlatBuffer.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut fbb = FlatBufferBuilder::new();
        let version = fbb.create_string(&self.version);
        let tool = fbb.create_string("a test");
        let shared = self.share.then(|| self.files[0].records(&mut fbb));
        let files: Vec<_> = self
            .files
            .iter()
            .map(|file| {
                let records = shared.unwrap_or_else(|| file.records(&mut fbb));
                file.write(&mut fbb, records)
            })
            .collect();
        let files = fbb.create_vector(&files);
        let start = fbb.start_table();
        fbb.push_slot_always(4, files);
        let toc = fbb.end_table(start);
        let checkpoints = fbb.create_vector(&self.checkpoints);
        let digests: Vec<_> = self.digests.iter().map(|digest| fbb.create_string(digest)).collect();
        let digests = fbb.create_vector(&digests);
        let start = fbb.start_table();
        fbb.push_slot::<i32>(6, self.last_span, 0);
        fbb.push_slot_always(8, digests);
        fbb.push_slot_always(10, checkpoints);
        fbb.push_slot::<i8>(4, self.algorithm, 1);
        let info = fbb.end_table(start);
        let start = fbb.start_table();
        fbb.push_slot_always(4, version);
        fbb.push_slot_always(6, tool);
        fbb.push_slot_always(12, toc);
        fbb.push_slot::<i64>(8, self.blob_size, 0);
        fbb.push_slot::<i64>(10, self.size, 0);
        fbb.push_slot_always(14, info);
        let root = fbb.end_table(start);
        fbb.finish_minimal(root);
        fbb.finished_data().to_vec()
    }
}

type Offset = WIPOffset<flatbuffers::TableFinishedWIPOffset>;
type Records<'a> = WIPOffset<Vector<'a, ForwardsUOffset<flatbuffers::TableFinishedWIPOffset>>>;

impl File {
    fn records<'a>(&self, fbb: &mut FlatBufferBuilder<'a>) -> Records<'a> {
        let mut records = Vec::new();
        for (key, value) in &self.pax {
            let (key, value) = (fbb.create_vector(key), fbb.create_vector(value));
            let start = fbb.start_table();
            fbb.push_slot_always(4, key);
            fbb.push_slot_always(6, value);
            records.push(fbb.end_table(start));
        }
        fbb.create_vector(&records)
    }

    fn write<'a>(&self, fbb: &mut FlatBufferBuilder<'a>, records: Records<'a>) -> Offset {
        // A string is a vector of bytes with a NUL behind it, which nobody needs.
        let (name, link) = (fbb.create_vector(&self.name), fbb.create_vector(&self.link));
        let (kind, mtime, nobody) =
            (fbb.create_string(&self.kind), fbb.create_string(&self.mtime), fbb.create_string("nobody"));
        let start = fbb.start_table();
        fbb.push_slot_always(4, name);
        fbb.push_slot_always(6, kind);
        fbb.push_slot::<i64>(8, self.offset, 0);
        fbb.push_slot::<i64>(10, self.size, 0);
        fbb.push_slot_always(12, link);
        fbb.push_slot::<i64>(14, self.mode, 0);
        fbb.push_slot::<u32>(16, self.uid, 0);
        fbb.push_slot::<u32>(18, self.gid, 0);
        fbb.push_slot_always(20, nobody);
        fbb.push_slot_always(22, nobody);
        fbb.push_slot_always(24, mtime);
        fbb.push_slot::<i64>(26, self.device.0, 0);
        fbb.push_slot::<i64>(28, self.device.1, 0);
        fbb.push_slot_always(30, records);
        fbb.end_table(start)
    }
}
