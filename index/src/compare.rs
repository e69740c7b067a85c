//! Do two indexes tell the same of a layer? One was claimed by somebody, the other comes out of the layer itself.

use std::collections::HashMap;

use crate::builder::NewEntry;
use crate::error::Name;
use crate::reader::EntryRef;
use crate::{Digest, EntryKind, Extent, LayerIndex, Layout, Timestamp};

/// Files that an eStargz blob's tar has and its table does not list, or lists for its own use only.
const TABLE_FILES: [&[u8]; 3] = [b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"];

/// Where a claimed index does not tell the truth about its layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Both have the entry, but an attribute of it differs.
    #[error("{path}: the index says {field} {claimed}, the layer has {proven}")]
    Field {
        /// The entry.
        path: Name,
        /// The attribute.
        field: &'static str,
        /// Its value in the index.
        claimed: String,
        /// Its value in the layer.
        proven: String,
    },
    /// Only the index has the entry.
    #[error("{path}: the index lists it, the layer does not have it")]
    Extra {
        /// The entry.
        path: Name,
    },
    /// Only the layer has the entry.
    #[error("{path}: the layer has it, the index leaves it out")]
    Missing {
        /// The entry.
        path: Name,
    },
    /// What the layer's archive makes of the entry depends on an order that the table does not keep.
    #[error("{path}: the layer's archive has it in an order that matters, which the index does not keep")]
    Order {
        /// The entry.
        path: Name,
    },
    /// The blob is what it should be, but a span's bytes do not have the digest that the index says.
    #[error("span {index}: the index says digest {claimed}, the layer has {proven}")]
    Span {
        /// Number of the span.
        index: u32,
        /// The digest in the index.
        claimed: Digest,
        /// The digest of the bytes.
        proven: Digest,
    },
    /// The layer file has another length.
    #[error("the index says that the layer file has {claimed} bytes, it has {proven}")]
    LayerSize {
        /// The length in the index.
        claimed: u64,
        /// The length of the layer file.
        proven: u64,
    },
}

impl Mismatch {
    /// The path of the entry that differs, if it is an entry.
    #[must_use]
    pub fn path(&self) -> Option<&[u8]> {
        match self {
            Self::Field { path, .. }
            | Self::Extra { path }
            | Self::Missing { path }
            | Self::Order { path } => Some(path.as_bytes()),
            Self::Span { .. } | Self::LayerSize { .. } => None,
        }
    }
}

/// Whether `claimed` tells of every entry what `proven`, the index built from the layer itself, does.
///
/// Tar layouts are compared entry by entry in archive order, extents included: equal extents in the same tar are
/// equal contents. Tables ([`Layout::Table`]) list entries in their own order: there the last entry of each path
/// counts, times without nanoseconds may be rounded, the table's own files may be left out, and nothing is said of
/// the extents, because they lie in another layer file: whoever copies the contents into it checks the spans'
/// digests, and that what no extent covers is zeros. A content digest counts where both have one.
pub fn compare(claimed: &LayerIndex, proven: &LayerIndex) -> Result<(), Mismatch> {
    let mut comparer = Comparer::new(claimed);
    for entry in proven.entries() {
        let (xattrs, extents) = (entry.xattrs().collect::<Vec<_>>(), entry.extents().collect::<Vec<_>>());
        comparer.entry(&NewEntry::of(&entry, &xattrs, &extents));
    }
    comparer.finish()
}

/// Takes the layer's entries one by one, in archive order.
pub(crate) struct Comparer<'a> {
    claimed: &'a LayerIndex,
    order: Order<'a>,
    /// The first that was found.
    found: Option<Mismatch>,
}

enum Order<'a> {
    /// Number of the claimed entry that is next.
    Archive(usize),
    Paths(Paths<'a>),
}

impl<'a> Comparer<'a> {
    pub(crate) fn new(claimed: &'a LayerIndex) -> Self {
        let order = match claimed.layout() {
            Layout::Tar => Order::Archive(0),
            Layout::Table => Order::Paths(Paths::new(claimed)),
        };
        Self { claimed, order, found: None }
    }

    /// The layer's next entry. What differs is kept for [`Comparer::finish`]: whether the layer itself is sound is
    /// only known at its end.
    pub(crate) fn entry(&mut self, proven: &NewEntry<'_>) {
        if self.found.is_some() {
            return;
        }
        let compared = match &mut self.order {
            Order::Archive(next) => {
                let i = *next;
                *next += 1;
                if i < self.claimed.entry_count() {
                    same_place(&self.claimed.entry(i), proven)
                } else {
                    Err(Mismatch::Missing { path: Name::new(proven.path) })
                }
            }
            Order::Paths(paths) => paths.entry(self.claimed, proven),
        };
        self.found = compared.err();
    }

