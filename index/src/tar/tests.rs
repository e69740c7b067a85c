//! Small hand-made archives for what writers rarely or never produce.

use super::{Entry, Parser, TarSink};
use crate::{Digest, EntryKind, Extent, IndexError, Timestamp};

#[derive(Default)]
struct Entries(Vec<Entry>);

impl TarSink for Entries {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        self.0.push(entry.clone());
        Ok(())
    }
}

/// Parses in one piece and byte by byte; both must agree.
fn parse(tar: &[u8]) -> Result<Vec<Entry>, IndexError> {
    let run = |step: usize| {
        let mut parser = Parser::new();
        let mut entries = Entries::default();
        for piece in tar.chunks(step) {
            parser.feed(piece, &mut entries)?;
        }
        parser.finish()?;
        Ok::<_, IndexError>(entries.0)
    };
    let whole = run(tar.len().max(1));
    match (&whole, run(1)) {
        (Ok(a), Ok(b)) => assert_eq!(*a, b),
        (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string()),
        (a, b) => panic!("{a:?} in one piece, {b:?} byte by byte"),
    }
    whole
}

/// A header block under construction.
#[derive(Clone)]
struct Head([u8; 512]);

fn head(name: &str, flag: u8, size: u64) -> Head {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    Head(block)
}

