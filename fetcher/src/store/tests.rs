use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use lazyrun_index::{LayerSink, SpanInfo, StreamOptions, index_layer};

use super::*;

const BOOT: [u8; 16] = [1; 16];
const LATER: [u8; 16] = [2; 16];

/// Hands the decoded bytes on to a file.
struct Copy<'a>(&'a File);

impl LayerSink for Copy<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
    fn span(&mut self, _: &SpanInfo) -> io::Result<()> {
        Ok(())
    }
}

/// A plain tar of one file, about 3 MB.
fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let content: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "file", content.as_slice()).unwrap();
    builder.into_inner().unwrap()
}

/// Builds and publishes the layer as a stream would.
fn publish(store: &LayerStore, tar: &[u8]) -> Arc<Layer> {
    let staging = store.stage(Digest::of(tar)).unwrap();
    let data = staging.create(&staging.data_path()).unwrap();
    let out = staging.create(&staging.index_path()).unwrap();
    let options = StreamOptions { span_size: 64 << 10, ..StreamOptions::default() };
    let summary = index_layer(tar, &mut Copy(&data), out, &options).unwrap();
    assert!(summary.spans > 3);
    store.publish(staging, summary.spans as usize).unwrap()
}

fn read(layer: &Layer, offset: u64, len: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0; len];
    let n = layer.read_local(offset, &mut buffer).unwrap()?;
    buffer.truncate(n);
    Some(buffer)
}

#[test]
fn a_published_layer_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let made = tar();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = publish(&store, &made);
    assert!(layer.is_hydrated());
    assert!(Arc::ptr_eq(&layer, &store.get(layer.diff_id()).unwrap().unwrap()));
    drop((layer, store));
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = store.get(Digest::of(&made)).unwrap().unwrap();
    assert!(layer.is_hydrated());
    assert_eq!(read(&layer, 1000, 2_000_000).unwrap(), made[1000..2_001_000]);
    assert_eq!(read(&layer, made.len() as u64 - 5, 100).unwrap(), made[made.len() - 5..]);
    assert_eq!(read(&layer, u64::MAX, 100).unwrap(), b"");
    store.remove(layer.diff_id()).unwrap();
    assert!(store.get(layer.diff_id()).unwrap().is_none());
    assert_eq!(read(&layer, 0, 10).unwrap(), made[..10]);
    assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
}

#[test]
fn after_a_reboot_spans_are_verified_before_use() {
    let dir = tempfile::tempdir().unwrap();
    let made = tar();
    let layer = publish(&LayerStore::open_at_boot(dir.path(), BOOT).unwrap(), &made);
    let (path, id) = (layer.data_path(), layer.diff_id());
    let (second, fourth) = (layer.index().span(1), layer.index().span(3).offset as usize);
    drop(layer);
    // The power cut took a page in the second span.
    let hole = File::options().write(true).open(&path).unwrap();
    hole.write_all_at(&[0; 4096], second.offset + 5000).unwrap();
    let store = LayerStore::open_at_boot(dir.path(), LATER).unwrap();
    let layer = store.get(id).unwrap().unwrap();
    assert!(!layer.is_hydrated());
    assert_eq!(read(&layer, 0, 1000).unwrap(), made[..1000]);
    assert_eq!(read(&layer, second.offset, 100), None);
    assert_eq!(read(&layer, fourth as u64, 1000).unwrap(), made[fourth..fourth + 1000]);
    layer.verify_suspects().unwrap();
    assert!(!layer.has_suspects() && !layer.is_hydrated());
}

#[test]
fn what_was_synced_is_believed_after_a_reboot() {
    let dir = tempfile::tempdir().unwrap();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = publish(&store, &tar());
    store.sync().unwrap();
    let id = layer.diff_id();
    drop((layer, store));
    let store = LayerStore::open_at_boot(dir.path(), LATER).unwrap();
    let layer = store.get(id).unwrap().unwrap();
    assert!(layer.is_hydrated() && !layer.has_suspects());
    // A file of another length is not believed all the same.
    File::options().write(true).open(layer.data_path()).unwrap().set_len(50_000).unwrap();
    drop((layer, store));
    let layer = LayerStore::open_at_boot(dir.path(), LATER).unwrap().get(id).unwrap().unwrap();
    assert!(layer.has_suspects());
    assert_eq!(read(&layer, 2_900_000, 10), None);
}

#[test]
fn forgetting_frees_the_disk_and_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let made = tar();
    let layer = publish(&store, &made);
    layer.sync().unwrap();
    assert!(fs::metadata(layer.data_path()).unwrap().blocks() > 500);
    layer.forget().unwrap();
    assert_eq!(layer.local_bytes(), 0);
    assert_eq!(read(&layer, 0, 10), None);
    let meta = fs::metadata(layer.data_path()).unwrap();
    assert_eq!((meta.len(), meta.blocks()), (made.len() as u64, 0));
    let id = layer.diff_id();
    let span = layer.index().span(1);
    let (from, to) = (span.offset as usize, (span.offset + span.len) as usize);
    layer.write_span(&span, &made[from..to]).unwrap();
    layer.save_map().unwrap();
    drop((layer, store));
    let layer = LayerStore::open_at_boot(dir.path(), BOOT).unwrap().get(id).unwrap().unwrap();
    assert_eq!(layer.local_bytes(), span.len);
    assert_eq!(read(&layer, span.offset, 10).unwrap(), made[from..from + 10]);
    assert_eq!(read(&layer, 0, 10), None);
}

#[test]
fn damaged_layers_are_dropped_and_leftovers_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = publish(&store, &tar());
    let (id, data) = (layer.diff_id(), layer.data_path());
    drop((layer, store));
    let index = data.with_file_name(INDEX);
    let mut bytes = fs::read(&index).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&index, bytes).unwrap();
    fs::create_dir(dir.path().join("layers/.tmp-0123-9-0")).unwrap();

    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    assert!(store.get(id).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
    // A directory that a living stream holds is left alone.
    let staging = store.stage(id).unwrap();
    let _other = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 1);
    drop(staging);
    assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
}
