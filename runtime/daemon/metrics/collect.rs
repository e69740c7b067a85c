//! All metrics, read from those who count. docs/OBSERVABILITY.md lists them.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Result;
use lazyrun_fetcher::{Class, ClientStats, HostStats};

use super::text::{Exposition, Format, seconds};
use crate::daemon::Daemon;
use crate::proc;

/// Names of what [`HostStats::answers`] counts.
const ANSWERS: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];

impl Daemon {
    /// All metrics as text. Reads a few files.
    ///
    /// # Errors
    /// When the store can't be read.
    pub(in crate::daemon) fn metrics(&self, format: Format) -> Result<String> {
        let mut out = Exposition::new(format);
        let version = env!("CARGO_PKG_VERSION");
        out.info("lazyrun_build", "The program.", &[("version", version), ("plan", &self.plan.to_string())]);
        self.faults(&mut out);
        self.registries(&mut out);
        self.reads(&mut out);
        self.cache(&mut out)?;
        self.starts_and_views(&mut out);
        process(&mut out);
        Ok(out.finish())
    }

    fn faults(&self, out: &mut Exposition) {
        let by_layer = self.seen.faults.snapshot();
        let stats = self.images.fetcher().stats();
        let mut faults = out.counters("lazyrun_faults", "Reads that found bytes missing, by how they ended.");
        faults.sample(&[("result", "ok")], stats.faults.saturating_sub(stats.failed_faults));
        faults.sample(&[("result", "error")], stats.failed_faults);
        let mut times = out.histograms("lazyrun_fault_duration_seconds", "How long faults waited.");
        for layer in &by_layer {
            times.histogram(&[("image", &layer.image), ("layer", &layer.layer)], &layer.faults);
        }
        let help = "Missing bytes that came from files of other layers with the same content.";
        let mut shared = out.counters("lazyrun_shared_bytes", help);
        for layer in &by_layer {
            shared.sample(&[("image", &layer.image), ("layer", &layer.layer)], layer.shared);
        }
        out.counter("lazyrun_spans_decoded", "Spans decoded and verified.", stats.spans);
        let help = "Bytes of layer files that decoding spans gave.";
        out.counter("lazyrun_decoded_bytes", help, stats.decoded_bytes);
        let help = "Time of cores spent on decoding, verifying and storing spans.";
        out.counter("lazyrun_decode_seconds", help, seconds(stats.decode_nanos));
        let help = "Spans whose bytes were not what the index says.";
        out.counter("lazyrun_spans_corrupt", help, stats.corrupt_spans);
        out.counter("lazyrun_layers_streamed", "Layers streamed for the first time.", stats.streams);
    }