impl Head {
    fn set(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn gnu(self) -> Self {
        self.set(257, b"ustar  \0")
    }

    /// The block with its checksum, and a padded body.
    fn with(&self, body: &[u8]) -> Vec<u8> {
        let mut out = self.0.to_vec();
        out[148..156].fill(b' ');
        let sum: u32 = out.iter().map(|&b| u32::from(b)).sum();
        out[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(body);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }
}

fn meta(flag: u8, body: &[u8]) -> Vec<u8> {
    head("meta", flag, body.len() as u64).with(body)
}

fn rec(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let len = (1..).find(|n: &usize| n.to_string().len() + rest.len() == *n).unwrap();
    format!("{len}{rest}")
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    meta(b'x', records.iter().map(|(k, v)| rec(k, v)).collect::<String>().as_bytes())
}

fn file(name: &str, body: &[u8]) -> Vec<u8> {
    head(name, b'0', body.len() as u64).with(body)
}

fn end() -> Vec<u8> {
    vec![0; 1024]
}

#[test]
fn extended_headers_in_any_order() {
    let tar = [
        pax(&[("path", "from-pax"), ("uid", "70000"), ("mtime", "5.5")]),
        meta(b'L', b"from-gnu\0"),
        file("short", b"a"),
        meta(b'L', b"from-gnu2\0"),
        pax(&[("path", "from-pax2"), ("gid", "7")]),
        file("short", b""),
        pax(&[("uid", "1")]),
        pax(&[("gid", "2")]),
        file("plain", b""),
        end(),
    ];
    let entries = parse(&tar.concat()).unwrap();
    assert_eq!(entries[0].path, b"from-gnu");
    assert_eq!((entries[0].uid, entries[0].mtime), (70000, Timestamp { secs: 5, nanos: 500_000_000 }));
    assert_eq!((&entries[1].path[..], entries[1].gid), (&b"from-gnu2"[..], 7));
    assert_eq!((entries[2].uid, entries[2].gid), (0, 2), "the last PAX header replaces the one before");
    assert_eq!(entries[0].content, Some(Digest::of(b"a")));
}

#[test]
fn global_headers_are_ignored() {
    let tar = [meta(b'g', rec("uid", "9").as_bytes()), pax(&[("gid", "3")]), meta(b'g', b"nonsense")];
    let entries = parse(&[tar.concat(), file("f", b""), file("g", b"")].concat()).unwrap();
    assert_eq!((entries[0].uid, entries[0].gid, entries[1].gid), (0, 3, 0));
}

#[test]
fn kinds_and_their_oddities() {
    let device = |flag| head("dev", flag, 0).set(329, b"0000007\0").set(337, b"0000010\0").with(b"");
    let v7 = |name: &str, flag: u8, size: u64| head(name, flag, size).set(257, &[0; 8]);
    let tar = [
        head("cont", b'7', 1).with(b"x"),
        head("nul", 0, 1).with(b"y"),
        v7("v7dir/", b'0', 0).with(b""),
        v7("v7dir2/", 0, 0).with(b""),
        head("dir", b'5', 999).with(b""),
        head("sym", b'2', 0).set(157, b"../else/where").with(b""),
        head("hard", b'1', 77).set(157, b"/./a//b").with(b""),
        device(b'3'),
        device(b'4'),
        head("pipe", b'6', 0).with(b""),
        head("c", b'0', 0).set(345, b"long/prefix").with(b""),
    ];
    let got = parse(&tar.concat()).unwrap();
    use EntryKind::{BlockDevice, CharDevice, Directory, Fifo, File, Hardlink, Symlink};
    let want =
        [File, File, Directory, Directory, Directory, Symlink, Hardlink, CharDevice, BlockDevice, Fifo, File];
    assert_eq!(got.iter().map(|e| e.kind).collect::<Vec<_>>(), want);
    assert_eq!((&got[5].link[..], &got[6].link[..]), (&b"../else/where"[..], &b"a/b"[..]));
    assert_eq!((got[7].rdev, got[6].size, got[10].path.as_slice()), ((7, 8), 0, &b"long/prefix/c"[..]));
}

#[test]
fn values_at_their_ends() {
    let base256 = |value: i64, len: usize| {
        let mut field = vec![if value < 0 { 0xff } else { 0 }; len];
        field[len - 8..].copy_from_slice(&value.to_be_bytes());
        field[0] |= 0x80;
        field
    };
    let long: String = ["x".repeat(255).as_str(); 16].join("/") + "/";
    let target = "t".repeat(4095);
    let times = |mtime| pax(&[("atime", "1.5"), ("ctime", "2.25"), ("mtime", mtime)]);
    let tar = [
        head("id", b'0', 0)
            .set(108, &base256(0xffff_fffe, 8))
            .set(116, &base256(0xffff_fffe, 8))
            .set(136, &base256(-5_000_000_000, 12))
            .with(b""),
        pax(&[("uid", "4294967294"), ("gid", "4294967294")]),
        head("pax-id", b'0', 0).set(136, &base256(1 << 40, 12)).with(b""),
        times("-1.5"),
        file("before", b""),
        times("99999999999.123456789123"),
        file("after", b""),
        pax(&[("path", &long), ("size", "3")]),
        head("p", b'0', 0).with(b"abc"),
        pax(&[("linkpath", &target)]),
        head("l", b'2', 0).set(157, b"short").with(b""),
        meta(b'L', long.as_bytes()),
        meta(b'K', target.as_bytes()),
        head("gnu", b'2', 0).gnu().with(b""),
        head("raw", b'0', 0).set(0, b"\xff\xfe\x01 \n").with(b""),
        file("raw", b"1"),
        file("raw", b"2"),
        head("h", b'1', 0).set(157, b"in/an/earlier/layer").with(b""),
        end(),
        b"garbage".to_vec(),
    ];
    let got = parse(&tar.concat()).unwrap();
    let at = |secs, nanos| Timestamp { secs, nanos };
    for entry in &got[..2] {
        assert_eq!((entry.uid, entry.gid), (u32::MAX - 1, u32::MAX - 1));
    }
    let mtimes: Vec<_> = got[..4].iter().map(|e| e.mtime).collect();
    let want = [at(-5_000_000_000, 0), at(1 << 40, 0), at(-2, 500_000_000), at(99_999_999_999, 123_456_789)];
    assert_eq!(mtimes, want);
    assert_eq!((got[4].path.len(), got[4].size), (4095, 3));
    assert_eq!((got[5].link.as_slice(), got[6].link.as_slice()), (target.as_bytes(), target.as_bytes()));
    assert_eq!(got[6].path, got[4].path);
    assert_eq!(got[7].path, b"\xff\xfe\x01 \n");
    assert_eq!((&got[8].path, got[8].content), (&got[9].path, Some(Digest::of(b"1"))));
    assert_eq!((got[10].kind, &got[10].link[..]), (EntryKind::Hardlink, &b"in/an/earlier/layer"[..]));
    assert_eq!(got.len(), 11);
}

#[test]
fn every_sparse_format() {
    let map = b"2\n0\n3\n1000\n2\n";
    let one = pax(&[
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "s"),
        ("GNU.sparse.realsize", "2000"),
    ]);
    let mut body = map.to_vec();
    body.resize(512, 0);
    body.extend_from_slice(b"abcde");
    let pieces = [("GNU.sparse.offset", "0"), ("GNU.sparse.numbytes", "3"), ("GNU.sparse.offset", "1000")];
    let zero = pax(&[&[("GNU.sparse.size", "2000")], &pieces[..], &[("GNU.sparse.numbytes", "2")]].concat());
    let zero_one = pax(&[
        ("GNU.sparse.size", "2000"),
        ("GNU.sparse.name", "s"),
        ("GNU.sparse.map", "0,3,1000,2,2000,0"),
    ]);
    let old = head("s", b'S', 5)
        .gnu()
        .set(386, b"00000000000\x0000000000003\0")
        .set(410, b"00000001750\x0000000000002\0")
        .set(483, b"00000003720\0");
    let mut extended = [0; 512];
    extended[..24].copy_from_slice(b"00000001750\x0000000000002\0");
    let old_long = head("s", b'S', 5).gnu().set(386, b"00000000000\x0000000000003\0").set(482, b"\x01");
    let old_long =
        [&old_long.set(483, b"00000003720\0").with(b"")[..], &extended, &file("", b"abcde")[512..]];

    let mut content = vec![0; 2000];
    content[..3].copy_from_slice(b"abc");
    content[1000..1002].copy_from_slice(b"de");
    let plain = file("s", b"abcde");
    for (name, tar) in [
        ("1.0", [one, file("GNUSparseFile.0/s", &body)].concat()),
        ("0.0", [zero, plain.clone()].concat()),
        ("0.1", [zero_one, plain].concat()),
        ("old", old.with(b"abcde")),
        ("old, extended", old_long.concat()),
    ] {
        let got = parse(&[tar.clone(), file("after", b"")].concat()).unwrap();
        let data = tar.windows(5).position(|w| w == b"abcde").unwrap() as u64;
        assert_eq!((got.len(), &got[0].path[..], got[0].size), (2, &b"s"[..], 2000), "{name}");
        assert_eq!(got[0].content, Some(Digest::of(&content)), "{name}");
        let extents = [(0, data, 3), (1000, data + 3, 2)];
        let extents =
            extents.map(|(file_offset, layer_offset, len)| Extent { file_offset, layer_offset, len });
        assert_eq!(got[0].extents, extents, "{name}");
    }
}

#[test]
fn hostile_sparse_maps_are_refused() {
    for map in ["0,6", "0,3,1,2", "5", "1999,5", "0,-1", "9223372036854775807,5", "0,3"] {
        let tar =
            [pax(&[("GNU.sparse.size", "2000"), ("GNU.sparse.map", map)]), file("s", b"abcde")].concat();
        assert!(matches!(parse(&tar), Err(IndexError::Entry { .. })), "{map}");
    }
    let one = pax(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "20")]);
    for body in [&b"9999999999\n"[..], b"x\n", b"1\n0\n600\n", b"1111111111111111111111111", b"5\n0\n"] {
        let mut body = body.to_vec();
        body.resize(512, 0);
        assert!(parse(&[one.clone(), file("s", &body), end()].concat()).is_err());
    }
    // A hole nobody can hash: taken, without a digest.
    let size = (1u64 << 43).to_string();
    let tar = [pax(&[("GNU.sparse.size", &size), ("GNU.sparse.map", "0,5")]), file("s", b"abcde")].concat();
    let got = parse(&tar).unwrap();
    assert_eq!((got[0].size, got[0].content), (1 << 43, None));
}

