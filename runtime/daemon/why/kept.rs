//! Timelines on disk: a file for each start, named so that it is found without being opened. The last few of each image
//! stay.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lazyrun_index::Digest;

use crate::ipc::why::{Start, Started, VERSION};

/// Starts of one image.
const MAX_OF_IMAGE: usize = 8;
/// Images whose starts are kept.
const MAX_IMAGES: usize = 64;
/// A file that is longer was not written here.
const MAX_SIZE: u64 = 8 << 20;

/// The directory of timelines.
#[derive(Debug)]
pub(super) struct Kept {
    dir: PathBuf,
}

/// What the name of a file says: `IMAGE-NUMBER-ID-NAME.json`, the last two empty for what is no container of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    /// A part of the digest of the image's reference.
    image: String,
    number: u64,
    id: String,
    name: String,
}

impl Name {
    fn parse(file: &str) -> Option<Name> {
        let mut parts = file.strip_suffix(".json")?.splitn(4, '-');
        let image = parts.next()?.to_owned();
        let number = parts.next()?.parse().ok()?;
        Some(Name { image, number, id: parts.next()?.to_owned(), name: parts.next()?.to_owned() })
    }

    fn file(&self) -> String {
        format!("{}-{:020}-{}-{}.json", self.image, self.number, self.id, self.name)
    }
}

fn key(reference: &str) -> String {
    Digest::of(reference.as_bytes()).hex()[..16].to_owned()
}

impl Kept {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Keeps a start, in place of what was kept of it before, and lets go of old ones.
    pub(super) fn save(&self, reference: &str, number: u64, start: &Start) -> Result<()> {
        let (id, name) = match &start.what {
            Started::Container { id, name } => (id.clone(), name.clone()),
            Started::Mount | Started::Snapshot { .. } => (String::new(), String::new()),
        };
        let path = self.dir.join(Name { image: key(reference), number, id, name }.file());
        let write = || -> Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            serde_json::to_writer(std::io::BufWriter::new(&mut file), start)?;
            file.as_file().sync_data()?;
            file.persist(&path)?;
            std::fs::File::open(&self.dir)?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", path.display()))?;
        self.drop_old();
        Ok(())
    }

    /// Starts of an image, in no order, with their numbers.
    pub(super) fn of_image(&self, reference: &str) -> Vec<(u64, Start)> {
        let image = key(reference);
        self.load(|name| name.image == image)
    }

    /// Starts of containers whose id and name are what is looked for.
    pub(super) fn of_container(&self, wanted: impl Fn(&str, &str) -> bool) -> Vec<(u64, Start)> {
        self.load(|name| !name.id.is_empty() && wanted(&name.id, &name.name))
    }

    /// Forgets the starts of an image.
    pub(super) fn forget(&self, reference: &str) {
        let image = key(reference);
        for (_, path) in self.list().into_iter().filter(|(name, _)| name.image == image) {
            remove(&path);
        }
    }

    fn load(&self, wanted: impl Fn(&Name) -> bool) -> Vec<(u64, Start)> {
        let found = self.list().into_iter().filter(|(name, _)| wanted(name));
        found.filter_map(|(name, path)| Some((name.number, read(&path)?))).collect()
    }

    fn list(&self) -> Vec<(Name, PathBuf)> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some((Name::parse(entry.file_name().to_str()?)?, entry.path()))).collect()
    }

    fn drop_old(&self) {
        let mut all = self.list();
        all.sort_by_key(|(name, _)| std::cmp::Reverse(name.number));
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for (name, path) in &all {
            let known = counts.len();
            let count = counts.entry(&name.image).or_default();
            // Newest first: an image that is new here has its last start longest ago.
            if *count >= MAX_OF_IMAGE || (*count == 0 && known >= MAX_IMAGES) {
                remove(path);
            } else {
                *count += 1;
            }
        }
    }
}

fn read(path: &Path) -> Option<Start> {
    let len = std::fs::metadata(path).ok()?.len();
    if len > MAX_SIZE {
        return None;
    }
    let start: Start = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (start.version == VERSION).then_some(start)
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "an old timeline can't be deleted");
    }
}

#[cfg(test)]
mod tests {
    use super::super::recording::Recording;
    use super::*;

    #[test]
    fn the_last_few_of_each_image_stay() {
        let dir = tempfile::tempdir().expect("dir");
        let kept = Kept::new(dir.path().into());
        let start = Recording::new("h/app:v1", Started::Mount).snapshot();
        for number in 1..=20 {
            let name = format!("na-me.{number}");
            let what = Started::Container { id: format!("{number:064x}"), name };
            kept.save("h/app:v1", number, &Start { what, ..start.clone() }).expect("save");
        }
        kept.save("h/app:v1", 20, &Start { what: Started::Mount, ..start.clone() }).expect("save");
        let mut numbers: Vec<u64> = kept.of_image("h/app:v1").into_iter().map(|(n, _)| n).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [14, 15, 16, 17, 18, 19, 20, 20]);
        let of_name = |wanted: &str| kept.of_container(|_, name| name == wanted);
        assert_eq!((of_name("na-me.19").len(), of_name("na-me.1").len()), (1, 0));
        assert_eq!(kept.of_container(|id, _| id.ends_with("13")).len(), 1, "19 in hexadecimal");
        for image in 0..MAX_IMAGES + 5 {
            kept.save(&format!("h/{image}"), 100 + image as u64, &start).expect("save");
        }
        assert!(kept.of_image("h/app:v1").is_empty() && kept.of_image("h/0").is_empty());
        assert_eq!(kept.of_image("h/68").len(), 1);
        kept.forget("h/68");
        assert!(kept.of_image("h/68").is_empty());
    }

    #[test]
    fn what_is_not_understood_is_passed_over() {
        let dir = tempfile::tempdir().expect("dir");
        let kept = Kept::new(dir.path().into());
        let start = Recording::new("h/app:v1", Started::Mount).snapshot();
        kept.save("h/app:v1", 1, &Start { version: VERSION + 1, ..start }).expect("save");
        let broken = Name { image: key("h/app:v1"), number: 2, id: String::new(), name: String::new() };
        std::fs::write(dir.path().join(broken.file()), b"{\"version\":1").expect("write");
        std::fs::write(dir.path().join("README"), b"x").expect("write");
        assert!(kept.of_image("h/app:v1").is_empty());
        assert_eq!(kept.list().len(), 2);
    }
}
