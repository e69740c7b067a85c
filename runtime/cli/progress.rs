//! Progress of long work, on stderr: bars on a terminal, plain lines elsewhere, JSON on request.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::ipc::client::Events;

/// How progress is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Style {
    /// Bars on a terminal, plain lines elsewhere
    #[default]
    Auto,
    /// Plain lines
    Plain,
    /// One JSON object a line
    Json,
    /// Nothing
    None,
}

/// Shows progress as asked for.
#[derive(Debug)]
pub(super) struct Shown {
    style: Style,
    bars: MultiProgress,
    layers: HashMap<String, ProgressBar>,
    // When a layer's last line was written; `None` once that was the final one.
    last_line: HashMap<String, Option<Instant>>,
}

// Plain lines are for logs; more than one a second for a layer is noise.
const LINE_EVERY: Duration = Duration::from_secs(1);

impl Shown {
    /// A display in this style.
    pub(super) fn new(style: Style) -> Self {
        let style = match style {
            Style::Auto if !std::io::stderr().is_terminal() => Style::Plain,
            style => style,
        };
        Self { style, bars: MultiProgress::new(), layers: HashMap::new(), last_line: HashMap::new() }
    }

    fn bar(&mut self, layer: &str, done: u64, total: u64) {
        let bars = &self.bars;
        let bar = self.layers.entry(layer.to_owned()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new(total));
            let template = "{prefix} {bar:30} {bytes:>11}/{total_bytes:<11} {binary_bytes_per_sec}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(layer.to_owned());
            bar
        });
        bar.set_position(done);
        if done >= total {
            bar.finish();
        }
    }

    fn due(&mut self, layer: &str, finished: bool) -> bool {
        let now = Instant::now();
        let due = match self.last_line.get(layer) {
            None => true,
            Some(None) => false,
            Some(Some(last)) => finished || now.duration_since(*last) >= LINE_EVERY,
        };
        if due {
            self.last_line.insert(layer.to_owned(), (!finished).then_some(now));
        }
        due
    }
}

impl Events for Shown {
    fn progress(&mut self, layer: &str, done: u64, total: u64) {
        let style = self.style;
        match style {
            Style::None => {}
            Style::Auto => self.bar(layer, done, total),
            Style::Plain | Style::Json if !self.due(layer, done >= total) => {}
            Style::Plain => eprintln!("{layer}: {done}/{total} bytes"),
            Style::Json => eprintln!("{}", serde_json::json!({"layer": layer, "done": done, "total": total})),
        }
    }

    fn note(&mut self, message: &str) {
        match self.style {
            Style::Json => eprintln!("{}", serde_json::json!({ "note": message })),
            Style::Auto => {
                let _ = self.bars.println(format!("lazyrun: {message}"));
            }
            // Without bars nothing is drawn, and a note must not be lost with them.
            Style::Plain | Style::None => eprintln!("lazyrun: {message}"),
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        for bar in self.layers.values() {
            bar.finish_and_clear();
        }
    }
}