#[test]
fn ends() {
    assert!(parse(b"").unwrap().is_empty());
    assert_eq!(parse(&[file("a", b"1"), end(), file("b", b"2")].concat()).unwrap().len(), 1);
    assert_eq!(parse(&[file("a", b"1"), vec![0; 512]].concat()).unwrap().len(), 1);
    assert_eq!(parse(&file("a", b"1")[..513]).unwrap().len(), 1, "only the padding is missing");
    for bad in [
        [file("a", b"1"), vec![0; 512], file("b", b"2")].concat(),
        file("a", b"12")[..513].to_vec(),
        file("a", b"1")[..300].to_vec(),
        pax(&[("uid", "1")]),
        [pax(&[("uid", "1")]), end()].concat(),
        meta(b'L', &[b'x'; 600])[..700].to_vec(),
    ] {
        assert!(parse(&bad).is_err());
    }
}

#[test]
fn impossible_entries_are_refused() {
    let id = |field: &[u8]| head("f", b'0', 0).set(108, field).with(b"");
    for bad in [
        file("../f", b""),
        file("a/../../f", b""),
        file("./", b""),
        head("l", b'2', 0).with(b""),
        head("l", b'1', 0).set(157, b"../x").with(b""),
        head("l", b'1', 0).set(157, b"./").with(b""),
        head("v", b'V', 0).with(b""),
        head("d", b'3', 0).set(329, b"7777777\0").with(b""),
        id(&[0x80, 0, 0, 1, 0, 0, 0, 0]),
        id(&[0xff; 8]),
        head("f", b'0', 0).set(124, &[0xff; 12]).with(b""),
        head("f", b'0', 0)
            .set(124, &[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
            .with(b""),
        [pax(&[("size", "9223372036854775808")]), file("f", b"")].concat(),
        head("x", b'x', 2 << 20).with(b""),
        head("L", b'L', 1 << 32).with(b""),
    ] {
        let refused = parse(&[bad, end()].concat());
        assert!(
            matches!(refused, Err(IndexError::Entry { .. } | IndexError::TarHeader { .. })),
            "{refused:?}"
        );
    }
    let mut damaged = file("f", b"");
    damaged[0] ^= 1;
    assert!(matches!(parse(&damaged), Err(IndexError::TarHeader { offset: 0, .. })));
}
