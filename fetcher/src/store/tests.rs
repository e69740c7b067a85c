use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use lazyrun_index::{
    Compression, DigestOf, IndexBuilder, LayerFacts, LayerSink, NewEntrance, NewSpan, SpanInfo,
    StreamOptions, index_layer,
};

use super::*;
use crate::trust::{OriginKind, Trust};

pub(super) const BOOT: [u8; 16] = [1; 16];
pub(super) const LATER: [u8; 16] = [2; 16];

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
pub(super) fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let content: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "file", content.as_slice()).unwrap();
    builder.into_inner().unwrap()
}

/// Builds and publishes the layer as a stream would.
pub(crate) fn publish(store: &LayerStore, tar: &[u8]) -> Arc<Layer> {
    let staging = store.stage(LayerId::tar(Digest::of(tar))).unwrap();
    let data = staging.create(&staging.data_path()).unwrap();
    let out = staging.create(&staging.index_path()).unwrap();
    let options = StreamOptions { span_size: 64 << 10, ..StreamOptions::default() };
    let summary = index_layer(tar, &mut Copy(&data), out, &options).unwrap();
    assert!(summary.spans > 3);
    store.publish(staging, summary.spans as usize, false).unwrap()
}

pub(super) fn read(layer: &Layer, offset: u64, len: usize) -> Option<Vec<u8>> {
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
    store.remove(layer.id()).unwrap();
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
    assert!(layer.write_span(&span, &made[from..to]).unwrap());
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
    let staging = store.stage(LayerId::tar(id)).unwrap();
    let _other = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 1);
    drop(staging);
    assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
}

/// An adopted index of a plain tar in spans of 64 KiB with these digests.
fn claim(tar: &[u8], digest_of: DigestOf) -> Vec<u8> {
    let facts = LayerFacts {
        blob_digest: Digest::of(tar),
        blob_size: tar.len() as u64,
        diff_id: Digest::of(tar),
        compression: Compression::None,
    };
    let mut builder = IndexBuilder::new(&facts, Layout::Tar);
    for (i, bytes) in tar.chunks(64 << 10).enumerate() {
        let span = NewSpan {
            blob_offset: (i << 16) as u64,
            blob_len: bytes.len() as u64,
            len: bytes.len() as u64,
            pad: 0,
            digest: if digest_of == DigestOf::Nothing {
                Digest::from_bytes([0; 32])
            } else {
                Digest::of(bytes)
            },
            digest_of,
            entrance: NewEntrance::Plain,
        };
        builder.span(&span).unwrap();
    }
    builder.finish().unwrap()
}

fn origin() -> Origin {
    Origin { kind: OriginKind::SociV1, artifact: None, trust: Trust::Bound }
}

#[test]
fn learnt_digests_verify_after_a_reboot() {
    let made = tar();
    for lose in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
        let layer = store.adopt(&claim(&made, DigestOf::Blob), &origin()).unwrap();
        for number in [1, 3, 5] {
            let span = layer.index().span(number);
            let bytes = &made[span.offset as usize..(span.offset + span.len) as usize];
            assert!(layer.write_span(&span, bytes).unwrap());
            // The same once more is no news, other bytes are refused.
            assert!(layer.write_span(&span, bytes).unwrap());
            assert!(!layer.write_span(&span, &vec![7; bytes.len()]).unwrap());
        }
        layer.save_map().unwrap();
        let (path, third) = (layer.data_path(), layer.index().span(3).offset);
        drop((layer, store));
        // The power cut took a page of one span and, in one case, all that was learnt.
        File::options().write(true).open(&path).unwrap().write_all_at(&[0; 4096], third + 5000).unwrap();
        if lose {
            fs::write(path.with_file_name(DIGESTS), b"").unwrap();
        }
        let store = LayerStore::open_at_boot(dir.path(), LATER).unwrap();
        let layer = store.get(Digest::of(&made)).unwrap().unwrap();
        assert!(layer.has_suspects() && !layer.is_proven());
        layer.verify_suspects().unwrap();
        let local: Vec<usize> = (0..8).filter(|i| layer.has_span(*i)).collect();
        assert_eq!(local, if lose { vec![] } else { vec![1, 5] });
        assert!(!layer.has_suspects());
    }
}

#[test]
fn a_proven_layer_accepts_only_what_was_learnt() {
    let dir = tempfile::tempdir().unwrap();
    let made = tar();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = store.adopt(&claim(&made, DigestOf::Nothing), &origin()).unwrap();
    let span = layer.index().span(2);
    let bytes = &made[span.offset as usize..(span.offset + span.len) as usize];
    assert!(!layer.can_fault(&span), "nothing vouches for it yet");
    layer.write_ahead(span.offset, bytes).unwrap();
    assert_eq!(read(&layer, span.offset, 10), None);
    layer.admit_span(&span, Digest::of(bytes), layer.epoch()).unwrap();
    assert_eq!(read(&layer, span.offset, 10).unwrap(), bytes[..10]);
    layer.prove().unwrap();
    layer.prove().unwrap();
    layer.forget().unwrap();
    assert!(layer.can_fault(&span) && !layer.can_fault(&layer.index().span(3)));
    assert!(!layer.write_span(&span, &vec![7; bytes.len()]).unwrap());
    assert_eq!(read(&layer, span.offset, 10), None);
    assert!(layer.write_span(&span, bytes).unwrap());
    // What was dropped since the pass began does not count as there.
    let epoch = layer.epoch();
    layer.write_ahead(0, &made[..100]).unwrap();
    layer.forget().unwrap();
    layer.admit_span(&layer.index().span(0), Digest::of(&made[..65_536]), epoch).unwrap();
    assert_eq!(read(&layer, 0, 10), None);
}

#[test]
fn an_origin_that_cannot_be_read_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = store.adopt(&claim(&tar(), DigestOf::Decoded), &origin()).unwrap();
    let (id, name, path) =
        (layer.id(), layer.file_name().to_owned(), layer.data_path().with_file_name("origin"));
    assert_eq!(store.file_name(id), Some(name));
    drop((layer, store));
    fs::write(path, br#"{"version":2}"#).unwrap();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    assert!(store.by_id(id).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_lie_makes_room_for_another_claim() {
    let dir = tempfile::tempdir().unwrap();
    let made = tar();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let layer = store.adopt(&claim(&made, DigestOf::Decoded), &origin()).unwrap();
    assert!(matches!(store.condemn(&layer, "so"), FetchError::Lie { reason, .. } if reason == "so"));
    assert!(store.get(layer.diff_id()).unwrap().is_none());
    assert!(store.adopt(&claim(&made, DigestOf::Decoded), &origin()).is_err());
    let other = Origin { kind: OriginKind::Own, artifact: Some(Digest::of(b"a")), trust: Trust::Bound };
    let good = store.adopt(&claim(&made, DigestOf::Blob), &other).unwrap();
    assert!(good.lie().is_none() && good.file_name() != layer.file_name());
    assert!(layer.lie().is_some(), "who holds the old one keeps it");
    // A late word about the old one does not touch the new one's directory.
    layer.prove().unwrap_err();
    assert!(!good.is_proven());
    // Unused lies are removed.
    store.condemn(&good, "too");
    assert_eq!(store.remove_superseded(|_| false).unwrap(), [good.file_name()]);
    assert!(store.list().unwrap().is_empty());
}