    fn registries(&self, out: &mut Exposition) {
        let (stats, hosts) = (self.images.client_stats(), self.images.hosts());
        let by_class = |mut family: super::text::Family<'_>, counts: [u64; 5]| {
            for (class, count) in Class::ALL.into_iter().zip(counts) {
                family.sample(&[("class", class.name())], count);
            }
        };
        let help = "Bytes received from registries in bodies of answers, by what they were for.";
        by_class(out.counters("lazyrun_fetched_bytes", help), stats.bytes_by_class);
        let help = "Requests to registries that are over, by what they were for.";
        by_class(out.counters("lazyrun_fetch_requests", help), stats.requests_by_class);
        let help = "Requests to registries that are over, by host and class of the answer's status; none: no answer came.";
        let mut requests = out.counters("lazyrun_registry_requests", help);
        for host in &hosts {
            for (answer, count) in ANSWERS.into_iter().zip(host.answers) {
                requests.sample(&[("host", &host.host), ("status", answer)], count);
            }
        }
        let help = "Requests that may wait for the host's answer at a time.";
        let mut windows = out.gauges("lazyrun_registry_window", help);
        for (host, window) in hosts.iter().filter_map(|h| Some((&h.host, h.window?))) {
            windows.sample(&[("host", host)], window);
        }
        for (name, help, value) in [
            (
                "lazyrun_registry_retries",
                "Requests repeated, or resumed where a body broke off.",
                stats.retries,
            ),
            ("lazyrun_registry_throttled", "Answers that said it is too much (429, 503).", stats.throttled),
            ("lazyrun_registry_hedges", "Second requests beside a slow one of a fault.", stats.hedges),
            ("lazyrun_registry_hedges_won", "Second requests that brought bytes first.", stats.hedges_won),
            ("lazyrun_registry_tokens", "Tokens asked for.", stats.tokens),
            ("lazyrun_registry_redirects", "Answers that led elsewhere.", stats.redirects),
        ] {
            out.counter(name, help, value);
        }
    }

    fn reads(&self, out: &mut Exposition) {
        let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
        for (kind, count) in self.flat.stats().each().chain(self.views.requests().each()) {
            *kinds.entry(kind).or_default() += count;
        }
        let mut requests = out.counters("lazyrun_fuse_requests", "Requests of the kernel by kind.");
        for (kind, count) in kinds {
            requests.sample(&[("kind", kind)], count);
        }
        let served = &self.service.served;
        let mut reads = out.counters("lazyrun_reads", "Reads of layer files: local, fetched, or failed.");
        reads.sample(&[("result", "hit")], served.hits.load(Relaxed));
        reads.sample(&[("result", "miss")], served.misses.load(Relaxed));
        reads.sample(&[("result", "error")], served.errors.load(Relaxed));
        let help = "Bytes of layer files answered to the kernel.";
        out.counter("lazyrun_served_bytes", help, served.bytes.load(Relaxed));
    }

    fn cache(&self, out: &mut Exposition) -> Result<()> {
        let store = self.images.fetcher().store();
        let help = "Disk that layer files take.";
        out.gauge("lazyrun_cache_bytes", help, store.disk_bytes()?);
        let opened = store.opened();
        let local: usize = opened.iter().map(|layer| layer.local_spans()).sum();
        let all: usize = opened.iter().map(|layer| layer.index().span_count()).sum();
        let mut spans = out.gauges("lazyrun_cache_spans", "Spans of layers in use, local or missing.");
        spans.sample(&[("state", "local")], local);
        spans.sample(&[("state", "missing")], all.saturating_sub(local));
        let evicted = store.evictions();
        out.counter("lazyrun_cache_evictions", "Times that room was made.", evicted.evictions);
        out.counter("lazyrun_cache_evicted_bytes", "Disk that was freed to make room.", evicted.bytes);
        out.counter("lazyrun_cache_refused", "Writes for which there was no room.", evicted.refused);
        let images = self.seen.faults.progress();
        let mut local =
            out.gauges("lazyrun_image_local_bytes", "Bytes of an image's layer files that are local.");
        for image in &images {
            local.sample(&[("image", &image.image)], image.local);
        }
        let mut total = out.gauges("lazyrun_image_bytes", "Bytes of an image's layer files.");
        for image in &images {
            total.sample(&[("image", &image.image)], image.total);
        }
        Ok(())
    }

    fn starts_and_views(&self, out: &mut Exposition) {
        let all = self.containers.all();
        let running = all.iter().filter(|container| container.is_running()).count();
        let mut containers = out.gauges("lazyrun_containers", "Containers by state.");
        containers.sample(&[("state", "running")], running);
        containers.sample(&[("state", "exited")], all.len() - running);
        let (ok, failed) = self.seen.starts.counts();
        let mut starts =
            out.counters("lazyrun_starts", "Starts of containers and mounts, by how they ended.");
        starts.sample(&[("result", "ok")], ok);
        starts.sample(&[("result", "error")], failed);
        let counted = self.views.counted();
        let help = "How long it took to write the metadata images of views.";
        out.histograms("lazyrun_view_build_duration_seconds", help)
            .histogram(&[], &counted.view_builds.snapshot());
        let help = "How long it took to mount views, the build included.";
        out.histograms("lazyrun_view_mount_duration_seconds", help)
            .histogram(&[], &counted.view_mounts.snapshot());
    }
}

/// Counts of several clients together.
pub(in crate::daemon) fn sum_clients(all: impl Iterator<Item = ClientStats>) -> ClientStats {
    let add = |a: [u64; 5], b: [u64; 5]| std::array::from_fn(|i| a[i] + b[i]);
    all.fold(ClientStats::default(), |a, b| ClientStats {
        requests: a.requests + b.requests,
        bytes: a.bytes + b.bytes,
        throttled: a.throttled + b.throttled,
        hedges: a.hedges + b.hedges,
        hedges_won: a.hedges_won + b.hedges_won,
        retries: a.retries + b.retries,
        tokens: a.tokens + b.tokens,
        redirects: a.redirects + b.redirects,
        bytes_by_class: add(a.bytes_by_class, b.bytes_by_class),
        requests_by_class: add(a.requests_by_class, b.requests_by_class),
    })
}

/// The same for hosts; of several windows the narrowest.
pub(in crate::daemon) fn sum_hosts(all: impl Iterator<Item = HostStats>) -> Vec<HostStats> {
    let mut sums: BTreeMap<String, HostStats> = BTreeMap::new();
    for stats in all {
        match sums.get_mut(&stats.host) {
            Some(sum) => {
                sum.answers = std::array::from_fn(|i| sum.answers[i] + stats.answers[i]);
                sum.window = match (sum.window, stats.window) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                };
            }
            None => drop(sums.insert(stats.host.clone(), stats)),
        }
    }
    sums.into_values().collect()
}

// The names that every Prometheus client uses for these.
fn process(out: &mut Exposition) {
    let usage = proc::Usage::now();
    out.counter("process_cpu_seconds", "Processor time of the daemon.", usage.cpu_seconds);
    out.gauge("process_resident_memory_bytes", "Resident memory of the daemon.", usage.resident);
    out.gauge("process_virtual_memory_bytes", "Address space of the daemon.", usage.virtual_memory);
    out.gauge("process_open_fds", "Descriptors that the daemon has open.", usage.open_fds);
    out.gauge("process_max_fds", "Descriptors that the daemon may have open.", usage.max_fds);
    out.gauge("process_threads", "Threads of the daemon.", usage.threads);
    out.gauge("process_start_time_seconds", "Start of the daemon since the epoch.", usage.started);
}
