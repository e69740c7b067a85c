//! Evictions against readers, fills, crashes and each other: whatever happens, what is read is right.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::tests::{BOOT, LATER, publish, read, tar};
use super::*;

/// A tar like [`tar`] with other bytes and a length of its own.
fn other_tar(seed: u8, len: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let content: Vec<u8> =
        (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761 + u32::from(seed)).to_be_bytes()[0]).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, format!("file-{seed}"), content.as_slice()).unwrap();
    builder.into_inner().unwrap()
}

fn bytes_of<'a>(layer: &Layer, tar: &'a [u8], span: usize) -> &'a [u8] {
    let span = layer.index().span(span);
    &tar[span.offset as usize..(span.offset + span.len) as usize]
}

fn fill(layer: &Layer, tar: &[u8], span: usize) {
    assert!(layer.write_span(&layer.index().span(span), bytes_of(layer, tar, span)).unwrap());
}

/// A store whose layers can all be fetched again.
fn store_at(dir: &Path, boot: [u8; 16]) -> LayerStore {
    let store = LayerStore::open_at_boot(dir, boot).unwrap();
    store.set_refetch(|_| true);
    store
}

fn limit(store: &LayerStore, bytes: u64) {
    let limit = Some(CacheLimit::Bytes(bytes));
    store.set_limits(CacheLimits { limit, reserve: 0 }).unwrap();
}

struct Uses(HashMap<LayerId, InUse>);

impl LayerUsers for Uses {
    fn in_use(&self) -> Option<HashMap<LayerId, InUse>> {
        Some(self.0.clone())
    }
    fn release(&self, layer: LayerId) -> bool {
        assert!(!self.0.contains_key(&layer), "what is in use is not let go");
        false
    }
}

#[test]
fn evicted_spans_are_missing_and_their_neighbours_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made = tar();
    let layer = publish(&store, &made);
    layer.sync().unwrap();
    let count = layer.index().span_count();
    let before = layer.disk_bytes().unwrap();
    let freed = layer.evict(&[1, 2, 5], false).unwrap();
    let evicted: u64 = [1, 2, 5].iter().map(|i| layer.index().span(*i).len).sum();
    assert!(freed <= evicted && freed + 4 * 4096 >= evicted, "{freed} of {evicted}");
    assert_eq!(layer.disk_bytes().unwrap(), before - freed);
    assert!(!layer.is_hydrated());
    for reopened in [None, Some(BOOT), Some(LATER)] {
        let (store, layer) = match reopened {
            None => (store.clone(), Arc::clone(&layer)),
            Some(boot) => {
                let store = store_at(dir.path(), boot);
                let layer = store.get(layer.diff_id()).unwrap().unwrap();
                (store, layer)
            }
        };
        for span in 0..count {
            let info = layer.index().span(span);
            let expected = (![1, 2, 5].contains(&span)).then(|| bytes_of(&layer, &made, span).to_vec());
            assert_eq!(read(&layer, info.offset, info.len as usize), expected, "span {span}");
        }
        drop(store);
    }
    // All that is left goes without a block remaining, in whatever pieces it went.
    for span in (0..count).rev() {
        layer.evict(&[span], false).unwrap();
    }
    assert_eq!((layer.disk_bytes().unwrap(), layer.local_bytes()), (0, 0));
    for span in 0..count {
        fill(&layer, &made, span);
    }
    assert!(layer.is_hydrated());
    assert_eq!(read(&layer, 0, made.len()).unwrap(), made);
}

#[test]
fn what_is_held_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made = tar();
    let layer = publish(&store, &made);
    let all: Vec<usize> = (0..layer.index().span_count()).collect();
    let direct = layer.pin_direct();
    assert_eq!(layer.evict(&all, false).unwrap(), 0);
    assert!(layer.is_hydrated());
    assert_eq!(layer.forget().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    drop(direct);
    let busy = layer.pin_busy();
    assert_eq!(layer.evict(&all, false).unwrap(), 0);
    drop(busy);
    // Somebody else has the file open, though nobody says so: a mount that an earlier life made.
    let other = fs::File::open(layer.data_path()).unwrap();
    assert_eq!(layer.evict(&all, false).unwrap(), 0);
    assert!(layer.is_hydrated());
    drop(other);
    let wanted = layer.want(2..4);
    assert!(layer.evict(&all, false).unwrap() > 0);
    let left: Vec<usize> = all.iter().copied().filter(|i| layer.counts(*i)).collect();
    assert_eq!(left, [2, 3]);
    drop(wanted);
    assert!(layer.evict(&all, false).unwrap() > 0);
    assert_eq!(layer.local_bytes(), 0);
}

