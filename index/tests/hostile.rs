//! Foreign bytes never cause a panic: mutated archives, mutated indexes.

use crate::common::hostile::{admit, seal, visit};
use crate::common::make::archive;
use crate::common::{index_blob, small_spans};
use lazyrun_index::{
    Compression, Digest, DigestOf, EntryKind, IndexBuilder, IndexError, LayerFacts, LayerIndex, Layout,
    NewEntrance, NewEntry, NewSpan, Timestamp,
};
use proptest::prelude::*;

fn index_bytes(blob: &[u8]) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    lazyrun_index::index_layer(blob, &mut (), &mut out, &small_spans()).unwrap();
    out.into_inner()
}

/// Real archives as starting points: PAX, GNU, sparse, xattrs and more.
fn seeds() -> Vec<Vec<u8>> {
    let root =
        std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/oddlayers/layout/blobs/sha256");
    let mut seeds = vec![archive(3, 700, 1)];
    let mut paths: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.metadata().unwrap().len() > 20_000 {
            continue;
        }
        let blob = std::fs::read(path).unwrap();
        match index_blob(&blob, &small_spans()) {
            Ok(indexed) if indexed.layer.len() < 40_000 && indexed.summary.entries > 0 => {
                seeds.push(indexed.layer);
            }
            _ => {}
        }
    }
    assert!(seeds.len() > 50);
    seeds
}

/// Seconds by which the entries of [`large_index`] can be told apart.
const FIRST_SECOND: i64 = 0x005a_5a5a_0000_0000;

/// One so large that several threads check it.
fn large_index(entries: i64) -> Vec<u8> {
    let digest = Digest::of(b"x");
    let facts =
        LayerFacts { blob_digest: digest, blob_size: 512, diff_id: digest, compression: Compression::None };
    let mut builder = IndexBuilder::new(&facts, Layout::Tar);
    for i in 0..entries {
        let path = format!("dir-{}/entry-{i}", i / 100);
        let entry = NewEntry {
            path: path.as_bytes(),
            kind: EntryKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp { secs: FIRST_SECOND + i, nanos: 0 },
            size: 0,
            link: b"",
            rdev: (0, 0),
            xattrs: &[],
            extents: &[],
            content: None,
        };
        builder.entry(&entry).unwrap();
    }
    let (digest_of, entrance) = (DigestOf::Decoded, NewEntrance::Plain);
    builder
        .span(&NewSpan { blob_offset: 0, blob_len: 512, len: 512, pad: 0, digest, digest_of, entrance })
        .unwrap();
    builder.finish().unwrap()
}

#[test]
fn all_parts_of_a_large_index_are_checked() {
    const ENTRIES: i64 = 70_000;
    let index = large_index(ENTRIES);
    assert_eq!(LayerIndex::from_bytes(index.clone()).unwrap().entry_count(), ENTRIES as usize);
    for number in [0, 4095, 20_000, 34_999, 35_000, 50_000, ENTRIES - 1] {
        let second = (FIRST_SECOND + number).to_le_bytes();
        let time = index.windows(8).position(|w| w == second).expect("the entry's record");
        let mut damaged = index.clone();
        // The mode lies 28 bytes behind the time.
        damaged[time + 28..time + 30].fill(0xff);
        let error = LayerIndex::from_bytes(damaged.clone()).unwrap_err().to_string();
        assert!(error.contains("checksum of its body"), "{error}");
        seal(&mut damaged);
        let error = LayerIndex::from_bytes(damaged).unwrap_err().to_string();
        assert!(error.contains(&format!("entry {number}: its mode")), "{error}");
    }
}

