//! How long spans should be: for span sizes of 128 KiB to 4 MiB the index's size and what a cold read fetches and
//! decodes, on the layers of an image. Nothing is timed, so one round is enough and a busy machine does no harm.
//!
//! `cargo bench --bench spans -- [--layout DIR[:TAG]] [--start FILE]`. FILE lists the regular files that a start opens,
//! a path a line. The default is what `strace` saw in an image of Debian's python3 with numpy, scipy, pandas and
//! scikit-learn from PyPI, whose program imports the four and fits a model; files an image has not are left out.

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::{self, Cursor};
use std::path::{Path, PathBuf};

use clap::Parser;
use common::LocalImage;
use lazyrun_index::{EntryKind, LayerIndex, LayerSink, SpanInfo, StreamOptions, index_layer};

/// Span sizes in KiB.
const SIZES: [u64; 6] = [128, 256, 512, 1024, 2048, 4096];
/// Random reads for each 1 MiB of files.
const READS_PER_MIB: u64 = 32;
/// Bytes of a random read.
const READ: u64 = 4096;
/// What the index writer compresses windows with.
const WINDOW_LEVEL: i32 = 6;

#[derive(Parser)]
struct Options {
    /// An OCI layout to use, with its tag, instead of an image of the host's files.
    #[arg(long, value_name = "DIR[:TAG]")]
    layout: Option<String>,
    /// The files that a start opens.
    #[arg(long, value_name = "FILE")]
    start: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A run of bytes of the blob and of the layer file.
#[derive(Clone, Copy)]
struct Span {
    blob: (u64, u64),
    layer: (u64, u64),
}

impl From<SpanInfo> for Span {
    fn from(span: SpanInfo) -> Span {
        Span {
            blob: (span.blob_offset, span.blob_offset + span.blob_len),
            layer: (span.offset, span.offset + span.len),
        }
    }
}

/// A regular file's bytes in the layer file.
struct FilePart {
    start: u64,
    end: u64,
    /// Opened by the start.
    opened: bool,
}

/// Sums over layers for one way of cutting.
#[derive(Clone, Copy, Default)]
struct Sums {
    spans: u64,
    index: u64,
    windows: u64,
    whole_windows: u64,
    reads: [u64; 3],
    files: [u64; 3],
    start: [u64; 2],
}

fn main() {
    let options = Options::parse();
    let list = match &options.start {
        Some(path) => fs::read_to_string(path).expect("read the list of files"),
        None => include_str!("data/python-ml.start").to_owned(),
    };
    let opened: HashSet<&str> = list.lines().collect();
    let mut plain = [Sums::default(); SIZES.len()];
    let mut following = plain;
    let mut layer_bytes = 0;
    for blob in LocalImage::find(options.layout.as_deref()).blobs() {
        layer_bytes += measure(&blob, &opened, &mut plain, &mut following);
    }
    println!("{:.1} MB of layers, {} files opened by the start", layer_bytes as f64 / 1e6, plain[0].files[0]);
    println!("\nspans end at the first block border after the size");
    print(&plain, layer_bytes);
    println!("\nspans end at the block border between 1/2 and 3/2 of the size that cuts off least of a file");
    print(&following, layer_bytes);
}

fn print(all: &[Sums], layer_bytes: u64) {
    println!(
        "| span size | spans | index | windows | windows untrimmed | 4 KiB read: fetched | decoded | file of the start: fetched | decoded | whole start: fetched | decoded |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (sums, size) in all.iter().zip(SIZES) {
        let percent = |bytes: u64| match bytes {
            0 => "–".to_owned(),
            bytes => format!("{:.2} %", bytes as f64 * 100.0 / layer_bytes as f64),
        };
        let mean = |[count, a, b]: [u64; 3]| {
            let kib = |bytes: u64| format!("{:.0} KiB", bytes as f64 / 1024.0 / count.max(1) as f64);
            format!("{} | {}", kib(a), kib(b))
        };
        println!(
            "| {size} KiB | {} | {} | {} | {} | {} | {} | {:.1} MB | {:.1} MB |",
            sums.spans,
            percent(sums.index),
            percent(sums.windows),
            percent(sums.whole_windows),
            mean(sums.reads),
            mean(sums.files),
            sums.start[0] as f64 / 1e6,
            sums.start[1] as f64 / 1e6,
        );
    }
}

/// Adds one layer to the sums of all sizes; returns the layer file's length.
fn measure(path: &Path, opened: &HashSet<&str>, plain: &mut [Sums], following: &mut [Sums]) -> u64 {
    let blob = fs::read(path).expect("read a blob");
    let mut keep = Keep(Vec::new());
    // Nearly all block borders.
    let fine = build(&blob, 4 << 10, &mut keep);
    let fine = LayerIndex::from_bytes(fine).expect("open an index");
    let borders: Vec<Span> = fine.spans().map(Span::from).collect();
    let files = files(&fine, opened);
    for (i, kib) in SIZES.into_iter().enumerate() {
        let bytes = build(&blob, kib << 10, &mut ());
        plain[i].index += bytes.len() as u64;
        plain[i].windows += windows(&bytes).map(|window| window.stored).sum::<u64>();
        plain[i].whole_windows += windows(&bytes).map(|window| whole_window(&keep.0, &window)).sum::<u64>();
        let index = LayerIndex::from_bytes(bytes).expect("open an index");
        let spans: Vec<Span> = index.spans().map(Span::from).collect();
        plain[i].add(&spans, &files);
        following[i].add(&follow_files(&borders, &files, kib << 10), &files);
    }
    fine.layer_size()
}

fn build(blob: &[u8], span_size: u64, sink: &mut dyn LayerSink) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    let options = StreamOptions { span_size, ..StreamOptions::default() };
    index_layer(blob, sink, &mut out, &options).expect("index a layer");
    out.into_inner()
}

