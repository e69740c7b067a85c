//! Indexes that travel through the registry: pushed, found, used before they are proven, proven, and lies.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lazyrun::demo::layout::Layout;
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::{Shape, Shaper};
use lazyrun_fetcher::{
    ClientOptions, IndexSource, Platform, PushOptions, Reference, RegistryClient, push_indexes,
};
use lazyrun_index::{
    IndexBuilder, LayerFacts, LayerIndex, Layout as IndexLayout, NewEntrance, NewEntry, NewSpan,
};
use serde_json::{Value, json};

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, TAG, big, sha256};
use crate::support::instance::Lazyrun;
use crate::support::tree::{differences, scan};
use crate::support::wait_for;

/// Slow enough that the whole image takes ten seconds and more.
const SLOW: Shape = Shape { mbit: 20.0, rtt_ms: 5.0 };

/// `index inspect` as JSON.
fn inspect(lazyrun: &Lazyrun, image: &str) -> Value {
    let text = lazyrun.ok(&["index", "inspect", "--format", "json", image]);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"))
}

/// One field of all layers' indexes.
fn of_layers(inspected: &Value, field: &str) -> Vec<Value> {
    let layers = inspected["Layers"].as_array().expect("layers");
    layers.iter().map(|layer| layer["Index"][field].clone()).collect()
}

fn proven(lazyrun: &Lazyrun, image: &str) {
    wait_for("the indexes to be proven", Duration::from_secs(120), || {
        let all = of_layers(&inspect(lazyrun, image), "Proven");
        all.iter().all(|proven| proven == &json!(true)).then_some(())
    });
}

