//! The database of snapshots: one redb file, one writer, the daemon. Each request is one transaction.

mod blobs;
mod read;
#[cfg(test)]
mod tests;

use std::path::Path;

use redb::{Database, ReadableTable, Table, TableDefinition};

use super::error::SnapshotError;
use super::labels;
use super::record::{Below, Chain, ImageRow, Kind, Labels, Moment, Named, Record, Remote, Usage};

/// The layout of the tables.
const FORMAT: u64 = 1;
const STATE: TableDefinition<'_, &str, u64> = TableDefinition::new("state");
/// By namespace and name.
const SNAPSHOTS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("snapshots.v1");
/// By namespace, name of the parent and name.
const CHILDREN: TableDefinition<'_, (&str, &str, &str), ()> = TableDefinition::new("children.v1");
/// Names of snapshots that are layers of images, by namespace, chainID and name of the parent.
const LAYERS: TableDefinition<'_, (&str, &str, &str), &str> = TableDefinition::new("layers.v1");
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images.v1");
/// Images of which containerd is to get all layers, by its namespace and the image's key.
const BLOBS: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("blobs.v1");

type Result<T> = std::result::Result<T, SnapshotError>;
type Records<'a> = Table<'a, (&'static str, &'static str), &'static [u8]>;

/// The database.
#[derive(Debug)]
pub struct Store {
    db: Database,
}

/// What is asked of [`Store::create`].
#[derive(Debug)]
pub struct New<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The snapshot's key.
    pub key: &'a str,
    /// What it stands on; empty for nothing.
    pub parent: &'a str,
    /// Active or view.
    pub kind: Kind,
    /// Its labels.
    pub labels: Labels,
    /// Set when it stands for a layer that will be committed later.
    pub remote: Option<Remote>,
}

/// What is asked of [`Store::commit`].
#[derive(Debug)]
pub struct Commit<'a> {
    /// containerd's namespace, if it was said.
    pub namespace: Option<&'a str>,
    /// The key of the active snapshot.
    pub key: &'a str,
    /// The name it gets.
    pub name: &'a str,
    /// What it is to stand on, if that was left open when it was made.
    pub parent: &'a str,
    /// Its labels from now on.
    pub labels: Labels,
    /// What it takes.
    pub usage: Usage,
}

/// What is asked of [`Store::take_layer`].
#[derive(Debug)]
pub struct TakenLayer<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The name it gets.
    pub name: &'a str,
    /// The chainID.
    pub target: &'a str,
    /// What it stands on; empty for nothing.
    pub parent: &'a str,
    /// Its labels.
    pub labels: Labels,
    /// The layer.
    pub remote: Remote,
    /// Its image.
    pub image: &'a ImageRow,
}

impl Store {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// When the file can't be opened, is damaged, or was written by a later version.
    pub fn open(path: &Path) -> Result<Self> {
        let db = Database::create(path)?;
        let write = db.begin_write()?;
        {
            let mut state = write.open_table(STATE)?;
            let format = state.get("format")?.map_or(FORMAT, |value| value.value());
            if format > FORMAT {
                return Err(SnapshotError::Internal(format!(
                    "{} was written by a later version of lazyrun (format {format}); use that",
                    path.display()
                )));
            }
            state.insert("format", FORMAT)?;
            write.open_table(SNAPSHOTS)?;
            write.open_table(CHILDREN)?;
            write.open_table(LAYERS)?;
            write.open_table(IMAGES)?;
            write.open_table(BLOBS)?;
        }
        write.commit()?;
        Ok(Self { db })
    }

    /// Makes an active snapshot or a view. `prepare` is told its id and does what must be done before it is there.
    ///
    /// # Errors
    /// When the key is taken or the parent is missing or not committed, or what `prepare` says.
    pub fn create(&self, new: New<'_>, prepare: impl FnOnce(u64) -> Result<()>) -> Result<Chain> {
        let write = self.db.begin_write()?;
        let chain = {
            let mut records = write.open_table(SNAPSHOTS)?;
            if records.get((new.namespace, new.key))?.is_some() {
                return Err(SnapshotError::AlreadyExists(new.key.to_owned()));
            }
            let below = below(&records, new.namespace, new.parent)?;
            let id = next_id(&mut write.open_table(STATE)?)?;
            let now = Moment::now();
            let record = Record {
                id,
                kind: new.kind,
                parent: new.parent.to_owned(),
                labels: new.labels,
                created: now,
                updated: now,
                usage: Usage::default(),
                remote: new.remote.clone(),
            };
            put(&mut records, new.namespace, new.key, &record)?;
            if !new.parent.is_empty() {
                write.open_table(CHILDREN)?.insert((new.namespace, new.parent, new.key), ())?;
            }
            prepare(id)?;
            let idmap = labels::idmap(&record.labels);
            Chain { id, kind: new.kind, remote: new.remote, below, idmap }
        };
        write.commit()?;
        Ok(chain)
    }