#[test]
fn damage_to_an_index_is_noticed() {
    let index = index_bytes(&crate::common::make::gzip(&archive(5, 5000, 1), 6, 0));
    for at in 0..index.len() {
        let mut damaged = index.clone();
        damaged[at] ^= 0x40;
        assert!(LayerIndex::from_bytes(damaged).is_err(), "byte {at}");
    }
    for len in 0..index.len() {
        assert!(LayerIndex::from_bytes(index[..len].to_vec()).is_err(), "cut to {len}");
    }
    let mut newer = index.clone();
    newer[8] = 3;
    let refused = LayerIndex::from_bytes(newer);
    assert!(matches!(refused, Err(IndexError::UnknownVersion { found: 3, known: 2 })));
    let mut longer = index;
    longer.push(0);
    assert!(LayerIndex::from_bytes(longer).is_err());
}

#[test]
fn a_mapped_index_is_the_same() {
    let bytes = index_bytes(&archive(5, 5000, 2));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    std::fs::write(&path, &bytes).unwrap();
    let (mapped, owned) = (LayerIndex::open(&path).unwrap(), LayerIndex::from_bytes(bytes).unwrap());
    assert!(mapped.entries().map(|e| e.path().to_vec()).eq(owned.entries().map(|e| e.path().to_vec())));
    assert!(mapped.spans().eq(owned.spans()));
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(LayerIndex::open(&path), Err(IndexError::BadIndex { .. })));
    assert!(matches!(LayerIndex::open(&dir.path().join("none")), Err(IndexError::IndexIo { .. })));
}

#[test]
fn thousands_of_holes_are_not_hashed() {
    // An old GNU sparse file that is one hole of 64 MiB costs a header, and hashing it a tenth of a second.
    const FILES: usize = 5000;
    let mut tar = Vec::new();
    for i in 0..FILES {
        let mut header = [0; 512];
        let name = format!("hole-{i}");
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(b"00000000000");
        header[156] = b'S';
        header[257..265].copy_from_slice(b"ustar  \0");
        header[483..494].copy_from_slice(format!("{:011o}", 64 << 20).as_bytes());
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        tar.extend_from_slice(&header);
    }
    tar.extend_from_slice(&[0; 1024]);
    let indexed = index_blob(&tar, &small_spans()).unwrap();
    assert_eq!(indexed.index.entry_count(), FILES);
    assert!(indexed.index.entries().all(|e| e.size() == 64 << 20 && e.extents().len() == 0));
    let hashed: Vec<_> = indexed.index.entries().filter_map(|e| e.content()).collect();
    assert_eq!(hashed.len(), 4, "256 MiB of holes and one for each byte of the archive");
    assert!(hashed.iter().all(|digest| *digest == hashed[0]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_archives_do_not_panic(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        fix in any::<bool>(),
    ) {
        thread_local!(static SEEDS: Vec<Vec<u8>> = seeds());
        let mut tar = SEEDS.with(|seeds| seeds[which.index(seeds.len())].clone());
        for (at, byte) in edits {
            let at = at.index(tar.len());
            tar[at] = byte;
            if fix {
                // A right checksum lets the damage through to the fields.
                let start = at / 512 * 512;
                if let Some(block) = tar.get_mut(start..start + 512) {
                    block[148..156].fill(b' ');
                    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
                    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
                }
            }
        }
        if let Ok(indexed) = index_blob(&tar, &small_spans()) {
            visit(&indexed.index);
        }
    }

    #[test]
    fn mutated_indexes_do_not_panic(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        compressed in any::<bool>(),
    ) {
        thread_local!(static INDEXES: Vec<[Vec<u8>; 2]> = seeds()
            .iter()
            .map(|tar| [index_bytes(tar), index_bytes(&crate::common::make::gzip(tar, 1, 0))])
            .collect());
        let mut index = INDEXES.with(|all| all[which.index(all.len())][usize::from(compressed)].clone());
        for (at, byte) in edits {
            let at = at.index(index.len());
            index[at] = byte;
        }
        admit(&mut index);
        if let Ok(index) = LayerIndex::from_bytes(index) {
            visit(&index);
        }
    }
}
