//! The kernel and fsck.erofs read what the writer writes.

/// These mount, so they need root.
mod root_kernel {
    use lazyrun_fs::view::View;
    use lazyrun_index::EntryKind;
    use proptest::prelude::*;

    use crate::common::layer::{Files, Item, TestLayer};
    use crate::common::{mount, tree};

    /// Writes, mounts, compares with the view entry by entry, and has fsck.erofs check it.
    fn check(layers: &[TestLayer]) -> mount::Written {
        let written = check_by_kernel(layers);
        mount::fsck(&written);
        written
    }

    fn check_by_kernel(layers: &[TestLayer]) -> mount::Written {
        mount::need_root();
        let view = View::merge(&layers.iter().collect::<Vec<_>>()).expect("layers merge");
        let files = Files::of(layers);
        let written = mount::write(&view, &files).expect("image is written");
        let differences =
            tree::compare_strictly(&tree::of_view(&view, &files), &mount::kernel_tree(&written));
        assert!(differences.is_empty(), "{differences:#?}");
        written
    }

    fn bytes(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
    }

    #[test]
    fn no_layers_and_empty_layers() {
        check(&[]);
        check(&[TestLayer::default(), TestLayer::default()]);
    }

    #[test]
    fn file_sizes() {
        let mut l = TestLayer::default();
        for size in [0, 1, 511, 512, 513, 1024, 4095, 4096, 4097, 70_000, 1 << 20] {
            l.file(format!("f{size}"), &bytes(size, 7));
        }
        assert_eq!(check(&[l]).summary.appendix_size, 0);
    }

    #[test]
    fn a_layer_file_that_ends_inside_its_last_block() {
        let mut l = TestLayer::default();
        l.file("a", b"x").file("b", &bytes(1000, 1));
        l.data.truncate(l.data.len() - 24);
        assert_eq!(check(&[l]).summary.appendix_size, 512);
    }

    #[test]
    fn sparse_files() {
        let mut l = TestLayer::default();
        l.file("plain", b"in front");
        l.sparse("hole", 3 << 20, &[]);
        l.sparse(
            "aligned",
            1 << 20,
            &[(0, bytes(4096, 1)), (1 << 19, bytes(512, 2)), ((1 << 20) - 512, bytes(512, 3))],
        );
        l.sparse("odd", 300_001, &[(100, bytes(700, 4)), (1000, bytes(3, 5)), (299_000, bytes(1001, 6))]);
        l.sparse("unaligned whole", 3000, &[(0, bytes(3000, 9))]);
        check(&[l]);
    }

    /// fsck.erofs would read every byte of these.
    #[test]
    fn huge_sparse_files() {
        let mut l = TestLayer::default();
        l.sparse("far", 9 << 30, &[(4 << 30, bytes(5000, 8)), ((9 << 30) - 1, vec![1])]);
        l.sparse("empty", 3 << 40, &[]);
        l.sparse("end", 1 << 36, &[((1 << 36) - 4096, bytes(4096, 1))]);
        let written = check_by_kernel(&[l]);
        assert!(written.summary.image_size < 4 << 20, "{:?}", written.summary);
        assert!(written.summary.appendix_size < 4 << 20, "{:?}", written.summary);
    }

    #[test]
    fn names_of_all_lengths_and_bytes() {
        let mut l = TestLayer::default();
        l.dir("d");
        for len in 1..=255 {
            l.file([&b"d/"[..], &vec![b'n'; len]].concat(), b"");
        }
        l.dir("bytes");
        for byte in (1..=255u8).filter(|b| *b != b'/') {
            for name in [vec![byte], vec![byte, b'x'], vec![b'.', byte], vec![b'.', b'.', byte]] {
                if name != b"." && name != b".." {
                    l.file([&b"bytes/"[..], &name].concat(), &[byte]);
                }
            }
        }
        l.dir("long");
        for i in 0..20u8 {
            l.file([&b"long/"[..], &[b'a' + i; 255]].concat(), b"");
        }
        check(&[l]);
    }

    #[test]
    fn directory_sizes_around_block_borders() {
        let mut l = TestLayer::default();
        for n in 0..90 {
            l.dir(format!("d{n}"));
            for i in 0..n {
                l.file(format!("d{n}/{i:04}"), b"");
            }
        }
        check(&[l]);
    }

    #[test]
    fn symlinks_of_all_lengths() {
        let mut l = TestLayer::default();
        for len in (1..700).step_by(3).chain([1000, 1023, 1024, 1025, 4094, 4095]) {
            l.symlink(format!("s{len}"), vec![b't'; len]);
        }
        check(&[l]);
    }

