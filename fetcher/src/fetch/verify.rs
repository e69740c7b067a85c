//! Comparing an index that is here with its layer's blob. Nothing is stored: what is local may be complete already.

use std::io;
use std::sync::Arc;

use lazyrun_index::{Digest, IndexError, LayerSink, SpanInfo, prove_layer};

use super::{Inner, Progress, ingest, prove};
use crate::error::FetchError;
use crate::store::Layer;

/// Streams the blob once and compares; an adopted index that lied is remembered as such.
pub(super) async fn run(
    inner: &Arc<Inner>,
    layer: &Arc<Layer>,
    progress: &Arc<dyn Progress>,
) -> Result<(), FetchError> {
    let (owned_inner, owned_layer, owned_progress) =
        (Arc::clone(inner), Arc::clone(layer), Arc::clone(progress));
    prove::pass(inner, layer, progress, move |reader, problem| {
        let (inner, layer) = (&owned_inner, &owned_layer);
        let index = layer.index();
        let options = inner.options.stream_of(index.blob_size());
        let mut sink =
            Watched { layer: layer.diff_id(), total: index.blob_size(), progress: &owned_progress };
        match prove_layer(index, reader, &mut sink, io::empty(), &options) {
            Ok(_) => Ok(()),
            Err(IndexError::Lie(mismatch)) if layer.adopted_from().is_some() => {
                Err(inner.store.condemn(layer, &mismatch.to_string()))
            }
            Err(IndexError::Lie(mismatch)) => {
                Err(FetchError::Disagrees { layer: layer.diff_id(), reason: mismatch.to_string() })
            }
            Err(error) => Err(ingest::layer_error(index.blob_digest(), error, problem, &layer.data_path())),
        }
    })
    .await
}

struct Watched<'a> {
    layer: Digest,
    total: u64,
    progress: &'a Arc<dyn Progress>,
}

impl LayerSink for Watched<'_> {
    fn data(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        Ok(())
    }

    fn progress(&mut self, blob_bytes: u64) {
        self.progress.advance(self.layer, blob_bytes, self.total);
    }
}
