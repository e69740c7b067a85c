//! Layers whose index somebody else made: faults by it, its proof by a stream, and what happens when it lies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::claim::{Checkpoint, Claim, Members};
use crate::common::server::{Reply, Seen, Server, broken, serve, status, with_body};
use crate::common::{Bench, TestImage, no_progress, quick_fetch};
use lazyrun_fetcher::{FetchError, Fetcher, Layer, LayerStore, Origin, OriginKind, Trust};
use lazyrun_index::{Digest, DigestOf, LayerId, Layout};

fn origin(kind: OriginKind) -> Origin {
    Origin { kind, artifact: Some(Digest::of(b"artifact")), trust: Trust::Repository }
}

fn is_layer(image: &TestImage, seen: &Seen) -> bool {
    seen.path.ends_with(&image.layers[0].digest().to_string())
}

/// An image of one layer, a server for it and a fetcher that knows where it is.
struct Setting {
    bench: Bench,
    server: Server,
    made: Members,
    image: TestImage,
}

impl Setting {
    async fn new(seed: u64) -> Setting {
        Setting::serving(seed, serve).await
    }

    async fn serving(
        seed: u64,
        answer: impl Fn(&TestImage, &Seen) -> Reply + Send + Sync + 'static,
    ) -> Setting {
        let made = Members::new(seed, 12, 70_001);
        let image = TestImage::new(vec![made.layer.clone()]);
        let served = image.clone();
        let server = Server::start(move |seen| answer(&served, seen)).await;
        let setting = Setting { bench: Bench::new(), server, made, image };
        setting.add_source(&setting.bench.fetcher).await;
        setting
    }

    async fn add_source(&self, fetcher: &Fetcher) {
        let image = self.bench.resolve(&self.server.name("app:v1")).await;
        let blobs = self.bench.client.blobs(&image.reference);
        fetcher.add_source(image.layers[0].diff_id, image.layers[0].clone(), blobs);
    }

    fn adopt(&self, claim: &Claim) -> Arc<Layer> {
        self.store().adopt(&claim.bytes(&self.made), &origin(OriginKind::SociV1)).unwrap()
    }

    fn store(&self) -> &LayerStore {
        self.bench.fetcher.store()
    }

    async fn hydrate(&self, layer: &Arc<Layer>) -> Result<(), FetchError> {
        self.bench.fetcher.hydrate(layer, no_progress()).await
    }

    async fn read(&self, layer: &Arc<Layer>, at: u64, len: usize) -> Result<Vec<u8>, FetchError> {
        self.bench.fetcher.read(layer, at, len).await.map(|b| b.to_vec())
    }

    fn asked(&self) -> usize {
        self.server.count(|s| is_layer(&self.image, s))
    }