#[test]
fn an_index_travels_through_the_registry() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let shaper = Shaper::start(registry.addr(), SLOW).expect("start the shaper");
    registry.push(fixture.layout(), TAG, "fixture");
    let direct = format!("{}/fixture:{TAG}", registry.addr());
    let image = format!("{}/fixture:{TAG}", shaper.addr());

    let builder = Lazyrun::new();
    let pushed = builder.ok(&["index", "push", &direct]);
    assert!(pushed.starts_with("sha256:"), "{pushed}");
    assert_eq!(builder.ok(&["index", "push", &direct]), pushed, "equal indexes make equal artifacts");
    let listed = builder.ok(&["index", "ls", "--format", "{{.Digest}} {{.Kind}} {{.Layers}}", &direct]);
    assert_eq!(listed.trim(), format!("{} own 3", pushed.trim()));

    // Elsewhere: only what is touched comes before the command has run.
    let node = Lazyrun::new();
    assert_eq!(node.ok(&["run", "--rm", &image, "cat", "/data/last"]), "behind the big file\n");
    let fetched = shaper.traffic().bytes_down;
    assert!(fetched < fixture.compressed() * 3 / 4, "{fetched} of {} bytes", fixture.compressed());
    let origins = of_layers(&inspect(&node, &image), "Origin");
    assert!(origins.iter().all(|o| o == &json!("lazyrun index")), "{origins:?}");

    // The proof comes with hydration, and then nobody is needed any more.
    node.ok(&["pull", "--quiet", &image]);
    proven(&node, &image);
    drop((shaper, registry));
    let sum = node.ok(&["run", "--rm", &image, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn trust_decides_which_indexes_are_used() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let builder = Lazyrun::new();
    let artifact = builder.ok(&["index", "push", &image]).trim().to_owned();
    let origins = |options: &[&str], image: &str| {
        let node = Lazyrun::new().with_options(options);
        assert_eq!(node.ok(&["run", "--rm", image, "cat", "/data/last"]), "behind the big file\n");
        of_layers(&inspect(&node, image), "Origin")
    };
    let (found, built) = (vec![json!("lazyrun index"); 3], vec![json!("built"); 3]);
    let manifest = builder.ok(&["pull", "--quiet", &image]).trim().to_owned();
    let by_digest = format!("{}@{manifest}", image.trim_end_matches(&format!(":{TAG}")));
    assert_eq!(origins(&[], &image), found);
    assert_eq!(origins(&["--index-trust", "proven"], &image), built);
    assert_eq!(origins(&["--index-trust", "bound"], &image), built);
    assert_eq!(origins(&[], &by_digest), built, "who asks by digest does not trust the repository");
    assert_eq!(origins(&["--index-digest", &artifact], &by_digest), found, "but what is pinned");

    // What one start took on trust, a stricter one has proven first.
    let node = Lazyrun::new();
    node.ok(&["index", "pull", &image]);
    assert_eq!(of_layers(&inspect(&node, &image), "Proven"), vec![json!(false); 3]);
    node.ok(&["--index-trust", "proven", "run", "--rm", &image, "true"]);
    assert_eq!(of_layers(&inspect(&node, &image), "Proven"), vec![json!(true); 3]);
    let why = node.fails(125, &["--index-trust", "perhaps", "run", "--rm", &image, "true"]);
    assert!(!why.is_empty());
}

#[test]
fn entries_and_spans_are_listed() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let lazyrun = Lazyrun::new();
    lazyrun.ok(&["index", "build", &image]);
    let rows = |options: &[&str]| -> Vec<Value> {
        let mut args = vec!["index", "inspect", "--format", "json"];
        args.extend_from_slice(options);
        args.push(&image);
        lazyrun.ok(&args).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let layers = of_layers(&inspect(&lazyrun, &image), "Entries");
    let entries = rows(&["--entries"]);
    assert_eq!(entries.len() as u64, layers.iter().filter_map(Value::as_u64).sum::<u64>());
    let file = entries.iter().find(|e| e["Path"] == "data/big.bin").expect("the big file");
    assert_eq!(file["Type"], "file");
    assert_eq!(file["Size"], big().len());
    assert_eq!(file["Content"], format!("sha256:{}", sha256(&big())));
    assert_eq!(file["Extents"][0][2], big().len());

    // The spans of a layer are its layer file, without gaps.
    let spans = rows(&["--spans", "--layer", "1"]);
    let sizes = of_layers(&inspect(&lazyrun, &image), "LayerSize");
    let mut at = 0;
    for span in &spans {
        assert_eq!(span["Offset"], at);
        assert_eq!(span["Local"], true);
        at += span["Size"].as_u64().expect("a size");
    }
    assert_eq!(json!(at), sizes[1]);
    let digest = spans[0]["Layer"].as_str().expect("a digest").to_owned();
    assert_eq!(rows(&["--spans", "--layer", &digest[..20]]), spans);

    let shown = lazyrun.ok(&["index", "inspect", "--entries", &image]);
    assert_eq!(shown.lines().count(), entries.len() + 1, "one header");
    let why = lazyrun.fails(1, &["index", "inspect", "--spans", "--layer", "9", &image]);
    assert!(why.contains("no layer 9"), "{why}");
}

#[test]
fn indexes_are_verified_and_removed() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let lazyrun = Lazyrun::new();
    let artifact = lazyrun.ok(&["index", "push", &image]).trim().to_owned();
    lazyrun.ok(&["index", "verify", &image]);
    let shown = lazyrun.ok(&["index", "inspect", &image]);
    assert_eq!(shown.lines().count(), 2 + 3, "{shown}");
    assert!(shown.contains("built") && shown.contains("gzip") && shown.contains("none"), "{shown}");
    for overhead in of_layers(&inspect(&lazyrun, &image), "Overhead") {
        assert!(overhead.as_f64().is_some_and(|percent| percent > 0.0), "{overhead}");
    }

    assert_eq!(lazyrun.ok(&["index", "rm", &image]).trim(), format!("Deleted: {artifact}"));
    assert_eq!(lazyrun.ok(&["index", "ls", "--format", "json", &image]), "");
    lazyrun.fails(1, &["index", "rm", &image]);
    let other = Lazyrun::new();
    let why = other.fails(1, &["index", "pull", &image]);
    assert!(why.contains("index build"), "{why}");
    other.ok(&["run", "--rm", &image, "true"]);
}

