//! Layers of many gzip members, and indexes that somebody claims of them, true or not.

use lazyrun_index::{
    Compression, Digest, DigestOf, EntryKind, Extent, IndexBuilder, LayerFacts, LayerIndex, Layout,
    NewEntrance, NewEntry, NewSpan, StreamOptions, index_layer,
};

use super::{TestLayer, gzip, tar};

/// A run of the tar and the gzip member that holds it.
#[derive(Clone, Copy)]
pub struct Member {
    pub tar: (usize, usize),
    pub blob: (usize, usize),
    /// Bytes of the member in front of the run.
    pub skip: usize,
}

/// A layer whose blob has a member for each file's content and one for each piece between.
#[derive(Clone)]
pub struct Members {
    pub layer: TestLayer,
    pub members: Vec<Member>,
    /// Path and content.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Members {
    pub fn new(seed: u64, files: usize, size: usize) -> Members {
        Members::cut(seed, files, size, false)
    }

    /// The same tar in one member; its runs are entered by skipping.
    pub fn one_member(seed: u64, files: usize, size: usize) -> Members {
        Members::cut(seed, files, size, true)
    }

    fn cut(seed: u64, files: usize, size: usize, one: bool) -> Members {
        let tar = tar(seed, files, size);
        let mut runs = Vec::new();
        let mut named = Vec::new();
        let mut at = 0;
        let mut archive = tar::Archive::new(&tar[..]);
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let start = usize::try_from(entry.raw_file_position()).unwrap();
            runs.extend([(at, start), (start, start + size)]);
            at = start + size;
            let path = entry.path().unwrap().to_str().unwrap().to_owned();
            named.push((path, tar[start..at].to_vec()));
        }
        runs.push((at, tar.len()));
        let mut blob = if one { gzip(&tar) } else { Vec::new() };
        let mut members = Vec::new();
        for run in runs {
            if one {
                members.push(Member { tar: run, blob: (0, blob.len()), skip: run.0 });
                continue;
            }
            let from = blob.len();
            blob.extend(gzip(&tar[run.0..run.1]));
            members.push(Member { tar: run, blob: (from, blob.len()), skip: 0 });
        }
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        Members { layer: TestLayer { tar, blob: blob.into(), media_type }, members, files: named }
    }

    fn own_index(&self) -> LayerIndex {
        let mut out = std::io::Cursor::new(Vec::new());
        index_layer(&self.layer.blob[..], &mut (), &mut out, &StreamOptions::default()).unwrap();
        LayerIndex::from_bytes(out.into_inner()).unwrap()
    }
}

/// What is claimed of a layer; by default the truth.
#[derive(Clone)]
pub struct Claim {
    pub layout: Layout,
    pub digest_of: DigestOf,
    /// Table: its files in the opposite order.
    pub reversed: bool,
    /// Another mode for file 3.
    pub mode: Option<u32>,
    /// A file that is not there.
    pub extra: Option<&'static str>,
    /// The last file is left out.
    pub missing: bool,
    /// Another content digest for file 3.
    pub content: bool,
    /// Files 3 and 4 have each other's bytes.
    pub swapped: bool,
    /// Span 7 has another digest.
    pub wrong_span: bool,
    /// File 3 is all hole.
    pub hole: bool,
    /// File 3 and the span that it is have this digest.
    pub named: Option<Digest>,
}

impl Claim {
    pub fn tar(digest_of: DigestOf) -> Claim {
        Claim {
            layout: Layout::Tar,
            digest_of,
            reversed: false,
            mode: None,
            extra: None,
            missing: false,
            content: false,
            swapped: false,
            wrong_span: false,
            hole: false,
            named: None,
        }
    }

    pub fn table(digest_of: DigestOf) -> Claim {
        Claim { layout: Layout::Table, ..Claim::tar(digest_of) }
    }