#[test]
fn what_cannot_be_fetched_again_is_never_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let store = LayerStore::open_at_boot(dir.path(), BOOT).unwrap();
    let made = tar();
    let layer = publish(&store, &made);
    assert_eq!(store.evict_idle(), 0, "nobody knows a source");
    store.set_refetch(|_| true);
    layer.set_origin_gone(true);
    drop((layer, store));
    let store = store_at(dir.path(), BOOT);
    let layer = store.get(Digest::of(&made)).unwrap().unwrap();
    assert!(layer.is_origin_gone());
    assert_eq!(store.evict_idle(), 0, "its source is gone");
    assert!(layer.is_hydrated());
    layer.set_origin_gone(false);
    assert!(store.evict_idle() > 0);
    assert_eq!(layer.local_bytes(), 0);
}

#[test]
fn a_crash_before_the_hole_is_harmless() {
    for boot in [BOOT, LATER] {
        let dir = tempfile::tempdir().unwrap();
        let store = store_at(dir.path(), BOOT);
        let made = tar();
        let layer = publish(&store, &made);
        layer.sync().unwrap();
        // All that an eviction does before it punches.
        {
            let left: Vec<u64> = layer.local_bits().iter().map(|w| w & !0b110).collect();
            layer.map.lock().unwrap().write_evicted(&vec![0b110; left.len()], &left).unwrap();
        }
        // The holes may be there or not.
        let span = layer.index().span(1);
        let file = fs::File::options().write(true).open(layer.data_path()).unwrap();
        file.write_all_at(&vec![0; span.len as usize], span.offset).unwrap();
        drop((layer, store, file));
        let layer = store_at(dir.path(), boot).get(Digest::of(&made)).unwrap().unwrap();
        for i in 0..layer.index().span_count() {
            let info = layer.index().span(i);
            let expected = (!(1..3).contains(&i)).then(|| bytes_of(&layer, &made, i).to_vec());
            assert_eq!(read(&layer, info.offset, info.len as usize), expected, "span {i}");
        }
    }
}