    /// The verdict.
    pub(crate) fn finish(self) -> Result<(), Mismatch> {
        if let Some(found) = self.found {
            return Err(found);
        }
        match self.order {
            Order::Archive(next) if next < self.claimed.entry_count() => {
                Err(Mismatch::Extra { path: Name::new(self.claimed.entry(next).path()) })
            }
            Order::Archive(_) => Ok(()),
            Order::Paths(paths) => paths.finish(self.claimed),
        }
    }
}

/// Compares the entries at one place of two archives.
fn same_place(claimed: &EntryRef<'_>, proven: &NewEntry<'_>) -> Result<(), Mismatch> {
    if claimed.path() != proven.path {
        let name = |path| Name::new(path).to_string();
        return differs(proven, "path", name(claimed.path()), name(proven.path));
    }
    same_fields(claimed, proven)?;
    if claimed.mtime() != proven.mtime {
        return differs(proven, "mtime", time(claimed.mtime()), time(proven.mtime));
    }
    if !claimed.extents().eq(proven.extents.iter().copied()) {
        let extents = |n: usize, first: Option<Extent>| match first {
            Some(e) => format!("{n} extents from byte {} of the layer file", e.layer_offset),
            None => "no extents".into(),
        };
        let (theirs, ours) = (claimed.extents(), proven.extents);
        let (theirs, ours) =
            (extents(theirs.len(), claimed.extents().next()), extents(ours.len(), ours.first().copied()));
        return differs(proven, "its data in", theirs, ours);
    }
    Ok(())
}

/// Compares what does not depend on the layout.
fn same_fields(claimed: &EntryRef<'_>, proven: &NewEntry<'_>) -> Result<(), Mismatch> {
    let differ = |field, claimed: String, true_value: String| differs(proven, field, claimed, true_value);
    if claimed.kind() != proven.kind {
        return differ("kind", format!("{:?}", claimed.kind()), format!("{:?}", proven.kind));
    }
    if claimed.mode() != proven.mode {
        return differ("mode", format!("{:04o}", claimed.mode()), format!("{:04o}", proven.mode));
    }
    if claimed.uid() != proven.uid {
        return differ("uid", claimed.uid().to_string(), proven.uid.to_string());
    }
    if claimed.gid() != proven.gid {
        return differ("gid", claimed.gid().to_string(), proven.gid.to_string());
    }
    if claimed.size() != proven.size {
        return differ("size", claimed.size().to_string(), proven.size.to_string());
    }
    if claimed.link() != proven.link {
        let name = |link| Name::new(link).to_string();
        return differ("link target", name(claimed.link()), name(proven.link));
    }
    if claimed.rdev() != proven.rdev {
        let numbers = |(major, minor): (u32, u32)| format!("{major}:{minor}");
        return differ("device number", numbers(claimed.rdev()), numbers(proven.rdev));
    }
    same_xattrs(claimed, proven)?;
    match (claimed.content(), proven.content) {
        (Some(theirs), Some(ours)) if theirs != ours => {
            differ("content", theirs.to_string(), ours.to_string())
        }
        _ => Ok(()),
    }
}

fn same_xattrs(claimed: &EntryRef<'_>, proven: &NewEntry<'_>) -> Result<(), Mismatch> {
    let mut theirs: Vec<_> = claimed.xattrs().collect();
    let mut ours = proven.xattrs.to_vec();
    if theirs == ours {
        return Ok(());
    }
    theirs.sort_unstable();
    ours.sort_unstable();
    let only = |all: &[(&[u8], &[u8])], in_other: &[(&[u8], &[u8])]| {
        let different = all.iter().find(|one| !in_other.contains(one));
        different
            .map_or("no other".into(), |(name, value)| format!("{}={}", Name::new(name), Name::new(value)))
    };
    if theirs == ours {
        return Ok(());
    }
    differs(proven, "extended attribute", only(&theirs, &ours), only(&ours, &theirs))
}

fn differs(
    proven: &NewEntry<'_>,
    field: &'static str,
    claimed: String,
    true_value: String,
) -> Result<(), Mismatch> {
    Err(Mismatch::Field { path: Name::new(proven.path), field, claimed, proven: true_value })
}

fn time(at: Timestamp) -> String {
    format!("{}.{:09}", at.secs, at.nanos)
}

/// The entries of a table by path.
struct Paths<'a> {
    last: HashMap<&'a [u8], Path>,
    /// Entries of the layer so far.
    count: usize,
}

/// What is known of one path.
struct Path {
    /// The claimed entry that counts.
    claimed: usize,
    claims: Seen,
    layer: Seen,
    /// Number of the layer's entry that counts.
    place: usize,
    differs: Option<Box<Mismatch>>,
}

