//! Micro-benches of the steps between bytes and a mount.

use std::hint::black_box;
use std::io::{self, Cursor, Read as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flate2::Compression;
use flate2::write::GzEncoder;
use lazyrun::daemon::layer_service::LayerService;
use lazyrun::daemon::profile::{Recorder, Watched};
use lazyrun::daemon::seen::Seen;
use lazyrun::demo::layout::{Encoding, ImageSettings, LayerWriter, Layout};
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use lazyrun::ipc::why::Started;
use lazyrun_fetcher::observe::{FaultSeen, Observer as _};
use lazyrun_fetcher::{
    ClientOptions, FetchOptions, Fetcher, LayerStore, NoProgress, Platform, RegistryClient,
};
use lazyrun_fs::erofs::{self, DeviceSpec, LayerContent};
use lazyrun_fs::fuse::{LayerFiles as _, ReadReply};
use lazyrun_fs::view::View;
use lazyrun_index::{
    Digest, LayerId, LayerIndex, LayerSink, SpanInfo, StreamOptions, hydrate_layer, index_layer,
};
use tokio::runtime::Runtime;

/// Takes everything and keeps nothing.
struct Null;

impl LayerSink for Null {
    fn data(&mut self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        black_box(bytes);
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

/// Takes what a read is answered with.
struct Ignored;

impl ReadReply for Ignored {
    fn data(self: Box<Self>, bytes: &[u8]) {
        black_box(bytes);
    }

    fn error(self: Box<Self>, errno: i32) {
        panic!("a read failed with {errno}");
    }
}

/// A layer of 8 MiB, all of it local, as the FUSE server reads it; with the number of its inode.
fn local_layer(dir: &Path, runtime: &Runtime) -> (LayerService, u64, LayerId) {
    let mut layout = Layout::create(&dir.join("layout")).expect("create a layout");
    let mut tar = tar::Builder::new(layout.layer(Encoding::Gzip(1)).expect("start a layer"));
    let mut header = tar::Header::new_ustar();
    header.set_size(8 << 20);
    tar.append_data(&mut header, "file", io::repeat(7).take(8 << 20)).expect("add a file");
    let blob = tar.into_inner().and_then(LayerWriter::finish).expect("finish a layer");
    layout.add_image("v1", &[blob], &ImageSettings::default()).expect("write the manifest");
    let registry = Registry::serve(&dir.join("layout"), Shape::default()).expect("serve the image");
    let store = LayerStore::open(dir).expect("open a store");
    let fetcher = Fetcher::new(store, FetchOptions::default());
    let layer = runtime.block_on(async {
        let client = RegistryClient::new(ClientOptions::default()).expect("a client");
        let name = registry.reference("app", "v1").parse().expect("a reference");
        let image = client.resolve(&name, &Platform::host()).await.expect("the image");
        let source = client.blobs(&image.reference);
        fetcher.ingest(&image.layers[0], source, Arc::new(NoProgress)).await.expect("the layer")
    });
    let service = LayerService::new(fetcher, runtime.handle().clone());
    let ino = service.by_name(layer.file_name().as_bytes()).expect("the layer's inode");
    (service, ino, layer.id())
}

/// What is done beside each read of a layer file (recording what a start touches, counting) and beside each read that
/// waited (telling whoever watches), and what such a read takes as a whole.
fn reads(criterion: &mut Criterion) {
    const FIRST_TOUCHES: u64 = 8192;
    let (dir, runtime) = (tempfile::tempdir().expect("a directory"), Runtime::new().expect("a runtime"));
    let (service, ino, id) = local_layer(dir.path(), &runtime);
    let chain = Digest::of(b"a chain");
    let watched = || vec![Watched::new(ino, id, 1 << 30)];
    let mut group = criterion.benchmark_group("read");
    let read = || service.read(ino, black_box(1 << 20), 4096, Box::new(Ignored));
    let note = || service.recorder.note(black_box(ino), black_box(1 << 20), 4096);
    group.bench_function("4 KiB, nobody records", |bencher| bencher.iter(read));
    group.bench_function("note, nobody records", |bencher| bencher.iter(note));
    service.recorder.start(chain, watched());
    group.bench_function("4 KiB, a start is recorded", |bencher| bencher.iter(read));
    group.bench_function("note, pages that were seen", |bencher| bencher.iter(note));
    group.bench_function("count", |bencher| bencher.iter(|| service.served.answered(black_box(4096), true)));

    let (seen, began) = (Seen::new(dir.path().into()), Instant::now());
    let fault =
        FaultSeen { layer: id, offset: 0, len: 4096, began, waited: Duration::from_millis(3), ok: true };
    group.bench_function("a fault, nobody records", |bencher| bencher.iter(|| seen.fault(black_box(&fault))));
    let _start = seen.starts.begin("registry.example/app:v1", Started::Mount);
    group.bench_function("a fault, a start is recorded", |bencher| {
        bencher.iter(|| seen.fault(black_box(&fault)));
    });

    group.throughput(Throughput::Elements(FIRST_TOUCHES));
    group.bench_function("note, pages seen first, 8192 of them", |bencher| {
        let recording = || {
            let recorder = Recorder::default();
            recorder.start(chain, watched());
            recorder
        };
        let all = |recorder: Recorder| {
            (0..FIRST_TOUCHES).for_each(|i| recorder.note(ino, i * 8192, 4096));
            recorder
        };
        bencher.iter_batched(recording, all, criterion::BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group!(benches, layers, views, reads);
criterion_main!(benches);
