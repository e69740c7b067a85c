//! When an index that somebody published turns out to be a lie: who is concerned is told, and nothing new starts from
//! it. What runs on it gets errors from the store, never bytes.

use std::sync::{Arc, Weak};

use lazyrun_fetcher::{FetchError, Layer};
use tokio::sync::mpsc;

use super::Daemon;

/// Lies that wait to be told; more at a time are only logged by whoever found them.
pub const QUEUE: usize = 64;

/// A layer and what is wrong with its index.
pub type Lie = (Arc<Layer>, FetchError);

/// Deals with lies for as long as the daemon lives.
pub fn watch(daemon: &Arc<Daemon>, mut lies: mpsc::Receiver<Lie>) {
    let daemon: Weak<Daemon> = Arc::downgrade(daemon);
    tokio::spawn(async move {
        while let Some((layer, error)) = lies.recv().await {
            let Some(daemon) = daemon.upgrade() else { return };
            let _ = tokio::task::spawn_blocking(move || daemon.drop_lie(&layer, &error)).await;
        }
    });
}

impl Daemon {
    fn drop_lie(&self, layer: &Layer, error: &FetchError) {
        let images = self.images.names_with(layer.diff_id()).join(", ");
        tracing::error!(
            images,
            layer = layer.file_name(),
            %error,
            "an index was a lie; containers that run on it get I/O errors, start them anew"
        );
        let file = layer.file_name();
        let _busy = self.views.release(|view| view.layers.iter().any(|l| l.file_name() == file));
        // What the kernel holds of it may be wrong too.
        if let Err(error) = self.views.invalidate(&self.flat, &[file]) {
            tracing::warn!(layer = file, %error, "cached contents of a layer may remain");
        }
    }
}
