//! eStargz tables that lie in an image of their own, beside the image under a tag of their own.

use bytes::Bytes;
use lazyrun_index::{Digest, estargz};

use super::Search;
use crate::artifact::{Descriptor, parse_descriptors, parse_layers};
use crate::manifest::LayerDescriptor;

/// Manifests of a list of table images that are looked at.
const MAX_PLATFORMS: usize = 16;

/// The packed table of a layer, of at most `limit` bytes. What ties it to the image is its digest in the layer's
/// annotations, which is checked when it is read.
pub(super) async fn fetch(search: &Search<'_>, layer: &LayerDescriptor, limit: u64) -> Result<Bytes, String> {
    let tables = search.table_image.get_or_init(|| all(search)).await.as_ref().map_err(Clone::clone)?;
    let of = layer.digest.to_string();
    let table = tables
        .iter()
        .find(|d| d.annotation(estargz::LAYER_DIGEST) == Some(of.as_str()))
        .ok_or("the image with the tables has none for it")?;
    let _turn = search.gate.acquire().await;
    let fetched =
        search.client.blob(&search.image.reference, table.digest, "table", limit.min(table.size)).await;
    fetched.map_err(|e| e.to_string())
}

/// The layers of the table image, of all platforms.
async fn all(search: &Search<'_>) -> Result<Vec<Descriptor>, String> {
    let tag = search.image.reference.tag.as_ref();
    let tag = tag.ok_or("it lies in an image of its own that is found by tag, and there is none")?;
    let name = format!("{tag}{}", estargz::TABLE_IMAGE_SUFFIX);
    let top = manifest(search, &name, None).await?;
    let parts = parse_descriptors(&top).unwrap_or_default();
    let mut layers = parse_layers(&top);
    for part in parts.iter().take(MAX_PLATFORMS) {
        layers.extend(parse_layers(&manifest(search, &part.digest.to_string(), Some(part.digest)).await?));
    }
    Ok(layers)
}

async fn manifest(search: &Search<'_>, name: &str, want: Option<Digest>) -> Result<Bytes, String> {
    let _turn = search.gate.acquire().await;
    let found = search.client.manifest_named(&search.image.reference, name, want).await;
    found.map_err(|e| e.to_string())?.ok_or_else(|| format!("the repository has no {name}"))
}
