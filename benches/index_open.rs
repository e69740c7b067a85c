//! Opening the index of a layer with 100,000 entries: the figure to hold is 2 ms, with two cores or more.

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lazyrun_index::{
    Compression, Digest, DigestOf, EntryKind, Extent, IndexBuilder, LayerFacts, LayerIndex, Layout,
    NewEntrance, NewEntry, NewSpan, Timestamp,
};

const ENTRIES: u64 = 100_000;
const FILE: u64 = 16 << 10;

/// An index with names as long as a distribution's, and a span for each 2 MiB.
fn index() -> Vec<u8> {
    let facts = LayerFacts {
        blob_digest: Digest::of(b"blob"),
        blob_size: ENTRIES * FILE,
        diff_id: Digest::of(b"layer"),
        compression: Compression::None,
    };
    let mut builder = IndexBuilder::new(&facts, Layout::Tar);
    for i in 0..ENTRIES {
        let path = format!("usr/lib/python3/dist-packages/package-{:03}/module_{i:05}.py", i / 100);
        let extents = [Extent { file_offset: 0, layer_offset: i * FILE, len: FILE }];
        builder
            .entry(&NewEntry {
                path: path.as_bytes(),
                kind: EntryKind::File,
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: Timestamp { secs: 1_700_000_000, nanos: 0 },
                size: FILE,
                link: b"",
                rdev: (0, 0),
                xattrs: &[],
                extents: &extents,
                content: Some(Digest::of(path.as_bytes())),
            })
            .expect("add an entry");
    }
    let len = 2 << 20;
    let mut start = 0;
    while start < facts.blob_size {
        let len = len.min(facts.blob_size - start);
        builder
            .span(&NewSpan {
                blob_offset: start,
                blob_len: len,
                len,
                pad: 0,
                digest: Digest::of(&start.to_le_bytes()),
                digest_of: DigestOf::Decoded,
                entrance: NewEntrance::Plain,
            })
            .expect("add a span");
        start += len;
    }
    builder.finish().expect("finish an index")
}

fn open(criterion: &mut Criterion) {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("index_open");
    std::fs::write(&path, index()).expect("write an index");
    let mut group = criterion.benchmark_group("index");
    group.throughput(Throughput::Elements(ENTRIES));
    group.bench_function("open a mapped one of 100,000 entries", |bencher| {
        bencher.iter(|| LayerIndex::open(&path).expect("open an index"));
    });
    group.finish();
}

criterion_group!(benches, open);
criterion_main!(benches);
