//! `lazyrun index`: building, sharing and checking the indexes of an image's layers.

use std::sync::Arc;

use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use lazyrun_fetcher::{
    Beside, IndexPolicy, IndexSource, Layer, OriginKind, Progress, PushOptions, ResolvedImage, TrustMode,
    delete_index, list_indexes, push_indexes,
};
use lazyrun_index::{Digest, LayerId, Layout, StreamOptions};
use serde_json::Value;

use super::Daemon;
use super::foresee::no_profile;
use super::images::Images;
use crate::failure::Failure;
use crate::ipc::index_lists::{EntryRow, Page, SpanRow};
use crate::ipc::indexes::{
    ArtifactSummary, IndexAction, IndexSummary, IndexedImage, IndexedLayer, Pushed, compression_name,
    layout_name,
};
use crate::ipc::protocol::ImageRequest;

impl Daemon {
    /// Does what an index request asks for and answers as [`IndexAction`] says.
    pub(super) async fn index(
        &self,
        request: ImageRequest,
        action: IndexAction,
        progress: Arc<dyn Progress>,
    ) -> Result<Value> {
        // What is here is no reason to ask a registry.
        let here = || {
            let record = self.images.find(&request.reference)?.into_iter().next().context("no record")?;
            self.images.load(&record)
        };
        match action {
            IndexAction::Inspect => return Ok(serde_json::to_value(self.indexed(&here()?)?)?),
            IndexAction::Entries { layer, from } => {
                return Ok(serde_json::to_value(self.entries(&here()?, layer, from)?)?);
            }
            IndexAction::Spans { layer, from } => {
                return Ok(serde_json::to_value(self.spans(&here()?, layer, from)?)?);
            }
            _ => {}
        }
        let image = self.images.resolve(&request).await?;
        Ok(match action {
            IndexAction::Build { along_profile } => {
                self.proven_layers(&image, &request, &progress).await?;
                if along_profile {
                    self.rebuild_along_profile(&image, &request, &progress).await?;
                }
                serde_json::to_value(self.indexed(&image)?)?
            }
            IndexAction::Pull => {
                self.pull_indexes(&image, &request, &progress).await?;
                serde_json::to_value(self.indexed(&image)?)?
            }
            IndexAction::Verify => {
                self.verify_indexes(&image, &request, &progress).await?;
                serde_json::to_value(self.indexed(&image)?)?
            }
            IndexAction::Push { without_profile, created } => {
                let layers = self.proven_layers(&image, &request, &progress).await?;
                let profile = self.profile_of(&image).filter(|_| !without_profile);
                let profile = profile.map(|(_, profile)| profile.to_json()).transpose()?;
                let options = PushOptions {
                    span_size: Some(StreamOptions::default().span_size),
                    created,
                    profile: profile.map(Into::into),
                };
                serde_json::to_value(
                    self.push_indexes(&image, &request, &layers, &options, &progress).await?,
                )?
            }
            IndexAction::List => serde_json::to_value(self.list_indexes(&image, &request, &progress).await?)?,
            IndexAction::Remove => serde_json::to_value(self.remove_indexes(&image, &request).await?)?,
            // Answered above.
            IndexAction::Inspect | IndexAction::Entries { .. } | IndexAction::Spans { .. } => Value::Null,
        })
    }

