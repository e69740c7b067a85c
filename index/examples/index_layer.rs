//! Indexes a layer blob and prints how fast, how large and with how much memory.
//!
//! ```text
//! cargo run --release -p lazyrun-index --example index_layer -- BLOB [SPAN_SIZE_IN_KIB [INDEX_FILE]]
//! ```

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use lazyrun_index::{EntryKind, LayerIndex, StreamOptions, hydrate_layer, index_layer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let blob = args.get(1).ok_or("usage: index_layer BLOB [SPAN_SIZE_IN_KIB [INDEX_FILE]]")?;
    let mut options = StreamOptions::default();
    if let Some(kib) = args.get(2) {
        options.span_size = kib.parse::<u64>()? << 10;
    }
    let default = std::env::temp_dir().join(format!("index_layer.{}", std::process::id()));
    let path = args.get(3).map_or(default.as_path(), Path::new);

    let start = Instant::now();
    let summary = index_layer(File::open(blob)?, &mut (), File::create(path)?, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    let megabytes = summary.layer_size as f64 / 1e6;
    println!("blob      {} bytes, {:?}, {}", summary.blob_size, summary.compression, summary.blob_digest);
    println!("layer     {} bytes, diffID {}", summary.layer_size, summary.diff_id);
    println!("entries   {}, spans {}", summary.entries, summary.spans);
    println!(
        "index     {} bytes, {:.2} % of the layer",
        summary.index_size,
        summary.index_size as f64 * 100.0 / summary.layer_size as f64
    );
    println!("build     {seconds:.2} s, {:.0} MB/s of layer", megabytes / seconds);
    println!("memory    {}", peak_memory());

    let mut best = f64::MAX;
    for _ in 0..9 {
        let start = Instant::now();
        LayerIndex::open(path)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("open      {:.2} ms, the best of 9", best * 1e3);
    let index = LayerIndex::open(path)?;
    let start = Instant::now();
    let files =
        index.entries().filter(|e| e.kind() == EntryKind::File).map(|e| e.path().len()).sum::<usize>();
    println!("walk      {:.2} ms ({files} bytes of file names)", start.elapsed().as_secs_f64() * 1e3);

    let bytes = std::fs::read(blob)?;
    let mut out = Vec::new();
    let mut worst = 0.0f64;
    let start = Instant::now();
    let mut decoded = 0;
    for (i, span) in index.spans().enumerate().filter(|(_, s)| s.restartable) {
        let one = Instant::now();
        let from = usize::try_from(span.blob_offset)?;
        index.decode_span(i, &bytes[from..from + usize::try_from(span.blob_len)?], &mut out)?;
        worst = worst.max(one.elapsed().as_secs_f64());
        decoded += out.len();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "spans     {:.0} MB/s one by one, slowest {:.1} ms",
        decoded as f64 / 1e6 / seconds,
        worst * 1e3
    );
    let start = Instant::now();
    hydrate_layer(&index, &bytes[..], &mut ())?;
    println!("hydrate   {:.0} MB/s", megabytes / start.elapsed().as_secs_f64());
    if args.len() < 4 {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// The most memory this process ever had resident.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap_or(" unknown").trim().to_owned()
}