/// An index of the fixture's topmost layer, a plain tar, that makes one script set-uid.
fn lie(honest: &LayerIndex) -> Vec<u8> {
    let mut builder = IndexBuilder::new(&LayerFacts::of(honest), IndexLayout::Tar);
    for entry in honest.entries() {
        let (xattrs, extents) = (entry.xattrs().collect::<Vec<_>>(), entry.extents().collect::<Vec<_>>());
        let mut told = NewEntry::of(&entry, &xattrs, &extents);
        if entry.path() == b"usr/local/bin/hello" {
            told.mode = 0o4755;
        }
        builder.entry(&told).expect("an entry");
    }
    for span in honest.spans() {
        builder.span(&NewSpan::of(&span, NewEntrance::Plain)).expect("a span");
    }
    builder.finish().expect("an index")
}

#[test]
fn a_lie_is_found_out_and_never_used_again() {
    let fixture = Fixture::new();
    let registry = DockerRegistry::start();
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let builder = Lazyrun::new();
    builder.ok(&["index", "build", &image]);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let artifact = runtime.block_on(async {
        let client = RegistryClient::new(ClientOptions::default()).expect("a client");
        let reference: Reference = image.parse().expect("a reference");
        let resolved = client.resolve(&reference, &Platform::host()).await.expect("the image");
        let index =
            |i: usize| builder.root().join("layers").join(resolved.layers[i].diff_id.hex()).join("index");
        let liar = lie(&LayerIndex::open(&index(2)).expect("the top layer's index"));
        let mut indexes: Vec<_> =
            (0..2).map(|i| (resolved.layers[i].clone(), IndexSource::File(index(i)))).collect();
        indexes.push((resolved.layers[2].clone(), liar.into()));
        push_indexes(&client, &resolved, &indexes, &PushOptions::default()).await.expect("push").artifact
    });

    let node = Lazyrun::new();
    node.ok(&["run", "-d", "--name", "victim", &image, "sleep", "1000"]);
    // Hydration finds the lie out: the layer is never served again, and the next start streams the blob instead.
    let mode =
        |lazyrun: &Lazyrun| lazyrun.run(&["run", "--rm", &image, "stat", "-c", "%a", "/usr/local/bin/hello"]);
    let told = wait_for("a start that knows of the lie", Duration::from_secs(120), || {
        let finished = mode(&node);
        finished.stderr.contains("lie").then_some(finished)
    });
    assert_eq!(told.code, Some(0), "{told:?}");
    assert_eq!(told.stdout.trim(), "755");
    for word in ["usr/local/bin/hello", "4755", "lazyrun index"] {
        assert!(told.stderr.contains(word), "{word}: {}", told.stderr);
    }
    let origins = of_layers(&inspect(&node, &image), "Origin");
    assert_eq!(origins[2], json!("built"));
    let again = node.run(&["index", "pull", &image]);
    assert!(
        of_layers(&inspect(&node, &image), "Artifact")
            .iter()
            .skip(2)
            .all(|a| a != &json!(artifact.to_string()))
    );
    assert_eq!(again.code, Some(0), "{again:?}");
    node.ok(&["rm", "-f", "victim"]);
}

