//! The images that are recorded: under which reference, with which documents.

use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use lazyrun_fetcher::{Reference, ResolvedImage};
use lazyrun_index::Digest;

use super::Images;
use crate::clock;
use crate::daemon::meta::ImageRecord;
use crate::failure::Failure;
use crate::ipc::protocol::{ImageSummary, RegistryOptions};

impl Images {
    /// Records an image under its reference, with the documents it was resolved from.
    ///
    /// # Errors
    /// When the database or a file can't be written.
    pub fn record(&self, image: &ResolvedImage, registry: &RegistryOptions) -> Result<()> {
        let reference = image.reference.to_string();
        let known = self.meta.image(&reference)?;
        if known.is_some_and(|k| k.manifest == image.manifest_digest && k.registry == *registry) {
            return Ok(());
        }
        self.save_blob(image.manifest_digest, &image.manifest)?;
        self.save_blob(image.config_digest, &image.config)?;
        let list = image.list.as_ref().map(|list| Digest::of(list));
        if let (Some(digest), Some(bytes)) = (list, &image.list) {
            self.save_blob(digest, bytes)?;
        }
        self.meta.put_image(&ImageRecord {
            reference,
            manifest: image.manifest_digest,
            config: image.config_digest,
            list,
            pulled_at: clock::now(),
            registry: registry.clone(),
        })
    }

    /// [`Images::record`] away from the threads that others wait for: it waits for the disk.
    ///
    /// # Errors
    /// As that.
    pub async fn record_apart(
        self: &Arc<Self>,
        image: &ResolvedImage,
        registry: &RegistryOptions,
    ) -> Result<()> {
        let (this, image, registry) = (Arc::clone(self), image.clone(), registry.clone());
        tokio::task::spawn_blocking(move || this.record(&image, &registry))
            .await
            .context("recording an image")?
    }

    fn save_blob(&self, digest: Digest, bytes: &Bytes) -> Result<()> {
        let path = self.blobs.join(digest.hex());
        if path.exists() {
            return Ok(());
        }
        let context = || format!("writing {}", path.display());
        let mut file = tempfile::NamedTempFile::new_in(&self.blobs).with_context(context)?;
        std::io::Write::write_all(&mut file, bytes).with_context(context)?;
        file.as_file().sync_data().with_context(context)?;
        file.persist(&path).with_context(context)?;
        std::fs::File::open(&self.blobs)?.sync_all().with_context(context)
    }

    pub(super) fn recorded(&self, reference: &Reference) -> Result<Option<ResolvedImage>> {
        if let Some(record) = self.meta.image(&reference.to_string())? {
            return self.load(&record).map(Some);
        }
        // A digest means the same image under whatever tag of the repository it came.
        let Some(digest) = reference.digest else { return Ok(None) };
        let same = |record: &ImageRecord| {
            let other = record.reference.parse::<Reference>();
            (record.manifest == digest || record.list == Some(digest))
                && other
                    .is_ok_and(|o| o.registry == reference.registry && o.repository == reference.repository)
        };
        let Some(record) = self.records()?.into_iter().find(same) else { return Ok(None) };
        Ok(Some(ResolvedImage { reference: reference.clone(), ..self.load(&record)? }))
    }

    /// The record of a full reference.
    pub fn record_of(&self, reference: &str) -> Option<ImageRecord> {
        self.meta.image(reference).ok().flatten()
    }

    /// The image of a record, read from the blobs kept here.
    ///
    /// # Errors
    /// When a blob is gone or damaged.
    pub fn load(&self, record: &ImageRecord) -> Result<ResolvedImage> {
        let read = |digest: Digest| {
            let path = self.blobs.join(digest.hex());
            let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            anyhow::ensure!(
                Digest::of(&bytes) == digest,
                "{} is damaged; remove the image and pull it again",
                path.display()
            );
            Ok(Bytes::from(bytes))
        };
        let reference = record.reference.parse()?;
        let image = ResolvedImage::from_parts(reference, read(record.manifest)?, read(record.config)?)?;
        Ok(match record.list {
            Some(list) => image.with_list(read(list)?)?,
            None => image,
        })
    }

    /// Every recorded image.
    ///
    /// # Errors
    /// The database's.
    pub fn records(&self) -> Result<Vec<ImageRecord>> {
        self.meta.images()
    }

    /// The records that a reference, an image id or its prefix means.
    ///
    /// # Errors
    /// When there is none, or a prefix means several images.
    pub fn find(&self, name: &str) -> Result<Vec<ImageRecord>> {
        if let Ok(reference) = name.parse::<Reference>()
            && let Some(record) = self.meta.image(&reference.to_string())?
        {
            return Ok(vec![record]);
        }
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        let wanted = |d: &Digest| hex.len() >= 4 && d.hex().starts_with(hex);
        let mut found = self.records()?;
        found.retain(|r| wanted(&r.config) || wanted(&r.manifest));
        if found.is_empty() {
            return Err(Failure::new(1, format!("no such image: {name}")).into());
        }
        if found.iter().any(|r| r.config != found[0].config) {
            return Err(Failure::new(1, format!("{name} is the beginning of several image ids")).into());
        }
        Ok(found)
    }

    /// References of the recorded images that have a layer.
    pub fn names_with(&self, diff_id: Digest) -> Vec<String> {
        let has = |record: &ImageRecord| {
            self.load(record).is_ok_and(|image| image.layers.iter().any(|l| l.diff_id == diff_id))
        };
        let records = self.records().unwrap_or_default();
        records.into_iter().filter(has).map(|r| r.reference).collect()
    }

    /// An image as `lazyrun images` shows it.
    ///
    /// # Errors
    /// When its manifest can't be read.
    pub fn summary(&self, record: &ImageRecord) -> Result<ImageSummary> {
        let image = self.load(record)?;
        let known: Vec<_> =
            image.layers.iter().filter_map(|l| self.fetcher.store().get(l.diff_id).ok().flatten()).collect();
        let mut repository = image.reference.familiar();
        let tag = image.reference.tag.clone().unwrap_or_else(|| "<none>".into());
        if let Some(at) = repository.find('@') {
            repository.truncate(at);
        }
        if let Some(bare) = repository.strip_suffix(&format!(":{tag}")) {
            repository.truncate(bare.len());
        }
        Ok(ImageSummary {
            repository,
            tag,
            digest: record.manifest,
            id: record.config,
            pulled_at: record.pulled_at.clone(),
            size: image.layers.iter().map(|l| l.size).sum(),
            local: known.iter().map(|l| l.local_bytes()).sum(),
            total: known.iter().map(|l| l.index().layer_size()).sum(),
            layers: image.layers.len(),
            indexed: known.len(),
        })
    }

    /// Forgets a reference and deletes the manifest and config that no other reference has.
    ///
    /// # Errors
    /// The database's.
    pub fn remove(&self, record: &ImageRecord) -> Result<()> {
        self.meta.remove_image(&record.reference)?;
        let rest = self.records()?;
        for digest in [Some(record.manifest), Some(record.config), record.list].into_iter().flatten() {
            let named = |r: &ImageRecord| [Some(r.manifest), Some(r.config), r.list].contains(&Some(digest));
            if !rest.iter().any(named) {
                let _ = std::fs::remove_file(self.blobs.join(digest.hex()));
            }
        }
        Ok(())
    }
}
