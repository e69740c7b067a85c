//! Micro-benches of the steps between bytes and a mount.

use std::io::{self, Cursor};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flate2::Compression;
use flate2::write::GzEncoder;
use lazyrun_fs::erofs::{self, DeviceSpec, LayerContent};
use lazyrun_fs::view::View;
use lazyrun_index::{LayerIndex, LayerSink, SpanInfo, StreamOptions, hydrate_layer, index_layer};

/// Takes everything and keeps nothing.
struct Null;

impl LayerSink for Null {
    fn data(&mut self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        std::hint::black_box(bytes);
        Ok(())
    }

    fn span(&mut self, _span: &SpanInfo) -> io::Result<()> {
        Ok(())
    }
}

/// A layer of `files` files with text that compresses about as well as a distribution's files do.
fn layer(files: usize, size: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("{:x} ", (state >> 33) % 50_000)
    };
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::new(6)));
    for i in 0..files {
        let mut content = Vec::with_capacity(size + 8);
        while content.len() < size {
            content.extend_from_slice(word().as_bytes());
        }
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        let path = format!("usr/lib/part-{:03}/file-{i:05}", i / 100);
        tar.append_data(&mut header, path, content.as_slice()).expect("write to memory");
    }
    tar.into_inner().and_then(GzEncoder::finish).expect("write to memory")
}

fn index(blob: &[u8]) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    index_layer(blob, &mut Null, &mut out, &StreamOptions::default()).expect("index a layer");
    out.into_inner()
}

fn layers(criterion: &mut Criterion) {
    let blob = layer(2_000, 16 << 10);
    let bytes = index(&blob);
    let opened = LayerIndex::from_bytes(bytes.clone()).expect("open an index");
    let mut group = criterion.benchmark_group("layer");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(opened.layer_size()));
    group.bench_function("gunzip only", |bencher| {
        bencher.iter(|| io::copy(&mut flate2::read::MultiGzDecoder::new(blob.as_slice()), &mut io::sink()));
    });
    group.bench_function("index", |bencher| bencher.iter(|| index(&blob)));
    group.bench_function("hydrate", |bencher| {
        bencher.iter(|| hydrate_layer(&opened, blob.as_slice(), &mut Null).expect("hydrate"));
    });
    group.finish();

    let mut group = criterion.benchmark_group("index");
    group.throughput(Throughput::Elements(opened.entry_count() as u64));
    group.bench_function("open", |bencher| {
        bencher.iter_batched(
            || bytes.clone(),
            |bytes| LayerIndex::from_bytes(bytes).expect("open an index"),
            criterion::BatchSize::LargeInput,
        );
    });
    group.bench_function("read all entries", |bencher| {
        bencher.iter(|| opened.entries().map(|entry| entry.path().len() as u64 + entry.size()).sum::<u64>());
    });
    group.bench_function("decode a span", |bencher| {
        let span = opened.span(opened.span_count() / 2);
        let start = usize::try_from(span.blob_offset).expect("a small blob");
        let part = &blob[start..start + usize::try_from(span.blob_len).expect("a small span")];
        let mut out = Vec::new();
        bencher.iter(|| {
            out.clear();
            opened.decode_span(span.index as usize, part, &mut out).expect("decode a span");
        });
    });
    group.finish();
}

/// Contents that nobody asks for: all of these layers lie block by block.
struct NoContent;

impl LayerContent for NoContent {
    fn read_at(&self, _: u16, offset: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other(format!("byte {offset} was read")))
    }
}

/// The merge of 50,000 files in three layers, where the upper two replace some, and the EROFS view of it.
fn views(criterion: &mut Criterion) {
    let layers: Vec<LayerIndex> = [50_000, 5_000, 500]
        .map(|files| LayerIndex::from_bytes(index(&layer(files, 20))).expect("open an index"))
        .into();
    let layers: Vec<&LayerIndex> = layers.iter().collect();
    let devices: Vec<DeviceSpec> =
        layers.iter().map(|layer| DeviceSpec::layer(&layer.id().to_string(), layer.layer_size())).collect();
    let view = View::merge(&layers).expect("merge the layers");
    let mut group = criterion.benchmark_group("view");
    group.sample_size(20);
    group.throughput(Throughput::Elements(view.len() as u64));
    group.bench_function("merge", |bencher| bencher.iter(|| View::merge(&layers).expect("merge the layers")));
    group.bench_function("write", |bencher| {
        bencher.iter(|| {
            let mut image = Cursor::new(Vec::new());
            erofs::write(&view, &devices, &NoContent, &mut image, Vec::new()).expect("write the view");
            image.into_inner().len()
        });
    });
    group.finish();
}

criterion_group!(benches, layers, views);
criterion_main!(benches);