    /// Commits a layer of an image in one step.
    ///
    /// # Errors
    /// [`SnapshotError::AlreadyExists`] when this layer on this parent, or the name, is taken; others as
    /// [`Store::create`].
    pub fn take_layer(&self, layer: TakenLayer<'_>) -> Result<()> {
        let write = self.db.begin_write()?;
        {
            let mut records = write.open_table(SNAPSHOTS)?;
            let mut layers = write.open_table(LAYERS)?;
            let place = (layer.namespace, layer.target, layer.parent);
            let taken = layers.get(place)?.is_some();
            if taken || records.get((layer.namespace, layer.name))?.is_some() {
                return Err(SnapshotError::AlreadyExists(layer.target.to_owned()));
            }
            below(&records, layer.namespace, layer.parent)?;
            let id = next_id(&mut write.open_table(STATE)?)?;
            let now = Moment::now();
            let image = layer.remote.image.clone();
            let record = Record {
                id,
                kind: Kind::Committed,
                parent: layer.parent.to_owned(),
                labels: layer.labels,
                created: now,
                updated: now,
                usage: Usage::default(),
                remote: Some(layer.remote),
            };
            put(&mut records, layer.namespace, layer.name, &record)?;
            layers.insert(place, layer.name)?;
            if !layer.parent.is_empty() {
                write.open_table(CHILDREN)?.insert((layer.namespace, layer.parent, layer.name), ())?;
            }
            let row = serde_json::to_vec(layer.image)?;
            write.open_table(IMAGES)?.insert(image.as_str(), row.as_slice())?;
        }
        write.commit()?;
        Ok(())
    }

    /// Keeps an image.
    ///
    /// # Errors
    /// The database's.
    pub fn put_image(&self, key: &str, row: &ImageRow) -> Result<()> {
        let write = self.db.begin_write()?;
        write.open_table(IMAGES)?.insert(key, serde_json::to_vec(row)?.as_slice())?;
        write.commit()?;
        Ok(())
    }

    /// Makes a committed snapshot of an active one.
    ///
    /// # Errors
    /// When the key is missing or not active, the name is taken, or the parent can't be set.
    pub fn commit(&self, commit: Commit<'_>) -> Result<()> {
        let write = self.db.begin_write()?;
        {
            let mut records = write.open_table(SNAPSHOTS)?;
            let Named { namespace, name: key, mut record } = find(&records, commit.namespace, commit.key)?;
            if records.get((namespace.as_str(), commit.name))?.is_some() {
                return Err(SnapshotError::AlreadyExists(commit.name.to_owned()));
            }
            if record.kind != Kind::Active {
                return Err(SnapshotError::FailedPrecondition(format!("snapshot {key} is not active")));
            }
            if !commit.parent.is_empty() && commit.parent != record.parent {
                if !record.parent.is_empty() {
                    return Err(SnapshotError::InvalidArgument(format!(
                        "snapshot {key} stands on {}, it can't be moved onto {}",
                        record.parent, commit.parent
                    )));
                }
                below(&records, &namespace, commit.parent)?;
                commit.parent.clone_into(&mut record.parent);
            }
            record.kind = Kind::Committed;
            record.created = Moment::now();
            record.updated = record.created;
            record.labels = commit.labels;
            record.usage = commit.usage;
            records.remove((namespace.as_str(), key.as_str()))?;
            put(&mut records, &namespace, commit.name, &record)?;
            if !record.parent.is_empty() {
                let mut children = write.open_table(CHILDREN)?;
                children.remove((namespace.as_str(), record.parent.as_str(), key.as_str()))?;
                children.insert((namespace.as_str(), record.parent.as_str(), commit.name), ())?;
            }
            if let (Some(_), Some(target)) = (&record.remote, record.labels.get(super::labels::TARGET)) {
                let place = (namespace.as_str(), target.as_str(), record.parent.as_str());
                write.open_table(LAYERS)?.insert(place, commit.name)?;
            }
        }
        write.commit()?;
        Ok(())
    }

    /// Takes a snapshot away that nothing stands on.
    ///
    /// # Errors
    /// When it is missing or something stands on it.
    pub fn remove(&self, namespace: Option<&str>, key: &str) -> Result<Named> {
        let write = self.db.begin_write()?;
        let removed = {
            let mut records = write.open_table(SNAPSHOTS)?;
            let removed = find(&records, namespace, key)?;
            let mut children = write.open_table(CHILDREN)?;
            let (namespace, name) = (removed.namespace.as_str(), removed.name.as_str());
            if let Some(child) = first_child(&children, namespace, name)? {
                return Err(SnapshotError::FailedPrecondition(format!(
                    "snapshot {name} can't be removed: {child} stands on it"
                )));
            }
            let parent = removed.record.parent.as_str();
            children.remove((namespace, parent, name))?;
            records.remove((namespace, name))?;
            if let (Some(_), Some(target)) =
                (&removed.record.remote, removed.record.labels.get(super::labels::TARGET))
            {
                let mut layers = write.open_table(LAYERS)?;
                let ours =
                    layers.get((namespace, target.as_str(), parent))?.is_some_and(|v| v.value() == name);
                if ours {
                    layers.remove((namespace, target.as_str(), parent))?;
                }
            }
            removed
        };
        write.commit()?;
        Ok(removed)
    }

