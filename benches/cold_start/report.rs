//! The figures of one link.

use std::fmt;

use lazyrun::bench::measure::median;
use lazyrun::bench::report::{megabytes, table};
use serde_json::{Value, json};

use crate::Link;
use crate::bound::{Start, Starts};
use crate::ways::{Sample, Way};

/// What was measured over one link.
pub(crate) struct Report<'a> {
    pub(crate) link: Link,
    pub(crate) rounds: usize,
    pub(crate) starts: &'a Starts,
    pub(crate) ways: &'a [Way],
    pub(crate) samples: Vec<(Way, Sample)>,
}

impl Report<'_> {
    fn median(&self, way: Way, field: impl Fn(&Sample) -> f64) -> Option<f64> {
        let of = self.samples.iter().filter(|(each, _)| *each == way);
        median(&of.map(|(_, sample)| field(sample)).collect::<Vec<_>>())
    }

    /// What the start touches, by the index that is used.
    fn start(&self, way: Way) -> &Start {
        if matches!(way, Way::Shared | Way::Snapshotter) { &self.starts.along } else { &self.starts.plain }
    }

    /// Seconds that the network needs at least.
    fn bound(&self, way: Way) -> Option<f64> {
        let rtt = self.link.0.rtt_ms / 1000.0;
        let bandwidth = self.link.0.mbit * 1e6 / 8.0;
        let transfer = if bandwidth > 0.0 { self.start(way).spans as f64 / bandwidth } else { 0.0 };
        Some(f64::from(way.round_trips()?) * rtt + transfer)
    }

    /// Time to ready over network bound and the program's own time.
    fn over_bound(&self, way: Way) -> Option<f64> {
        let warm = self.median(Way::Warm, |s| s.first)?;
        Some(self.median(way, |s| s.first)? / (self.bound(way)? + warm))
    }

    /// Bytes that came over those of the touched pages.
    fn amplification(&self, way: Way) -> Option<f64> {
        way.round_trips()?;
        Some(self.median(way, |s| s.bytes)? / self.start(way).compressed)
    }

    fn ratio(&self, way: Way) -> Option<f64> {
        Some(self.median(way, |s| s.first)? / self.median(Way::Containerd, |s| s.first)?)
    }

    pub(crate) fn json(&self) -> Value {
        let way = |&way: &Way| {
            let of = self.samples.iter().filter(|(each, _)| *each == way);
            json!({
                "way": way.to_string(),
                "first_output": self.median(way, |s| s.first),
                "total": self.median(way, |s| s.total),
                "bytes": self.median(way, |s| s.bytes),
                "requests": self.median(way, |s| s.requests),
                "ratio": self.ratio(way),
                "network_bound": self.bound(way),
                "over_bound": self.over_bound(way),
                "amplification": self.amplification(way),
                "samples": of.map(|(_, s)| [s.first, s.total, s.bytes, s.requests]).collect::<Vec<_>>(),
            })
        };
        json!({
            "mbit": self.link.0.mbit,
            "rtt_ms": self.link.0.rtt_ms,
            "rounds": self.rounds,
            "touched_files": self.starts.plain.files,
            "touched_pages_bytes": self.starts.plain.pages,
            "touched_pages_compressed": self.starts.plain.compressed,
            "touched_spans_compressed": self.starts.plain.spans,
            "touched_spans_compressed_along_profile": self.starts.along.spans,
            "ways": self.ways.iter().map(way).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{}, medians of {}\n", self.link, self.rounds)?;
        let head = [
            "",
            "ready",
            "total",
            "fetched",
            "requests",
            "ratio",
            "bound",
            "over bound + warm",
            "amplification",
        ];
        let mut rows = vec![head.map(str::to_owned)];
        let number =
            |value: Option<f64>, unit: &str| value.map_or_else(String::new, |v| format!("{v:.2}{unit}"));
        for &way in self.ways {
            rows.push([
                way.to_string(),
                number(self.median(way, |s| s.first), " s"),
                number(self.median(way, |s| s.total), " s"),
                self.median(way, |s| s.bytes).map_or_else(String::new, |bytes| megabytes(bytes as u64)),
                self.median(way, |s| s.requests).map_or_else(String::new, |n| format!("{n:.0}")),
                number(self.ratio(way), " x"),
                number(self.bound(way), " s"),
                number(self.over_bound(way), " x"),
                number(self.amplification(way), " x"),
            ]);
        }
        table(out, &rows)
    }
}
