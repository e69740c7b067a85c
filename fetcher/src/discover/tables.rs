//! Tables of other formats.

use super::Search;
use crate::manifest::LayerDescriptor;

/// Takes the tables that lie inside of missing layers.
pub(super) async fn take(_search: &Search<'_>) {}

/// Turns a SOCI zTOC into an index.
pub(super) fn ztoc(_bytes: &[u8], _layer: &LayerDescriptor) -> Result<Vec<u8>, String> {
    Err("SOCI tables cannot be read yet".to_owned())
}