#[test]
fn readers_never_see_the_hole() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made = tar();
    let layer = publish(&store, &made);
    let count = layer.index().span_count();
    let (stop, reads, misses) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..3u64 {
            let (layer, made, stop, reads, misses) = (&layer, &made, &stop, &reads, &misses);
            scope.spawn(move || {
                let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut buffer = vec![0; 200_000];
                while !stop.load(Ordering::Relaxed) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let offset = (state % (made.len() as u64 - 1)) as usize;
                    let len = (state >> 40) as usize % buffer.len() + 1;
                    match layer.read_local(offset as u64, &mut buffer[..len]).unwrap() {
                        Some(n) => {
                            assert!(buffer[..n] == made[offset..offset + n], "wrong bytes at {offset}");
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                        None => {
                            misses.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        // Fills go on while others evict.
        for part in 0..2 {
            let (layer, made, stop) = (&layer, &made, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for span in (0..count).filter(|i| i % 2 == part && layer.lacks_span(*i)) {
                        fill(layer, made, span);
                    }
                    layer.save_map().unwrap();
                }
            });
        }
        for round in 0..120 {
            let spans: Vec<usize> = (0..count).filter(|i| (i + round) % 3 != 0).collect();
            layer.evict(&spans, false).unwrap();
            if round % 40 == 39 {
                layer.sync().unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (reads, misses) = (reads.into_inner(), misses.into_inner());
    assert!(reads > 100 && misses > 20, "{reads} reads, {misses} misses: nothing was tried");
    layer.save_map().unwrap();
    drop((layer, store));
    for boot in [BOOT, LATER] {
        let layer = store_at(dir.path(), boot).get(Digest::of(&made)).unwrap().unwrap();
        assert!(layer.check(false).unwrap().bad.is_empty());
    }
}

#[test]
fn a_pin_and_an_eviction_agree_on_what_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made = tar();
    let layer = publish(&store, &made);
    let path = layer.data_path();
    let stop = AtomicBool::new(false);
    let mut direct = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                layer.evict(&[0, 1, 2], false).unwrap();
                (0..3).for_each(|span| fill(&layer, &made, span));
            }
        });
        for _ in 0..300 {
            // As a view is mounted: pin, look, then read without asking.
            let _pin = layer.pin_direct();
            if layer.is_hydrated() {
                direct += 1;
                assert!(fs::read(&path).unwrap() == made, "a hole was read directly");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(direct > 0, "never whole, so nothing was tried");
}

#[test]
fn a_limit_is_kept_by_evicting_what_was_not_used_for_longest() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made: Vec<Vec<u8>> = (0..4).map(|seed| other_tar(seed, 4 << 20)).collect();
    let layers: Vec<_> = made
        .iter()
        .map(|tar| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let layer = publish(&store, tar);
            layer.touch();
            layer
        })
        .collect();
    std::thread::sleep(std::time::Duration::from_millis(5));
    // The first is used again, so the second is the oldest.
    layers[0].touch();
    let used = store.disk_bytes().unwrap();
    assert!(used > 16 << 20, "{used}");
    limit(&store, used);
    let span = layers[3].index().span(0);
    layers[3].evict(&[0], false).unwrap();
    limit(&store, 14 << 20);
    assert!(store.disk_bytes().unwrap() <= 14 << 20);
    let local: Vec<bool> = layers.iter().map(|l| l.local_bytes() == l.index().layer_size()).collect();
    assert_eq!(
        local,
        [true, false, true, false],
        "{:?}",
        layers.iter().map(|l| l.local_bytes()).collect::<Vec<_>>()
    );
    assert!(
        layers[3].local_bytes() + span.len == layers[3].index().layer_size(),
        "only what was evicted by hand"
    );
    // In use by a container, in use by a mount, and the last one not.
    let uses = [
        (layers[0].id(), InUse::Running),
        (layers[2].id(), InUse::Mounted),
        (layers[1].id(), InUse::Running),
    ];
    store.set_users(Arc::new(Uses(uses.into())));
    limit(&store, 8 << 20);
    assert_eq!(layers[3].local_bytes(), 0, "it was not in use");
    assert!(layers[2].local_bytes() < layers[2].index().layer_size(), "mounts go before containers");
    assert!(layers[0].is_hydrated(), "containers go last");
    // For what nobody waits for, nothing that is in use goes.
    let refused = store.evictions().refused;
    let error = (0..layers[1].index().span_count()).find_map(|i| {
        layers[1].write_span(&layers[1].index().span(i), bytes_of(&layers[1], &made[1], i)).err()
    });
    let error = FetchError::store("writing", Path::new("x"), error.expect("no room"));
    assert!(matches!(error, FetchError::CacheFull { limit: 0x80_0000, .. }), "{error}");
    assert!(store.evictions().refused > refused && layers[0].is_hydrated());
    // A reader gets its bytes, whatever has to go, and the limit holds.
    for round in 0..2 {
        for i in 0..layers[1].index().span_count() {
            let span = layers[1].index().span(i);
            let bytes = bytes_of(&layers[1], &made[1], i);
            assert!(layers[1].write_span_for(Need::Reader, &span, bytes).unwrap());
            assert_eq!(read(&layers[1], span.offset, bytes.len()).unwrap(), bytes, "round {round}, span {i}");
            let used = store.disk_bytes().unwrap();
            assert!(used <= 8 << 20, "{used} after span {i} of round {round}");
        }
    }
}

#[test]
fn writes_under_way_count_before_they_are_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    limit(&store, 1 << 20);
    let room = &store.inner.room;
    room.with_room(0, 700 << 10, Need::Reader, || {
        // Nothing of it is on the disk yet, and all the rest of the limit was given back by a new look.
        let other = room.with_room(0, 700 << 10, Need::Ahead, || Ok(()));
        assert_eq!(other.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        room.with_room(0, 200 << 10, Need::Ahead, || Ok(()))
    })
    .unwrap();
    room.with_room(0, 700 << 10, Need::Ahead, || Ok(())).unwrap();
}

#[test]
fn the_order_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made = tar();
    let layer = publish(&store, &made);
    for span in [4, 1] {
        std::thread::sleep(std::time::Duration::from_millis(70));
        read(&layer, layer.index().span(span).offset, 10).unwrap();
    }
    let order = |layer: &Layer| layer.evictable().iter().map(|(_, _, span, _)| *span).collect::<Vec<_>>();
    let before = order(&layer);
    assert_eq!(before[before.len() - 2..], [4, 1], "{before:?}");
    drop((layer, store));
    let layer = store_at(dir.path(), BOOT).get(Digest::of(&made)).unwrap().unwrap();
    assert_eq!(order(&layer), before);
}

