//! `lazyrun why`: where the time of a start went, as text for people or everything as JSON.

use std::fmt::Write;
use std::os::fd::AsFd;

use lazyrun_fetcher::Class;

use super::{Context, output};
use crate::container::client::tty;
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::Request;
use crate::ipc::why::{ReadOf, RequestOf, Start, StartSummary, Started, Summary, Why, WhyAction};

/// Columns where the terminal does not say.
const WIDTH: usize = 100;
/// Requests in the waterfall; the longest ones, if there are more.
const MAX_ROWS: usize = 32;
/// Reads that are listed.
const MAX_READS: usize = 10;
/// Columns of the waterfall in front of the bars.
const LABEL: usize = 40;
/// And behind them.
const TIMES: usize = 20;

/// Shows one start, or all that are known.
pub(super) fn why(
    context: &Context,
    name: &str,
    number: usize,
    list: bool,
    format: Option<&str>,
) -> Result<(), Failure> {
    let ask = |action| Request::Why { name: name.to_owned(), action };
    if list {
        let lines: Vec<StartSummary> = context.daemon()?.call(&ask(WhyAction::List), &mut Quiet)?;
        return output::rows(
            &lines,
            format,
            &[
                ("NR", |l| l.number.to_string()),
                ("BEGAN", |l| l.began.chars().take(19).collect()),
                ("WHAT", |l| l.what.clone()),
                ("IMAGE", |l| l.image.clone()),
                ("TOTAL", |l| time(l.total_ms)),
                ("REQUESTS", |l| l.requests.to_string()),
                ("BYTES", |l| output::bytes(l.bytes)),
                ("READS", |l| l.reads.to_string()),
                ("ERROR", |l| l.error.clone().unwrap_or_default()),
            ],
        );
    }
    let why: Why = context.daemon()?.call(&ask(WhyAction::Show { number }), &mut Quiet)?;
    match format {
        Some(format) => output::value(&why, Some(format)),
        None => {
            let columns = tty::size(std::io::stdout().as_fd()).map_or(WIDTH, |(_, columns)| columns.into());
            output::print(&text(&why, columns.max(80)))
        }
    }
}

fn text(why: &Why, columns: usize) -> String {
    let (start, summary) = (&why.start, &why.summary);
    let mut out = String::new();
    head(&mut out, start, summary);
    parts(&mut out, summary);
    traffic(&mut out, start, summary);
    waterfall(&mut out, start, summary.total_ms, columns);
    slowest(&mut out, start);
    out
}

// Writing to a string cannot fail.
fn head(out: &mut String, start: &Start, summary: &Summary) {
    let what = match &start.what {
        Started::Container { id, name } => format!("container {name} ({id:.12})"),
        Started::Mount => "a mount".to_owned(),
        Started::Snapshot { key } => format!("snapshot {key} of containerd"),
    };
    let _ = writeln!(out, "{} of {}, asked for at {}", what, start.image, start.began);
    let end = match (&start.error, &start.exit) {
        (Some(error), _) => format!("failed after {}: {error}", time(summary.total_ms)),
        (None, Some(exit)) => {
            format!(
                "started after {}, ended after {} with exit code {}",
                time(summary.started_ms),
                time(exit.at_ms),
                exit.code
            )
        }
        (None, None) if summary.reads == 0 => format!("started after {}", time(summary.started_ms)),
        (None, None) => format!(
            "started after {}, waited for bytes for the last time after {}",
            time(summary.started_ms),
            time(summary.total_ms)
        ),
    };
    let _ = writeln!(out, "{end}{}", if start.recording { " (still being recorded)" } else { "" });
}

fn parts(out: &mut String, summary: &Summary) {
    let _ = writeln!(out, "\nwhere the time went");
    // What rounds to nothing is of no interest to people.
    for part in summary.parts.iter().filter(|part| part.ms >= 0.05) {
        let share = part.ms / summary.total_ms.max(f64::MIN_POSITIVE) * 100.0;
        let _ = writeln!(out, "  {:>9}  {share:>3.0}%  {}", time(part.ms), part.what);
    }
    let _ = writeln!(out, "  {:>9}  100%  in all", time(summary.total_ms));
}

