//! The two text formats that metrics are asked for in: Prometheus 0.0.4 and OpenMetrics 1.0. They differ in how counters
//! and infos are named in the head of a family, in units, and in the end.
//!
//! Written by hand: what counts are plain atomics of the libraries, so nothing is left for a metrics library but this
//! text, and the small ones write only one of the two.

use std::fmt::{Display, Write};

use lazyrun_fetcher::{Histogram, HistogramSnapshot};

/// A text format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// Prometheus text exposition format, version 0.0.4.
    #[default]
    Prometheus,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// Its media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The one that an `Accept` header likes better; Prometheus where it does not say.
    pub fn accepted(header: Option<&str>) -> Format {
        let mut best = (Format::Prometheus, 0.0);
        for range in header.unwrap_or_default().split(',') {
            let mut parts = range.split(';').map(str::trim);
            let format = match parts.next() {
                Some("application/openmetrics-text") => Format::OpenMetrics,
                Some("text/plain" | "text/*" | "*/*") => Format::Prometheus,
                _ => continue,
            };
            let quality = parts.find_map(|p| p.strip_prefix("q=")).map_or(1.0, |q| q.parse().unwrap_or(0.0));
            if quality > best.1 {
                best = (format, quality);
            }
        }
        best.0
    }
}

/// Labels of a sample.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Metrics being written.
#[derive(Debug)]
pub struct Exposition {
    format: Format,
    text: String,
}

impl Exposition {
    /// Nothing yet.
    pub fn new(format: Format) -> Self {
        Exposition { format, text: String::with_capacity(16 << 10) }
    }

    /// Starts a family of counters; its name without `_total`.
    pub fn counters(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(name, help, "counter", "_total")
    }

    /// Starts a family of gauges.
    pub fn gauges(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(name, help, "gauge", "")
    }

    /// Starts a family of histograms of times in seconds.
    pub fn histograms(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(name, help, "histogram", "")
    }

    /// A single counter; its name without `_total`.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.counters(name, help).sample(&[], value);
    }

    /// A single gauge.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.gauges(name, help).sample(&[], value);
    }

    /// Facts that do not change; its name without `_info`.
    pub fn info(&mut self, name: &str, help: &str, labels: Labels<'_>) {
        self.family(name, help, "info", "_info").sample(labels, 1);
    }

    /// All of it.
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }

    fn family(&mut self, name: &str, help: &str, kind: &str, suffix: &'static str) -> Family<'_> {
        let open = self.format == Format::OpenMetrics;
        // Here the two formats disagree what a family is called.
        let title = if open { name.to_owned() } else { format!("{name}{suffix}") };
        let kind = if kind == "info" && !open { "gauge" } else { kind };
        let text = &mut self.text;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE {title} {kind}");
        let unit = name.rsplit('_').next().filter(|unit| matches!(*unit, "seconds" | "bytes" | "ratio"));
        if let Some(unit) = unit.filter(|_| open && kind != "info") {
            let _ = writeln!(text, "# UNIT {title} {unit}");
        }
        let _ = writeln!(text, "# HELP {title} {}", escape(help, open));
        Family { text, name: name.to_owned(), suffix }
    }
}

/// A family whose samples are being written.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: String,
    suffix: &'static str,
}

impl Family<'_> {
    /// One counter or gauge.
    pub fn sample(&mut self, labels: Labels<'_>, value: impl Display) {
        let _ = write!(self.text, "{}{}", self.name, self.suffix);
        self.labels(labels, None);
        let _ = writeln!(self.text, " {value}");
    }

    /// One histogram.
    pub fn histogram(&mut self, labels: Labels<'_>, times: &HistogramSnapshot) {
        let bounds = Histogram::BOUNDS_MS.iter().map(|ms| (*ms as f64 / 1e3).to_string());
        let mut sum = 0;
        for (bound, count) in bounds.chain(std::iter::once("+Inf".to_owned())).zip(times.buckets) {
            sum += count;
            let _ = write!(self.text, "{}_bucket", self.name);
            self.labels(labels, Some(&bound));
            let _ = writeln!(self.text, " {sum}");
        }
        for (part, value) in [("sum", seconds(times.nanos)), ("count", sum.to_string())] {
            let _ = write!(self.text, "{}_{part}", self.name);
            self.labels(labels, None);
            let _ = writeln!(self.text, " {value}");
        }
    }

    fn labels(&mut self, labels: Labels<'_>, bound: Option<&str>) {
        let all = labels.iter().copied().chain(bound.map(|bound| ("le", bound)));
        for (i, (name, value)) in all.enumerate() {
            let open = if i == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{open}{name}=\"{}\"", escape(value, true));
        }
        if !labels.is_empty() || bound.is_some() {
            self.text.push('}');
        }
    }
}

/// Nanoseconds as seconds, exactly.
pub fn seconds(nanos: u64) -> String {
    format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

fn escape(text: &str, quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { text.replace('"', "\\\"") } else { text }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn all(format: Format) -> String {
        let mut out = Exposition::new(format);
        out.counters("a_bytes", "of \"a\"").sample(&[("class", "x\"\\\ny"), ("b", "")], 7);
        out.gauge("b", "back\\slash", 1.5);
        out.info("build", "what", &[("version", "1")]);
        let times = Histogram::default();
        times.observe(Duration::from_micros(1500));
        times.observe(Duration::from_secs(60));
        out.histograms("t_seconds", "times").histogram(&[("k", "v")], &times.snapshot());
        out.finish()
    }

    #[test]
    fn both_formats() {
        let old = all(Format::Prometheus);
        assert!(old.starts_with(
            "# TYPE a_bytes_total counter\n# HELP a_bytes_total of \"a\"\n\
             a_bytes_total{class=\"x\\\"\\\\\\ny\",b=\"\"} 7\n# TYPE b gauge\n# HELP b back\\\\slash\nb 1.5\n\
             # TYPE build_info gauge\n# HELP build_info what\nbuild_info{version=\"1\"} 1\n"
        ));
        assert!(old.contains(
            "t_seconds_bucket{k=\"v\",le=\"0.001\"} 0\nt_seconds_bucket{k=\"v\",le=\"0.002\"} 1\n"
        ));
        assert!(old.ends_with(
            "t_seconds_bucket{k=\"v\",le=\"30\"} 1\nt_seconds_bucket{k=\"v\",le=\"+Inf\"} 2\n\
             t_seconds_sum{k=\"v\"} 60.001500000\nt_seconds_count{k=\"v\"} 2\n"
        ));
        let open = all(Format::OpenMetrics);
        assert!(open.starts_with(
            "# TYPE a_bytes counter\n# UNIT a_bytes bytes\n# HELP a_bytes of \\\"a\\\"\na_bytes_total{"
        ));
        assert!(open.contains("# TYPE build info\n# HELP build what\nbuild_info{version=\"1\"} 1\n"));
        assert!(open.contains("# UNIT t_seconds seconds\n") && open.ends_with("\n# EOF\n"));
    }

    #[test]
    fn the_scraper_chooses() {
        let real =
            "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert_eq!(Format::accepted(Some(real)), Format::OpenMetrics);
        let other = "application/openmetrics-text;q=0.2, text/plain;q=0.5";
        for header in [None, Some("*/*"), Some(""), Some("text/html"), Some(other), Some("text/plain;q=x")] {
            assert_eq!(Format::accepted(header), Format::Prometheus, "{header:?}");
        }
    }
}