    /// The layers of an image with indexes that this node has proven; blobs are streamed where that takes it.
    async fn proven_layers(
        &self,
        image: &ResolvedImage,
        request: &ImageRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<Vec<Arc<Layer>>> {
        let policy = IndexPolicy { trust: TrustMode::Proven, pinned: None };
        self.images.layers(image, &request.registry, &policy, progress).await
    }

    /// Streams the layers that the image's profile touches anew, with spans that follow it.
    async fn rebuild_along_profile(
        &self,
        image: &ResolvedImage,
        request: &ImageRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<()> {
        let (_, profile) = self.profile_of(image).ok_or_else(|| no_profile(&image.reference))?;
        let source = self.images.client(&request.registry)?.blobs(&image.reference);
        let jobs = image.layers.iter().enumerate().map(|(number, descriptor)| {
            let (runs, source) = (profile.runs(number), source.clone());
            async move {
                if runs.is_empty() {
                    return anyhow::Ok(());
                }
                let id = LayerId::tar(descriptor.diff_id);
                self.images.fetcher().cancel(id);
                let fetcher = self.images.fetcher();
                let layer = fetcher.ingest_along(descriptor, source, runs, Arc::clone(progress)).await?;
                // The same bytes in another file: whoever comes next takes that, and the old one can go.
                self.views.release(|view| view.layers.iter().any(|l| l.id() == id));
                self.service.forget(layer.file_name());
                Ok(())
            }
        });
        try_join_all(jobs).await?;
        Ok(())
    }

    async fn pull_indexes(
        &self,
        image: &ResolvedImage,
        request: &ImageRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<()> {
        let policy = Images::policy(request, image);
        self.images.adopt_found(image, &request.registry, &policy, Beside::default(), progress).await?;
        let store = self.images.fetcher().store();
        let mut missing = 0;
        for layer in &image.layers {
            missing += usize::from(store.get(layer.diff_id)?.is_none());
        }
        if missing == image.layers.len() {
            let name = image.reference.familiar();
            return Err(Failure::new(
                1,
                format!("no usable index of {name} was found; `lazyrun index build {name}` makes one"),
            )
            .into());
        }
        if missing > 0 {
            progress.note(&format!("{missing} of {} layers have no index", image.layers.len()));
        } else {
            // Every layer has an index, so the image can be started without another look at the registry.
            self.images.record(image, &request.registry)?;
        }
        Ok(())
    }

    async fn verify_indexes(
        &self,
        image: &ResolvedImage,
        request: &ImageRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<()> {
        let fetcher = self.images.fetcher();
        let mut layers = Vec::new();
        for layer in &image.layers {
            layers.extend(fetcher.store().get(layer.diff_id)?);
        }
        if layers.is_empty() {
            let name = image.reference.familiar();
            return Err(Failure::new(1, format!("no index of {name} is here to be verified")).into());
        }
        if layers.len() < image.layers.len() {
            let missing = image.layers.len() - layers.len();
            progress.note(&format!("{missing} of {} layers have no index here", image.layers.len()));
        }
        let source = self.images.client(&request.registry)?.blobs(&image.reference);
        for layer in &image.layers {
            fetcher.add_source(layer.diff_id, layer.clone(), source.clone());
        }
        try_join_all(layers.iter().map(|layer| fetcher.verify(layer, Arc::clone(progress)))).await?;
        Ok(())
    }

    async fn push_indexes(
        &self,
        image: &ResolvedImage,
        request: &ImageRequest,
        layers: &[Arc<Layer>],
        options: &PushOptions,
        progress: &Arc<dyn Progress>,
    ) -> Result<Pushed> {
        let client = self.images.client(&request.registry)?;
        let mut indexes = Vec::new();
        for (descriptor, layer) in image.layers.iter().zip(layers) {
            let tar_of_this_blob =
                layer.id().layout == Layout::Tar && layer.index().blob_digest() == descriptor.digest;
            let foreign = layer.adopted_from().filter(|origin| origin.kind != OriginKind::Own);
            if let Some(origin) = foreign {
                // Its spans and digests are not what ours have, and whoever wants it finds it where it is.
                progress.note(&format!("layer {} has a {} and is left out", descriptor.digest, origin.kind));
            } else if tar_of_this_blob {
                indexes.push((descriptor.clone(), IndexSource::File(layer.index_path())));
            } else {
                progress
                    .note(&format!("layer {} has no index of this blob and is left out", descriptor.digest));
            }
        }
        let report = push_indexes(&client, image, &indexes, options).await?;
        for layer in &report.left_out {
            progress.note(&format!("the index of layer {layer} is longer than the layer and is left out"));
        }
        Ok(Pushed {
            digest: report.artifact,
            layers: report.layers,
            size: report.size,
            profile: options.profile.is_some(),
            sent: report.sent,
        })
    }

    async fn list_indexes(
        &self,
        image: &ResolvedImage,
        request: &ImageRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<Vec<ArtifactSummary>> {
        let client = self.images.client(&request.registry)?;
        let (found, warnings) = list_indexes(&client, image).await?;
        for warning in &warnings {
            progress.note(warning);
        }
        let summary = |a: lazyrun_fetcher::IndexArtifact| ArtifactSummary {
            digest: a.digest,
            kind: a.kind,
            trust: a.trust,
            layers: a.layers.len(),
            size: a.size,
            format: a.format,
            span_size: a.span_size,
            created: a.created,
        };
        Ok(found.into_iter().map(summary).collect())
    }

    async fn remove_indexes(&self, image: &ResolvedImage, request: &ImageRequest) -> Result<Vec<Digest>> {
        let client = self.images.client(&request.registry)?;
        let digests = match request.index.digest {
            Some(digest) => vec![digest],
            None => {
                let (found, _) = list_indexes(&client, image).await?;
                let own = found.into_iter().filter(|a| a.kind == OriginKind::Own);
                own.map(|a| a.digest).collect()
            }
        };
        let mut removed = Vec::new();
        for digest in digests {
            if delete_index(&client, image, digest).await? {
                removed.push(digest);
            }
        }
        if removed.is_empty() {
            let name = image.reference.familiar();
            return Err(Failure::new(1, format!("the registry has no such index of {name}")).into());
        }
        Ok(removed)
    }

    fn entries(&self, image: &ResolvedImage, layer: usize, from: usize) -> Result<Page<EntryRow>> {
        let Some((digest, layer)) = self.indexed_layer(image, layer)? else { return Ok(Page::empty()) };
        let row = |i| EntryRow::new(&digest, &layer.index().entry(i));
        Ok(Page::of(from, layer.index().entry_count(), row))
    }

    fn spans(&self, image: &ResolvedImage, layer: usize, from: usize) -> Result<Page<SpanRow>> {
        let Some((digest, layer)) = self.indexed_layer(image, layer)? else { return Ok(Page::empty()) };
        let row = |i| SpanRow::new(&digest, &layer.index().span(i), layer.has_span(i));
        Ok(Page::of(from, layer.index().span_count(), row))
    }

    /// A layer of an image, if it has an index here, and the digest of its blob.
    fn indexed_layer(&self, image: &ResolvedImage, layer: usize) -> Result<Option<(String, Arc<Layer>)>> {
        let Some(descriptor) = image.layers.get(layer) else {
            let (name, count) = (image.reference.familiar(), image.layers.len());
            return Err(
                Failure::new(1, format!("{name} has no layer {layer}, its {count} count from 0")).into()
            );
        };
        let found = self.images.fetcher().store().get(descriptor.diff_id)?;
        Ok(found.map(|layer| (descriptor.digest.to_string(), layer)))
    }

    fn indexed(&self, image: &ResolvedImage) -> Result<IndexedImage> {
        let store = self.images.fetcher().store();
        let one = |layer: &lazyrun_fetcher::LayerDescriptor| -> Result<IndexedLayer> {
            Ok(IndexedLayer {
                digest: layer.digest,
                diff_id: layer.diff_id,
                size: layer.size,
                index: store.get(layer.diff_id)?.map(|layer| summary(&layer)),
            })
        };
        Ok(IndexedImage {
            reference: image.reference.familiar(),
            digest: image.manifest_digest,
            layers: image.layers.iter().map(one).collect::<Result<_>>()?,
        })
    }
}

fn summary(layer: &Layer) -> IndexSummary {
    let index = layer.index();
    let origin = layer.adopted_from();
    let percent = 100.0 * index.index_size() as f64 / index.layer_size().max(1) as f64;
    IndexSummary {
        origin: origin.as_ref().map_or_else(|| "built".to_owned(), |o| o.kind.to_string()),
        artifact: origin.and_then(|o| o.artifact),
        proven: layer.is_proven(),
        layout: layout_name(layer.id().layout).to_owned(),
        compression: compression_name(index.compression()).to_owned(),
        entries: index.entry_count() as u64,
        spans: index.span_count() as u64,
        restartable: index.spans().filter(|s| s.restartable).count() as u64,
        layer_size: index.layer_size(),
        local: layer.local_bytes(),
        index_size: index.index_size(),
        overhead: (percent * 1000.0).round() / 1000.0,
    }
}
