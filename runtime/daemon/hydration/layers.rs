//! Hydration of layers that belong to no image recorded here: containerd's. What is wanted of them follows from its
//! snapshots, so nothing of it is kept on disk.

use std::sync::{Arc, PoisonError};

use futures_util::FutureExt as _;
use lazyrun_fetcher::{Haste, Layer, NoProgress, Progress};
use lazyrun_index::LayerId;

use super::Hydration;

impl Hydration {
    /// Hydrates layers in the background, until done or [`Hydration::stop_layers`].
    pub fn begin_layers(self: &Arc<Self>, layers: &[Arc<Layer>]) {
        self.begin_layers_after(layers, std::future::ready(()));
    }

    /// As [`Hydration::begin_layers`], once `first` is over. That goes on by itself, also where another start has begun to
    /// hydrate the layers already.
    pub fn begin_layers_after(
        self: &Arc<Self>,
        layers: &[Arc<Layer>],
        first: impl Future<Output = ()> + Send + 'static,
    ) {
        let first = first.shared();
        tokio::spawn(first.clone());
        let mut jobs = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|_, job| !job.is_finished());
        for layer in layers.iter().filter(|l| !l.is_hydrated()) {
            if jobs.contains_key(&layer.id()) {
                continue;
            }
            let (this, layer, id, first) = (Arc::clone(self), Arc::clone(layer), layer.id(), first.clone());
            let job = tokio::spawn(async move {
                first.await;
                let progress: Arc<dyn Progress> = Arc::new(NoProgress);
                let mut paused = this.paused.subscribe();
                let proven = loop {
                    let _ = paused.wait_for(|paused| !*paused).await;
                    tokio::select! {
                        proven = this.images.prove(&layer, Haste::Background, &progress) => break proven,
                        _ = paused.wait_for(|paused| *paused) => {}
                    }
                };
                match proven {
                    Ok(()) => tracing::info!(layer = %id, "layer hydrated"),
                    Err(error) => tracing::warn!(layer = %id, %error, "background hydration ended early"),
                }
            });
            jobs.insert(id, job.abort_handle());
        }
    }

    /// Stops that for these layers, and whatever else is under way for whole ones. Returns those for which something was.
    pub fn stop_layers(&self, ids: impl IntoIterator<Item = LayerId>) -> Vec<LayerId> {
        let mut jobs = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let stop = |id: &LayerId| {
            if let Some(job) = jobs.remove(id) {
                job.abort();
            }
            self.images.fetcher().cancel(*id)
        };
        ids.into_iter().filter(stop).collect()
    }
}
