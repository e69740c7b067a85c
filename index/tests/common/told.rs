//! Claims about a layer: its true index told again, with lies where a test wants them.

use lazyrun_index::{
    Digest, DigestOf, EntryKind, EntryRef, Extent, IndexBuilder, LayerFacts, LayerIndex, Layout, NewEntrance,
    NewEntry, NewSpan, Timestamp,
};

/// An entry that owns what it is made of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Told {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) size: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) rdev: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) extents: Vec<Extent>,
    pub(crate) content: Option<Digest>,
}

impl Told {
    pub(crate) fn of(entry: EntryRef<'_>) -> Self {
        Self {
            path: entry.path().to_vec(),
            kind: entry.kind(),
            mode: entry.mode(),
            uid: entry.uid(),
            gid: entry.gid(),
            mtime: entry.mtime(),
            size: entry.size(),
            link: entry.link().to_vec(),
            rdev: entry.rdev(),
            xattrs: entry.xattrs().map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
            extents: entry.extents().collect(),
            content: entry.content(),
        }
    }

    fn into(&self, builder: &mut IndexBuilder) {
        let xattrs: Vec<(&[u8], &[u8])> = self.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        let entry = NewEntry {
            path: &self.path,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            size: self.size,
            link: &self.link,
            rdev: self.rdev,
            xattrs: &xattrs,
            extents: &self.extents,
            content: self.content,
        };
        builder.entry(&entry).unwrap();
    }
}

/// Everything that is claimed of a layer.
#[derive(Clone)]
pub(crate) struct Claim {
    pub(crate) facts: LayerFacts,
    pub(crate) layout: Layout,
    pub(crate) entries: Vec<Told>,
    /// Spans that only come by streaming are enough for a proof.
    pub(crate) spans: Vec<NewSpan<'static>>,
}

impl Claim {
    /// The truth.
    pub(crate) fn of(index: &LayerIndex) -> Self {
        let entrance = match index.compression() {
            lazyrun_index::Compression::None => NewEntrance::Plain,
            _ => NewEntrance::None,
        };
        Self {
            facts: LayerFacts::of(index),
            layout: Layout::Tar,
            entries: index.entries().map(Told::of).collect(),
            spans: index.spans().map(|span| NewSpan::of(&span, entrance)).collect(),
        }
    }

    /// The truth as a table tells it: its own layer file, here without anything in it that could be looked at.
    pub(crate) fn table(index: &LayerIndex) -> Self {
        let mut claim = Self::of(index);
        claim.layout = Layout::Table;
        claim
    }

    /// With digests of the blob's ranges, or with none.
    pub(crate) fn with_digests(mut self, digest_of: DigestOf, blob: &[u8]) -> Self {
        for span in &mut self.spans {
            span.digest_of = digest_of;
            span.digest = match digest_of {
                DigestOf::Blob => Digest::of(&blob[span.blob_offset as usize..][..span.blob_len as usize]),
                _ => Digest::from_bytes([0; 32]),
            };
        }
        self
    }

    /// The entry with this path.
    pub(crate) fn entry(&mut self, path: &str) -> &mut Told {
        let found = self.entries.iter_mut().find(|e| e.path == path.as_bytes());
        found.unwrap_or_else(|| panic!("no entry {path}"))
    }

    pub(crate) fn index(&self) -> LayerIndex {
        let mut builder = IndexBuilder::new(&self.facts, self.layout);
        for entry in &self.entries {
            entry.into(&mut builder);
        }
        for span in &self.spans {
            builder.span(span).unwrap();
        }
        LayerIndex::from_bytes(builder.finish().unwrap()).unwrap()
    }
}