/// An image of one committed eStargz or zstd:chunked layer, as its tool annotated it, in an OCI layout.
fn table_image(dir: &Path, layer: &Value) {
    let layout = Layout::create(dir).expect("a layout");
    let file = layer["file"].as_str().expect("a file");
    let bytes = fs::read(tables().join(file)).expect("a layer with a table");
    let (digest, size) = layout.blob(&bytes).expect("store the layer");
    let config = json!({
        "architecture": lazyrun::demo::layout::architecture(), "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [layer["diff_id"]] },
    });
    let (config, config_size) = layout.blob(config.to_string().as_bytes()).expect("store the config");
    let kind = if file.ends_with("gz") { "gzip" } else { "zstd" };
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size,
        },
        "layers": [{
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar+{kind}"), "digest": digest, "size": size,
            "annotations": layer["annotations"],
        }],
    });
    let tagged = |manifest: &Value, tag: &str| {
        let (manifest, size) = layout.blob(manifest.to_string().as_bytes()).expect("store a manifest");
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": size,
            "annotations": { "org.opencontainers.image.ref.name": tag },
        })
    };
    let mut manifests = vec![tagged(&manifest, TAG)];
    // A table that lies elsewhere is a layer of an image beside this one.
    if let Some(table) = layer["table"].as_str() {
        let bytes = fs::read(tables().join(table)).expect("a table");
        let (table, size) = layout.blob(&bytes).expect("store the table");
        let mut beside = manifest.clone();
        beside["layers"] = json!([{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": table, "size": size,
            "annotations": { "containerd.io/snapshot/stargz/layer.digest": digest },
        }]);
        manifests.push(tagged(&beside, &format!("{TAG}-esgztoc")));
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(dir.join("index.json"), index.to_string()).expect("write the layout's index");
}

fn tables() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("index/tests/data/tables")
}

/// The tree by the layer's own table, before and after it is proven, against the tree by a stream of the tar.
fn tables_show_what_the_tar_holds(plan: &str) {
    let layers = fs::read_to_string(tables().join("tables.json")).expect("tables.json");
    let layers: Vec<Value> = serde_json::from_str(&layers).expect("tables.json");
    assert!(layers.len() >= 5);
    for layer in &layers {
        let file = layer["file"].as_str().expect("a file");
        let dir = tempfile::tempdir().expect("a directory");
        table_image(dir.path(), layer);
        let registry = Registry::serve(dir.path(), Shape::default()).expect("serve the image");
        let image = registry.reference("tables", TAG);
        let mounted = |lazyrun: &Lazyrun, name: &str| {
            let at = lazyrun.scratch(name);
            let at_text = at.to_str().expect("a path");
            lazyrun.ok(&["mount", "--union", plan, &image, at_text]);
            let tree = scan(&at);
            lazyrun.ok(&["umount", at_text]);
            tree
        };
        let by_tar = mounted(&Lazyrun::new().with_options(&["--index-trust", "proven"]), "tar");
        let node = Lazyrun::new();
        // Takes the table over and leaves the blob alone; a mount hydrates, and so small a layer at once.
        node.ok(&["index", "pull", &image]);
        let origin = of_layers(&inspect(&node, &image), "Origin");
        assert!(
            origin[0] == json!("eStargz table") || origin[0] == json!("zstd:chunked manifest"),
            "{origin:?}"
        );
        let by_table = mounted(&node, "table");
        let mut found = differences(&by_tar, &by_table);
        // docs/SEMANTICS.md: the table's own files are not in it, and eStargz has whole seconds.
        found.retain(|difference| {
            !difference.contains("stargz.index.json") && !difference.contains(".landmark")
        });
        if file.starts_with("estargz") {
            // Of whole seconds nothing is lost.
            found.retain(|d| !d.contains("mtime expected") || d.contains(".000000000\" got"));
        }
        assert!(found.is_empty(), "{file}:\n{}", found.join("\n"));
        // Once it is proven the tar itself is here.
        node.ok(&["pull", "--quiet", &image]);
        proven(&node, &image);
        drop(registry);
        let found = differences(&by_tar, &mounted(&node, "proven"));
        assert!(found.is_empty(), "{file}, proven:\n{}", found.join("\n"));
    }
}

#[test]
fn layers_with_tables_by_plan_erofs() {
    tables_show_what_the_tar_holds("erofs");
}

#[test]
fn layers_with_tables_by_plan_overlay() {
    tables_show_what_the_tar_holds("overlay");
}
