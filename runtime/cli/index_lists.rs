//! `lazyrun index inspect --entries` and `--spans`: lists that are as long as layers are, so they come and go page by page.

use std::ops::Range;

use lazyrun_index::Digest;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::output::{self, Column};
use crate::failure::Failure;
use crate::ipc::index_lists::{EntryRow, Page, SpanRow};
use crate::ipc::indexes::IndexAction;

/// Asks the daemon.
type Ask<'a> = &'a dyn Fn(IndexAction) -> Result<Value, Failure>;

/// Prints the entries of these layers.
pub(super) fn entries(ask: Ask<'_>, layers: Range<usize>, format: Option<&str>) -> Result<(), Failure> {
    let columns: &[Column<'_, EntryRow>] = &[
        ("LAYER", |e| short(&e.layer)),
        ("TYPE", |e| e.kind.clone()),
        ("MODE", |e| e.mode.clone()),
        ("OWNER", |e| format!("{}:{}", e.uid, e.gid)),
        ("SIZE", |e| match e.device {
            Some((major, minor)) => format!("{major},{minor}"),
            None => e.size.to_string(),
        }),
        ("MTIME", |e| format!("{}.{:09}", e.mtime.0, e.mtime.1)),
        ("PATH", |e| match &e.link {
            Some(link) => format!("{} -> {}", shown(&e.path), shown(link)),
            None => shown(&e.path),
        }),
    ];
    list(ask, layers, format, columns, |layer, from| IndexAction::Entries { layer, from })
}

/// Prints the spans of these layers.
pub(super) fn spans(ask: Ask<'_>, layers: Range<usize>, format: Option<&str>) -> Result<(), Failure> {
    let columns: &[Column<'_, SpanRow>] = &[
        ("LAYER", |s| short(&s.layer)),
        ("SPAN", |s| s.number.to_string()),
        ("BLOB", |s| format!("{}+{}", s.blob_offset, s.blob_size)),
        ("LAYER FILE", |s| format!("{}+{}", s.offset, s.size)),
        ("RESTARTABLE", |s| if s.restartable { "yes" } else { "no" }.to_owned()),
        ("LOCAL", |s| if s.local { "yes" } else { "no" }.to_owned()),
        ("DIGEST OF", |s| s.digest_of.clone()),
        ("DIGEST", |s| s.digest.as_deref().map_or_else(|| "-".to_owned(), short)),
    ];
    list(ask, layers, format, columns, |layer, from| IndexAction::Spans { layer, from })
}

fn list<T: Serialize + DeserializeOwned>(
    ask: Ask<'_>,
    layers: Range<usize>,
    format: Option<&str>,
    columns: &[Column<'_, T>],
    action: impl Fn(usize, usize) -> IndexAction,
) -> Result<(), Failure> {
    let mut header = true;
    for layer in layers {
        let mut next = Some(0);
        while let Some(from) = next {
            let page: Page<T> = serde_json::from_value(ask(action(layer, from))?)
                .map_err(|e| Failure::daemon(format!("the daemon's answer can't be read: {e}")))?;
            output::more_rows(&page.rows, format, columns, header)?;
            header = false;
            next = page.next;
        }
    }
    Ok(())
}

fn short(digest: &str) -> String {
    digest.parse::<Digest>().map_or_else(|_| digest.to_owned(), |digest| digest.hex()[..12].to_owned())
}

/// A name on one line, harmless for a terminal.
fn shown(name: &str) -> String {
    if name.is_empty() { "/".to_owned() } else { name.escape_debug().collect() }
}