    /// The same store as a new process finds it.
    async fn reopened(&self) -> Fetcher {
        let store = LayerStore::open(self.bench.dir.path()).unwrap();
        let fetcher = Fetcher::new(store, quick_fetch());
        self.add_source(&fetcher).await;
        fetcher
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tar_claims_serve_faults_and_are_proven_by_one_pass() {
    for digest_of in [DigestOf::Decoded, DigestOf::Blob] {
        let s = Setting::new(300).await;
        let tar = s.made.layer.tar.clone();
        let layer = s.adopt(&Claim::tar(digest_of));
        assert!(!layer.is_proven() && !layer.is_hydrated() && layer.local_bytes() == 0);
        assert_eq!(layer.origin().unwrap().kind, OriginKind::SociV1);
        assert_eq!(s.read(&layer, 200_000, 5000).await.unwrap(), tar[200_000..205_000]);
        assert!(layer.local_bytes() < tar.len() as u64 / 2);
        // Adopting once more changes nothing.
        assert!(Arc::ptr_eq(&layer, &s.adopt(&Claim::tar(digest_of))));
        drop(layer);

        // Another life: still a claim, and what was local still is.
        let fetcher = s.reopened().await;
        let layer = fetcher.store().get(s.made.layer.diff_id()).unwrap().unwrap();
        assert!(!layer.is_proven());
        let before = s.asked();
        assert_eq!(fetcher.read(&layer, 200_000, 5000).await.unwrap(), tar[200_000..205_000]);
        assert_eq!(s.asked(), before);
        fetcher.hydrate(&layer, no_progress()).await.unwrap();
        assert!(layer.is_proven() && layer.is_hydrated() && layer.origin().is_none());
        assert_eq!(layer.adopted_from().unwrap().kind, OriginKind::SociV1);
        assert_eq!(s.asked(), before + 1, "one pass over the blob");
        assert!(std::fs::read(layer.data_path()).unwrap() == tar);
        let name = layer.file_name().to_owned();
        assert!(name.starts_with(&layer.id().to_string()) && name != layer.id().to_string());
        drop((layer, fetcher));

        let fetcher = s.reopened().await;
        let layer = fetcher.store().get(s.made.layer.diff_id()).unwrap().unwrap();
        assert!(layer.is_hydrated() && layer.file_name() == name);
        // Dropped and faulted in again, now against what the stream has seen.
        layer.forget().unwrap();
        assert_eq!(fetcher.read(&layer, 300_000, 10).await.unwrap(), tar[300_000..300_010]);
        fetcher.hydrate(&layer, no_progress()).await.unwrap();
        assert!(layer.is_hydrated() && std::fs::read(layer.data_path()).unwrap() == tar);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_without_any_digest_wait_for_the_stream() {
    let s = Setting::new(310).await;
    let tar = s.made.layer.tar.clone();
    let layer = s.adopt(&Claim::tar(DigestOf::Nothing));
    let before = s.asked();
    // Only the end of the stream proves them, and no range can.
    assert_eq!(s.read(&layer, 400_000, 100).await.unwrap(), tar[400_000..400_100]);
    assert_eq!(s.asked(), before + 1);
    s.hydrate(&layer).await.unwrap();
    assert!(layer.is_hydrated() && std::fs::read(layer.data_path()).unwrap() == tar);
    assert_eq!(s.asked(), before + 1);
    layer.forget().unwrap();
    assert_eq!(s.read(&layer, 400_000, 100).await.unwrap(), tar[400_000..400_100]);
    assert!(!layer.is_hydrated(), "what is known now comes by range");
}

#[tokio::test(flavor = "multi_thread")]
async fn table_claims_are_proven_by_the_tar_beside_them() {
    for digest_of in [DigestOf::Decoded, DigestOf::Blob, DigestOf::Nothing] {
        for reversed in [false, true] {
            let s = Setting::new(320).await;
            let claim = Claim { reversed, ..Claim::table(digest_of) };
            let layer = s.adopt(&claim);
            assert_eq!(layer.id(), LayerId::table(s.made.layer.diff_id()));
            let (path, content) = &s.made.files[5];
            let at = claim.place_of(&s.made, path);
            if digest_of != DigestOf::Nothing {
                let part = s.read(&layer, at + 1000, 5000).await.unwrap();
                assert!(part == content[1000..6000]);
                assert!(layer.local_bytes() < layer.index().layer_size());
            }
            assert!(s.store().get(layer.diff_id()).unwrap().unwrap().id().layout == Layout::Table);
            s.hydrate(&layer).await.unwrap();
            assert!(layer.is_hydrated());
            for (path, content) in &s.made.files {
                let at = claim.place_of(&s.made, path);
                assert!(s.read(&layer, at, content.len()).await.unwrap() == *content, "{path}");
            }
            // What starts now starts from the tar; the table goes when nobody uses it.
            let tar = s.store().get(layer.diff_id()).unwrap().unwrap();
            assert!(tar.id().layout == Layout::Tar && tar.is_hydrated() && tar.adopted_from().is_none());
            assert!(std::fs::read(tar.data_path()).unwrap() == s.made.layer.tar);
            assert!(s.store().remove_superseded(|_| true).unwrap().is_empty());
            let gone = s.store().remove_superseded(|_| false).unwrap();
            assert_eq!(gone, [layer.file_name()]);
            assert_eq!(s.store().list().unwrap(), [tar.id()]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_beside_a_local_tar_needs_no_network() {
    let s = Setting::new(330).await;
    let image = s.bench.resolve(&s.server.name("app:v1")).await;
    let blobs = s.bench.client.blobs(&image.reference);
    s.bench.fetcher.ingest(&image.layers[0], blobs, no_progress()).await.unwrap();
    let layer = s.adopt(&Claim::table(DigestOf::Decoded));
    let before = s.asked();
    s.hydrate(&layer).await.unwrap();
    assert!(layer.is_hydrated());
    assert_eq!(s.asked(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_of_a_table_come_by_one_request_and_no_byte_twice() {
    for (reversed, shared) in [(false, false), (true, false), (false, true), (true, true)] {
        let s = Setting::new(340).await;
        // With `shared` all contents are in one gzip member, entered at its start and skipped into.
        let made = if shared { Members::one_member(340, 12, 70_001) } else { s.made.clone() };
        let image = TestImage::new(vec![made.layer.clone()]);
        let s = if shared {
            let served = image.clone();
            let server = Server::start(move |seen| serve(&served, seen)).await;
            let setting = Setting { bench: Bench::new(), server, made, image };
            setting.add_source(&setting.bench.fetcher).await;
            setting
        } else {
            s
        };
        let claim = Claim { reversed, ..Claim::table(DigestOf::Decoded) };
        let layer = s.adopt(&claim);
        let (asked, bytes) = (s.asked(), s.bench.client.stats().bytes);
        let size = usize::try_from(layer.index().layer_size()).unwrap();
        let all = s.read(&layer, 0, size).await.unwrap();
        for (path, content) in &s.made.files {
            let at = usize::try_from(claim.place_of(&s.made, path)).unwrap();
            assert!(all[at..at + content.len()] == *content, "{path}");
        }
        assert_eq!(s.asked(), asked + 1, "reversed {reversed} shared {shared}");
        let came = s.bench.client.stats().bytes - bytes;
        assert!(came <= s.made.layer.blob.len() as u64, "{came} bytes came");
    }
}

/// Hydrates a layer of this claim, which is a lie, and looks at all the consequences.
async fn is_caught(seed: u64, claim: Claim, word: &str) {
    let s = Setting::new(seed).await;
    let layer = s.adopt(&claim);
    // All bytes are local by then, if they can be had at all.
    let _ = s.read(&layer, 0, usize::try_from(layer.index().layer_size()).unwrap()).await;
    let error = s.hydrate(&layer).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, FetchError::Lie { .. }), "{word}: {text}");
    assert!(text.contains(word) && text.contains(&layer.diff_id().to_string()), "{word}: {text}");
    // Nothing of it is served any more, not even what is local.
    assert!(!layer.is_hydrated());
    assert!(layer.read_local(0, &mut [0; 10]).is_err());
    let again = s.read(&layer, 0, 10).await.unwrap_err();
    assert!(matches!(again, FetchError::Lie { .. }), "{again}");
    let again = s.hydrate(&layer).await.unwrap_err();
    assert!(matches!(again, FetchError::Lie { .. }), "{again}");
    let (id, name) = (layer.id(), layer.file_name().to_owned());

    // It is never adopted again, also not in another life, nor anything else of that artifact.
    let fetcher = s.reopened().await;
    let kept = fetcher.store().by_id(id).unwrap().unwrap();
    assert!(kept.lie().is_some() && kept.read_local(0, &mut [0; 10]).is_err());
    drop(kept);
    let found = fetcher.store().get(layer.diff_id()).unwrap();
    assert!(found.is_none_or(|tar| tar.adopted_from().is_none() && tar.id().layout == Layout::Tar));
    let refused = fetcher.store().adopt(&claim.bytes(&s.made), &origin(OriginKind::SociV2)).unwrap_err();
    assert!(matches!(refused, FetchError::Distrusted { .. }), "{refused}");
    assert!(fetcher.store().refused_artifacts().contains(&Digest::of(b"artifact")));

    // The layer itself is good and can be streamed; the old file stays what it is for those who hold it.
    let image = s.bench.resolve(&s.server.name("app:v1")).await;
    let blobs = s.bench.client.blobs(&image.reference);
    let good = fetcher.ingest(&image.layers[0], blobs, no_progress()).await.unwrap();
    assert!(good.is_hydrated() && good.file_name() != name);
    assert!(std::fs::read(good.data_path()).unwrap() == s.made.layer.tar);
    assert!(layer.read_local(0, &mut [0; 10]).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_of_tar_claims_are_caught() {
    let tar = || Claim::tar(DigestOf::Decoded);
    is_caught(400, Claim { mode: Some(0o4755), ..tar() }, "file-400-3").await;
    is_caught(401, Claim { extra: Some("etc/evil"), ..tar() }, "etc/evil").await;
    is_caught(402, Claim { missing: true, ..tar() }, "file-402-").await;
    is_caught(403, Claim { content: true, ..tar() }, "file-403-3").await;
    is_caught(404, Claim { swapped: true, ..tar() }, "file-404-").await;
    is_caught(405, Claim { wrong_span: true, ..tar() }, "span 7").await;
    is_caught(406, Claim { wrong_span: true, ..Claim::tar(DigestOf::Blob) }, "span 7").await;
    is_caught(407, Claim { mode: Some(0o4755), ..Claim::tar(DigestOf::Nothing) }, "file-407-3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_of_table_claims_are_caught() {
    let table = || Claim::table(DigestOf::Decoded);
    is_caught(420, Claim { mode: Some(0o4755), ..table() }, "file-420-3").await;
    is_caught(421, Claim { extra: Some("etc/evil"), ..table() }, "etc/evil").await;
    is_caught(422, Claim { swapped: true, ..table() }, "file-422-").await;
    is_caught(423, Claim { swapped: true, ..Claim::table(DigestOf::Blob) }, "file-423-").await;
    is_caught(424, Claim { wrong_span: true, ..table() }, "file-424-").await;
    is_caught(425, Claim { hole: true, ..table() }, "file-425-3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_that_lie_are_caught_when_a_fault_has_used_them() {
    let made = Checkpoint::new();
    let image = TestImage::new(vec![made.layer.clone()]);
    let server = Server::start(move |seen| serve(&image, seen)).await;
    let tar = &made.layer.tar;
    let place = made.at + 1000;
    for (used, lie) in [(true, true), (false, true), (true, false)] {
        let bench = Bench::new();
        let image = bench.resolve(&server.name("app:v1")).await;
        let blobs = bench.client.blobs(&image.reference);
        bench.fetcher.add_source(image.layers[0].diff_id, image.layers[0].clone(), blobs);
        let layer = bench.fetcher.store().adopt(&made.claim(lie), &origin(OriginKind::SociV1)).unwrap();
        let read = || bench.fetcher.read(&layer, place as u64, 100);
        if used {
            // The compressed bytes are right by the claim's digest; only the stream can tell.
            assert_eq!(read().await.unwrap() != tar[place..place + 100], lie);
        }
        let proof = bench.fetcher.hydrate(&layer, no_progress()).await;
        if used && lie {
            let error = proof.unwrap_err();
            assert!(matches!(error, FetchError::Lie { .. }), "{error}");
            assert!(error.to_string().contains("span 1"), "{error}");
            assert!(read().await.is_err());
            continue;
        }
        // Nobody was deceived, and nobody will be: the checkpoint is not believed later either.
        proof.unwrap();
        assert!(layer.is_hydrated() && std::fs::read(layer.data_path()).unwrap() == *tar);
        layer.forget().unwrap();
        assert!(read().await.unwrap() == tar[place..place + 100]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_that_breaks_off_starts_again() {
    let good = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&good);
    let s = Setting::serving(440, move |image, seen| {
        if !is_layer(image, seen) || now.load(Ordering::SeqCst) {
            return serve(image, seen);
        }
        // The first third comes, and then the blob is gone.
        match seen.range().map_or(0, |(start, _)| start) {
            0 => with_body(seen, &image.layers[0].blob, |b| broken(b, b.len() / 3)),
            _ => status(404),
        }
    })
    .await;
    for claim in [Claim::tar(DigestOf::Nothing), Claim::table(DigestOf::Decoded)] {
        good.store(false, Ordering::SeqCst);
        let layer = s.adopt(&claim);
        let error = s.hydrate(&layer).await.unwrap_err();
        assert!(!matches!(error, FetchError::Lie { .. }), "{error}");
        assert!(!layer.is_proven() && layer.lie().is_none());
        good.store(true, Ordering::SeqCst);
        s.hydrate(&layer).await.unwrap();
        assert!(layer.is_hydrated());
        let id = layer.id();
        drop(layer);
        s.store().remove(id).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_is_no_lie() {
    let s = Setting::serving(450, |image, seen| {
        if !is_layer(image, seen) || seen.range().is_some() {
            return serve(image, seen);
        }
        with_body(seen, &image.layers[0].blob, |b| {
            let mut bytes = b.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
            crate::common::server::full(bytes)
        })
    })
    .await;
    let layer = s.adopt(&Claim::tar(DigestOf::Decoded));
    let error = s.hydrate(&layer).await.unwrap_err();
    assert!(!matches!(error, FetchError::Lie { .. }), "{error}");
    // Faults go on.
    assert!(layer.lie().is_none());
    assert_eq!(s.read(&layer, 1000, 10).await.unwrap(), s.made.layer.tar[1000..1010]);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_during_the_proof_are_right() {
    for claim in [Claim::tar(DigestOf::Blob), Claim { reversed: true, ..Claim::table(DigestOf::Decoded) }] {
        let s = Arc::new(Setting::new(460).await);
        let layer = s.adopt(&claim);
        let proof = {
            let (fetcher, layer) = (s.bench.fetcher.clone(), Arc::clone(&layer));
            tokio::spawn(async move { fetcher.hydrate(&layer, no_progress()).await })
        };
        let mut readers = Vec::new();
        for r in 0..12 {
            let (s, layer, claim) = (Arc::clone(&s), Arc::clone(&layer), claim.clone());
            readers.push(tokio::spawn(async move {
                let (path, content) = &s.made.files[(r * 5) % 12];
                let at = claim.place_of(&s.made, path);
                assert!(s.read(&layer, at, content.len()).await.unwrap() == *content);
            }));
        }
        for reader in readers {
            reader.await.unwrap();
        }
        proof.await.unwrap().unwrap();
        assert!(layer.is_hydrated());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_not_adopted() {
    let s = Setting::new(470).await;
    let error = s.store().adopt(b"LZRINDEX and nothing else", &origin(OriginKind::Own)).unwrap_err();
    assert!(matches!(error, FetchError::BadClaim { .. }), "{error}");
    assert!(s.bench.left_behind().is_empty());
}