fn traffic(out: &mut String, start: &Start, summary: &Summary) {
    let classes: Vec<String> = summary
        .bytes
        .iter()
        .map(|c| format!("{} {} in {}", output::bytes(c.bytes), c.class, c.requests))
        .collect();
    let retries = match summary.retries {
        0 => String::new(),
        retries => format!(", {retries} of them repeated"),
    };
    let classes = if classes.is_empty() { String::new() } else { format!(": {}", classes.join(", ")) };
    let _ = writeln!(out, "\n{} requests{retries}{classes}", summary.requests);
    let _ = writeln!(
        out,
        "{} reads waited, together {}; {} spans decoded in {} of processor time",
        summary.reads,
        time(summary.blocked_ms),
        start.decode.spans,
        time(start.decode.core_ms)
    );
    let _ = writeln!(out, "profile: {}", start.profile);
    for (number, layer) in start.layers.iter().enumerate() {
        let _ = writeln!(
            out,
            "layer {number} {} {:>7}  index: {}",
            layer.layer,
            output::bytes(layer.size),
            layer.index
        );
    }
    for reason in &summary.not_lazy {
        let _ = writeln!(out, "note: {reason}");
    }
    if start.dropped.requests + start.dropped.reads > 0 {
        let _ = writeln!(
            out,
            "note: {} more requests and {} more reads were counted only",
            start.dropped.requests, start.dropped.reads
        );
    }
}

/// A row of the waterfall: its label, its times, and what its bar is made of.
struct Row {
    label: String,
    start: f64,
    end: f64,
    /// Until then it waited to be sent, and from then for the first byte.
    sent: f64,
    first: f64,
    note: String,
}

fn waterfall(out: &mut String, start: &Start, total: f64, columns: usize) {
    let phase = |p: &crate::ipc::why::Phase| Row {
        label: p.name.clone(),
        start: p.start_ms,
        end: p.end_ms,
        sent: p.start_ms,
        first: p.start_ms,
        note: String::new(),
    };
    let mut rows: Vec<Row> = start.phases.iter().filter(|p| p.end_ms > p.start_ms).map(phase).collect();
    rows.extend(start.beside.iter().map(|p| Row { label: format!("({})", p.name), ..phase(p) }));
    let (shown, hidden) = longest(&start.requests);
    rows.extend(shown.into_iter().map(request_row));
    // Hydration goes on behind the start; the picture ends with it.
    let end = rows.iter().map(|row| row.end).fold(total, f64::max).min(total.max(1.0) * 1.25);
    let width = columns.saturating_sub(LABEL + TIMES + 2).max(10);
    let _ = writeln!(
        out,
        "\n{:LABEL$} |{:<width$}| start     took",
        "phases and requests",
        format!("0{:>1$}", time(end), width.saturating_sub(1))
    );
    for row in rows {
        let label: String = row.label.chars().take(LABEL).collect();
        let _ = writeln!(
            out,
            "{label:LABEL$} |{}| {:>8} {:>8}{}",
            bar(&row, end, width),
            time(row.start),
            time(row.end - row.start),
            row.note
        );
    }
    if hidden > 0 {
        let _ = writeln!(out, "({hidden} shorter requests are not shown; --format json has all)");
    }
    let _ = writeln!(out, "bars: . waits for its turn, - for the first byte, = bytes come");
}

/// The longest requests in the order in which they began, and how many others there are.
fn longest(requests: &[RequestOf]) -> (Vec<&RequestOf>, usize) {
    let mut shown: Vec<&RequestOf> = requests.iter().collect();
    shown.sort_by(|a, b| (b.end_ms - b.start_ms).total_cmp(&(a.end_ms - a.start_ms)));
    let hidden = shown.len().saturating_sub(MAX_ROWS);
    shown.truncate(MAX_ROWS);
    shown.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
    (shown, hidden)
}