    /// The members that become spans, in the order of the layer file, with where they start in it.
    fn spans<'a>(&self, made: &'a Members) -> Vec<(u64, &'a Member)> {
        let mut members: Vec<&Member> = match self.layout {
            Layout::Tar => made.members.iter().collect(),
            Layout::Table => made.members.iter().skip(1).step_by(2).collect(),
        };
        if self.reversed {
            members.reverse();
        }
        let mut at = 0;
        let mut placed = Vec::new();
        for member in members {
            placed.push((at, member));
            at += (member.tar.1 - member.tar.0) as u64;
            if self.layout == Layout::Table {
                at = at.next_multiple_of(512);
            }
        }
        placed
    }

    /// Byte of the layer file at which a file starts.
    pub fn place_of(&self, made: &Members, path: &str) -> u64 {
        let file = made.files.iter().position(|(name, _)| name == path).unwrap();
        let member = &made.members[2 * file + 1];
        match self.layout {
            Layout::Tar => member.tar.0 as u64,
            Layout::Table => self.spans(made).iter().find(|(_, m)| m.tar == member.tar).unwrap().0,
        }
    }

    /// The index in our format.
    pub fn bytes(&self, made: &Members) -> Vec<u8> {
        let facts = LayerFacts {
            blob_digest: made.layer.digest(),
            blob_size: made.layer.blob.len() as u64,
            diff_id: made.layer.diff_id(),
            compression: Compression::Gzip,
        };
        let mut builder = IndexBuilder::new(&facts, self.layout);
        for (i, (at, member)) in self.spans(made).into_iter().enumerate() {
            let (from, to) = member.tar;
            let pad = match self.layout {
                Layout::Tar => 0,
                Layout::Table => (at + (to - from) as u64).next_multiple_of(512) - at - (to - from) as u64,
            };
            let mut digest = match self.digest_of {
                DigestOf::Decoded => Digest::of(&made.layer.tar[from..to]),
                DigestOf::Blob => Digest::of(&made.layer.blob[member.blob.0..member.blob.1]),
                DigestOf::Nothing => Digest::from_bytes([0; 32]),
            };
            if let Some(named) = self.named.filter(|_| i == 7) {
                digest = named;
            }
            if self.wrong_span && i == 7 {
                digest = Digest::of(b"something else");
            }
            builder
                .span(&NewSpan {
                    blob_offset: member.blob.0 as u64,
                    blob_len: (member.blob.1 - member.blob.0) as u64,
                    len: (to - from) as u64 + pad,
                    pad: u16::try_from(pad).unwrap(),
                    digest,
                    digest_of: self.digest_of,
                    entrance: NewEntrance::GzipMember { skip: member.skip as u64 },
                })
                .unwrap();
        }
        let own = made.own_index();
        let last = own.entry_count() - 1;
        for (i, entry) in own.entries().enumerate().filter(|(i, _)| !(self.missing && *i == last)) {
            let xattrs: Vec<_> = entry.xattrs().collect();
            let path = std::str::from_utf8(entry.path()).unwrap();
            let lied = i == 3;
            let from = match (self.swapped, i) {
                (true, 3) => &made.files[4].0,
                (true, 4) => &made.files[3].0,
                _ => path,
            };
            let layer_offset = self.place_of(made, from);
            let extents = [Extent { file_offset: 0, layer_offset, len: entry.size() }];
            let held: &[Extent] = if self.hole && lied { &[] } else { &extents };
            let mut told = NewEntry::of(&entry, &xattrs, held);
            if let Some(mode) = self.mode.filter(|_| lied) {
                told.mode = mode;
            }
            if self.content && lied {
                told.content = Some(Digest::of(b"other"));
            }
            if lied && self.named.is_some() {
                told.content = self.named;
            }
            builder.entry(&told).unwrap();
        }
        if let Some(path) = self.extra {
            builder.entry(&empty(path)).unwrap();
        }
        builder.finish().unwrap()
    }
}

fn empty(path: &str) -> NewEntry<'_> {
    NewEntry {
        path: path.as_bytes(),
        kind: EntryKind::File,
        mode: 0o4755,
        uid: 0,
        gid: 0,
        mtime: lazyrun_index::Timestamp::default(),
        size: 0,
        link: b"",
        rdev: (0, 0),
        xattrs: &[],
        extents: &[],
        content: None,
    }
}

/// A layer of one gzip member with a checkpoint in the middle, whose window may be a lie: the compressed bytes behind
/// it are what they should be, but refer back to bytes that are not.
pub struct Checkpoint {
    pub layer: TestLayer,
    /// Byte of the tar at which the checkpoint is, and byte of the blob.
    pub at: usize,
    blob_at: usize,
}