    #[test]
    fn attributes() {
        let mut l = TestLayer::default();
        let acl = [
            2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255,
            255, 255, 255,
        ];
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        l.file_item(
            Item::new("cap", EntryKind::File).xattr("security.capability", &capability).mode(0o4755),
            b"x",
        );
        l.file_item(Item::new("acl", EntryKind::File).xattr("system.posix_acl_access", &acl), b"x");
        l.add(Item::new("dacl", EntryKind::Directory).xattr("system.posix_acl_default", &acl));
        l.file_item(
            Item::new("many", EntryKind::File)
                .xattr("user.a", b"1")
                .xattr("user.empty", b"")
                .xattr("trusted.t", &[7; 300])
                .xattr("user.big", &bytes(3000, 1)),
            &bytes(600, 2),
        );
        l.add(
            Item::new("s", EntryKind::Symlink)
                .link("t")
                .xattr("security.s", b"label")
                .xattr("user.gone", b"x"),
        );
        l.add(
            Item::new("d", EntryKind::Directory)
                .xattr("trusted.overlay.opaque", b"y")
                .xattr("user.overlay.opaque", b"y"),
        );
        l.file("d/f", b"1");
        l.file_item(Item::new("old", EntryKind::File).time(-86_400, 999_999_999), b"x");
        l.file_item(Item::new("far", EntryKind::File).time(1 << 40, 1), b"x");
        l.file_item(Item::new("ids", EntryKind::File).owner(4_000_000_000, 100_000).mode(0o7777), b"x");
        l.add(Item { rdev: (1, 3), ..Item::new("null", EntryKind::CharDevice) });
        l.add(Item { rdev: (4095, 0xf_ffff), ..Item::new("largest", EntryKind::BlockDevice) });
        l.add(Item::new("fifo", EntryKind::Fifo).mode(0o600));
        check(&[l]);
    }

    #[test]
    fn links_over_layers() {
        let mut a = TestLayer::default();
        a.dir("d").file("d/f", b"one").hardlink("g", "d/f").symlink("s", "g").hardlink("t", "s");
        let mut b = TestLayer::default();
        b.hardlink("d/h", "g").file("g", b"new");
        check(&[a, b]);
    }

    #[test]
    fn many_layers() {
        let layers: Vec<TestLayer> = (0..131)
            .map(|i| {
                let mut l = TestLayer::default();
                l.file("same", format!("layer {i}").as_bytes()).file(format!("own{i}"), &bytes(600, i as u8));
                l
            })
            .collect();
        let written = check(&layers);
        assert_eq!(written.devices.len(), 131);
    }

    #[test]
    fn a_large_directory() {
        let mut l = TestLayer::default();
        for i in 0..20_000 {
            l.file(format!("d/file-{}", i * 7919 % 20_000), b"");
        }
        check(&[l]);
    }

    #[test]
    fn dump_reads_the_superblock_as_written() {
        let mut l = TestLayer::default();
        l.file("f", b"x");
        let written = check(&[l]);
        let out = mount::tool("dump.erofs")
            .args(mount::device_options(&written))
            .arg("-s")
            .arg(&written.image)
            .output();
        let text = String::from_utf8(out.expect("dump.erofs runs").stdout).expect("text");
        let u = written.summary.uuid.map(|b| format!("{b:02x}")).concat();
        let uuid = [&u[..8], &u[8..12], &u[12..16], &u[16..20], &u[20..]].join("-");
        for part in ["0xE0F5E1E2", "sb_csum", "chunked_file", "device_table", &uuid] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert_eq!(&uuid[14..15], "8");
    }

    /// A random item: which of four names in which of three directories, what kind, and numbers to derive the
    /// rest from.
    fn item() -> impl Strategy<Value = (u8, u8, u64, Vec<(u16, u16)>)> {
        (0..12u8, 0..8u8, any::<u64>(), prop::collection::vec((0..3000u16, 1..3000u16), 0..5))
    }

    fn add(l: &mut TestLayer, (name, kind, number, pieces): &(u8, u8, u64, Vec<(u16, u16)>)) {
        let long = "n".repeat((number % 200) as usize);
        let path = format!("dir{}/{}{long}", name % 3, name / 3);
        let small = (number >> 32) as u32;
        let with = |kind| {
            let mut item = Item::new(&path, kind).mode(small & 0o7777).owner(small, small >> 3);
            item = item.time(*number as i64 >> 20, small % 1_000_000_000);
            for i in 0..number % 3 {
                item = item.xattr(&format!("trusted.{i}"), &bytes((number % 700) as usize, i as u8));
            }
            item
        };
        match kind {
            0 => l.add(with(EntryKind::Directory)),
            1 => l.add(with(EntryKind::Symlink).link(vec![b't'; 1 + (number % 1500) as usize])),
            2 => l.add(with(EntryKind::Fifo)),
            3 => l.add(Item { rdev: (1 + small % 4095, small % (1 << 20)), ..with(EntryKind::BlockDevice) }),
            4 | 5 => l.file_item(with(EntryKind::File), &bytes((number % 5000) as usize, small as u8)),
            6 => l.file(format!("dir{}/.wh.{}{long}", name % 3, name / 3), b""),
            _ => {
                // Gaps and lengths; every other file on a grid of 512.
                let grid = if number % 2 == 0 { 512 } else { 1 };
                let mut at = 0;
                let mut list = Vec::new();
                for &(gap, len) in pieces {
                    at += u64::from(gap) / grid * grid;
                    let len = (u64::from(len) / grid * grid).max(grid);
                    list.push((at, bytes(len as usize, gap as u8)));
                    at += len;
                }
                l.sparse(&path, at + number % 3000 / grid * grid, &list)
            }
        };
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn random_layers(layers in prop::collection::vec(prop::collection::vec(item(), 0..20), 1..4)) {
            let layers: Vec<TestLayer> = layers
                .iter()
                .map(|items| {
                    let mut l = TestLayer::default();
                    items.iter().for_each(|i| add(&mut l, i));
                    l
                })
                .collect();
            check(&layers);
        }
    }
}