    /// Changes labels: those that `paths` name, all of them without.
    ///
    /// # Errors
    /// When the snapshot is missing or a path names something else than labels.
    pub fn update(
        &self,
        namespace: Option<&str>,
        key: &str,
        labels: &Labels,
        paths: &[String],
    ) -> Result<Named> {
        let write = self.db.begin_write()?;
        let named = {
            let mut records = write.open_table(SNAPSHOTS)?;
            let mut named = find(&records, namespace, key)?;
            let all = ["labels".to_owned()];
            for path in if paths.is_empty() { all.as_slice() } else { paths } {
                change_labels(&mut named.record.labels, labels, path).ok_or_else(|| {
                    SnapshotError::InvalidArgument(format!(
                        "the field {path:?} of snapshot {key} can't be changed"
                    ))
                })?;
            }
            named.record.labels.retain(|_, value| !value.is_empty());
            named.record.updated = Moment::now();
            put(&mut records, &named.namespace, &named.name, &named.record)?;
            named
        };
        write.commit()?;
        Ok(named)
    }

    /// Forgets the images that no snapshot is a layer of; returns the keys of those.
    ///
    /// # Errors
    /// The database's.
    pub fn forget_images(&self) -> Result<Vec<String>> {
        let write = self.db.begin_write()?;
        let gone = {
            let records = write.open_table(SNAPSHOTS)?;
            let mut used = std::collections::HashSet::new();
            for row in records.iter()? {
                let record: Record = serde_json::from_slice(row?.1.value())?;
                used.extend(record.remote.map(|remote| remote.image));
            }
            let mut images = write.open_table(IMAGES)?;
            let mut gone = Vec::new();
            for row in images.iter()? {
                let key = row?.0.value().to_owned();
                if !used.contains(&key) {
                    gone.push(key);
                }
            }
            for key in &gone {
                images.remove(key.as_str())?;
            }
            gone
        };
        write.commit()?;
        Ok(gone)
    }
}

fn next_id(state: &mut Table<'_, &'static str, u64>) -> Result<u64> {
    let id = state.get("last id")?.map_or(0, |value| value.value()) + 1;
    state.insert("last id", id)?;
    Ok(id)
}

fn put(records: &mut Records<'_>, namespace: &str, name: &str, record: &Record) -> Result<()> {
    records.insert((namespace, name), serde_json::to_vec(record)?.as_slice())?;
    Ok(())
}

// Requests that name no namespace mean all of them: containerd's garbage collector asks so.
fn find(
    records: &impl ReadableTable<(&'static str, &'static str), &'static [u8]>,
    namespace: Option<&str>,
    key: &str,
) -> Result<Named> {
    let named = |namespace: &str, bytes: &[u8]| -> Result<Named> {
        let record = serde_json::from_slice(bytes)?;
        Ok(Named { namespace: namespace.to_owned(), name: key.to_owned(), record })
    };
    let not_found = || SnapshotError::NotFound(key.to_owned());
    let first = namespace.unwrap_or("");
    if let Some(value) = records.get((first, key))? {
        return named(first, value.value());
    }
    if namespace.is_some() {
        return Err(not_found());
    }
    let mut found = None;
    for row in records.iter()? {
        let (place, value) = row?;
        let (namespace, name) = place.value();
        if name == key && found.replace(named(namespace, value.value())?).is_some() {
            return Err(SnapshotError::FailedPrecondition(format!(
                "snapshot {key} is in several namespaces; say in which"
            )));
        }
    }
    found.ok_or_else(not_found)
}

fn below(
    records: &impl ReadableTable<(&'static str, &'static str), &'static [u8]>,
    namespace: &str,
    parent: &str,
) -> Result<Vec<Below>> {
    let mut below = Vec::new();
    let mut name = parent.to_owned();
    while !name.is_empty() {
        let value = records.get((namespace, name.as_str()))?;
        let value = value.ok_or_else(|| SnapshotError::NotFound(name.clone()))?;
        let record: Record = serde_json::from_slice(value.value())?;
        if record.kind != Kind::Committed {
            return Err(SnapshotError::InvalidArgument(format!("snapshot {name} is not committed")));
        }
        below.push(Below { id: record.id, remote: record.remote });
        name = record.parent;
    }
    Ok(below)
}

fn first_child(
    children: &impl ReadableTable<(&'static str, &'static str, &'static str), ()>,
    namespace: &str,
    parent: &str,
) -> Result<Option<String>> {
    let first = children.range((namespace, parent, "")..)?.next().transpose()?;
    let child = first.and_then(|(key, _)| {
        let (of, below, name) = key.value();
        (of == namespace && below == parent).then(|| name.to_owned())
    });
    Ok(child)
}

fn change_labels(labels: &mut Labels, new: &Labels, path: &str) -> Option<()> {
    if path == "labels" {
        labels.clone_from(new);
        return Some(());
    }
    let label = path.strip_prefix("labels.")?;
    // A label that is set to nothing is taken away.
    labels.insert(label.to_owned(), new.get(label).cloned().unwrap_or_default());
    Some(())
}