/// How often and as what a path occurs.
#[derive(Default)]
struct Seen {
    count: usize,
    directory: bool,
    other: bool,
}

impl Seen {
    fn add(&mut self, kind: EntryKind) {
        self.count += 1;
        if kind == EntryKind::Directory { self.directory = true } else { self.other = true }
    }
}

impl<'a> Paths<'a> {
    fn new(claimed: &'a LayerIndex) -> Self {
        let mut last: HashMap<&[u8], Path> = HashMap::with_capacity(claimed.entry_count());
        for (i, entry) in claimed.entries().enumerate() {
            let path = last.entry(entry.path()).or_insert_with(|| Path {
                claimed: i,
                claims: Seen::default(),
                layer: Seen::default(),
                place: 0,
                differs: None,
            });
            path.claimed = i;
            path.claims.add(entry.kind());
        }
        Self { last, count: 0 }
    }

    fn entry(&mut self, claimed: &LayerIndex, proven: &NewEntry<'_>) -> Result<(), Mismatch> {
        self.count += 1;
        let Some(path) = self.last.get_mut(proven.path) else {
            if proven.kind == EntryKind::File && TABLE_FILES.contains(&proven.path) {
                return Ok(());
            }
            return Err(Mismatch::Missing { path: Name::new(proven.path) });
        };
        path.layer.add(proven.kind);
        path.place = self.count;
        let entry = claimed.entry(path.claimed);
        let compared = same_fields(&entry, proven).and_then(|()| {
            if may_be(entry.mtime(), proven.mtime) {
                return Ok(());
            }
            differs(proven, "mtime", time(entry.mtime()), time(proven.mtime))
        });
        // A later entry of the same path may still make it right.
        path.differs = compared.err().map(Box::new);
        Ok(())
    }

    fn finish(mut self, claimed: &LayerIndex) -> Result<(), Mismatch> {
        if let Some(path) = self.child_of_no_directory(claimed) {
            return Err(Mismatch::Order { path: Name::new(path) });
        }
        // In the table's order, so that the answer is the same every time.
        for (i, entry) in claimed.entries().enumerate() {
            let name = || Name::new(entry.path());
            let Some(path) = self.last.get_mut(entry.path()) else { continue };
            if path.claimed != i {
                continue;
            }
            if let Some(differs) = path.differs.take() {
                return Err(*differs);
            }
            if path.layer.count == 0 {
                return Err(Mismatch::Extra { path: name() });
            }
            let path = &self.last[entry.path()];
            if !self.order_is_all_one(&entry, path) {
                return Err(Mismatch::Order { path: name() });
            }
        }
        Ok(())
    }

    /// A path inside of something that is no directory: that was one, if only implied, when the archive put the path
    /// there. By neighbours in sorted order, because looking up each parent of each path is what a hostile table of
    /// deep paths would have us do.
    fn child_of_no_directory(&self, claimed: &LayerIndex) -> Option<&'a [u8]> {
        let mut paths: Vec<&'a [u8]> = self.last.keys().copied().collect();
        paths.sort_unstable();
        claimed.entries().enumerate().find_map(|(i, entry)| {
            let counts = self.last.get(entry.path()).is_some_and(|p| p.claimed == i);
            if !counts || entry.kind() == EntryKind::Directory {
                return None;
            }
            let mut inside = entry.path().to_vec();
            inside.push(b'/');
            let next = paths.get(paths.partition_point(|path| *path < inside.as_slice()))?;
            next.starts_with(&inside).then_some(*next)
        })
    }

    /// Whether the layer's order and the table's give the same tree around this entry.
    fn order_is_all_one(&self, entry: &EntryRef<'_>, path: &Path) -> bool {
        // A directory that becomes something else loses what is in it.
        if (path.layer.directory && path.layer.other) || (path.claims.directory && path.claims.other) {
            return false;
        }
        if entry.kind() != EntryKind::Hardlink {
            return true;
        }
        // A link to a file that is replaced keeps the old one; one that comes before its target means an earlier layer's.
        self.last.get(entry.link()).is_none_or(|target| {
            let once = target.layer.count == 1 && target.claims.count == 1;
            once && (target.claimed < path.claimed) == (target.place < path.place)
        })
    }
}

/// Whether a table's time can be the true one: exactly, or rounded to whole seconds (eStargz rounds to the nearest).
fn may_be(claimed: Timestamp, proven: Timestamp) -> bool {
    let up = proven.nanos >= 500_000_000;
    claimed == proven
        || claimed.nanos == 0
            && (claimed.secs == proven.secs || up && proven.secs.checked_add(1) == Some(claimed.secs))
}
