//! What a single fault costs on a quiet link, beside what network and decoder ask: a round trip, the transfer of the
//! span's compressed bytes, and its decoding.
//!
//! `cargo bench --bench fault -- [--link RTT_MS:MBIT] [--faults N]`: reads of 4 KiB, each in a span of its own and far
//! from the one before, one after another, from a real registry over a shaped link, on an image of the host's own files.
//! Beside it a plain HTTP client asks for the same bytes: what that takes longer than the link asks is the registry's and
//! the shaper's own time.
//! The kernel's part of a fault (a FUSE request) is not in it; `cargo bench --bench view` has that.

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use lazyrun::demo::image::{self, HostImageOptions, TAG};
use lazyrun::demo::shaper::{Shape, Shaper};
use lazyrun_fetcher::{
    ClientOptions, FetchOptions, Fetcher, Layer, LayerStore, NoProgress, Platform, Reference, RegistryClient,
};
use support::docker_registry::DockerRegistry;

/// Spans between one fault and the next, so that nothing is read ahead for it: no divisor of many layers' numbers.
const STRIDE: usize = 37;
/// Nothing has come for so long: what was read ahead is over.
const QUIET: Duration = Duration::from_millis(60);

#[derive(Parser)]
struct Options {
    /// Round-trip time in milliseconds and bandwidth in 10^6 bits per second.
    #[arg(long, default_value = "20:1000", value_parser = link)]
    link: Shape,
    /// Faults to take.
    #[arg(long, default_value_t = 200)]
    faults: usize,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn link(text: &str) -> Result<Shape, String> {
    let parts = text.split_once(':').and_then(|(rtt, mbit)| Some((rtt.parse().ok()?, mbit.parse().ok()?)));
    let (rtt_ms, mbit) = parts.ok_or("a link is RTT_MS:MBIT, such as 20:200")?;
    Ok(Shape { mbit, rtt_ms })
}

/// What one fault took, in milliseconds.
struct Fault {
    took: f64,
    plain: f64,
    transfer: f64,
    decode: f64,
}

fn main() {
    let options = Options::parse();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-image");
    let image = image::build(&cache, &HostImageOptions::default()).expect("make an image");
    let registry = DockerRegistry::start();
    registry.push(&image.layout, TAG, "bench");
    let shaper = Shaper::start(registry.addr(), options.link).expect("start the shaper");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let faults = runtime.block_on(measure(&options, &registry, &format!("{}/bench:{TAG}", shaper.addr())));
    report(&options, &faults);
}

async fn measure(options: &Options, registry: &DockerRegistry, name: &str) -> Vec<Fault> {
    let dir = tempfile::tempdir().expect("a directory");
    let store = LayerStore::open(dir.path()).expect("a store");
    let fetcher = Fetcher::new(store, FetchOptions::default());
    let client = RegistryClient::new(ClientOptions::default()).expect("a client");
    let reference: Reference = name.parse().expect("a reference");
    let resolved = client.resolve(&reference, &Platform::host()).await.expect("resolve");
    let mut layers = Vec::new();
    let mut blobs = HashMap::new();
    for descriptor in &resolved.layers {
        let source = client.blobs(&resolved.reference);
        let layer = fetcher.ingest(descriptor, source, Arc::new(NoProgress)).await.expect("index a layer");
        let blob = registry.blob(&layer.index().blob_digest().to_string());
        blobs.insert(layer.id(), blob);
        layers.push(layer);
    }
    let plain = Plain {
        client: reqwest::Client::new(),
        base: format!("http://{}/v2/bench/blobs", reference.registry),
    };
    let mut faults = Vec::new();
    let order = far_apart(&layers);
    while faults.len() < options.faults {
        layers.iter().for_each(|layer| layer.forget().expect("forget its bytes"));
        let known = faults.len();
        for &(layer, span) in &order {
            // What was read ahead of an earlier fault is no fault any more.
            if faults.len() < options.faults && layer.lacks_span(span) {
                let mut fault = fault(options, &fetcher, layer, span, &blobs[&layer.id()]).await;
                settle(&client).await;
                fault.plain = plain.get(layer, span).await;
                faults.push(fault);
            }
        }
        assert!(faults.len() > known, "the image has no spans");
    }
    faults
}

/// All spans, such that those that follow each other lie far apart.
fn far_apart(layers: &[Arc<Layer>]) -> Vec<(&Arc<Layer>, usize)> {
    let counts: Vec<usize> = layers.iter().map(|layer| layer.index().span_count()).collect();
    let all: usize = counts.iter().sum();
    let place = |mut n: usize| {
        let layer = counts.iter().position(|count| {
            let here = n < *count;
            n -= if here { 0 } else { *count };
            here
        });
        layer.map(|layer| (&layers[layer], n))
    };
    (0..STRIDE).flat_map(|first| (first..all).step_by(STRIDE)).filter_map(place).collect()
}

async fn fault(options: &Options, fetcher: &Fetcher, layer: &Arc<Layer>, span: usize, blob: &[u8]) -> Fault {
    let info = layer.index().span(span);
    let began = Instant::now();
    fetcher.read(layer, info.offset, 4096.min(info.len as usize)).await.expect("a read");
    let took = began.elapsed();
    let compressed = &blob[info.blob_offset as usize..][..info.blob_len as usize];
    let mut decoded = Vec::new();
    let began = Instant::now();
    layer.index().decode_span(span, compressed, &mut decoded).expect("decode a span");
    let decode = began.elapsed();
    let transfer = info.blob_len as f64 * 8.0 / (options.link.mbit * 1000.0);
    let transfer = if transfer.is_finite() { transfer } else { 0.0 };
    Fault { took: ms(took), plain: 0.0, transfer, decode: ms(decode) }
}

/// A client that does nothing but ask.
struct Plain {
    client: reqwest::Client,
    base: String,
}

impl Plain {
    /// Gets a span's compressed bytes; milliseconds.
    async fn get(&self, layer: &Layer, span: usize) -> f64 {
        let info = layer.index().span(span);
        let range = format!("bytes={}-{}", info.blob_offset, info.blob_offset + info.blob_len - 1);
        let url = format!("{}/{}", self.base, layer.index().blob_digest());
        let began = Instant::now();
        let answer = self.client.get(url).header("range", range).send().await.expect("an answer");
        let bytes = answer.bytes().await.expect("a body");
        assert_eq!(bytes.len() as u64, info.blob_len);
        ms(began.elapsed())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Waits until nothing comes any more.
async fn settle(client: &RegistryClient) {
    let mut before = client.stats().bytes;
    loop {
        tokio::time::sleep(QUIET).await;
        let now = client.stats().bytes;
        if now == before {
            return;
        }
        before = now;
    }
}

/// A part of what a fault took.
type Part<'a> = &'a dyn Fn(&Fault) -> f64;

fn report(options: &Options, faults: &[Fault]) {
    let rtt = options.link.rtt_ms;
    let sorted = |value: Part| {
        let mut values: Vec<f64> = faults.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    println!("{} faults at {} Mbit/s and {rtt} ms, in milliseconds\n", faults.len(), options.link.mbit);
    println!("{:<38}{:>9}{:>9}", "", "median", "p99");
    let rows: [(&str, Part); 6] = [
        ("fault", &|f| f.took),
        ("the same bytes by a plain client", &|f| f.plain),
        ("transfer of the span", &|f| f.transfer),
        ("decoding of the span", &|f| f.decode),
        ("less round trip, transfer, decoding", &|f| f.took - rtt - f.transfer - f.decode),
        ("less the plain client and decoding", &|f| f.took - f.plain - f.decode),
    ];
    for (name, value) in rows {
        let values = sorted(value);
        let at = |part: f64| values[((values.len() - 1) as f64 * part).round() as usize];
        println!("{name:<38}{:>9.2}{:>9.2}", at(0.5), at(0.99));
    }
}
