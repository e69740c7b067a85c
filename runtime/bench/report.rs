//! What a bench found: samples, their medians, and the table.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::Phase;
use super::measure::median;

/// One measured start.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Seconds from the user's command to the first byte the container wrote; a preceding pull included.
    pub first_output: f64,
    /// Seconds until the command had ended.
    pub total: f64,
    /// Bytes that came over the network until the command had ended.
    pub bytes: u64,
    /// Requests made until then.
    pub requests: u64,
}

impl Sample {
    pub(super) fn new(first_output: Duration, total: Duration, bytes: u64, requests: u64) -> Sample {
        Sample { first_output: first_output.as_secs_f64(), total: total.as_secs_f64(), bytes, requests }
    }
}

/// All samples of one phase and their medians.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseReport {
    /// Which phase.
    pub phase: Phase,
    /// Median seconds to first output.
    pub first_output: f64,
    /// Median seconds in all.
    pub total: f64,
    /// Median bytes fetched.
    pub bytes: u64,
    /// Median requests.
    pub requests: u64,
    /// First output as a part of that of the full pull; `None` without that phase.
    pub ratio: Option<f64>,
    /// One per round.
    pub samples: Vec<Sample>,
}

/// The result of a bench; its `Display` is the table.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The image's reference.
    pub image: String,
    /// The command run in it.
    pub args: Vec<String>,
    /// Compressed bytes of the image, when known.
    pub compressed: Option<u64>,
    /// Rounds measured.
    pub rounds: usize,
    /// Whether the kernel's page cache could be emptied before cold starts.
    pub cold_page_cache: bool,
    /// In the order they were run.
    pub phases: Vec<PhaseReport>,
}

impl Report {
    pub(super) fn phases(samples: &[(Phase, Sample)]) -> Vec<PhaseReport> {
        let of = |phase: Phase| -> Vec<Sample> {
            samples.iter().filter(|(each, _)| *each == phase).map(|(_, sample)| *sample).collect()
        };
        let middle = |samples: &[Sample], field: fn(&Sample) -> f64| {
            median(&samples.iter().map(field).collect::<Vec<_>>())
        };
        let baseline = middle(&of(Phase::FullPull), |sample| sample.first_output);
        let report = |phase: Phase| {
            let samples = of(phase);
            let first_output = middle(&samples, |sample| sample.first_output)?;
            Some(PhaseReport {
                phase,
                first_output,
                total: middle(&samples, |sample| sample.total)?,
                bytes: middle(&samples, |sample| sample.bytes as f64)? as u64,
                requests: middle(&samples, |sample| sample.requests as f64)? as u64,
                ratio: baseline.map(|baseline| first_output / baseline),
                samples,
            })
        };
        Phase::ALL.into_iter().filter_map(report).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.image)?;
        if let Some(bytes) = self.compressed {
            write!(out, ", {} compressed", megabytes(bytes))?;
        }
        writeln!(out, ", medians of {}", self.rounds)?;
        if !self.cold_page_cache {
            writeln!(out, "(the page cache could not be emptied: cold starts read local files from memory)")?;
        }
        writeln!(out)?;
        let head = ["", "first output", "total", "fetched", "requests", "of a pull"];
        let mut rows = vec![head.map(str::to_owned)];
        for phase in &self.phases {
            rows.push([
                phase.phase.to_string(),
                format!("{:.2} s", phase.first_output),
                format!("{:.2} s", phase.total),
                megabytes(phase.bytes),
                phase.requests.to_string(),
                phase.ratio.map(|ratio| format!("{ratio:.2} x")).unwrap_or_default(),
            ]);
        }
        table(out, &rows)
    }
}

/// Writes rows in columns, the first aligned left, the others right.
pub fn table<const N: usize>(out: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let widths: [usize; N] =
        std::array::from_fn(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    for row in rows {
        write!(out, "{:<width$}", row[0], width = widths[0])?;
        for (cell, width) in row.iter().zip(widths).skip(1) {
            write!(out, "  {cell:>width$}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Bytes in 10^6, as networks count.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_per_phase() {
        let sample =
            |seconds: f64, bytes| Sample { first_output: seconds, total: seconds, bytes, requests: 1 };
        let samples = [
            (Phase::FullPull, sample(10.0, 100)),
            (Phase::LazyIndexed, sample(1.0, 10)),
            (Phase::FullPull, sample(30.0, 100)),
            (Phase::LazyIndexed, sample(3.0, 30)),
            (Phase::FullPull, sample(20.0, 100)),
            (Phase::LazyIndexed, sample(2.0, 20)),
        ];
        let phases = Report::phases(&samples);
        assert_eq!(phases.len(), 2);
        assert_eq!(
            (phases[0].phase, phases[0].first_output, phases[0].ratio),
            (Phase::FullPull, 20.0, Some(1.0))
        );
        assert_eq!((phases[1].first_output, phases[1].bytes, phases[1].ratio), (2.0, 20, Some(0.1)));
        let report = Report {
            image: "demo".into(),
            args: vec![],
            compressed: Some(1_500_000),
            rounds: 3,
            cold_page_cache: true,
            phases,
        };
        let text = report.to_string();
        assert!(text.contains("1.5 MB compressed") && text.contains("0.10 x"), "{text}");
    }
}
