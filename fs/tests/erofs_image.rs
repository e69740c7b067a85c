//! What the writer promises without a kernel: equal inputs give equal images, and what cannot be written is
//! refused with a sentence.

use std::io::{self, Cursor};

use crate::common::layer::{Files, Item, TestLayer};
use lazyrun_fs::erofs::{self, DeviceSpec, ErofsError, ErofsSummary, LayerContent};
use lazyrun_fs::view::View;
use lazyrun_index::{EntryKind, Extent};

fn layers() -> [TestLayer; 2] {
    let mut a = TestLayer::default();
    a.dir("d").file("d/f", b"contents").symlink("s", "d/f").sparse("odd", 5000, &[(3, vec![1; 1000])]);
    let mut b = TestLayer::default();
    b.file("d/g", &[7; 3000]).file("d/.wh.f", b"");
    [a, b]
}

fn image(
    layers: &[TestLayer],
    devices: &[DeviceSpec],
) -> Result<(Vec<u8>, Vec<u8>, ErofsSummary), ErofsError> {
    let view = View::merge(&layers.iter().collect::<Vec<_>>()).expect("merges");
    let mut image = Cursor::new(Vec::new());
    let mut appendix = Vec::new();
    let summary = erofs::write(&view, devices, &Files::of(layers), &mut image, &mut appendix)?;
    Ok((image.into_inner(), appendix, summary))
}

fn refused(build: impl FnOnce(&mut TestLayer)) -> String {
    let mut l = TestLayer::default();
    build(&mut l);
    let devices = Files::of(std::slice::from_ref(&l)).devices();
    image(&[l], &devices).expect_err("must be refused").to_string()
}

#[test]
fn equal_inputs_give_equal_images() {
    let devices = Files::of(&layers()).devices();
    let one = image(&layers(), &devices).expect("written");
    let two = image(&layers(), &devices).expect("written");
    assert_eq!(one, two);
    assert_eq!(one.0.len() as u64, one.2.image_size);
    assert_eq!(one.1.len() as u64, one.2.appendix_size);
    assert!(one.2.appendix_size > 0);
}

#[test]
fn any_other_input_gives_another_uuid() {
    let devices = Files::of(&layers()).devices();
    let mut seen = vec![image(&layers(), &devices).expect("written").2.uuid];
    let mut tagged = devices.clone();
    tagged[0].tag[0] ^= 1;
    seen.push(image(&layers(), &tagged).expect("written").2.uuid);
    let mut longer = devices.clone();
    longer[1].size += 512;
    seen.push(image(&layers(), &longer).expect("written").2.uuid);
    let mut newer = layers();
    newer[0].items[0].mtime.nanos = 1;
    seen.push(image(&newer, &devices).expect("written").2.uuid);
    let mut other = layers();
    let odd = other[0].data.iter().rposition(|&b| b == 1).expect("sparse data");
    other[0].data[odd] = 2;
    seen.push(image(&other, &devices).expect("written").2.uuid);
    let all = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), all);
}

#[test]
fn contents_stay_where_they_are() {
    let mut l = TestLayer::default();
    for i in 0..2000 {
        l.file(format!("d/{i}"), &vec![b'x'; i * 37]);
    }
    let devices = Files::of(std::slice::from_ref(&l)).devices();
    let (image, appendix, summary) = image(&[l], &devices).expect("written");
    assert!(appendix.is_empty() && summary.appendix_size == 0);
    // 64 for the inode, 8 for the only chunk, 24 of padding, and the name.
    assert!(image.len() < 2000 * 130, "{}", image.len());
}

#[test]
fn what_cannot_be_written_is_refused() {
    let outside = refused(|l| {
        let mut item = Item::new("dir/f", EntryKind::File);
        item.size = 10;
        item.extents = vec![Extent { file_offset: 0, layer_offset: 512, len: 10 }];
        l.add(item);
    });
    assert!(outside.contains("/dir/f") && outside.contains("past the end"), "{outside}");
    let number = refused(|l| _ = l.add(Item { rdev: (5000, 1), ..Item::new("dev", EntryKind::CharDevice) }));
    assert!(number.contains("5000:1"), "{number}");
    let xattrs = refused(|l| {
        let mut item = Item::new("x", EntryKind::File);
        for i in 0..10 {
            item = item.xattr(&format!("user.{i}"), &[0; 60_000]);
        }
        l.add(item);
    });
    assert!(xattrs.contains("extended attributes"), "{xattrs}");
    let sparse = refused(|l| {
        let mut item = Item::new("s", EntryKind::File);
        item.size = 1 << 62;
        l.data = vec![0; 1 << 20];
        // Nowhere near any common grid.
        item.extents = (0..2000u64)
            .map(|i| Extent { file_offset: i * (1 << 51) + i * 512, layer_offset: i * 512, len: 512 })
            .collect();
        l.add(item);
    });
    assert!(sparse.contains("sparse"), "{sparse}");
}

#[test]
fn too_many_or_too_large_devices_are_refused() {
    let view = View::merge::<TestLayer>(&[]).expect("merges");
    let write = |devices: &[DeviceSpec]| {
        erofs::write(&view, devices, &Files(Vec::new()), Cursor::new(Vec::new()), io::sink())
    };
    let device = DeviceSpec { size: 512, tag: [0; 64] };
    assert!(matches!(write(&vec![device; 65_001]), Err(ErofsError::TooManyDevices(65_001))));
    assert!(write(&vec![device; 65_000]).is_ok());
    let large = DeviceSpec { size: (1 << 41) + 1, ..device };
    assert!(matches!(write(&[large]), Err(ErofsError::DeviceTooLarge(_))));
}

#[test]
fn failing_reads_and_writes_are_reported() {
    struct Broken;
    impl LayerContent for Broken {
        fn read_at(&self, _: u16, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::Error::other("registry is gone"))
        }
    }
    let layers = layers();
    let view = View::merge(&layers.iter().collect::<Vec<_>>()).expect("merges");
    let devices = Files::of(&layers).devices();
    let read = erofs::write(&view, &devices, &Broken, Cursor::new(Vec::new()), io::sink());
    let text = read.expect_err("the read fails").to_string();
    assert!(text.contains("/odd") && text.contains("layer 1") && text.contains("registry is gone"), "{text}");
    let mut small = [0u8; 700];
    let full = erofs::write(&view, &devices, &Files::of(&layers), Cursor::new(&mut small[..]), io::sink());
    assert!(matches!(full, Err(ErofsError::Write { what: "image", .. })));
}