#[test]
fn a_check_finds_wrong_bytes_and_a_repair_drops_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path(), BOOT);
    let made = tar();
    let layer = publish(&store, &made);
    let count = layer.index().span_count();
    let good = layer.check(true).unwrap();
    assert_eq!((good.spans, good.bytes, good.bad.len()), (count, made.len() as u64, 0));
    let file = fs::File::options().write(true).open(layer.data_path()).unwrap();
    file.write_all_at(b"x", layer.index().span(2).offset + 7).unwrap();
    drop(file);
    let found = layer.check(false).unwrap();
    assert_eq!((found.bad.as_slice(), found.trusted_bad), ([2].as_slice(), 1));
    assert!(layer.is_hydrated(), "only looked at");
    assert_eq!(layer.check(true).unwrap().bad, [2]);
    assert!(layer.lacks_span(2) && !layer.is_hydrated());
    fill(&layer, &made, 2);
    assert!(layer.check(false).unwrap().bad.is_empty());
    assert_eq!(read(&layer, 0, made.len()).unwrap(), made);
}

#[derive(Clone, Debug)]
enum Step {
    Fill(usize),
    Evict(usize, usize),
    Read(usize),
    Save,
    Sync,
    /// The process is killed; what the map's file says counts.
    Kill,
    /// The machine goes down; what was not synced is lost or not, span by span.
    Reboot(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let span = 0..64usize;
    let step = prop_oneof![
        4 => span.clone().prop_map(Step::Fill),
        3 => (span.clone(), 1..8usize).prop_map(|(from, len)| Step::Evict(from, len)),
        4 => span.prop_map(Step::Read),
        2 => Just(Step::Save),
        1 => Just(Step::Sync),
        1 => Just(Step::Kill),
        1 => any::<u64>().prop_map(Step::Reboot),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a set of spans as the model: what is read is right, what was evicted is gone in every later life, and
    /// what was synced and not evicted since survives them all.
    #[test]
    fn a_layer_keeps_what_it_says(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let made = tar();
        let mut boot = BOOT;
        let mut store = store_at(dir.path(), boot);
        let mut layer = publish(&store, &made);
        let count = layer.index().span_count();
        layer.sync().unwrap();
        let all: BTreeSet<usize> = (0..count).collect();
        // Here now; here as far as the map's file says; there after a power cut for certain.
        let (mut here, mut saved, mut durable) = (all.clone(), all.clone(), all);
        for step in steps {
            match step {
                Step::Fill(i) => {
                    fill(&layer, &made, i % count);
                    here.insert(i % count);
                }
                Step::Evict(from, len) => {
                    let spans: Vec<usize> = (from % count..count.min(from % count + len)).collect();
                    layer.evict(&spans, false).unwrap();
                    let any = spans.iter().any(|i| here.contains(i));
                    spans.iter().for_each(|i| { here.remove(i); durable.remove(i); saved.remove(i); });
                    if any { saved = here.clone(); }
                }
                Step::Read(i) => {
                    let span = layer.index().span(i % count);
                    let expected = here.contains(&(i % count)).then(|| bytes_of(&layer, &made, i % count).to_vec());
                    prop_assert_eq!(read(&layer, span.offset, span.len as usize), expected);
                }
                Step::Save => { layer.save_map().unwrap(); saved = here.clone(); }
                Step::Sync => { layer.sync().unwrap(); saved = here.clone(); durable = here.clone(); }
                Step::Kill => {
                    drop((layer, store));
                    store = store_at(dir.path(), boot);
                    layer = store.get(Digest::of(&made)).unwrap().unwrap();
                    here = saved.clone();
                }
                Step::Reboot(lost) => {
                    let path = layer.data_path();
                    drop((layer, store));
                    boot[0] = boot[0].wrapping_add(1);
                    store = store_at(dir.path(), boot);
                    layer = store.get(Digest::of(&made)).unwrap().unwrap();
                    let file = fs::File::options().write(true).open(&path).unwrap();
                    for i in (0..count).filter(|i| lost >> (i % 64) & 1 == 1 && !durable.contains(i)) {
                        let span = layer.index().span(i);
                        file.write_all_at(&vec![0; span.len as usize], span.offset).unwrap();
                    }
                    drop(file);
                    layer.verify_suspects().unwrap();
                    here = (0..count).filter(|i| layer.counts(*i)).collect();
                    prop_assert!(here.is_superset(&durable) && here.is_subset(&saved));
                    layer.save_map().unwrap();
                    saved = here.clone();
                }
            }
            let counted: BTreeSet<usize> = (0..count).filter(|i| layer.counts(*i)).collect();
            prop_assert_eq!(&counted, &here);
        }
        prop_assert!(layer.check(false).unwrap().bad.is_empty());
    }
}
