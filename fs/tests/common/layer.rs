//! Layers made up in memory: a list of entries and the layer file they point into.

use lazyrun_fs::erofs::{DeviceSpec, LayerContent};
use lazyrun_fs::view::{Entry, LayerEntries};
use lazyrun_index::{EntryKind, Extent, Timestamp};

/// An entry with everything it owns.
#[derive(Clone, Debug)]
pub struct Item {
    pub path: Vec<u8>,
    pub kind: EntryKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub size: u64,
    pub link: Vec<u8>,
    pub rdev: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub extents: Vec<Extent>,
}

impl Item {
    pub fn new(path: impl AsRef<[u8]>, kind: EntryKind) -> Item {
        Item {
            path: path.as_ref().to_vec(),
            kind,
            mode: if kind == EntryKind::Directory { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: Timestamp { secs: 1_600_000_000, nanos: 0 },
            size: 0,
            link: Vec::new(),
            rdev: (0, 0),
            xattrs: Vec::new(),
            extents: Vec::new(),
        }
    }

    pub fn xattr(mut self, name: &str, value: &[u8]) -> Item {
        self.xattrs.push((name.into(), value.into()));
        self
    }

    pub fn mode(mut self, mode: u32) -> Item {
        self.mode = mode;
        self
    }

    pub fn owner(mut self, uid: u32, gid: u32) -> Item {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn time(mut self, secs: i64, nanos: u32) -> Item {
        self.mtime = Timestamp { secs, nanos };
        self
    }

    pub fn link(mut self, link: impl AsRef<[u8]>) -> Item {
        self.link = link.as_ref().to_vec();
        self
    }
}

/// A layer: entries and the bytes of its layer file, laid out as tar does it, block by block.
#[derive(Clone, Debug, Default)]
pub struct TestLayer {
    pub items: Vec<Item>,
    pub data: Vec<u8>,
}

impl TestLayer {
    pub fn add(&mut self, item: Item) -> &mut Self {
        self.items.push(item);
        self
    }

    pub fn dir(&mut self, path: impl AsRef<[u8]>) -> &mut Self {
        self.add(Item::new(path, EntryKind::Directory))
    }

    pub fn file(&mut self, path: impl AsRef<[u8]>, content: &[u8]) -> &mut Self {
        self.file_item(Item::new(path, EntryKind::File), content)
    }

    /// A file whose contents come behind a header block.
    pub fn file_item(&mut self, mut item: Item, content: &[u8]) -> &mut Self {
        self.data.resize(self.data.len() + 512, b'h');
        item.size = content.len() as u64;
        if !content.is_empty() {
            item.extents = vec![Extent {
                file_offset: 0,
                layer_offset: self.data.len() as u64,
                len: content.len() as u64,
            }];
        }
        self.data.extend_from_slice(content);
        self.data.resize(self.data.len().next_multiple_of(512), b'p');
        self.add(item)
    }

    /// A file with holes: `pieces` of (offset, bytes); they follow each other in the layer file without padding.
    pub fn sparse(&mut self, path: &str, size: u64, pieces: &[(u64, Vec<u8>)]) -> &mut Self {
        let mut item = Item::new(path, EntryKind::File);
        item.size = size;
        for (file_offset, bytes) in pieces {
            let layer_offset = self.data.len() as u64;
            item.extents.push(Extent { file_offset: *file_offset, layer_offset, len: bytes.len() as u64 });
            self.data.extend_from_slice(bytes);
        }
        self.data.resize(self.data.len().next_multiple_of(512), b'p');
        self.add(item)
    }

    pub fn symlink(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Self {
        self.add(Item::new(path, EntryKind::Symlink).link(target))
    }

    pub fn hardlink(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Self {
        self.add(Item::new(path, EntryKind::Hardlink).link(target))
    }
}

impl LayerEntries for TestLayer {
    fn name(&self) -> String {
        "sha256:test".to_owned()
    }

    fn count(&self) -> usize {
        self.items.len()
    }

    fn get(&self, i: usize) -> Entry<'_> {
        let e = &self.items[i];
        Entry {
            path: &e.path,
            kind: e.kind,
            mode: e.mode,
            uid: e.uid,
            gid: e.gid,
            mtime: e.mtime,
            size: e.size,
            link: &e.link,
            rdev: e.rdev,
        }
    }

    fn each_xattr(&self, i: usize, each: &mut dyn FnMut(&[u8], &[u8])) {
        for (name, value) in &self.items[i].xattrs {
            each(name, value);
        }
    }

    fn each_extent(&self, i: usize, each: &mut dyn FnMut(Extent)) {
        self.items[i].extents.iter().copied().for_each(each);
    }
}

/// Layer files in memory.
#[derive(Clone, Debug)]
pub struct Files(pub Vec<Vec<u8>>);

impl Files {
    pub fn of(layers: &[TestLayer]) -> Files {
        Files(layers.iter().map(|l| l.data.clone()).collect())
    }

    pub fn devices(&self) -> Vec<DeviceSpec> {
        self.0
            .iter()
            .map(|data| DeviceSpec::layer(&lazyrun_index::Digest::of(data).hex(), data.len() as u64))
            .collect()
    }
}

impl LayerContent for Files {
    fn read_at(&self, layer: u16, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let start = offset as usize;
        let bytes = self.0[usize::from(layer)]
            .get(start..start + buf.len())
            .ok_or(std::io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}
