//! The odd and hostile layers of `tests/oddlayers`.

use std::io::Cursor;
use std::path::PathBuf;

use lazyrun_index::{LayerIndex, LayerSink, SpanInfo, StreamOptions, index_layer};
use serde_json::Value;

use super::layer::Files;
use super::tree::{Tree, of_jsonl};

/// One image of the collection.
pub struct Case {
    pub tag: String,
    pub expect: String,
    pub big: bool,
    /// Compressed layers, bottom first, and what the config says of their diffIDs.
    pub layers: Vec<(Vec<u8>, String)>,
    pub expected: Option<Tree>,
}

fn home() -> PathBuf {
    std::env::var_os("LAZYRUN_ODDLAYERS").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oddlayers")),
        PathBuf::from,
    )
}

fn blob(digest: &str) -> Vec<u8> {
    let path = home().join("layout/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("JSON")
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let all = json(&std::fs::read(home().join("cases.json")).expect("tests/oddlayers/cases.json"));
    let all = all.as_object().expect("an object of cases");
    all.iter()
        .map(|(tag, case)| {
            let manifest = json(&blob(case["digest"].as_str().expect("digest")));
            let config = json(&blob(manifest["config"]["digest"].as_str().expect("config")));
            let diff_ids = config["rootfs"]["diff_ids"].as_array().expect("diff_ids");
            let layers = manifest["layers"].as_array().expect("layers");
            let layers = layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
                (
                    blob(layer["digest"].as_str().expect("digest")),
                    diff_id.as_str().expect("diff_id").to_owned(),
                )
            });
            let expected = std::fs::read_to_string(home().join(format!("expected/{tag}.jsonl"))).ok();
            Case {
                tag: tag.clone(),
                expect: case["expect"].as_str().expect("expect").to_owned(),
                big: case["big"].as_bool().unwrap_or(false),
                layers: layers.collect(),
                expected: expected.as_deref().map(of_jsonl),
            }
        })
        .collect()
}

/// A case's layers as the rest of the tests use them.
pub struct Indexed {
    pub indexes: Vec<LayerIndex>,
    pub files: Files,
}

struct Collect(Vec<u8>);

impl LayerSink for Collect {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        assert_eq!(offset, self.0.len() as u64, "layer bytes come in order");
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn span(&mut self, _: &SpanInfo) -> std::io::Result<()> {
        Ok(())
    }
}

/// Indexes all layers, refusing those whose diffID the config denies.
pub fn index(case: &Case) -> Result<Indexed, String> {
    let mut out = Indexed { indexes: Vec::new(), files: Files(Vec::new()) };
    for (blob, diff_id) in &case.layers {
        let (index, file) = index_blob(blob)?;
        if index.diff_id().to_string() != *diff_id {
            return Err(format!("diffID is {}, not {diff_id}", index.diff_id()));
        }
        out.indexes.push(index);
        out.files.0.push(file);
    }
    Ok(out)
}

/// Indexes one layer in memory; also gives its layer file.
pub fn index_blob(blob: &[u8]) -> Result<(LayerIndex, Vec<u8>), String> {
    let mut file = Collect(Vec::new());
    let mut bytes = Cursor::new(Vec::new());
    index_layer(blob, &mut file, &mut bytes, &StreamOptions::default()).map_err(|e| format!("index: {e}"))?;
    let index = LayerIndex::from_bytes(bytes.into_inner()).map_err(|e| format!("own index: {e}"))?;
    Ok((index, file.0))
}