/// Keeps the layer file.
struct Keep(Vec<u8>);

impl LayerSink for Keep {
    fn data(&mut self, _: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        Ok(())
    }
}

fn files(index: &LayerIndex, opened: &HashSet<&str>) -> Vec<FilePart> {
    let mut files = Vec::new();
    for entry in index.entries().filter(|entry| entry.kind() == EntryKind::File) {
        let opened = std::str::from_utf8(entry.path()).is_ok_and(|path| opened.contains(path));
        for extent in entry.extents() {
            let start = extent.layer_offset;
            files.push(FilePart { start, end: start + extent.len, opened });
        }
    }
    files.sort_by_key(|file| file.start);
    files
}

/// A window as the index has it.
struct Window {
    /// Where its span starts in the layer file.
    at: u64,
    /// Bytes in the index.
    stored: u64,
    /// Bytes of the window itself.
    len: u64,
}

/// All windows of an index, read as docs/FORMAT.md says.
fn windows(index: &[u8]) -> impl Iterator<Item = Window> + '_ {
    const HEADER: usize = 152;
    let u64_at = |at: usize| u64::from_le_bytes(index[at..at + 8].try_into().expect("8 bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(index[at..at + 4].try_into().expect("4 bytes"));
    let (entries, spans, body) = (u64_at(96) as usize, u64_at(104) as usize, u64_at(112) as usize);
    let directory = HEADER + body + entries.div_ceil(4096) * 8;
    (0..spans)
        .map(move |i| HEADER + u64_at(directory + i / 1024 * 8) as usize + i % 1024 * 88)
        .filter(move |&at| index[at + 48] == 3)
        .map(move |at| Window { at: u64_at(at), stored: u32_at(at + 40).into(), len: u32_at(at + 44).into() })
}

/// Bytes of a window in the index if nothing were left out of it.
fn whole_window(layer: &[u8], window: &Window) -> u64 {
    let at = window.at as usize;
    let bytes = &layer[at - window.len as usize..at];
    zstd::bulk::compress(bytes, WINDOW_LEVEL).expect("compress a window").len() as u64
}

/// Cuts where least of a file is cut off, between half of the size and one and a half.
fn follow_files(borders: &[Span], files: &[FilePart], size: u64) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut rest = borders;
    while let Some(first) = rest.first() {
        let mut best = (u64::MAX, rest.len());
        for (i, border) in rest.iter().enumerate() {
            let blob = border.blob.1 - first.blob.0;
            if i + 1 == rest.len() && blob < size * 3 / 2 {
                best = (0, i + 1);
                break;
            }
            if blob > size * 3 / 2 && best.0 < u64::MAX || border.layer.1 - first.layer.0 > 16 << 20 {
                best.1 = if best.0 == u64::MAX { i + 1 } else { best.1 };
                break;
            }
            let cut = cut_off(files, border.layer.1);
            if blob >= size / 2 && cut < best.0 {
                best = (cut, i + 1);
            }
        }
        let (span, after) = rest.split_at(best.1);
        let last = span.last().unwrap_or(first);
        spans.push(Span { blob: (first.blob.0, last.blob.1), layer: (first.layer.0, last.layer.1) });
        rest = after;
    }
    spans
}

/// The smaller of the two parts into which a border at `at` cuts a file.
fn cut_off(files: &[FilePart], at: u64) -> u64 {
    let file = files[..files.partition_point(|file| file.start < at)].last();
    file.map_or(0, |file| (at - file.start).min(file.end.saturating_sub(at)))
}

impl Sums {
    fn add(&mut self, spans: &[Span], files: &[FilePart]) {
        self.spans += spans.len() as u64;
        let covering = |start: u64, end: u64| {
            spans.partition_point(|s| s.layer.1 <= start)..spans.partition_point(|s| s.layer.0 < end)
        };
        let cost = |span: &Span| [span.blob.1 - span.blob.0, span.layer.1 - span.layer.0];
        for part in random_reads(files) {
            self.reads[0] += 1;
            for [fetched, decoded] in spans[covering(part.0, part.1)].iter().map(cost) {
                self.reads[1] += fetched;
                self.reads[2] += decoded;
            }
        }
        let mut needed = vec![false; spans.len()];
        for file in files.iter().filter(|file| file.opened) {
            self.files[0] += 1;
            for i in covering(file.start, file.end) {
                let [fetched, decoded] = cost(&spans[i]);
                self.files[1] += fetched;
                self.files[2] += decoded;
                needed[i] = true;
            }
        }
        for (span, _) in spans.iter().zip(needed).filter(|(_, needed)| *needed) {
            let [fetched, decoded] = cost(span);
            self.start[0] += fetched;
            self.start[1] += decoded;
        }
    }
}

/// Reads of one page of a file, each byte of all files as likely as any other; the same ones each time.
fn random_reads(files: &[FilePart]) -> Vec<(u64, u64)> {
    let mut before = Vec::with_capacity(files.len());
    let mut total = 0;
    for file in files {
        before.push(total);
        total += file.end - file.start;
    }
    let mut state = 1u64;
    (0..(total * READS_PER_MIB) >> 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let byte = (state >> 11) % total;
            let i = before.partition_point(|before| *before <= byte) - 1;
            let page = (byte - before[i]) / READ * READ;
            let start = files[i].start + page;
            (start, (start + READ).min(files[i].end))
        })
        .collect()
}
