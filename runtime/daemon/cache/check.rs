//! Verifying all that is local.

use anyhow::Result;

use super::Daemon;
use crate::ipc::system::{BadSpan, CheckReport};

impl Daemon {
    /// Verifies every local span against its index; with `repair` drops those that are wrong.
    pub(super) fn check_store(&self, repair: bool) -> Result<CheckReport> {
        let store = self.images.fetcher().store();
        let mut report = CheckReport { repaired: repair, ..CheckReport::default() };
        let mut ids = store.list()?;
        ids.sort_unstable_by_key(ToString::to_string);
        for id in ids {
            let Some(layer) = store.by_id(id)? else { continue };
            let found = layer.check(repair)?;
            report.layers += 1;
            report.spans += found.spans;
            report.bytes += found.bytes;
            if !found.bad.is_empty() {
                tracing::error!(layer = layer.file_name(), spans = ?found.bad, repair, "spans of a layer are wrong");
            }
            if repair && !found.bad.is_empty() {
                // What the kernel has read of them is as wrong.
                if let Err(error) = self.views.invalidate(&self.flat, &[layer.file_name()]) {
                    tracing::warn!(layer = layer.file_name(), %error, "wrong contents of a layer may remain cached");
                }
            }
            report.bad.extend(found.bad.into_iter().map(|number| {
                let span = layer.index().span(number);
                let layer = layer.file_name().to_owned();
                BadSpan { layer, span: number, offset: span.offset, length: span.len }
            }));
        }
        Ok(report)
    }
}
