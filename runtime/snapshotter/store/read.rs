//! Questions to the database.

use redb::{ReadableDatabase, ReadableTable};

use super::super::labels;
use super::{CHILDREN, IMAGES, LAYERS, Result, SNAPSHOTS, Store, below, find};
use crate::snapshotter::error::SnapshotError;
use crate::snapshotter::record::{Below, Chain, ImageRow, Kind, Named, Record, Remote};

impl Store {
    /// Whether this layer on this parent is there.
    ///
    /// # Errors
    /// The database's.
    pub fn has_layer(&self, namespace: &str, target: &str, parent: &str) -> Result<bool> {
        Ok(self.db.begin_read()?.open_table(LAYERS)?.get((namespace, target, parent))?.is_some())
    }

    /// One snapshot.
    ///
    /// # Errors
    /// When it is missing.
    pub fn stat(&self, namespace: Option<&str>, key: &str) -> Result<Named> {
        find(&self.db.begin_read()?.open_table(SNAPSHOTS)?, namespace, key)
    }

    /// An active snapshot or view and all it stands on.
    ///
    /// # Errors
    /// When it is missing or committed.
    pub fn chain(&self, namespace: Option<&str>, key: &str) -> Result<Chain> {
        let records = self.db.begin_read()?.open_table(SNAPSHOTS)?;
        let Named { namespace, record, .. } = find(&records, namespace, key)?;
        if record.kind == Kind::Committed {
            return Err(SnapshotError::FailedPrecondition(format!(
                "snapshot {key} is committed; only active snapshots and views are mounted"
            )));
        }
        let below = below(&records, &namespace, &record.parent)?;
        let idmap = labels::idmap(&record.labels);
        Ok(Chain { id: record.id, kind: record.kind, remote: record.remote, below, idmap })
    }

    /// What a snapshot made on `parent` would stand on, nearest first.
    ///
    /// # Errors
    /// When the parent is missing or not committed.
    pub fn below(&self, namespace: &str, parent: &str) -> Result<Vec<Below>> {
        below(&self.db.begin_read()?.open_table(SNAPSHOTS)?, namespace, parent)
    }

    /// All snapshots of a namespace, or of all namespaces.
    ///
    /// # Errors
    /// The database's.
    pub fn all(&self, namespace: Option<&str>) -> Result<Vec<Named>> {
        let records = self.db.begin_read()?.open_table(SNAPSHOTS)?;
        let mut all = Vec::new();
        for row in records.range((namespace.unwrap_or(""), "")..)? {
            let (key, value) = row?;
            let (of, name) = key.value();
            if namespace.is_some_and(|wanted| wanted != of) {
                break;
            }
            let record = serde_json::from_slice(value.value())?;
            all.push(Named { namespace: of.to_owned(), name: name.to_owned(), record });
        }
        Ok(all)
    }

    /// Whether anything else than layers of images stands on a snapshot.
    ///
    /// # Errors
    /// The database's.
    pub fn in_use(&self, namespace: &str, name: &str) -> Result<bool> {
        let read = self.db.begin_read()?;
        let records = read.open_table(SNAPSHOTS)?;
        for row in read.open_table(CHILDREN)?.range((namespace, name, "")..)? {
            let (key, _) = row?;
            let (of, below, child) = key.value();
            if (of, below) != (namespace, name) {
                break;
            }
            let Some(value) = records.get((namespace, child))? else { continue };
            if serde_json::from_slice::<Record>(value.value())?.remote.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The images that layers stand for, each from the bottom, with the id of the topmost snapshot. With `used`, only
    /// those that something else than layers stands on.
    ///
    /// # Errors
    /// The database's.
    pub fn views(&self, used: bool) -> Result<Vec<(u64, Vec<Remote>)>> {
        let read = self.db.begin_read()?;
        let records = read.open_table(SNAPSHOTS)?;
        let mut views = Vec::new();
        for named in self.all(None)? {
            let Some(remote) = named.record.remote else { continue };
            if used && !self.in_use(&named.namespace, &named.name)? {
                continue;
            }
            let below = below(&records, &named.namespace, &named.record.parent)?;
            let mut layers: Vec<Remote> = below.into_iter().rev().filter_map(|b| b.remote).collect();
            layers.push(remote);
            views.push((named.record.id, layers));
        }
        Ok(views)
    }

    /// All images, by key.
    ///
    /// # Errors
    /// The database's.
    pub fn images(&self) -> Result<Vec<(String, ImageRow)>> {
        let images = self.db.begin_read()?.open_table(IMAGES)?;
        let mut all = Vec::new();
        for row in images.iter()? {
            let (key, value) = row?;
            all.push((key.value().to_owned(), serde_json::from_slice(value.value())?));
        }
        Ok(all)
    }

    /// One image.
    ///
    /// # Errors
    /// The database's.
    pub fn image(&self, key: &str) -> Result<Option<ImageRow>> {
        let images = self.db.begin_read()?.open_table(IMAGES)?;
        let Some(value) = images.get(key)? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(value.value())?))
    }
}
