//! The metadata database: which reference names which manifest. One writer, the daemon.

use std::path::Path;

use anyhow::{Context, Result};
use lazyrun_index::Digest;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::ipc::protocol::RegistryOptions;

const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images.v1");

/// A reference and what it was resolved to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The full reference.
    pub reference: String,
    /// The manifest it named when it was last asked.
    pub manifest: Digest,
    /// The config of that manifest: docker's image id.
    pub config: Digest,
    /// The manifest list or image index it was chosen from: it may name indexes of the layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<Digest>,
    /// When that was (RFC 3339).
    pub pulled_at: String,
    /// How its registry was talked to, for a daemon that starts while containers of the image run.
    #[serde(default)]
    pub registry: RegistryOptions,
}

/// The database.
#[derive(Debug)]
pub struct Meta {
    db: Database,
}

impl Meta {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// When the file can't be opened, is damaged, or is held by another daemon.
    pub fn open(path: &Path) -> Result<Self> {
        let db =
            Database::create(path).with_context(|| format!("opening the database {}", path.display()))?;
        let write = db.begin_write()?;
        write.open_table(IMAGES)?;
        write.commit()?;
        Ok(Self { db })
    }

    /// Records an image under its reference.
    ///
    /// # Errors
    /// The database's.
    pub fn put_image(&self, record: &ImageRecord) -> Result<()> {
        let write = self.db.begin_write()?;
        write
            .open_table(IMAGES)?
            .insert(record.reference.as_str(), serde_json::to_vec(record)?.as_slice())?;
        write.commit().context("writing the metadata database")
    }

    /// The image that a full reference names.
    ///
    /// # Errors
    /// The database's, or a record that makes no sense.
    pub fn image(&self, reference: &str) -> Result<Option<ImageRecord>> {
        let table = self.db.begin_read()?.open_table(IMAGES)?;
        let Some(bytes) = table.get(reference)? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(bytes.value()).context("reading the metadata database")?))
    }

    /// All images, by reference.
    ///
    /// # Errors
    /// As [`Meta::image`].
    pub fn images(&self) -> Result<Vec<ImageRecord>> {
        let table = self.db.begin_read()?.open_table(IMAGES)?;
        let mut records = Vec::new();
        for row in table.iter()? {
            records.push(serde_json::from_slice(row?.1.value()).context("reading the metadata database")?);
        }
        Ok(records)
    }

    /// Forgets a reference.
    ///
    /// # Errors
    /// The database's.
    pub fn remove_image(&self, reference: &str) -> Result<()> {
        let write = self.db.begin_write()?;
        write.open_table(IMAGES)?.remove(reference)?;
        write.commit().context("writing the metadata database")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_survive_reopening() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("meta.db");
        let record = ImageRecord {
            reference: "docker.io/library/x:1".into(),
            manifest: Digest::of(b"m"),
            list: None,
            config: Digest::of(b"c"),
            pulled_at: "now".into(),
            registry: RegistryOptions::default(),
        };
        Meta::open(&path).expect("open").put_image(&record).expect("put");
        let meta = Meta::open(&path).expect("reopen");
        assert_eq!(meta.image(&record.reference).expect("get"), Some(record.clone()));
        meta.remove_image(&record.reference).expect("remove");
        assert!(meta.images().expect("list").is_empty());
    }
}