fn request_row(request: &RequestOf) -> Row {
    let place = match (request.layer, request.spans) {
        (Some(layer), Some((first, end))) if end - first == 1 => format!(" layer {layer} span {first}"),
        (Some(layer), Some((first, end))) => format!(" layer {layer} spans {first}-{}", end - 1),
        (Some(layer), None) => format!(" layer {layer}"),
        (None, _) => match request.what.split_once('/') {
            Some((_, name)) => match name.strip_prefix("sha256:") {
                Some(digest) => format!(" {digest:.12}"),
                None => format!(" {name}"),
            },
            None => String::new(),
        },
    };
    let kind = if request.layer.is_some() { String::new() } else { request.kind.clone() };
    let class = if request.class == Class::Metadata { String::new() } else { request.class.to_string() };
    let label = format!("  {class}{kind}{place}");
    let sent = request.sent_ms.unwrap_or(request.end_ms);
    let mut note = format!(" {}", output::bytes(request.bytes));
    match (request.status, &request.failure) {
        (_, Some(failure)) => note += &format!(" {}", failure.escape_debug()),
        (None, None) => note += " given up",
        (Some(200 | 206), None) => {}
        (Some(status), None) => note += &format!(" {status}"),
    }
    if request.second {
        note += " second";
    }
    if request.retries > 0 {
        note += &format!(" try {}", request.retries + 1);
    }
    let first = request.first_byte_ms.unwrap_or(request.end_ms);
    let label = label.escape_debug().to_string();
    Row { label, start: request.start_ms, end: request.end_ms, sent, first, note }
}

fn bar(row: &Row, end: f64, width: usize) -> String {
    let scale = width as f64 / end.max(f64::MIN_POSITIVE);
    let column = |ms: f64| (ms * scale).clamp(0.0, width as f64) as usize;
    let (from, to) = (column(row.start).min(width - 1), column(row.end).min(width));
    let to = to.max(from + 1);
    (0..width)
        .map(|at| match at {
            at if at < from || at >= to => ' ',
            // What is shorter than a column is shown as what it ended as.
            at if at + 1 < to && at < column(row.sent) => '.',
            at if at + 1 < to && at < column(row.first) => '-',
            _ => '=',
        })
        .collect()
}

fn slowest(out: &mut String, start: &Start) {
    if start.reads.is_empty() {
        return;
    }
    let mut reads: Vec<&ReadOf> = start.reads.iter().collect();
    reads.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let _ = writeln!(out, "\nslowest reads\n  waited    at        bytes    layer  file");
    for read in reads.iter().take(MAX_READS) {
        let more =
            if read.more_files > 0 { format!(" (and {} more)", read.more_files) } else { String::new() };
        let _ = writeln!(
            out,
            "  {:<8}  {:<8}  {:<7}  {:<5}  {}{more}{}",
            time(read.ms),
            time(read.start_ms),
            output::bytes(read.len),
            read.layer,
            read.path.escape_debug(),
            if read.ok { "" } else { "  FAILED" }
        );
    }
    if reads.len() > MAX_READS {
        let _ = writeln!(out, "  ({} more)", reads.len() - MAX_READS);
    }
}

/// Milliseconds for people.
fn time(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1}ms"),
        ms if ms < 1000.0 => format!("{ms:.0}ms"),
        ms => format!("{:.2}s", ms / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(start: f64, sent: f64, first: f64, end: f64) -> Row {
        Row { label: String::new(), start, end, sent, first, note: String::new() }
    }

    #[test]
    fn bars_show_what_was_waited_for() {
        assert_eq!(bar(&row(10.0, 20.0, 50.0, 80.0), 100.0, 10), " .---===  ");
        assert_eq!(bar(&row(0.0, 0.0, 100.0, 100.0), 100.0, 10), "---------=");
        assert_eq!(bar(&row(99.9, 99.9, 99.9, 99.9), 100.0, 10), "         =");
        assert_eq!(bar(&row(50.0, 50.0, 50.0, 500.0), 100.0, 10), "     =====");
        assert_eq!(bar(&row(0.0, 0.0, 0.0, 0.0), 0.0, 10).len(), 10);
        assert_eq!(bar(&row(200.0, 200.0, 200.0, 300.0), 100.0, 10), "         =");
    }

    #[test]
    fn times_for_people() {
        assert_eq!([0.04, 9.94, 10.0, 999.4, 1234.0].map(time), ["0.0ms", "9.9ms", "10ms", "999ms", "1.23s"]);
    }
}
