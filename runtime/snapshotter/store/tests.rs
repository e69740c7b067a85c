use super::super::record::{ImageRow, Kind, Labels, Remote};
use super::*;

fn layer<'a>(name: &'a str, parent: &'a str, image: &'a ImageRow) -> TakenLayer<'a> {
    let remote = Remote { image: "i".into(), position: 0, diff_id: lazyrun_index::Digest::of(b"l") };
    let labels = Labels::from([(super::super::labels::TARGET.into(), name.into())]);
    TakenLayer { namespace: "n", name, target: name, parent, labels, remote, image }
}

#[test]
fn layers_are_taken_once_and_images_live_as_long_as_their_layers() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(&dir.path().join("db")).expect("open");
    let image = ImageRow {
        reference: "r".into(),
        manifest: String::new(),
        config: String::new(),
        list: None,
        registry: Default::default(),
    };
    store.take_layer(layer("a", "", &image)).expect("take");
    store.take_layer(layer("b", "a", &image)).expect("take");
    assert!(matches!(store.take_layer(layer("b", "a", &image)), Err(SnapshotError::AlreadyExists(_))));
    assert!(matches!(store.take_layer(layer("c", "x", &image)), Err(SnapshotError::NotFound(_))));
    assert!(store.has_layer("n", "b", "a").expect("ask") && !store.has_layer("m", "b", "a").expect("ask"));
    assert!(!store.in_use("n", "a").expect("ask"), "layers on layers need no view");
    let new = New {
        namespace: "n",
        key: "k",
        parent: "b",
        kind: Kind::Active,
        labels: Labels::new(),
        remote: None,
    };
    let chain = store.create(new, |_| Ok(())).expect("create");
    assert_eq!(chain.view().map(|(id, layers)| (id, layers.len())), Some((2, 2)));
    assert!(store.in_use("n", "b").expect("ask"));
    assert_eq!(store.views(true).expect("ask").len(), 1);
    assert!(matches!(store.remove(Some("n"), "b"), Err(SnapshotError::FailedPrecondition(_))));
    store.remove(Some("n"), "k").expect("remove");
    store.remove(None, "b").expect("remove");
    assert_eq!(store.forget_images().expect("forget"), Vec::<String>::new());
    store.remove(None, "a").expect("remove");
    assert!(!store.has_layer("n", "a", "").expect("ask"));
    assert_eq!(store.forget_images().expect("forget"), ["i"]);
    assert!(store.images().expect("ask").is_empty() && store.all(None).expect("ask").is_empty());
}

#[test]
fn a_failure_on_the_way_leaves_nothing_and_ids_are_not_used_twice() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(&dir.path().join("db")).expect("open");
    let new = |key| New {
        namespace: "n",
        key,
        parent: "",
        kind: Kind::Active,
        labels: Labels::new(),
        remote: None,
    };
    let fails = store.create(new("a"), |_| Err(SnapshotError::Internal("no".into())));
    assert!(fails.is_err() && store.all(None).expect("ask").is_empty());
    let first = store.create(new("a"), |_| Ok(())).expect("create").id;
    store.remove(Some("n"), "a").expect("remove");
    assert!(store.create(new("a"), |_| Ok(())).expect("create").id > first);
}

#[test]
fn a_later_format_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("db");
    drop(Store::open(&path).expect("open"));
    let db = Database::create(&path).expect("open");
    let write = db.begin_write().expect("write");
    write.open_table(STATE).expect("table").insert("format", FORMAT + 1).expect("insert");
    write.commit().expect("commit");
    drop(db);
    let error = Store::open(&path).expect_err("refused").to_string();
    assert!(error.contains("later version"), "{error}");
}

#[test]
fn what_containerd_is_to_get_is_noted() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("db");
    let store = Store::open(&path).expect("open");
    for namespace in ["a", "b", "b"] {
        store.want_blobs(namespace, "image", true).expect("note");
    }
    drop(store);
    let store = Store::open(&path).expect("open");
    let noted = || store.wanted_blobs().expect("list").into_iter().map(|(n, _)| n).collect::<Vec<_>>();
    assert_eq!(noted(), ["a", "b"]);
    for namespace in ["b", "c"] {
        store.want_blobs(namespace, "image", false).expect("forget");
    }
    assert_eq!(noted(), ["a"]);
}