impl Checkpoint {
    pub fn new() -> Checkpoint {
        const REPEATS: usize = 100;
        let mut content = tar(900, 1, 50_000);
        content.truncate(40_000);
        content.extend_from_slice(b"abcd");
        let at = 512 + content.len();
        content.extend(b"abcd".repeat(258 * REPEATS / 4 + 1));
        content.truncate(at - 512 + 258 * REPEATS);
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut header = ::tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, "file", content.as_slice()).unwrap();
        let tar = builder.into_inner().unwrap();

        let mut blob = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        stored(&mut blob, &tar[..at], false);
        let blob_at = blob.len();
        // A block with fixed codes: copy 258 bytes from 4 bytes back, again and again.
        let mut bits = vec![false, true, false];
        for _ in 0..REPEATS {
            bits.extend([true, true, false, false, false, true, false, true]); // length 258
            bits.extend([false, false, false, true, true]); // distance 4
        }
        bits.extend([false; 7]); // end of block
        // The head of a stored block, which then goes on at the next whole byte.
        bits.extend([true, false, false]);
        for byte in bits.chunks(8) {
            blob.push(byte.iter().enumerate().map(|(i, bit)| u8::from(*bit) << i).sum());
        }
        let rest = &tar[at + 258 * REPEATS..];
        let len = u16::try_from(rest.len()).unwrap();
        blob.extend(len.to_le_bytes());
        blob.extend((!len).to_le_bytes());
        blob.extend_from_slice(rest);
        blob.extend(crc32(&tar).to_le_bytes());
        blob.extend(u32::try_from(tar.len()).unwrap().to_le_bytes());
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        Checkpoint { layer: TestLayer { tar, blob: blob.into(), media_type }, at, blob_at }
    }

    /// The index with digests of compressed bytes, true but perhaps for the window.
    pub fn claim(&self, lie: bool) -> Vec<u8> {
        let (tar, blob) = (&self.layer.tar, &self.layer.blob);
        let facts = LayerFacts {
            blob_digest: self.layer.digest(),
            blob_size: blob.len() as u64,
            diff_id: self.layer.diff_id(),
            compression: Compression::Gzip,
        };
        let mut window = tar[self.at - 32_768..self.at].to_vec();
        if lie {
            window[32_767] = b'X';
        }
        let mut builder = IndexBuilder::new(&facts, Layout::Tar);
        let entrances =
            [NewEntrance::GzipMember { skip: 0 }, NewEntrance::Deflate { bits: 0, window: &window }];
        let places = [(0, self.at, 0, self.blob_at), (self.at, tar.len(), self.blob_at, blob.len())];
        for (entrance, (from, to, blob_from, blob_to)) in entrances.into_iter().zip(places) {
            builder
                .span(&NewSpan {
                    blob_offset: blob_from as u64,
                    blob_len: (blob_to - blob_from) as u64,
                    len: (to - from) as u64,
                    pad: 0,
                    digest: Digest::of(&blob[blob_from..blob_to]),
                    digest_of: DigestOf::Blob,
                    entrance,
                })
                .unwrap();
        }
        let mut out = std::io::Cursor::new(Vec::new());
        index_layer(&blob[..], &mut (), &mut out, &StreamOptions::default()).unwrap();
        let own = LayerIndex::from_bytes(out.into_inner()).unwrap();
        let entry = own.entry(0);
        let extents: Vec<Extent> = entry.extents().collect();
        let file = NewEntry {
            path: entry.path(),
            mode: entry.mode(),
            mtime: entry.mtime(),
            size: entry.size(),
            extents: &extents,
            content: entry.content(),
            ..empty("")
        };
        builder.entry(&file).unwrap();
        builder.finish().unwrap()
    }
}

fn stored(blob: &mut Vec<u8>, bytes: &[u8], last: bool) {
    for piece in bytes.chunks(65_535) {
        let len = u16::try_from(piece.len()).unwrap();
        blob.push(u8::from(last));
        blob.extend(len.to_le_bytes());
        blob.extend((!len).to_le_bytes());
        blob.extend_from_slice(piece);
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    };
    !bytes.iter().fold(u32::MAX, step)
}
